"""Curves over epochs as inline SVG, in the colours of the page around it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

Array = npt.NDArray[np.float64]

_WIDTH, _HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
_MOST_POINTS, _MOST_DOTTED = 300, 6


class Line(NamedTuple):
    """A curve; values that are not finite are left out."""

    label: str
    epochs_T: Array
    values_T: Array
    color: int = 0
    """One of the page's classes c0, c1 and so on."""
    opacity: float = 1.0


def chart(lines: Sequence[Line], *, log: bool = False, alt: str | None = None) -> Markup:
    """Return an SVG that a screen reader reads as ``alt``, or as each line's range.

    Args:
        lines: at least one.
        log: a logarithmic axis, without values of 0.
        alt: what the picture shows.
    """
    drawn = [_kept(line, log) for line in lines]
    x = np.concatenate([line.epochs_T for line in drawn])
    y = np.concatenate([line.values_T for line in drawn])
    if not len(y):
        return Markup("<p>No finite value was recorded.</p>")
    (x0, x1), (y0, y1) = (0.0, max(float(x.max()), 1e-9)), _range(y)
    parts = []
    for at in _ticks(y0, y1, log):
        place = _HEIGHT - _BOTTOM - (at - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)
        label = f"{10.0**at:.0e}" if log else f"{at:.4g}"
        parts.append(
            f'<path class="grid" d="M{_LEFT} {place:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for at in _ticks(x0, x1, False):
        place = _LEFT + (at - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
        parts.append(
            f'<text x="{place:.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{at:.4g}</text>'
        )
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 3}">epoch</text>')
    for line in drawn:
        across_T = _LEFT + (line.epochs_T - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
        up_T = (line.values_T - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)
        points = [
            f"{a:.1f},{_HEIGHT - _BOTTOM - b:.1f}" for a, b in zip(across_T, up_T, strict=True)
        ]
        mark = f'class="line c{line.color}" opacity="{line.opacity:.2f}"'
        parts.append(f'<polyline {mark} points="{" ".join(points)}"/>')
        if len(points) < 25 and len(drawn) <= _MOST_DOTTED:
            dots = [point.split(",") for point in points]
            parts += [f'<circle class="c{line.color}" cx="{a}" cy="{b}" r="2.5"/>' for a, b in dots]
    label = alt or "; ".join(_in_words(line) for line in lines)
    return Markup(
        f'<svg role="img" aria-label="{{}}" viewBox="0 0 {_WIDTH} {_HEIGHT}">{{}}</svg>'
    ).format(label, Markup("".join(parts)))


def _kept(line: Line, log: bool) -> Line:
    good_T = np.isfinite(line.values_T) & (line.values_T > 0 if log else True)
    epochs_T, values_T = line.epochs_T[good_T], line.values_T[good_T]
    chosen = np.unique(np.linspace(0, max(len(values_T) - 1, 0), _MOST_POINTS).astype(int))
    chosen = chosen[: len(values_T)]
    values_T = values_T[chosen]
    return line._replace(
        epochs_T=epochs_T[chosen], values_T=np.log10(values_T) if log else values_T
    )


def _range(values: Array) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    # one value alone gets some room
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    locator = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=log)
    return [at for at in map(float, locator.tick_values(low, high)) if low <= at <= high]


def _in_words(line: Line) -> str:
    values_T = line.values_T[np.isfinite(line.values_T)]
    if not len(values_T):
        return f"{line.label}: no finite value"
    return (
        f"{line.label}: from {values_T[0]:.3g} to {values_T[-1]:.3g}, "
        f"between {values_T.min():.3g} and {values_T.max():.3g}"
    )
