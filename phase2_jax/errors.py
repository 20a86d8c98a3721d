"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in what the user asked for.

    The message is a single line that names the offending value and the remedy. Programs print it without a traceback
    and exit with status 2; library callers may catch it like any other exception.
    """
