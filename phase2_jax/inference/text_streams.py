"""From tokens to text as they come, in constant memory: words that are not complete yet wait, and so may a stop."""

from collections.abc import Sequence

from phase2_jax.data.tokenizers import Tokenizer

# Bytes of one character at most, and then some: what is still broken after so many tokens will stay so.
LONGEST_WAIT = 8
_BROKEN = "\ufffd"


class TextStream:
    """The text of a stream of tokens; joined, the pieces are the text of all tokens decoded at once.

    Tokens of a character that is cut in the middle wait for the rest of it. The few tokens before those of a piece are
    decoded with it, because the space between two words belongs to neither.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        """Args: context: last tokens of the text that this stream continues."""
        self._tokenizer = tokenizer
        self._context = list(context)[-LONGEST_WAIT:]
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes, possibly empty."""
        self._waiting.append(token)
        text = self._new_text()
        if text.endswith(_BROKEN) and len(self._waiting) < LONGEST_WAIT:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """The text of what still waits, broken or not."""
        return self._emit(self._new_text())

    @property
    def context(self) -> tuple[int, ...]:
        """What a stream that continues this one needs."""
        return tuple([*self._context, *self._waiting][-LONGEST_WAIT:])

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context) if self._context else ""
        return self._tokenizer.decode([*self._context, *self._waiting])[len(before) :]

    def _emit(self, text: str) -> str:
        if text or len(self._waiting) >= LONGEST_WAIT:
            self._context, self._waiting = self._waiting or self._context, []
        return text


class StopStrings:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certain to belong to the output, and whether a stop string is complete."""
        self._held += text
        found = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False

    def flush(self) -> str:
        """What was held back and came to nothing."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that is a proper beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
