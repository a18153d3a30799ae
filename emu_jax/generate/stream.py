"""Text that grows: what can be shown of ids so far, when a character is several bytes and an end is
a text of several tokens.
"""

from collections.abc import Callable, Iterable, Sequence

# bytes of a character that may still lack the last one
PARTIAL = 3


class TextStream:
    """Ids go in, text comes out that no later id takes back; it ends before the first of the `stop`
    texts.
    """

    def __init__(self, decode: Callable[[Iterable[int]], str], stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        # characters given out
        self._sent = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that one more id makes certain; "" once a stop text has come."""
        self._ids.append(token)
        return "" if self.stopped else self._new(self._certain(self._decode(self._ids)))

    def finish(self) -> str:
        """What was held back, when no more ids come."""
        return "" if self.stopped else self._new(self._decode(self._ids))

    def _new(self, text: str) -> str:
        new = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return new

    def _certain(self, text: str) -> str:
        ended = truncate_at_stop(text, self._stop)
        if ended != text:
            self.stopped = True
            return ended
        for _ in range(PARTIAL):
            text = text.removesuffix("\ufffd")
        begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]


def truncate_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]
