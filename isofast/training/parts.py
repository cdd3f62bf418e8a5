"""Named parts of a training step, timed and traced on request, with no overhead otherwise."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

_spans: dict[str, list[tuple[Any, Any]]] | None = None


@contextmanager
def part(name: str) -> Iterator[None]:
    """Name the enclosed part of a step for ``timed_parts``."""
    if _spans is None:
        yield
        return
    with record_function(name):
        start = _now()
        yield
        _spans[name].append((start, _now()))


@contextmanager
def timed_parts() -> Iterator[dict[str, list[float]]]:
    """Time every part of the enclosed steps.

    Yields:
        Each part's milliseconds by name, one number per step, filled in on exit: GPU time if there
        is a GPU, wall-clock time otherwise.
    """
    global _spans
    spans = _spans = defaultdict(list)
    times: dict[str, list[float]] = {}
    try:
        yield times
    finally:
        _spans = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for name, pairs in spans.items():
            times[name] = [_milliseconds(*pair) for pair in pairs]


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _milliseconds(start: Any, end: Any) -> float:
    return float(1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end))
