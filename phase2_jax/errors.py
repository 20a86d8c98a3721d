"""The one exception that means "the user can fix this", and the exit statuses of the programs."""

USAGE_STATUS = 2
INTERRUPTED_STATUS = 130


class UserError(Exception):
    """A mistake in what the user asked for.

    The message is a single line that names the offending value and the remedy. Programs print it without a traceback
    and exit with status 2; library callers may catch it like any other exception.
    """
