"""One exception type per kind of mistake, all from one base class."""


class LowRankError(Exception):
    """Base class of every error that this package raises on purpose."""


class SettingError(LowRankError, ValueError):
    """A method, an energy, a rank or a patch size outside of what is allowed."""


class ConversionError(LowRankError, ValueError):
    """A layer that cannot be converted; the model is unchanged when this is raised."""


class NonFiniteError(LowRankError, ArithmeticError):
    """NaN or infinite values where a decomposition or a measurement needs finite ones."""


class TableError(LowRankError, ValueError):
    """A perplexity table that is damaged, foreign, or does not fit the model."""


class BudgetError(LowRankError, ValueError):
    """A memory budget that no choice of ranks can meet."""


class StateError(LowRankError, ValueError):
    """A training state that is damaged or of another model."""


class ChangedError(LowRankError, RuntimeError):
    """A tensor that was changed in place while something still had to be computed from it."""


class DoubleBackwardError(LowRankError, RuntimeError):
    """A gradient that would have to be differentiated again, of a layer that keeps too little for that."""
