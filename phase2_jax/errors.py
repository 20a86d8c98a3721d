"""The one exception that means "the user can fix this", and the exit statuses of the programs."""

import errno
import os

USAGE_STATUS = 2
INTERRUPTED_STATUS = 130
# What a file system answers to a write that it has no room for, or does not take.
_REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


class UserError(Exception):
    """A mistake in what the user asked for.

    The message is a single line that names the offending value and the remedy. Programs print it without a traceback
    and exit with status 2; library callers may catch it like any other exception.
    """


def refused_write(error: BaseException) -> str | None:
    """The system's reason where an exception says that a write was refused, else None.

    Tensorstore, which writes the arrays of checkpoints, has exceptions of other types with the reason in their text.
    """
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _REFUSED_WRITES else None
    return next((os.strerror(number) for number in _REFUSED_WRITES[:2] if os.strerror(number) in str(error)), None)
