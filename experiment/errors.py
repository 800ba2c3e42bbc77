"""The error of everything around a run that a user can mend, and the exit code that an error ends a command with."""

import errno

MENDABLE_CODE, OTHER_CODE = 2, 1
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG}


class ExperimentError(Exception):
    """One line: what is wrong, where, and what to do.

    Attributes:
        code: exit code of a command that it ends.
    """

    code = MENDABLE_CODE


class InUseError(ExperimentError):
    """Another process is at work in the run's folder."""


def exit_code(error: BaseException, mendable: tuple[type[Exception], ...]) -> int:
    """The exit code of a command that an error ends.

    Args:
        error: any but one that stands for a signal, unless it has a code of its own.
        mendable: errors whose message says all that a user needs.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else OTHER_CODE
    if isinstance(error, mendable):
        return int(getattr(error, "code", MENDABLE_CODE))
    return MENDABLE_CODE if isinstance(error, OSError) and error.errno in DISK else OTHER_CODE
