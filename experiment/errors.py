"""The error of everything around a run that a user can mend."""


class ExperimentError(Exception):
    """One line: what is wrong, where, and what to do."""
