"""The help that is read from the sources tells of every option that the parser takes, with its default."""

import ast
import re

import pytest
import yaml

from classification import help
from classification.cli import main
from classification.data.registry import source
from classification.options import prepared_names

NEEDED = ("--model.backbone", "mcunet", "--data.dataset", "digits")


def taken(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, *NEEDED, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("part", ["model", "data", "trainer"])
def test_every_option_is_told_with_its_default(part, capsys):
    settings = taken("fit", capsys)[part]
    options = {option.name: option for option in help.options_of(part)}
    assert options.keys() == settings.keys()
    compared = 0
    for name, value in settings.items():
        default = options[name].default
        if default is None:
            assert f"--{part}.{name}" in NEEDED
        elif re.fullmatch(r"[\w.'\"()\[\], +-]*", default) and not re.match(r"[A-Z_]+$", default):
            wanted = ast.literal_eval(default)
            assert (list(wanted) if isinstance(wanted, tuple) else wanted) == value, name
            compared += 1
    assert compared > len(settings) / 2
    assert all(option.text for option in options.values())


@pytest.mark.parametrize("command", help.SINGLE)
def test_every_option_of_a_run_is_told(command, capsys):
    text = help.text_of([command, "--help"])
    settings = taken(command, capsys)
    for name, value in settings.items():
        names = [f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name]
        for one in names:
            assert re.search(rf"^  --{re.escape(one).replace('_', '[_-]')}\b", text, re.MULTILINE), one


def test_the_data_sets_to_prepare_are_those_that_are_registered():
    assert prepared_names() == [name for name in source.names() if name in source.entries]
