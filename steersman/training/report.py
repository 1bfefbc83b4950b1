"""What a training run or a comparison found, and the page that shows it."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from steersman.errors import InputError, require
from steersman.training import figures, statistics
from steersman.training.figures import Estimate
from steersman.training.runs import atomic

_CURVE_POINTS = 400
_PROFILE_POINTS = 201
_NONE = "\N{EN DASH}"
# Beyond this many systems, a plot of all pairs would be longer than the rest of the page.
_PLOTTED_SYSTEMS = 5
# Below this, a bootstrap interval misses the truth much more often than it says (see `statistics`).
_FEW_SEEDS = 5


@dataclass(frozen=True, eq=False)
class SystemResult:
    """What one system reached, over its seeds ``S``.

    Attributes:
        name: the slug that is shown.
        title: the paper's title, or one line.
        returns: mean evaluation return of each seed's trained policy ``[S]``.
        curve_samples: environment steps that one seed had taken at each point of its learning curve ``[K]``.
        curve_returns: mean return of the training episodes that ended there ``[S, K]``; NaN where none did.
        config: every setting that is needed to repeat it; values may be nested dicts.
        seconds: wall time of training all seeds.
        episode: an animated GIF, WebP or PNG of one episode of the trained policy.
        episode_caption: what the episode shows.
    """

    name: str
    title: str
    returns: np.ndarray
    curve_samples: np.ndarray
    curve_returns: np.ndarray
    config: dict[str, Any]
    seconds: float
    episode: bytes | None = None
    episode_caption: str = ""

    def __post_init__(self) -> None:
        for attribute in ("returns", "curve_samples", "curve_returns"):
            object.__setattr__(self, attribute, np.asarray(getattr(self, attribute), dtype=np.float64))
        where = f"of system {self.name!r}"
        shape = self.returns.shape
        require(len(shape) == 1 and shape[0] > 0, f"returns' shape {where}", shape, "[S] with at least one seed")
        bad = np.flatnonzero(~np.isfinite(self.returns)).tolist()
        require(not bad, f"returns {where}", f"NaN or infinite for seed {bad}", "finite for every seed")
        shape = (len(self.returns), *self.curve_samples.shape)
        found = self.curve_returns.shape
        require(len(shape) == 2 and found == shape, f"curve_returns' shape {where}", found, f"[S, K], here {shape}")
        steps = self.curve_samples
        good = bool(np.all(np.isfinite(steps))) and bool(np.all(np.diff(steps) >= 0))
        require(good, f"curve_samples {where}", steps.tolist()[:8], "finite and ascending")
        require(not np.isinf(self.curve_returns).any(), f"curve_returns {where}", "infinite", "finite or NaN")
        require(self.seconds >= 0, f"seconds {where}", self.seconds, "a time of at least 0")
        if self.episode is not None:
            _media_type(self.episode)

    @property
    def steps(self) -> float:
        """Environment steps of all seeds together."""
        return float(self.curve_samples[-1]) * len(self.returns) if self.curve_samples.size else 0.0


@dataclass(frozen=True, eq=False)
class ComparisonResult:
    """What one or several systems reached on one environment.

    Attributes:
        environment: the environment's name.
        systems: results by slug, in the order in which they are shown.
        versions: name to version of everything that shaped the numbers (packages, interpreter, hardware).
        command: how to repeat it.
        evaluation: how ``returns`` were measured, as half a sentence: ``"mean of 20 episodes, most likely action"``.
        confidence: probability mass of every interval.
        resamples: bootstrap resamples behind every interval.
    """

    environment: str
    systems: dict[str, SystemResult]
    versions: dict[str, str]
    command: str
    evaluation: str = ""
    confidence: float = 0.95
    resamples: int = 2000

    def __post_init__(self) -> None:
        require(len(self.systems) > 0, "systems", self.systems, "at least one system's result")

    @property
    def title(self) -> str:
        """One line that names what was run."""
        names = list(self.systems)
        shown = " against ".join(names) if len(names) <= 2 else f"{len(names)} systems"
        return f"{shown} on {self.environment}"

    @cached_property
    def interquartile_means(self) -> dict[str, Estimate]:
        """Interquartile mean of each system's returns; its interval is NaN for a single seed."""
        found = {}
        for name, system in self.systems.items():
            value = float(statistics.interquartile_mean(system.returns))
            low, high = self._interval(system.returns) if len(system.returns) > 1 else (math.nan, math.nan)
            found[name] = Estimate(value, low, high, system.returns)
        return found

    @cached_property
    def improvements(self) -> dict[tuple[str, str], Estimate]:
        """For each ordered pair, the probability that a run of the first scores higher than a run of the second."""
        found = {}
        for first, second in itertools.combinations(self.systems, 2):
            x, y = self.systems[first].returns, self.systems[second].returns
            value = statistics.probability_of_improvement(x, y)
            low = high = math.nan
            if min(len(x), len(y)) > 1:
                low, high = statistics.probability_of_improvement_interval(x, y, self.resamples, self.confidence)
            found[first, second] = Estimate(value, low, high)
            found[second, first] = Estimate(1.0 - value, 1.0 - high, 1.0 - low)
        return found

    @property
    def ranking(self) -> list[str]:
        """The systems by interquartile mean, highest first."""
        return sorted(self.systems, key=lambda name: -self.interquartile_means[name].value)

    def summary(self) -> dict[str, Any]:
        """The numbers as plain Python values, ready for JSON.

        Returns:
            ``{"env", "systems": {slug: {"returns", "iqm", "interval"}}, "probability_of_improvement": {"a>b":
            {"value", "interval"}}}``; an interval is ``[low, high]``, or None where one seed gives none.
        """
        systems = {}
        for name, estimate in self.interquartile_means.items():
            returns = self.systems[name].returns.tolist()
            systems[name] = {"returns": returns, "iqm": estimate.value, "interval": _bounds(estimate)}
        pairs = {
            f"{first}>{second}": {"value": estimate.value, "interval": _bounds(estimate)}
            for (first, second), estimate in self.improvements.items()
        }
        return {"env": self.environment, "systems": systems, "probability_of_improvement": pairs}

    def verdict(self) -> str:
        """The finding in a few sentences: who is ahead, whether the intervals overlap, how often a run is better."""
        number = number_format(system.returns for system in self.systems.values())
        means = self.interquartile_means
        best, *others = self.ranking
        if not others:
            if len(means[best].points) == 1:
                reached = f"{best} reaches a return of {number(means[best].value)} with its one seed."
            else:
                shown = f"{_with_interval(means[best], number)} over {len(means[best].points)} seeds"
                reached = f"{best} reaches an interquartile mean return of {shown}."
            return " ".join([reached, *self._caveats()])

        second = others[0]
        leader = f"{_with_interval(means[best], number)} against {_with_interval(means[second], number)} for {second}"
        if means[best].value == means[second].value:
            first = f"{best} and {second} have the same interquartile mean return, {number(means[best].value)}."
        elif len(others) == 1:
            first = f"{best} has the higher interquartile mean return: {leader}."
        else:
            first = f"{best} has the highest interquartile mean return of {len(self.systems)} systems: {leader}."

        sentences = [first]
        known = [name for name in others if _bounds(means[name])] if _bounds(means[best]) else []
        close = [name for name in known if _overlap(means[best], means[name])]
        if close and len(others) == 1:
            sentences.append("The two intervals overlap.")
        elif close:
            sentences.append(f"Its interval overlaps {_listed(close, 'that', 'those')} of {_join(close)}.")
        elif known and len(known) == len(others):
            one = "The two intervals do not overlap." if len(others) == 1 else "Its interval overlaps no other."
            sentences.append(one)

        chance = self.improvements[best, second]
        shown = f"{chance.value:.2f}"
        if _bounds(chance):
            shown += f" [{chance.low:.2f}, {chance.high:.2f}]"
        sentences.append(f"A run of {best} scores higher than a run of {second} with probability {shown}.")
        if close and all(self.improvements[best, name].low <= 0.5 for name in close):
            sentences.append(f"These seeds do not settle whether it is better than {_join(close, 'or')}.")
        return " ".join([*sentences, *self._caveats()])

    def _caveats(self) -> list[str]:
        counts = [len(system.returns) for system in self.systems.values()]
        if min(counts) == 1:
            return ["A single seed gives no interval: another seed may turn out differently."]
        if min(counts) < _FEW_SEEDS:
            return [f"Intervals from {min(counts)} seeds are usually too narrow."]
        return []

    def _interval(self, returns: np.ndarray) -> tuple[float, float]:
        return statistics.stratified_bootstrap_interval(
            returns, statistics.interquartile_mean, self.resamples, self.confidence
        )


def number_format(values: Iterable[np.ndarray]) -> Any:
    """A function that writes returns with as many decimals as tell these values apart."""
    joined = np.concatenate([np.ravel(part) for part in values])
    scale = float(np.ptp(joined)) or float(np.max(np.abs(joined))) or 1.0
    if not 1e-4 <= scale < 1e12:
        return lambda value: f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
    decimals = min(max(2 - math.floor(math.log10(scale)), 0), 6)
    # Adding zero makes a rounded -0 a 0.
    return lambda value: f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def check_report_path(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """The path as such, if a report can be written there: to be asked before what takes long.

    Raises:
        InputError: it is a folder, or its name does not end in .html.
    """
    target = Path(path)
    require(target.suffix.lower() in (".html", ".htm"), argument, str(path), "a file name ending in .html")
    require(not target.is_dir(), argument, str(path), "a file, but there is a folder of that name")
    return target


def write_report(result: ComparisonResult, path: str | os.PathLike[str]) -> Path:
    """Writes the page that shows a result: one HTML file that needs nothing else, and returns its path.

    The file is replaced in one step: a reader never finds half a report.

    Args:
        result: one system or several.
        path: the file, for example ``report.html``; missing folders are made.
    """
    target = check_report_path(path)
    page = render_report(result)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def render_report(result: ComparisonResult) -> str:
    """The page of :func:`write_report` as text."""
    several = len(result.systems) > 1
    sections = [
        _learning_section(result),
        _returns_section(result),
        _improvement_section(result) if several else "",
        _table_section(result),
        _episode_section(result),
        _configuration_section(result),
        _versions_section(result),
        _repeat_section(result),
    ]
    title = html.escape(result.title)
    # An interval stays on one line.
    words = re.sub(r"\[[^\]]*\]", lambda bounds: bounds.group().replace(" ", "\N{NO-BREAK SPACE}"), result.verdict())
    first, _, rest = words.partition(". ")
    first = first if first.endswith(".") else first + "."
    rest = f"<p>{html.escape(rest)}</p>" if rest else ""
    return _PAGE.format(
        title=title,
        style=figures.scheme_css() + _STYLE,
        verdict=f'<p class="lead">{html.escape(first)}</p>{rest}',
        facts=_facts(result),
        sections="\n".join(section for section in sections if section),
    )


def _facts(result: ComparisonResult) -> str:
    systems = result.systems.values()
    seeds = sorted({len(system.returns) for system in systems})
    steps = sorted({float(system.curve_samples[-1]) for system in systems if system.curve_samples.size})
    entries = [
        ("environment", result.environment),
        ("seeds", _span([str(n) for n in seeds])),
        ("steps per seed", _span([figures.format_count(n) for n in steps])),
        ("training time", format_seconds(sum(system.seconds for system in systems))),
    ]
    items = (f"<div><dt>{term}</dt><dd>{html.escape(value)}</dd></div>" for term, value in entries if value)
    return f'<dl class="facts">{"".join(items)}</dl>'


def _learning_section(result: ComparisonResult) -> str:
    curves = {}
    for name, system in result.systems.items():
        held = statistics.hold_last(system.curve_returns) if system.curve_returns.size else system.curve_returns
        if held.size == 0 or np.isnan(held).all():
            continue
        x, held = figures.decimate(system.curve_samples, held, _CURVE_POINTS)
        band = statistics.curve_interval(held, statistics.interquartile_mean, result.resamples, result.confidence)
        curves[name] = (x, band)
    if not curves:
        return _section("learning-curves", "Learning curves", "<p>No episode ended during training.</p>")
    number = number_format(system.returns for system in result.systems.values())
    ends = [f"{name} ends at {number(band.value[~np.isnan(band.value)][-1])}" for name, (_, band) in curves.items()]
    description = f"Learning curves, training return over environment steps: {'; '.join(ends)}."
    colour = figures.colours(result.systems)
    wide = figures.learning_curves(curves, y_label="training return", colour=colour)
    narrow = figures.learning_curves(
        curves, y_label="training return", size=figures.NARROW, label="legend", colour=colour
    )
    several = any(len(system.returns) > 1 for system in result.systems.values())
    band = f" Lines are interquartile means over seeds, bands their {_percent(result)} bootstrap intervals."
    caption = "Return of the episodes that ended during training, exploration included." + (band if several else "")
    body = (
        f'<div class="wide">{figures.inline_svg(wide, "curves-wide", description)}</div>'
        f'<div class="narrow">{figures.inline_svg(narrow, "curves-narrow", description)}</div>'
    )
    missing = [name for name in result.systems if name not in curves]
    if missing:
        caption += f" No episode of {_join(missing)} ended during training."
    return _section("learning-curves", "Learning curves", _figure(body, caption))


def _returns_section(result: ComparisonResult) -> str:
    several = any(len(system.returns) > 1 for system in result.systems.values())
    if not several and len(result.systems) == 1:
        return ""
    number = number_format(system.returns for system in result.systems.values())
    means = result.interquartile_means
    rows = "; ".join(f"{name} {_with_interval(estimate, number)}" for name, estimate in means.items())
    # The run of a single seed is the estimate itself: no second dot.
    drawn = {name: e if len(e.points) > 1 else Estimate(e.value) for name, e in means.items()}
    description = f"Interquartile mean return with interval: {rows}."
    intervals = figures.inline_svg(figures.interval_plot(drawn), "returns", description)
    caption = "The evaluation return of the one seed."
    if several:
        caption = f"Large dots are interquartile means, bars their {_percent(result)} intervals, small dots the seeds."
    if result.evaluation:
        caption += f" Evaluation: {result.evaluation}."
    parts = [_figure(intervals, caption, "Return after training")]

    if several:
        pooled = np.concatenate([system.returns for system in result.systems.values()])
        margin = 0.05 * float(np.ptp(pooled)) or 0.05 * float(np.max(np.abs(pooled))) or 1.0
        thresholds = np.linspace(pooled.min() - margin, pooled.max() + margin, _PROFILE_POINTS)
        profiles = {
            name: statistics.performance_profile(system.returns, thresholds, result.resamples, result.confidence)
            for name, system in result.systems.items()
        }
        halves = (f"half of the runs of {n} exceed {number(np.median(s.returns))}" for n, s in result.systems.items())
        description = f"Performance profile: {'; '.join(halves)}."
        profile = figures.inline_svg(figures.performance_profiles(thresholds, profiles), "profile", description)
        explained = "How many runs score above each return: further up and to the right is better."
        parts.append(_figure(profile, explained, "Performance profile"))
    return _section("final-returns", "Final returns", f'<div class="pair">{"".join(parts)}</div>')


def _improvement_section(result: ComparisonResult) -> str:
    ranking = result.ranking
    few = len(ranking) <= _PLOTTED_SYSTEMS
    # Of many systems only the best is drawn against the others; the table has every pair.
    chosen = itertools.combinations(ranking, 2) if few else itertools.product(ranking[:1], ranking[1:])
    pairs = {pair: result.improvements[pair] for pair in chosen}
    rows = "; ".join(f"{first} over {second} {estimate.value:.2f}" for (first, second), estimate in pairs.items())
    plot = figures.inline_svg(figures.improvement_plot(pairs), "improvement", f"Probability of improvement: {rows}.")
    caption = "How likely a run of the first scores higher than a run of the second; at 0.5 neither is ahead."
    body = _figure(plot, caption)
    if len(ranking) > 2:
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ranking)
        lines = []
        for first in ranking:
            cells = "".join(
                "<td>\N{EN DASH}</td>"
                if first == second
                else f"<td>{result.improvements[first, second].value:.2f}</td>"
                for second in ranking
            )
            lines.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
        corner = '<th scope="col">row beats column</th>'
        table = _table(corner + head, lines, "Probability of improvement", "numbers matrix")
        body = f'<div class="pair">{body}<div>{table}</div></div>' if few else body + table
    return _section("improvement", "Probability of improvement", body)


def _table_section(result: ComparisonResult) -> str:
    number = number_format(system.returns for system in result.systems.values())
    columns = ("system", "IQM", f"{_percent(result)} interval", "mean", "seeds", "wall time", "steps/s")
    lines = []
    for name in result.ranking:
        system, estimate = result.systems[name], result.interquartile_means[name]
        bounds = _bounds(estimate)
        rate = figures.format_count(system.steps / system.seconds) if system.seconds > 0 else _NONE
        cells = (
            number(estimate.value),
            f"[{number(bounds[0])}, {number(bounds[1])}]" if bounds else _NONE,
            number(float(np.mean(system.returns))),
            str(len(system.returns)),
            format_seconds(system.seconds),
            rate,
        )
        title = f"<small>{html.escape(system.title)}</small>" if system.title else ""
        label = _swatch(result, name) + html.escape(name)
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{label}{title}</th>{row}</tr>')
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    note = (
        '<p class="note">IQM: interquartile mean, the mean of the middle half of the seeds\' evaluation returns. '
        f"Intervals: percentile bootstrap over seeds, {result.resamples:,} resamples "
        '(<a href="https://arxiv.org/abs/2108.13264">Agarwal et al., 2021</a>). '
        "Wall time and steps per second are of training all seeds together, compilation included.</p>"
    )
    return _section("results", "Results", _table(head, lines, "Results by system") + note)


def _episode_section(result: ComparisonResult) -> str:
    cards = []
    for name, system in result.systems.items():
        if system.episode is None:
            continue
        caption = html.escape(system.episode_caption)
        words = html.escape(system.episode_caption or f"One episode of the trained {name} policy")
        picture = _picture(system.episode, f"{html.escape(name)}: {words}")
        heading = f"<h3>{_swatch(result, name)}{html.escape(name)}</h3>"
        cards.append(f"<figure>{heading}{picture}<figcaption>{caption}</figcaption></figure>")
    if not cards:
        return ""
    return _section("episodes", "Trained policies at work", f'<div class="cards">{"".join(cards)}</div>')


def _configuration_section(result: ComparisonResult) -> str:
    flat = {name: _flatten(system.config) for name, system in result.systems.items()}
    parts = []
    if len(flat) > 1:
        keys = dict.fromkeys(key for config in flat.values() for key in config)
        differing = [key for key in keys if len({config.get(key) for config in flat.values()}) > 1]
        if differing:
            head = '<th scope="col">setting</th>'
            head += "".join(f'<th scope="col">{html.escape(name)}</th>' for name in flat)
            lines = []
            for key in differing:
                cells = "".join(f"<td>{html.escape(config.get(key, _NONE))}</td>" for config in flat.values())
                lines.append(f'<tr><th scope="row">{html.escape(key)}</th>{cells}</tr>')
            parts.append(_details("Where they differ", _table(head, lines, "Settings that differ", "settings")))
        else:
            parts.append("<p>All settings are equal.</p>")
    head = '<th scope="col">setting</th><th scope="col">value</th>'
    for name, config in flat.items():
        lines = [
            f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(value)}</td></tr>'
            for key, value in config.items()
        ]
        body = _table(head, lines, f"Settings of {name}", "settings") if lines else "<p>No settings were recorded.</p>"
        parts.append(_details(name, body))
    return _section("configuration", "Configuration", "".join(parts))


def _versions_section(result: ComparisonResult) -> str:
    if not result.versions:
        return ""
    items = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in result.versions.items())
    return _section("versions", "Versions", f'<dl class="facts">{"".join(items)}</dl>')


def _repeat_section(result: ComparisonResult) -> str:
    if not result.command:
        return ""
    return _section("repeat", "Repeat it", f"<pre><code>{html.escape(result.command)}</code></pre>")


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{body}</section>'


def _figure(body: str, caption: str, title: str = "") -> str:
    heading = f"<h3>{html.escape(title)}</h3>" if title else ""
    return f"<figure>{heading}{body}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _table(head: str, lines: Sequence[str], label: str, kind: str = "numbers") -> str:
    # The box scrolls, not the page; a keyboard reaches it through the tab index.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(label)}"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _details(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def _swatch(result: ComparisonResult, name: str) -> str:
    """A dot in the colour that the figures give to a system; nothing where there is only one."""
    if len(result.systems) == 1:
        return ""
    colour = figures.scheme_colour(list(result.systems).index(name))
    return f'<i class="swatch" style="background:{colour}"></i>'


def _picture(image: bytes, description: str) -> str:
    """An image as a data address; for readers who asked for less motion, its first frame."""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        width, height = opened.size
        still = ""
        if getattr(opened, "is_animated", False):
            buffer = io.BytesIO()
            opened.convert("RGB").save(buffer, "PNG", optimize=True)
            address = _data_address(buffer.getvalue())
            still = f'<source media="(prefers-reduced-motion: reduce)" srcset="{address}">'
    size = f'width="{width}" height="{height}"'
    return f'<picture>{still}<img src="{_data_address(image)}" alt="{description}" {size}></picture>'


def _data_address(image: bytes) -> str:
    return f"data:{_media_type(image)};base64,{base64.b64encode(image).decode()}"


def _media_type(image: bytes) -> str:
    if image.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return "image/webp"
    raise InputError(f"episode starts with {image[:8]!r}, but it must be the bytes of a GIF, WebP or PNG image.")


def format_seconds(seconds: float) -> str:
    """A duration in at most two units: ``0.42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names with their values written out."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _written(value)
    return flat


def _written(value: Any) -> str:
    if isinstance(value, np.generic) or (hasattr(value, "tolist") and getattr(value, "size", 2) == 1):
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_written(part) for part in value)}]"
    return str(value)


def _bounds(estimate: Estimate) -> list[float] | None:
    low, high = float(estimate.low), float(estimate.high)
    return [low, high] if math.isfinite(low) and math.isfinite(high) else None


def _with_interval(estimate: Estimate, number: Any) -> str:
    bounds = _bounds(estimate)
    return number(estimate.value) + (f" [{number(bounds[0])}, {number(bounds[1])}]" if bounds else "")


def _overlap(first: Estimate, second: Estimate) -> bool:
    return first.low <= second.high and second.low <= first.high


def _percent(result: ComparisonResult) -> str:
    return f"{100 * result.confidence:g}%"


def _join(names: Sequence[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def _listed(names: Sequence[str], one: str, many: str) -> str:
    return one if len(names) == 1 else many


def _span(values: Sequence[str]) -> str:
    if not values:
        return ""
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"


# The policy in the head makes a browser refuse anything that is not in the file itself.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<div id="verdict">{verdict}</div>
{facts}
</header>
{sections}
</main>
<footer><p>Written by Steersman.</p></footer>
</body>
</html>
"""

_STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main,footer{max-width:64rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}
h1{font-size:clamp(1.5rem,1.1rem + 2vw,2.25rem);line-height:1.2;margin:0 0 1rem;letter-spacing:-.01em;text-wrap:balance}
h2{font-size:1.3rem;line-height:1.3;margin:0 0 1rem}
h3{font-size:1rem;margin:0 0 .5rem}
section{margin-top:2.75rem;padding-top:1.75rem;border-top:1px solid var(--grid)}
p{margin:0 0 .75rem;max-width:46rem}
.lead{font-size:1.2rem;line-height:1.45}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:1rem 1.5rem;margin:1.5rem 0 0}
.facts div{min-width:0}
dt{color:var(--muted);font-size:.85rem}
dd{margin:0;font-weight:600}
figure{margin:0;min-width:0}
figcaption,.note{color:var(--muted);font-size:.9rem;margin:.5rem 0 0;max-width:46rem}
svg{display:block;width:100%;height:auto;overflow:visible}
.narrow{display:none}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:2rem 2.5rem;align-items:start}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr));gap:1.5rem}
img{display:block;width:100%;max-width:40rem;height:auto;border-radius:6px;border:1px solid var(--grid)}
.scroll{overflow-x:auto;max-width:100%;
background:linear-gradient(to left,var(--paper) 40%,transparent) right/3rem 100% no-repeat local,
linear-gradient(to left,rgb(128 128 128/.4),transparent) right/.9rem 100% no-repeat scroll}
table{border-collapse:collapse;width:100%;overflow-wrap:normal}
th,td{padding:.55rem .9rem .55rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
thead th{color:var(--muted);font-weight:500;font-size:.85rem;white-space:nowrap}
tbody th{font-weight:600}
.numbers td,.numbers th:not(:first-child){text-align:right;white-space:nowrap;padding:.55rem 0 .55rem 1.25rem}
.numbers small{display:block;font-weight:400;color:var(--muted);min-width:12rem}
.matrix th,.matrix thead th:not(:first-child){white-space:normal;overflow-wrap:normal}
.matrix td,.matrix th:not(:first-child){padding-left:.8rem}
.swatch{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em}
.settings{width:auto;font-size:.9rem}
.settings th{font-weight:400}
.settings th:not(:first-child){padding-left:1.5rem}
figure+.scroll{margin-top:1.25rem}
.settings td{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.85rem;padding-left:1.5rem;
min-width:5.5rem;overflow-wrap:anywhere}
details{border-bottom:1px solid var(--grid)}
summary{padding:.7rem 0;cursor:pointer;font-weight:600}
details .scroll,details>p{margin-bottom:1rem}
pre{margin:0;padding:1rem;white-space:pre-wrap;border:1px solid var(--grid);border-radius:6px;
font:.9rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
a{color:inherit;text-underline-offset:.15em}
:focus-visible{outline:2px solid var(--series-0);outline-offset:3px}
footer{padding-top:2.5rem;padding-bottom:2rem;color:var(--muted);font-size:.85rem}
@media (max-width:600px){
main,footer{padding-left:1rem;padding-right:1rem}
header{padding-top:1.5rem}
.numbers td,.numbers th:not(:first-child){padding-left:.9rem}
.numbers small{min-width:8.5rem}
section{margin-top:2rem;padding-top:1.25rem}
.lead{font-size:1.1rem}
.facts{grid-template-columns:1fr 1fr}
.pair,.cards{grid-template-columns:minmax(0,1fr)}
}
@media (max-width:760px){.wide{display:none}.narrow{display:block}}
"""
