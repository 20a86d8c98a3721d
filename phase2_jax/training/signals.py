"""Ctrl-C and SIGTERM stop a run between two steps, where its state is whole."""

import signal
import threading
from types import FrameType


class Interrupted(Exception):
    """A signal asked the run to stop.

    Attributes:
      signum: which one; programs exit with 128 + signum.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopRequest:
    """Context in which the first SIGINT or SIGTERM is remembered for `check`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self._signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python allows handlers in the main thread only; elsewhere the owner of the thread decides when to stop.
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._signum = signum

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self._signum is not None:
            raise Interrupted(self._signum)
