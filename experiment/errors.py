"""The error of everything around a run that a user can mend, and the exit code that an error ends a command with."""

import errno
import sys
from argparse import ArgumentError

MENDABLE_CODE, OTHER_CODE = 2, 1
# Errors of others whose message says all that a user needs; looked for where they are imported already.
_OTHERS = {"lowrank": "LowRankError", "pytorch_lightning.utilities.exceptions": "MisconfigurationException"}
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG}
DISK |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP}


class ExperimentError(Exception):
    """One line: what is wrong, where, and what to do.

    Attributes:
        code: exit code of a command that it ends.
    """

    code = MENDABLE_CODE


class InUseError(ExperimentError):
    """Another process is at work in the run's folder."""


def is_mendable(error: BaseException) -> bool:
    """Whether the message of an error says all that a user needs."""
    others = (getattr(sys.modules.get(module), name, None) for module, name in _OTHERS.items())
    return isinstance(error, (ExperimentError, ArgumentError, *filter(None, others)))


def exit_code(error: BaseException) -> int:
    """The exit code of a command that an error ends: any but one of a signal, unless that has a code of its own."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else OTHER_CODE
    if is_mendable(error):
        return int(getattr(error, "code", MENDABLE_CODE))
    return MENDABLE_CODE if isinstance(error, OSError) and error.errno in DISK else OTHER_CODE
