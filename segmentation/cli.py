"""The command line: `python -m segmentation prepare | measure | train | picture | sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.config import Config, DictAction

from experiment import ExperimentError
from experiment.command import Work, dashed, finish, folder_word, importing
from experiment.limit import check_limit
from experiment.method import require_own_ranks, require_use
from experiment.moved import place_now
from experiment.process_group import run_all
from experiment.processes import alone, place
from experiment.sweep import SEED
from segmentation import register, sweep
from segmentation.compose import HOOK, choose_depth, load_config, move_data, rescale
from segmentation.config_names import check_options
from segmentation.data.prepare import DATASETS, prepare
from segmentation.parts import check_parts
from segmentation.settings import check_settings

if TYPE_CHECKING:
    from segmentation.training import Task

LENGTHS = ("train_cfg.max_iters", "train_cfg.max_epochs")
HELP = ("--help", "-h")
PICTURE = "Draw the first validation images: input, truth, and the prediction of each run's last weights."
PREPARE = "Write a data set in the layout that is read, from its archives as published, or digit scenes from nothing."


class _Options(DictAction):
    """MMEngine's options, where one that is no KEY=VALUE is an error of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except ValueError:
            wrong = next((value for value in values if "=" not in value), " ".join(values))
            parser.error(f"{option_string} has {wrong!r}; allowed is KEY=VALUE, several times")


def parser() -> argparse.ArgumentParser:
    """The command line of `train` and `measure`."""
    command = argparse.ArgumentParser(
        prog="python -m segmentation",
        description="Train a segmentor of MMSegmentation in little memory, or measure the perplexity of its layers. "
        "Several configs are merged in their order: a network, a data set, a stage and a method of "
        "configs/segmentation; or one config of your own. A config is a program that is run as you: take none from "
        "people you do not trust. Checkpoints and weights are only read.",
    )
    commands = command.add_subparsers(dest="command", required=True)
    for name, text in (("train", "train and write result.json"), ("measure", "write the perplexity table")):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("configs", nargs="+", metavar="CONFIG", help="configs, merged in their order")
        sub.add_argument("--layers", type=_layers, help="depth: 5, 10 or all, for the suite's own configs")
        sub.add_argument("--seed", type=int, help="seed of the run (default: the config's)")
        sub.add_argument("--runs-dir", type=folder_word, default=Path("runs"), help="folder that holds all runs")
        sub.add_argument("--work-dir", type=folder_word, help="the run's own folder (default: one below --runs-dir)")
        sub.add_argument("--data-dir", type=folder_word, help="folder that holds the data sets (default: the config's)")
        sub.add_argument("--load-from", metavar="FILE", help="weights to start from: a file or an address")
        sub.add_argument("--iterations", type=int, help="length of the run; schedule and validations in proportion")
        sub.add_argument("--resume", action="store_true", help="as without it: an interrupted run goes on by itself")
        sub.add_argument("--limit", type=float, metavar="N", help="train on so many images, or up to 1 on that share")
        sub.add_argument("--batches", type=int, metavar="N", help="measure: take the mean over N batches (default: 1)")
        derive = "measure: what methods with derive need as well; N: those that allow so many products"
        sub.add_argument("--derive", type=_derive, nargs="?", const=True, default=False, metavar="N", help=derive)
        sub.add_argument("--amp", action="store_true", help="mixed precision, on an accelerator")
        sub.add_argument("--budget-table", metavar="FILE", help="perplexity table that ranks are chosen by")
        sub.add_argument("--budget-mib", type=float, metavar="MIB", help="memory that they are chosen for")
        sub.add_argument("--budget-run", metavar="DIR", help="finished run whose formula memory is the budget")
        sub.add_argument("--budget-divisor", type=int, metavar="N", help="the budget is one N-th of that memory")
        sub.add_argument("--budget-name", metavar="NAME", help="what the run's name says of the budget")
        sub.add_argument("--cfg-options", nargs="+", action=_Options, metavar="KEY=VALUE", help="override the config")
        several = "train in so many processes of this machine (default: the config's, or 1)"
        sub.add_argument("--processes", type=int, metavar="N", help=several)
        started = "what has started several processes, where --processes is not to"
        sub.add_argument("--launcher", help=started, choices=("none", "pytorch", "slurm", "mpi"), default="none")
        sub.add_argument("--local-rank", type=int, default=0, help=argparse.SUPPRESS)
        sub.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    drawn = commands.add_parser(
        "picture", help="draw input, truth and predictions", description=PICTURE, allow_abbrev=False
    )
    drawn.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs of one data set")
    drawn.add_argument("--output", type=Path, required=True, metavar="FILE", help="the PNG to write")
    drawn.add_argument("--count", type=int, default=4, help="number of validation images (default: %(default)s)")
    prepared = commands.add_parser(
        "prepare", help="write a data set in the layout that is read", description=PREPARE, allow_abbrev=False
    )
    prepared.add_argument("dataset", choices=DATASETS)
    prepared.add_argument("--data-dir", type=folder_word, default=Path("data"), help="folder that holds the data sets")
    prepared.add_argument(
        "--archives", type=folder_word, help="folder with the archives as published (default: --data-dir)"
    )
    commands.add_parser("sweep", add_help=False, help="many runs by one command; see sweep --help")
    return command


def _derive(word: str) -> bool | int:
    """What `--derive` says: true, or a number of products."""
    try:
        return True if word == "true" else int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r}; allowed: true, or a number of products such as 20000") from None


def _layers(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor 'all'")
    return int(text)


def task_of(options: argparse.Namespace) -> Task:
    """The run that the arguments describe; errors as of `config_of`."""
    from segmentation.training import Task  # which takes seconds to import

    config = config_of(options)
    _find_moved(config, options.runs_dir)
    return Task(config, options.runs_dir, options.work_dir, options.dry_run)


def _find_moved(config: Config, runs_dir: Path) -> None:
    """Set what names other runs to where these are now, in place; see `experiment.moved`."""
    budgets = [hook.budget for hook in config.get("custom_hooks", []) if hook["type"] == HOOK and hook.get("budget")]
    for settings, name in ((config, "load_from"), *((one, name) for one in budgets for name in ("table", "run"))):
        if isinstance(given := settings.get(name), str):
            settings[name] = place_now(given, runs_dir)


def config_of(options: argparse.Namespace) -> Config:
    """The config that the arguments describe, of `train` or `measure`, once its settings are checked.

    Raises:
        ExperimentError: an option, a config or a setting that cannot work.
    """
    config = load_config(options.configs)
    check_options(options.cfg_options, config)
    config.merge_from_dict(dict(options.cfg_options or {}))
    check_settings(config.to_dict())
    check_parts(config.to_dict(), options.command)
    if "depths" in config:
        _refuse_of_depth(options.cfg_options or {})
    _set(config, options)
    # Once more, over what the other arguments set.
    config.merge_from_dict(
        {key: value for key, value in (options.cfg_options or {}).items() if key.split(".")[0] in config}
    )
    check_settings(config.to_dict())
    if options.command == "measure":  # the network as it is, with the table that a budget is to come of
        for hook in config.get("custom_hooks", []):
            hook.pop("budget", None)
    else:
        for hook in config.get("custom_hooks", []):
            if hook["type"] == HOOK and not hook.get("budget"):
                require_own_ranks(hook["method"])
            elif hook["type"] == HOOK:
                require_use(hook["method"], "a budget")
    config.launcher = options.launcher
    started = options.launcher != "none"
    config.processes = place().count if started else options.processes or config.get("processes", 1)
    return config


def _set(config: Config, options: argparse.Namespace) -> None:
    """Set what options of the command line say, in place."""
    choose_depth(config, options.layers)
    if options.iterations is not None:
        _require_one_length(options)
        rescale(config, options.iterations)
    if options.data_dir is not None:
        move_data(config, options.data_dir)
    if options.limit is not None:
        _limit(config, options.limit)
    if options.batches is not None:
        config.perplexity = {**config.get("perplexity", {}), "batches": options.batches}
    if options.derive is not False:
        config.perplexity = {**config.get("perplexity", {}), "derive": options.derive}
    if options.load_from is not None:
        config.load_from = options.load_from
    seed = options.seed if options.seed is not None else config.get("randomness", {}).get("seed", SEED)
    config.randomness = {**config.get("randomness", {}), "seed": seed}
    if options.amp:
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    _set_budget(config, options)


def _refuse_of_depth(given: Mapping[str, Any]) -> None:
    """Refuse to override what follows from `--layers` and the method: a run would be another one than its name says."""
    for key in given:
        if key.partition(".")[0] in ("layers", "custom_hooks"):
            raise ExperimentError(
                f"--cfg-options sets {key}, which in the suite's own configs follows from --layers and the method; "
                "give --layers and a config of a method, and further hooks as custom_hooks of a config behind these"
            )


def _require_one_length(options: argparse.Namespace) -> None:
    """Refuse `--iterations` beside an option that sets the length as well, to which no schedule would be fitted."""
    for key in LENGTHS:
        if key in (options.cfg_options or {}):
            raise ExperimentError(
                f"--iterations and --cfg-options {key} both set the length of the run; give one of them"
            )


def _limit(config: Config, limit: float) -> None:
    """Train on a part of the data set, which the validation images do not belong to."""
    check_limit(limit, "--limit")
    from segmentation.data.draws import PlacedDataset

    if config.train_dataloader.dataset.type != PlacedDataset.__name__:
        raise ExperimentError(f"--limit is for a train_dataloader with a data set of type {PlacedDataset.__name__}")
    config.train_dataloader.dataset.limit = limit


def _set_budget(config: Config, options: argparse.Namespace) -> None:
    names = ("table", "mib", "run", "divisor", "name")
    given = {name: getattr(options, f"budget_{name}") for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return
    if options.command == "measure":
        raise ExperimentError("a budget is for train, which chooses ranks for it by the table of measure; leave it out")
    if set(given) - {"name"} not in ({"table", "mib"}, {"table", "run"}, {"table", "run", "divisor"}):
        raise ExperimentError(
            "a budget is --budget-table with either --budget-mib or --budget-run; --budget-divisor goes with the latter"
        )
    from experiment.ranks import Budget

    Budget(**given)
    hooks = [hook for hook in config.get("custom_hooks", []) if hook["type"] == HOOK]
    if not hooks:
        raise ExperimentError(f"a budget is for the method of a {HOOK}, and custom_hooks has none; leave it out")
    for hook in hooks:
        hook["budget"] = given


def run(arguments: Sequence[str], work: Work | None = None) -> None:
    """Run one command but `sweep`; what trains is imported when there is something to do, as that takes seconds.

    Args:
        arguments: of the command.
        work: where the run that it is about is noted, and its folder.

    Raises:
        ExperimentError, LowRankError: something that the user can mend.
    """
    options = parser().parse_args(dashed(arguments))
    if options.command == "prepare":
        prepare(options.dataset, options.data_dir, options.archives or options.data_dir)
        return
    with importing():
        register()
    if options.command == "picture":
        from segmentation.pictures import picture

        picture(options.runs, options.output, options.count)
        return
    with importing():
        from segmentation.building import mendable_parts
        from segmentation.start import join_others
        from segmentation.training import is_due, measure, train

    with alone(), mendable_parts():
        join_others(options)
        task = task_of(options)
        if options.command == "measure":
            measure(task, work)
        elif task.config.processes == place().count:
            train(task, work)
        elif is_due(task, work):
            run_all("segmentation", arguments, task.config.processes)


def main(arguments: Sequence[str]) -> int:
    """Run one command. Returns its exit code; see `experiment.command.finish`."""
    if any(word in HELP for word in arguments):  # ends here, before what takes seconds to import
        sweep.parse(arguments[1:]) if arguments[0] == "sweep" else parser().parse_args(arguments)
    return finish(lambda work: _command(arguments, work))


def _command(arguments: Sequence[str], work: Work) -> int:
    work.title = arguments[0] if arguments else ""
    if work.title == "sweep":
        return sweep.main(arguments[1:], run)
    run(arguments, work)
    return 0
