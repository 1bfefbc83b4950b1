"""Figures of runs and comparisons: one look, one colour per system, legible on paper, on a phone and in the dark.

Every function returns a Matplotlib figure that no global state knows of. :func:`save_figure` writes it to a file;
:func:`inline_svg` makes it part of a page, where it follows the page's light or dark scheme.
"""

from __future__ import annotations

import html
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from steersman.errors import InputError, require, require_count
from steersman.training.runs import atomic
from steersman.training.statistics import Band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

# Eight hues whose lightness differs too, so that they stay apart under red-green and blue-yellow colour blindness
# (CIE76 distance above 20 in Machado et al.'s 2009 simulation), each with at least 3:1 contrast to its background.
_SERIES_LIGHT = ("#1192f4", "#9e2508", "#248048", "#de64aa", "#b08004", "#2321ac", "#4f5157", "#57271a")
_SERIES_DARK = ("#3aa5ff", "#fd5a22", "#4ee993", "#e4649a", "#f2d900", "#e2abfe", "#dbe5ef", "#dea18a")

#: Colours by role, in the light scheme. Matplotlib draws with these.
LIGHT = {"ink": "#1d2126", "muted": "#5b636c", "grid": "#dfe3e8", "paper": "#fefefe"} | {
    f"series-{i}": colour for i, colour in enumerate(_SERIES_LIGHT)
}
#: The same roles in the dark scheme.
DARK = {"ink": "#e7eaed", "muted": "#a3abb4", "grid": "#333a42", "paper": "#15181c"} | {
    f"series-{i}": colour for i, colour in enumerate(_SERIES_DARK)
}

_DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)))

#: Width and height in inches, without the further lines of a legend. At 72 units to the inch the first fills a page,
#: the second half of one, or a phone.
WIDE = (12.0, 5.4)
NARROW = (5.3, 4.0)


class Estimate(NamedTuple):
    """A number with its interval, and what it was computed from.

    Attributes:
        value: the estimate.
        low: lower end of the interval; NaN where there is none (a single run).
        high: upper end.
        points: the individual values behind it, drawn beside it; may be empty.
    """

    value: float
    low: float = float("nan")
    high: float = float("nan")
    points: Sequence[float] | np.ndarray = ()


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, by its place in the order given; the same names in the same order always look alike."""
    return {name: _SERIES_LIGHT[i % len(_SERIES_LIGHT)] for i, name in enumerate(names)}


def format_count(value: float | np.number, position: int | None = None) -> str:
    """A number as an axis shows it: ``200k``, ``1.5M``; below ten thousand ``5,000``, ``0.25``.

    Args:
        value: the number.
        position: ignored; Matplotlib passes the tick's place.
    """
    del position
    size = abs(value)
    if size >= 9_999.5:
        for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            # 999,950 and above would round to 1000k.
            if size >= 0.9995 * unit:
                digits = max(0, 2 - int(np.floor(np.log10(size / unit))))
                text = f"{value / unit:,.{digits}f}"
                text = text.rstrip("0").rstrip(".") if "." in text else text
                return text.replace("-", "\N{MINUS SIGN}") + name
    text = f"{value:,.0f}" if size >= 1_000 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def decimate(
    samples: Float[np.ndarray, " K"], curves: Float[np.ndarray, "runs K"], points: int = 400
) -> tuple[Float[np.ndarray, " J"], Float[np.ndarray, "runs J"]]:
    """Learning curves as means over blocks of neighbouring points, at most `points` of them.

    Args:
        samples: environment steps of each point ``[K]``.
        curves: ``[runs, K]``; NaN entries are left out of their block's mean.
        points: largest number of blocks.

    Returns:
        ``(samples, curves)`` of the blocks. The last block stands at the last point, so that no step is lost from
        the axis; the others at their middle.
    """
    require_count("points", points, minimum=2)
    count = len(samples)
    if count <= points:
        return samples, curves
    edges = np.linspace(0, count, points + 1).astype(int)
    known = ~np.isnan(curves)
    sums = np.add.reduceat(np.where(known, curves, 0.0), edges[:-1], axis=1)
    counts = np.add.reduceat(known.astype(np.float64), edges[:-1], axis=1)
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    centers = np.add.reduceat(samples, edges[:-1]) / np.diff(edges)
    centers[-1] = samples[-1]
    return centers, means


def learning_curves(
    curves: Mapping[str, tuple[np.ndarray, Band]],
    *,
    x_label: str = "environment steps",
    y_label: str = "return",
    size: tuple[float, float] = WIDE,
    label: str = "direct",
    colour: Mapping[str, str] | None = None,
) -> Figure:
    """Lines with bands over environment steps, or over whatever the curves run along.

    Args:
        curves: for each name, the ``[K]`` positions and the :class:`~steersman.training.statistics.Band` there. A
            band that collapses onto its line is not drawn.
        x_label: what the positions are, with their unit.
        y_label: what the values are.
        size: inches.
        label: ``"direct"`` names each line at its end, ``"legend"`` in a row above the axes, ``"none"`` leaves it to
            the page around the figure.
        colour: a colour for each name, where figures of a page must agree; by default :func:`colours` of the names.
    """
    require(len(curves) > 0, "curves", curves, "at least one named curve")
    require(label in ("direct", "legend", "none"), "label", label, "'direct', 'legend' or 'none'")
    figure, axes = _axes(size)
    colour = colours(curves) if colour is None else colour
    ends = {}
    for name, (x, band) in curves.items():
        _draw_band(axes, np.asarray(x), band, colour[name], _dash(colour, name), name)
        shown = np.flatnonzero(~np.isnan(band.value))
        if shown.size:
            ends[name] = float(band.value[shown[-1]])
    positions = np.concatenate([np.zeros(1), *(np.asarray(x, dtype=np.float64) for x, _ in curves.values())])
    axes.set_xlim(positions.min(), positions.max() if positions.max() > 0 else 1.0)
    _count_axis(axes, "x", x_label, size)
    _count_axis(axes, "y", y_label, size)
    axes.grid(axis="y", color=LIGHT["grid"], linewidth=0.8)
    if label == "direct":
        _name_line_ends(axes, ends, colour, size)
    elif label == "legend":
        _legend(figure, axes, list(curves), size)
    return figure


def interval_plot(
    estimates: Mapping[str, Estimate],
    *,
    x_label: str = "evaluation return",
    size: tuple[float, float] | None = None,
    colour: Mapping[str, str] | None = None,
) -> Figure:
    """One row per system: the estimate, its interval, and the individual runs below it.

    Args:
        estimates: the rows, from top to bottom.
        x_label: what the numbers are, with their unit.
        size: inches; by default as high as the rows need.
        colour: a colour for each name, where figures of a page must agree; by default :func:`colours` of the names.
    """
    require(len(estimates) > 0, "estimates", estimates, "at least one named estimate")
    size = size or (NARROW[0], 1.3 + 0.7 * len(estimates))
    figure, axes = _axes(size)
    colour = colours(estimates) if colour is None else colour
    for row, (name, estimate) in enumerate(estimates.items()):
        runs = np.asarray(estimate.points, dtype=np.float64)
        axes.scatter(runs, np.full(runs.shape, row + 0.27), s=26, color=colour[name], alpha=0.5, linewidths=0)
        _draw_estimate(axes, estimate, row - 0.06, colour[name])
    _rows(axes, list(estimates))
    _count_axis(axes, "x", x_label, size)
    axes.grid(axis="x", color=LIGHT["grid"], linewidth=0.8)
    axes.margins(x=0.06)
    return figure


def performance_profiles(
    thresholds: Float[np.ndarray, " K"],
    profiles: Mapping[str, Band],
    *,
    x_label: str = "evaluation return \N{GREEK SMALL LETTER TAU}",
    y_label: str = "fraction of runs above \N{GREEK SMALL LETTER TAU}",
    size: tuple[float, float] = NARROW,
    colour: Mapping[str, str] | None = None,
) -> Figure:
    """The fraction of runs that score above each threshold: the curve further up and to the right is better.

    Args:
        thresholds: ``[K]``, ascending.
        profiles: for each name, the :class:`~steersman.training.statistics.Band` at the thresholds.
        x_label: what the thresholds are, with their unit.
        y_label: what the fractions are.
        size: inches.
        colour: a colour for each name, where figures of a page must agree; by default :func:`colours` of the names.
    """
    require(len(profiles) > 0, "profiles", profiles, "at least one named profile")
    figure, axes = _axes(size)
    colour = colours(profiles) if colour is None else colour
    for name, band in profiles.items():
        _draw_band(axes, np.asarray(thresholds), band, colour[name], _dash(colour, name), name, step=True)
    axes.set_xlim(float(thresholds[0]), float(thresholds[-1]))
    axes.set_ylim(-0.02, 1.02)
    _count_axis(axes, "x", x_label, size)
    axes.set_ylabel(y_label, parse_math=False)
    axes.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "0.5", "0.75", "1"])
    axes.grid(axis="y", color=LIGHT["grid"], linewidth=0.8)
    _legend(figure, axes, list(profiles), size)
    return figure


def improvement_plot(pairs: Mapping[tuple[str, str], Estimate], *, size: tuple[float, float] | None = None) -> Figure:
    """One row per pair of systems: the probability that a run of the first scores higher than a run of the second.

    Args:
        pairs: ``(first, second)`` to the estimate, from top to bottom.
        size: inches; by default as high as the rows need.
    """
    require(len(pairs) > 0, "pairs", pairs, "at least one pair")
    # Two long names do not fit beside the axes on one line.
    names = [f"{first} >{_gap(first, second)}{second}" for first, second in pairs]
    height = 0.56 if any("\n" in name for name in names) else 0.36
    figure, axes = _axes(size or (NARROW[0], 1.2 + height * len(pairs)))
    axes.axvline(0.5, color=LIGHT["muted"], linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    for row, estimate in enumerate(pairs.values()):
        _draw_estimate(axes, estimate, float(row), LIGHT["ink"])
    _rows(axes, names)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlabel("probability that the first scores higher")
    axes.grid(axis="x", color=LIGHT["grid"], linewidth=0.8)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a figure in the format that the path's suffix names, ``.png``, ``.svg`` or ``.pdf``, and returns the path.

    Raster images have 200 dots per inch and a white ground.
    """
    import matplotlib

    target = Path(path)
    kind = target.suffix.lower().lstrip(".")
    require(kind in ("png", "svg", "pdf"), "path", str(path), "a file name ending in .png, .svg or .pdf")
    buffer = io.BytesIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(buffer, format=kind, dpi=200, facecolor="white", metadata=_NO_DATE[kind])
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic(target) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return target


def inline_svg(figure: Figure, prefix: str, description: str) -> str:
    """A figure as an ``<svg>`` element to be put into a page.

    Colours become the custom properties of :func:`scheme_css`, with the light scheme where the page defines none;
    text stays text, in the page's own font. Nothing in it refers to anything outside the page.

    Args:
        figure: the figure.
        prefix: starts every id in the element; different for every figure of a page.
        description: what a reader who cannot see it is told.
    """
    import matplotlib

    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", prefix):
        raise InputError(f"prefix is {prefix!r}, but it must be letters, digits, '-' and '_', a letter first.")
    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_DATE["svg"])
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    width, height = (72.0 * float(inches) for inches in figure.get_size_inches())
    text = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    head = f'<svg role="img" aria-label="{html.escape(description)}" viewBox="0 0 {width:g} {height:g}"'
    # Wider than this, its letters would outgrow the text around it.
    head += f' style="max-width:{1.35 * width:.0f}px"'
    body = re.sub(r"<[^>]*>", lambda tag: _inline_tag(tag.group(), prefix), text[text.index(">") + 1 :])
    return f'{head} stroke-linejoin="round">{body}'.replace("> <", "><")


def _inline_tag(tag: str, prefix: str) -> str:
    """One tag of Matplotlib's SVG, made shorter and safe to share a page with other figures."""
    tag = re.sub(r"\s+", " ", tag).replace('xlink:href="', 'href="')
    # Group ids name Matplotlib's artists, which nothing refers to.
    tag = re.sub(r'^<g id="[^"]*"', "<g", tag)
    tag = re.sub(r'(\bid="|href="#|url\(#)', lambda match: match.group() + prefix + "-", tag)
    tag = re.sub(r' font-family: [^;"]*;?', "", tag)
    tag = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", tag)
    # A tenth of a unit is less than a pixel; opacities keep two digits.
    tag = _rounded(re.sub(r' d="[^"]*"', lambda match: _rounded(match.group(), 1), tag), 2)
    for role, value in LIGHT.items():
        tag = tag.replace(value, f"var(--{role}, {value})")
    return tag


def _rounded(text: str, digits: int) -> str:
    """The text with its decimal numbers cut to so many digits."""
    longer = rf"-?\d+\.\d{{{digits + 1},}}"
    return re.sub(longer, lambda match: f"{float(match.group()):.{digits}f}".rstrip("0").rstrip("."), text)


def scheme_colour(index: int) -> str:
    """The style value of the ``index``-th system's colour, which follows the page's scheme."""
    place = index % len(_SERIES_LIGHT)
    return f"var(--series-{place}, {_SERIES_LIGHT[place]})"


def scheme_css() -> str:
    """Style rules that define every colour of :func:`inline_svg`, for a light and for a dark scheme."""
    light, dark = (";".join(f"--{role}:{value}" for role, value in scheme.items()) for scheme in (LIGHT, DARK))
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"


# Text stays text (small, searchable, in the page's font), and ids do not change from one run to the next.
_RC: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "steersman", "path.simplify": True}
_NO_DATE = {
    "svg": {"Date": None, "Creator": None, "Type": None, "Format": None},
    "pdf": {"CreationDate": None},
    "png": {"Software": None},
}


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure with one pair of axes in the house style."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=6 / 72, h_pad=5 / 72))
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0.0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["muted"])
    axes.tick_params(colors=LIGHT["muted"], labelcolor=LIGHT["muted"], labelsize=12, length=0, pad=6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(LIGHT["ink"])
        axis.label.set_fontsize(12.5)
        axis.labelpad = 6
    return figure, axes


def _count_axis(axes: Axes, which: str, label: str, size: tuple[float, float]) -> None:
    """Short numbers and a label on one axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(
        MaxNLocator(nbins=4 if which == "x" and size[0] < 8 else 6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3)
    )
    axis.set_major_formatter(FuncFormatter(format_count))
    axis.set_label_text(label, parse_math=False)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Names instead of numbers along the vertical axis, the first on top."""
    axes.set_ylim(len(names) - 0.45, -0.55)
    for tick in axes.set_yticks(range(len(names)), labels=list(names)):
        _plain(tick.label1)
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"], labelsize=12.5)


def _gap(first: str, second: str) -> str:
    return "\n" if len(first) + len(second) > 20 else " "


def _plain(text: Text) -> None:
    """Shows a user's text as it is: a dollar sign in a name starts no formula."""
    text.set_parse_math(False)


def _dash(colour: Mapping[str, str], name: str) -> str | tuple[int, tuple[int, ...]]:
    """Where colours repeat, the dashes differ."""
    return _DASHES[list(colour).index(name) // len(_SERIES_LIGHT) % len(_DASHES)]


def _draw_band(
    axes: Axes,
    x: np.ndarray,
    band: Band,
    colour: str,
    dash: str | tuple[int, tuple[int, ...]],
    name: str,
    step: bool = False,
) -> None:
    if np.any(band.high > band.low):
        where = "post" if step else None
        axes.fill_between(x, band.low, band.high, color=colour, alpha=0.18, linewidth=0, step=where)
    style = "steps-post" if step else "default"
    # A point between two gaps would be invisible as a line.
    alone = "o" if np.count_nonzero(~np.isnan(band.value)) == 1 else None
    axes.plot(x, band.value, color=colour, linewidth=2.0, linestyle=dash, drawstyle=style, marker=alone, label=name)


def _draw_estimate(axes: Axes, estimate: Estimate, row: float, colour: str) -> None:
    if np.isfinite(estimate.low) and np.isfinite(estimate.high):
        axes.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=4.0, alpha=0.45)
    axes.plot([estimate.value], [row], "o", color=colour, markersize=9, markeredgecolor=LIGHT["paper"], clip_on=False)


def _legend(figure: Figure, axes: Axes, names: Sequence[str], size: tuple[float, float]) -> None:
    """A row of names above the axes, broken into as many lines as the width asks for; each makes the figure higher."""
    if len(names) < 2:
        return
    # About 7.5 units a character and 45 for the line and the gaps.
    columns = max(1, int(72 * size[0] // (45 + 7.5 * max(len(name) for name in names))))
    figure.set_size_inches(size[0], size[1] + 0.25 * (math.ceil(len(names) / columns) - 1))
    legend = figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=min(columns, len(names)),
        frameon=False,
        fontsize=12.5,
        handlelength=1.4,
        columnspacing=1.4,
        labelcolor=LIGHT["ink"],
    )
    for text in legend.get_texts():
        _plain(text)


def _name_line_ends(
    axes: Axes, ends: Mapping[str, float], colour: Mapping[str, str], size: tuple[float, float]
) -> None:
    """Names at the right end of the lines, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 16.0 / (72 * size[1] * 0.8)
    names = sorted(ends, key=lambda name: ends[name])
    places = spread([(ends[name] - low) / (high - low) for name in names], gap)
    for name, place in zip(names, places, strict=True):
        text = axes.annotate(
            name, (1.0, place), xycoords="axes fraction", xytext=(8, 0), textcoords="offset points", va="center"
        )
        text.set(color=colour[name], fontsize=13, fontweight="bold")
        _plain(text)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved as little as possible, in the least-squares sense, to be at least `gap` apart.

    Subtracting ``i * gap`` from the ``i``-th turns this into isotonic regression.
    """
    from scipy.optimize import isotonic_regression

    if not places:
        return []
    offsets = gap * np.arange(len(places))
    return (isotonic_regression(np.asarray(places) - offsets).x + offsets).tolist()
