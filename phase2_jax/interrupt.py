"""Ctrl-C at any moment of a program's life."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from phase2_jax.errors import INTERRUPTED_STATUS


@contextmanager
def interruptible() -> Iterator[None]:
    """Context of a whole program, its imports included, that Ctrl-C ends with one line and status 130.

    Where Ctrl-C ended a compilation, jax (0.10.2) crashes while Python takes its modules down: the process leaves
    without that, everything written.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
    except SystemExit as end:
        if end.code != INTERRUPTED_STATUS:
            raise
    else:
        return
    # Whoever reads it may have been interrupted, too.
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED_STATUS)
