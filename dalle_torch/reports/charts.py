"""Charts as PNG bytes, by matplotlib, which is imported when one is drawn.

Owns: lines, scatters and histograms in one manner. Does not own: what they show (`studies`).
"""

import io
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Curve(NamedTuple):
    """One line, with a band around it where there are several runs of it."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def lines(
    curves: Mapping[str, Curve], *, x: str, y: str, title: str = "", log_y: bool = False, marked: bool = False
) -> bytes:
    """Named curves over one axis.

    Args:
        x, y: names of the axes.
        marked: a dot at each point.

    Raises:
        ImportError: matplotlib is not installed; says how to.
    """
    figure, axes = _figure(title, x, y)
    for index, (name, curve) in enumerate(curves.items()):
        # There are ten colours.
        style = ("-", "--", ":", "-.")[index // 10 % 4]
        (line,) = axes.plot(curve.x, curve.y, style, label=name, marker="o" if marked else None, markersize=4)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.15, linewidth=0)
    if log_y:
        axes.set_yscale("log")
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False, loc="best", ncols=1 + (len(curves) > 8))
    return _png(figure)


def histogram(
    counts: Sequence[int], edges: Sequence[float], *, x: str, y: str = "samples", title: str = "",
    marks: Mapping[str, float] | None = None,
) -> bytes:  # fmt: skip
    """Bars over bins.

    Args:
        edges: of the bins, one more than there are counts.
        marks: named places on the axis, drawn as upright lines.

    Raises:
        ImportError: matplotlib is not installed; says how to.
    """
    figure, axes = _figure(title, x, y)
    widths = [high - low for low, high in pairwise(edges)]
    axes.bar(edges[:-1], counts, width=widths, align="edge", alpha=0.8)
    for name, place in (marks or {}).items():
        axes.axvline(place, color="tab:red", linewidth=1)
        axes.annotate(name, (place, axes.get_ylim()[1]), rotation=90, va="top", ha="right", fontsize=8)
    return _png(figure)


def scatter(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    title: str = "",
    labels: Mapping[str, Sequence[str]] | None = None,
    joined: Mapping[str, bool] | None = None,
    hollow: Collection[str] = (),
    log_x: bool = False,
) -> bytes:
    """Named sets of points.

    Args:
        points: (x values, y values) of each set.
        labels: a text beside each point of a set.
        joined: whether the points of a set are joined by a line, in their order.
        hollow: sets that are rings around points of others.

    Raises:
        ImportError: matplotlib is not installed; says how to.
    """
    figure, axes = _figure(title, x, y)
    for name, (xs, ys) in points.items():
        style = "-" if (joined or {}).get(name) else ""
        ring = (
            {"markersize": 11, "markerfacecolor": "none", "color": "tab:red"} if name in hollow else {"markersize": 5}
        )
        axes.plot(xs, ys, marker="o", linestyle=style, label=name, **ring)
        for place_x, place_y, text in zip(xs, ys, (labels or {}).get(name, ()), strict=False):
            axes.annotate(text, (place_x, place_y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    if log_x:
        axes.set_xscale("log")
    if len(points) > 1:
        axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def _figure(title: str, x: str, y: str) -> tuple["Figure", Any]:
    try:
        # Without pyplot there is no window system to look for, and nothing global to clean up.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("charts need matplotlib: pip install 'dalle-torch[eval]'") from error
    figure = Figure(figsize=(7.2, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    # Without a date the same figures make the same file.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
