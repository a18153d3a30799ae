"""Streaming: turns a growing list of ids into text that later ids cannot change.

One character may take several ids, and so may a stop string. Read next: conversation.py.
"""

from collections.abc import Callable, Iterable, Sequence

# The most bytes of an incomplete UTF-8 character, since a complete one has at most four.
PARTIAL = 3


class TextStream:
    """Decodes ids one at a time; the text ends before the first stop string.

    `stopped` becomes True with the id that completes a stop string.
    """

    def __init__(self, decode: Callable[[Iterable[int]], str], stop: Sequence[str] = ()):
        """decode: maps all ids so far to text. stop: strings that end the text."""
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        # Number of characters returned so far.
        self._sent = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Add an id and return the text that no later id can change; "" once stopped."""
        self._ids.append(token)
        return "" if self.stopped else self._unsent(self._stable(self._decode(self._ids)))

    def finish(self) -> str:
        """Return the text held back, once there are no more ids."""
        return "" if self.stopped else self._unsent(self._decode(self._ids))

    def _unsent(self, text: str) -> str:
        new = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return new

    def _stable(self, text: str) -> str:
        """The text up to an incomplete character, or up to what may become a stop string."""
        before_stop = truncate_at_stop(text, self._stop)
        if before_stop != text:
            self.stopped = True
            return before_stop
        for _ in range(PARTIAL):
            text = text.removesuffix("\ufffd")
        begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]


def truncate_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    found = (at for at in map(text.find, stop) if at >= 0)
    return text[: min(found, default=len(text))]
