"""Curves over epochs as inline SVG, in the colours of the surrounding page."""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from isofast.run.stored import Array

# matplotlib draws in these; they are replaced by the page's CSS variables, to follow dark mode
_COLORS = ("#0072b2", "#c04f00", "#008060", "#a8508a", "#8a6a00", "#444444")
_SOFT, _RULE = "#5b6370", "#d5d9df"
_VARIABLES = {_SOFT: "soft", _RULE: "rule"} | {hue: f"c{k}" for k, hue in enumerate(_COLORS)}
_STYLE: Any = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "isofast"}
_MOST_POINTS, _MOST_DOTTED = 300, 6


class Line(NamedTuple):
    """A curve; non-finite values are left out."""

    label: str
    epochs_T: Array
    values_T: Array
    color: int = 0
    """Index into the page's variables --c0 to --c5, modulo 6."""
    opacity: float = 1.0


def chart(lines: Sequence[Line], *, log: bool = False, alt: str | None = None) -> Markup:
    """Return an SVG labelled for screen readers by ``alt``, or by each line's range.

    Args:
        lines: at least one.
        log: use a logarithmic y axis, which drops values of 0.
        alt: description of the chart.
    """
    if not any(np.isfinite(line.values_T).any() for line in lines):
        return Markup("<p>No finite value was recorded.</p>")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.8, 2.1), layout="constrained")
        axis = figure.subplots()
        for line in lines:
            kept = np.flatnonzero(np.isfinite(line.values_T))
            places = np.linspace(0, len(kept) - 1, min(len(kept), _MOST_POINTS)).round()
            kept = kept[places.astype(int)]
            axis.plot(
                line.epochs_T[kept],
                line.values_T[kept],
                color=_COLORS[line.color % len(_COLORS)],
                alpha=line.opacity,
                markersize=3,
                clip_on=False,
                marker="o" if len(kept) < (25 if len(lines) <= _MOST_DOTTED else 2) else None,
            )
        axis.set(xlim=(0, None), yscale="log" if log else "linear")
        axis.set_xlabel("epoch", color=_SOFT)
        axis.tick_params(which="both", length=0, colors=_SOFT)
        axis.grid(axis="y", color=_RULE)
        axis.spines[:].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    # drop ids such as line2d_1, which every chart repeats; marker and clip ids are hashes
    svg = re.sub(r' id="[\w.]+_\d+"', "", file.getvalue())
    for color, name in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    (box,) = re.findall('viewBox="[^"]*"', svg)
    tag = Markup('<svg role="img" aria-label="{}" {}>').format(
        alt or "; ".join(map(_in_words, lines)), Markup(box)
    )
    # without the header: HTML needs no namespaces
    return tag + Markup(svg[svg.index("<g>") :])


def _in_words(line: Line) -> str:
    values_T = line.values_T[np.isfinite(line.values_T)]
    if not len(values_T):
        return f"{line.label}: no finite value"
    return (
        f"{line.label}: from {values_T[0]:.3g} to {values_T[-1]:.3g}, "
        f"between {values_T.min():.3g} and {values_T.max():.3g}"
    )
