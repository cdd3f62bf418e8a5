"""A progress bar on a terminal, an occasional line in a log file."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

_LINE_EVERY_S = 15.0
# what fits 80 columns; tqdm's own leaves no room for the values
_BAR = "{percentage:3.0f}% {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"


class Progress:
    """Shows steps, speed, time left and a few values; silent on all ranks but the first.

    Args:
        total: steps of the whole run.
        start: steps taken before.
        speak: whether this process prints.
    """

    def __init__(self, total: int, start: int, speak: bool) -> None:
        terminal = sys.stderr.isatty()
        self._total, self._start = total, start
        self._lines = speak and not terminal
        self._speak = speak
        self._began = self._last_line = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            bar_format=_BAR,
            disable=not (speak and terminal),
        )

    def advance(self, done: int, values: Mapping[str, str] | None = None) -> None:
        """One more step is done; ``values`` are new ones to show, by name."""
        self._bar.update(1)
        if values is None:
            return
        shown = "  ".join(f"{name} {value}" for name, value in values.items())
        self._bar.set_postfix_str(shown)
        now = time.monotonic()
        if self._lines and (now - self._last_line > _LINE_EVERY_S or done == self._total):
            self._last_line = now
            left = (now - self._began) / max(done - self._start, 1) * (self._total - done)
            self.say(f"step {done}/{self._total}  {shown}  left {duration(left)}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._speak:
            tqdm.write(text, file=sys.stderr)

    def note(self, text: str) -> None:
        """A line in a log file only: on a terminal a bar of its own says it."""
        if self._lines:
            self.say(text)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def duration(seconds: float) -> str:
    """3725 -> "1:02:05", 65 -> "1:05"."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
