"""The columns of the page's tables, and the axes of its plots."""

# The page is for people and uses the signs that people write.
# ruff: noqa: RUF001

from __future__ import annotations

from dataclasses import dataclass

AXES = {  # horizontal axes of the Pareto plots: column, words, how its numbers are written
    "saved_measured_bytes": ("Kept memory, measured (MiB)", "mib"),
    "activation_formula_bytes": ("Activation memory by formula (MiB)", "mib"),
    "peak_measured_bytes": ("Peak memory, measured (MiB)", "mib"),
    "flops_corrected": ("FLOPs of a training step", "count"),
    "step_median_s": ("Time of a training step (ms)", "ms"),
}


@dataclass(frozen=True)
class Shown:
    """A column of the page's tables.

    Attributes:
        key: of the number or text in a row.
        title: heading; "{}" stands for the name of the task's accuracy.
        form: how it is written: text, share, points, mib, times, count, ms or runs.
        note: what it is.
        modes: comparisons in which it is shown unless asked otherwise, of "depth", "memory" and "accuracy".
    """

    key: str
    title: str
    form: str
    note: str
    modes: tuple[str, ...] = ()


ALWAYS = ("depth", "memory", "accuracy")
COLUMNS = (
    Shown("method", "Method", "text", "How the layers' inputs are kept, with its setting or budget.", ALWAYS),
    Shown("model", "Model", "text", "The network.", ALWAYS),
    Shown("dataset", "Data set", "text", "What it is trained on.", ALWAYS),
    Shown("layers", "Layers", "layers", "How many trailing layers are trained with the method.", ALWAYS),
    Shown("recipe", "Recipe", "text", "What differs in how the runs were trained."),
    Shown("n", "Runs", "runs", "Finished runs (seeds), of how many that were planned.", ALWAYS),
    Shown("main", "{} (%)", "share", "Mean ± sample standard deviation over the seeds.", ALWAYS),
    Shown("difference", "Δ {}", "points", "Points more than the baseline's at the same number of layers.", ("depth",)),
    Shown(
        *("equal_saved_difference_points", "Δ at equal memory", "points"),
        "Points more than the best that the baseline reaches, at any depth, where it keeps at most as much (measured).",
        ("memory",),
    ),
    Shown(
        *("equal_memory_difference_points", "Δ at equal formula memory", "points"),
        "Points more than the best that the baseline reaches, at any depth, in at most this memory by formula.",
    ),
    Shown("other", "{other} (%)", "share", "The other accuracy of the task."),
    Shown("reported_accuracy_percent", "Reported (%)", "percent", "As published, on a validation split."),
    Shown("reported_difference_points", "Δ reported", "points", "Validation accuracy here less the published one."),
    Shown("saved_measured_bytes", "Kept (MiB)", "mib", "All that autograd keeps for a backward pass.", ALWAYS),
    Shown(
        *("saved_measured_times_less", "Kept, × less", "times"),
        "The baseline's kept memory at the same number of layers, over this one's.",
        ("depth",),
    ),
    Shown(
        *("equal_accuracy_saved_times_less", "Kept at equal accuracy, × less", "times"),
        "The least that the baseline keeps, at any depth, where it is at least as accurate, over what is kept here.",
        ("accuracy",),
    ),
    Shown("activation_formula_bytes", "Formula (MiB)", "mib", "Inputs of the trained layers alone, by formula."),
    Shown("activation_formula_times_less", "Formula, × less", "times", "The baseline's formula memory over this one."),
    Shown(
        *("equal_accuracy_times_less", "Formula at equal accuracy, × less", "times"),
        "The least formula memory at which the baseline is at least as accurate, over this one.",
    ),
    Shown("reported_memory_bytes", "Reported (MiB)", "mib", "Formula memory as published."),
    Shown("peak_measured_bytes", "Peak (MiB)", "mib", "Most tensor bytes alive in a training step, as measured."),
    Shown("weight_training_bytes", "Weights in training (MiB)", "mib", "Weights, their gradients and optimizer state."),
    Shown("flops_corrected", "FLOPs", "count", "Of the trained layers in one training step, corrected count."),
    Shown("flops_corrected_times_less", "FLOPs, × less", "times", "The baseline's at the same depth over this one's."),
    Shown("flops_paper", "FLOPs, papers", "count", "The same in the papers' convention."),
    Shown(
        *("equal_accuracy_flops_times_less", "FLOPs at equal accuracy, × less", "times"),
        "The fewest FLOPs with which the baseline is at least as accurate, over these.",
    ),
    Shown("step_median_s", "Step (ms)", "ms", "Median time of a training step.", ("depth", "accuracy", "memory")),
    Shown("step_median_times_less", "Step, × less", "times", "The baseline's at this depth over this.", ("depth",)),
    Shown(
        *("equal_accuracy_step_times_less", "Step at equal accuracy, × less", "times"),
        "The least time with which the baseline is at least as accurate, over this.",
        ("accuracy",),
    ),
)
