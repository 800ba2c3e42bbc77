"""The error of everything around a run that a user can mend."""


class ExperimentError(Exception):
    """One line: what is wrong, where, and what to do."""


class InUseError(ExperimentError):
    """Another process is at work in the run's folder."""
