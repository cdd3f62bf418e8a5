"""Progress of long jobs."""

import math
import sys
from typing import Any

from tqdm import tqdm

from isofast.errors import tell

_LINE_EVERY_S = 60.0


class Bar(tqdm):  # type: ignore[misc]
    """tqdm's bar on a terminal; in a log file a line a minute, and none for shorter jobs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._lines = not sys.stderr.isatty()
        if self._lines:
            options |= {"mininterval": _LINE_EVERY_S, "delay": _LINE_EVERY_S, "miniters": 1}
            options["bar_format"] = "{desc}: {n_fmt}/{total_fmt}, {elapsed}<{remaining}"
        super().__init__(*args, **options)

    def status_printer(self, file: Any) -> Any:
        if not self._lines:
            return super().status_printer(file)
        return lambda text: tell(f"{text}\n")

    def close(self) -> None:
        if self._lines:
            # no last line
            self.delay = math.inf
        super().close()
