"""A progress bar on a terminal, an occasional line in a log file."""

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress

from tqdm import tqdm

from isofast.errors import tell

# fits 80 columns; tqdm's own format leaves no room for the values
_BAR = "{percentage:3.0f}% {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"


class Progress:
    """Shows the step, the time left and a few values.

    Args:
        total: steps of the whole run.
        start: steps already taken.
        speak: whether this rank prints.
        line_every_s: seconds between lines in a log file.
    """

    def __init__(self, total: int, start: int, speak: bool, line_every_s: float = 10.0) -> None:
        terminal = sys.stderr.isatty()
        self._total, self._start, self._speak = total, start, speak
        self._lines = speak and not terminal
        self._line_every_s = line_every_s
        self._began = self._last_line = time.monotonic()
        disable = not (speak and terminal)
        self._bar = tqdm(
            total=total, initial=start, dynamic_ncols=True, bar_format=_BAR, disable=disable
        )

    def advance(self, done: int, values: Mapping[str, str] | None = None) -> None:
        """Count step number ``done``, and show ``values`` if given."""
        self._bar.update(1)
        if values is None:
            return
        shown = "  ".join(f"{name} {value}" for name, value in values.items())
        self._bar.set_postfix_str(shown)
        now = time.monotonic()
        if self._lines and (now - self._last_line > self._line_every_s or done == self._total):
            self._last_line = now
            left = (now - self._began) / max(done - self._start, 1) * (self._total - done)
            self.say(f"step {done}/{self._total}  {shown}  left {tqdm.format_interval(left)}")

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show every few seconds how long ``what`` has taken so far."""
        began, done = time.monotonic(), threading.Event()

        def show() -> None:
            while not done.wait(self._line_every_s if self._lines else 1.0):
                text = f"{what}, {tqdm.format_interval(time.monotonic() - began)}"
                self._bar.set_postfix_str(text)
                self.note(text)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._lines:
            tell(f"{text}\n")
        elif self._speak:
            # the terminal may have closed
            with suppress(OSError):
                tqdm.write(text, file=sys.stderr)

    def note(self, text: str) -> None:
        """Print a line in log files only; a terminal has the bar."""
        if self._lines:
            self.say(text)

    def close(self) -> None:
        """Close the bar, leaving it on screen."""
        self._bar.close()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show how long ``what`` takes, outside a run."""
    with closing(Progress(1, 0, speak=True)) as progress:
        with progress.waiting(what):
            yield
        progress.advance(1)
