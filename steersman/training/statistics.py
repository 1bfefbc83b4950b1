"""Statistics of few runs: robust aggregates, bootstrap intervals and comparisons.

Scores are arrays ``[runs, tasks]``, or ``[runs]`` for a single task. Definitions follow Agarwal et al. (2021), "Deep
Reinforcement Learning at the Edge of the Statistical Precipice", arXiv:2108.13264. An interval says how much an
aggregate would vary if the same systems were trained again with other seeds on the same tasks.

A bootstrap knows only the runs that it is given: a 95% interval of the interquartile mean of normal scores covers
the truth in about 50% of the cases with 2 runs, 74% with 3, 90% with 5 and 93% with 10. From a single run nothing
can be resampled, and every interval here collapses to the estimate itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats
from jaxtyping import Float

from steersman.errors import InputError, InputTypeError, require, require_count

#: Maps scores ``[..., runs, tasks]`` to one number each. A function of a single ``[runs, tasks]`` array works too;
#: it is then called once per resample, which is slower.
Statistic = Callable[[np.ndarray], Any]

#: Anything that NumPy makes an array of numbers of.
Numbers = npt.ArrayLike | float | int

#: One number, or an array of them.
Values = np.ndarray | np.floating[Any]

# Elements of one batch of resampled scores: bounds memory, and stays near the caches.
_BATCH = 2_000_000


class Band(NamedTuple):
    """A statistic at many points, with its interval; NaN where it is not known."""

    value: Float[np.ndarray, " K"]
    low: Float[np.ndarray, " K"]
    high: Float[np.ndarray, " K"]


class EstimatorStatistics(NamedTuple):
    """What :func:`estimator_stats` measures of an estimator with values of shape ``[...]``.

    Attributes:
        bias: mean of the replicates minus the truth, ``[...]``.
        bias_interval: ``(low, high)``, each ``[...]``.
        variance: sample variance of one replicate (``n - 1`` in the denominator), ``[...]``.
        variance_interval: ``(low, high)``, each ``[...]``.
        total_variance: the variance summed over all components, which is what gradient estimators are compared by.
        total_variance_interval: ``(low, high)``.
    """

    bias: Values
    bias_interval: tuple[Values, Values]
    variance: Values
    variance_interval: tuple[Values, Values]
    total_variance: float
    total_variance_interval: tuple[float, float]

    @property
    def mean_squared_error(self) -> Values:
        """Estimate of ``bias**2 + variance`` of one replicate, ``[...]``."""
        return self.bias**2 + self.variance


def mean(scores: Numbers) -> Any:
    """Mean over all runs and tasks.

    Args:
        scores: ``[runs]`` or ``[..., runs, tasks]``; leading axes are kept.
    """
    return np.mean(_scores("scores", scores), axis=(-2, -1))


def median(scores: Numbers) -> Any:
    """Median over tasks of the mean over runs; of a single task, the median of its runs.

    The median ignores nearly half of the tasks, and varies more than :func:`interquartile_mean`.

    Args:
        scores: ``[runs]`` or ``[..., runs, tasks]``; leading axes are kept.
    """
    array = _scores("scores", scores)
    return np.median(array[..., 0] if array.shape[-1] == 1 else np.mean(array, axis=-2), axis=-1)


def interquartile_mean(scores: Numbers) -> Any:
    """Mean of the middle half of all scores: the lowest and the highest quarter are left out.

    Of ``n`` scores ``floor(n / 4)`` are dropped at either end, so that three runs or fewer are simply averaged.

    Args:
        scores: ``[runs]`` or ``[..., runs, tasks]``; leading axes are kept.
    """
    array = _scores("scores", scores)
    return scipy.stats.trim_mean(array.reshape(*array.shape[:-2], -1), 0.25, axis=-1)


def optimality_gap(scores: Numbers, target: float = 1.0) -> Any:
    """How far runs fall short of a target score on average: ``mean(target - min(score, target))``; lower is better.

    Args:
        scores: ``[runs]`` or ``[..., runs, tasks]``, normalized so that `target` means the same on every task.
        target: the score beyond which an improvement no longer counts.
    """
    require(bool(np.isfinite(target)), "target", target, "a finite number")
    return target - np.mean(np.minimum(_scores("scores", scores), target), axis=(-2, -1))


def stratified_bootstrap_interval(
    scores: Numbers,
    statistic: Statistic = interquartile_mean,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic; runs are resampled within each task.

    Args:
        scores: ``[runs, tasks]`` or ``[runs]``. A single run gives ``low == high``: it says nothing about other seeds.
        statistic: what is computed of each resample, for example :func:`interquartile_mean`.
        samples: number of resamples.
        confidence: probability mass between the two ends.
        seed: of the resampling.

    Returns:
        ``(low, high)``.

    Raises:
        InputError: a score is not finite, or the statistic does not give one number.
    """
    array = _table("scores", scores)
    rng, quantiles = _resampling(samples, confidence, seed)
    runs, tasks = array.shape
    found = []
    for count in _batches(samples, array.size):
        index = rng.integers(runs, size=(count, runs, tasks))
        found.append(_apply(statistic, np.take_along_axis(array[None], index, axis=1)))
    low, high = np.quantile(np.concatenate(found), quantiles)
    return float(low), float(high)


def probability_of_improvement(x: Numbers, y: Numbers) -> float:
    """Probability that a run of `x` scores higher than a run of `y`, averaged over tasks; a tie counts half.

    This is the Mann-Whitney U statistic of each task, divided by the number of pairs.

    Args:
        x: ``[runs, tasks]`` or ``[runs]``.
        y: scores on the same tasks; the number of runs may differ.
    """
    return float(np.mean(_wins(x, y)))


def probability_of_improvement_interval(
    x: Numbers, y: Numbers, samples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of :func:`probability_of_improvement`; runs are resampled within each task.

    Args:
        x: ``[runs, tasks]`` or ``[runs]``.
        y: scores on the same tasks; the number of runs may differ.
        samples: number of resamples.
        confidence: probability mass between the two ends.
        seed: of the resampling.

    Returns:
        ``(low, high)``. Where every run of one beats every run of the other, both are 1 (or 0), however few there are.
    """
    wins = _wins(x, y)
    rng, quantiles = _resampling(samples, confidence, seed)
    x_runs, y_runs, tasks = wins.shape
    found = []
    for count in _batches(samples, (x_runs + y_runs) * tasks):
        x_share = _shares(rng, count, x_runs, tasks)
        y_share = _shares(rng, count, y_runs, tasks)
        found.append(np.einsum("sit,ijt,sjt->s", x_share, wins, y_share, optimize=True) / tasks)
    low, high = np.quantile(np.concatenate(found), quantiles)
    return float(low), float(high)


def performance_profile(
    scores: Numbers,
    thresholds: Numbers,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Band:
    """Fraction of runs that score above each threshold, averaged over tasks, with a pointwise interval.

    Args:
        scores: ``[runs, tasks]`` or ``[runs]``, on one scale for all tasks.
        thresholds: ``[K]``.
        samples: number of resamples.
        confidence: probability mass between the two ends, at each threshold by itself.
        seed: of the resampling.
    """
    array = _table("scores", scores)
    levels = np.asarray(thresholds, dtype=np.float64)
    require(levels.ndim == 1 and levels.size > 0, "thresholds", levels.shape, "an array of shape [K], K at least 1")
    rng, quantiles = _resampling(samples, confidence, seed)
    runs, tasks = array.shape
    above = (array[..., None] > levels).astype(np.float64).reshape(runs * tasks, -1)
    found = []
    for count in _batches(samples, array.size):
        found.append(_shares(rng, count, runs, tasks).reshape(count, -1) @ above / tasks)
    low, high = np.quantile(np.concatenate(found), quantiles, axis=0)
    return Band(above.mean(axis=0), low, high)


def curve_interval(
    curves: Numbers,
    statistic: Statistic = interquartile_mean,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Band:
    """A statistic over runs at each point of their learning curves, with a pointwise bootstrap interval.

    Whole runs are resampled, so that neighbouring points share their noise.

    Args:
        curves: ``[runs, K]``. NaN means that a run has no value yet; such a point is computed of the other runs, and
            is NaN where there are none. See :func:`hold_last` for gaps within a curve.
        statistic: what is computed over the runs, for example :func:`interquartile_mean`.
        samples: number of resamples.
        confidence: probability mass between the two ends, at each point by itself.
        seed: of the resampling.
    """
    array = _curves("curves", curves)
    _, quantiles = _resampling(samples, confidence, seed)
    band = Band(*(np.full(array.shape[1], np.nan) for _ in range(3)))
    # Points that the same runs have reached are computed together: at most one group per run, unless curves have gaps.
    groups, members = np.unique(~np.isnan(array), axis=1, return_inverse=True)
    for group, present in enumerate(groups.T):
        runs = int(present.sum())
        if runs == 0:
            continue
        columns = np.flatnonzero(np.ravel(members) == group)
        values = array[np.ix_(present, columns)].T
        band.value[columns] = _apply(statistic, values[..., None])
        index = np.random.default_rng(seed).integers(runs, size=(samples, runs))
        width = max(1, _BATCH // index.size)
        for start in range(0, columns.size, width):
            part = slice(start, start + width)
            found = _apply(statistic, values[part][:, index][..., None])
            band.low[columns[part]], band.high[columns[part]] = np.quantile(found, quantiles, axis=1)
    return band


def hold_last(curves: Numbers) -> Float[np.ndarray, "runs K"]:
    """Learning curves whose gaps keep the last value before them; NaN remains only before the first value.

    Args:
        curves: ``[runs, K]``, NaN where nothing was measured.
    """
    array = _curves("curves", curves)
    last = np.where(np.isnan(array), -1, np.arange(array.shape[1]))
    last = np.maximum.accumulate(last, axis=1)
    return np.where(last < 0, np.nan, np.take_along_axis(array, np.maximum(last, 0), axis=1))


def estimator_stats(replicates: Numbers, truth: Numbers, confidence: float = 0.95) -> EstimatorStatistics:
    """Bias and variance of an estimator, from independent replicates of it and the true value.

    The interval of the bias is Student's; it holds for large samples whatever the distribution. The interval of a
    variance is ``variance * exp(+- z * standard error / variance)``, with the standard error of the mean squared
    deviation: unlike the chi-squared interval, it does not assume normal replicates.

    Args:
        replicates: ``[n, ...]``, `n` independent values of the estimator, at least 2.
        truth: the true value, which broadcasts against one replicate.
        confidence: probability that an interval covers, for each component by itself.
    """
    array = np.asarray(replicates, dtype=np.float64)
    require(array.ndim >= 1 and len(array) >= 2, "replicates", array.shape, "an array [n, ...] with n at least 2")
    _require_finite("replicates", array)
    _require_confidence(confidence)
    true = np.asarray(truth, dtype=np.float64)
    _require_finite("truth", true)
    count = len(array)
    try:
        true = np.broadcast_to(true, array.shape[1:])
    except ValueError:
        message = f"truth has shape {true.shape}, but it must broadcast to a replicate's shape {array.shape[1:]}."
        raise InputError(message) from None

    center = array.mean(axis=0)
    bias = center - true
    # With this factor the mean of the squared deviations is the unbiased sample variance.
    squared = (array - center) ** 2 * (count / (count - 1))
    variance = squared.mean(axis=0)
    margin = scipy.stats.t.ppf(0.5 + confidence / 2, count - 1) * np.sqrt(variance / count)
    total = squared.reshape(count, -1).sum(axis=1)
    low, high = _positive_mean_interval(total, confidence)
    return EstimatorStatistics(
        bias=bias,
        bias_interval=(bias - margin, bias + margin),
        variance=variance,
        variance_interval=_positive_mean_interval(squared, confidence),
        total_variance=float(total.mean()),
        total_variance_interval=(float(low), float(high)),
    )


def _positive_mean_interval(values: np.ndarray, confidence: float) -> tuple[Values, Values]:
    """Interval of the mean over the first axis of nonnegative values, symmetric on the logarithmic scale."""
    center = values.mean(axis=0)
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    relative = error / np.where(center > 0, center, 1.0)
    factor = np.exp(scipy.stats.norm.ppf(0.5 + confidence / 2) * relative)
    return center / factor, center * factor


def _scores(argument: str, value: Numbers) -> np.ndarray:
    """Finite float scores with axes ``[..., runs, tasks]``."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputTypeError(f"{argument} is {value!r}, but it must be an array [runs] or [runs, tasks].") from None
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim < 2 or array.size == 0:
        shape = np.shape(value)
        raise InputError(f"{argument} has shape {shape}, but it must be [runs] or [runs, tasks] with at least one run.")
    finite = np.isfinite(array)
    if not finite.all():
        bad = np.flatnonzero(~finite.all(axis=(*range(array.ndim - 2), -1))).tolist()
        raise InputError(
            f"{argument} is NaN or infinite in {len(bad)} of {array.shape[-2]} runs (run {', '.join(map(str, bad))}), "
            "but every score must be a finite number: give a failed run the score that it deserves, or leave it out."
        )
    return array


def _table(argument: str, value: Numbers) -> np.ndarray:
    """Finite scores ``[runs, tasks]``."""
    array = _scores(argument, value)
    if array.ndim != 2:
        raise InputError(f"{argument} has shape {array.shape}, but it must be [runs] or [runs, tasks].")
    return array


def _curves(argument: str, value: Numbers) -> np.ndarray:
    """Curves ``[runs, K]`` that may hold NaN, but not infinity."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"{argument} has shape {array.shape}, but it must be [runs, K] with at least one of each.")
    infinite = int(np.isinf(array).sum())
    require(infinite == 0, argument, f"infinite at {infinite} points", "finite, or NaN where there is no value yet")
    return array


def _wins(x: Numbers, y: Numbers) -> Float[np.ndarray, "x_runs y_runs tasks"]:
    """1 where a run of `x` beats a run of `y`, 0.5 where they tie."""
    first, second = _table("x", x), _table("y", y)
    tasks = (first.shape[1], second.shape[1])
    require(tasks[0] == tasks[1], "number of tasks of x and y", tasks, "equal")
    return (first[:, None] > second[None]) + 0.5 * (first[:, None] == second[None])


def _shares(rng: np.random.Generator, samples: int, runs: int, tasks: int) -> Float[np.ndarray, "samples runs tasks"]:
    """How large a share of each resample each run has, within each task."""
    index = rng.integers(runs, size=(samples, runs, tasks))
    # One histogram for all resamples: each (resample, task) counts in bins of its own.
    offset = (np.arange(samples)[:, None, None] * tasks + np.arange(tasks)) * runs
    counts = np.bincount((index + offset).ravel(), minlength=samples * tasks * runs)
    return counts.reshape(samples, tasks, runs).swapaxes(1, 2) / runs


def _batches(samples: int, size: int) -> Iterator[int]:
    """Numbers of resamples that are computed together."""
    width = max(1, _BATCH // size)
    for start in range(0, samples, width):
        yield min(width, samples - start)


def _apply(statistic: Statistic, batch: Float[np.ndarray, "... runs tasks"]) -> Float[np.ndarray, "..."]:
    """`statistic` of each ``[runs, tasks]`` array, all at once where it can."""
    leading = batch.shape[:-2]
    result = np.asarray(statistic(batch), dtype=np.float64)
    if result.shape == leading:
        return result
    single = [np.asarray(statistic(one), dtype=np.float64) for one in batch.reshape(-1, *batch.shape[-2:])]
    shape = single[0].shape
    require(shape == (), "statistic's result", f"an array of shape {shape}", "one number for one array [runs, tasks]")
    return np.stack(single).reshape(leading)


def _resampling(samples: int, confidence: float, seed: int) -> tuple[np.random.Generator, tuple[float, float]]:
    """The generator and the two quantiles of a percentile bootstrap."""
    require_count("samples", samples)
    require_count("seed", seed, minimum=0)
    _require_confidence(confidence)
    return np.random.default_rng(seed), (0.5 - confidence / 2, 0.5 + confidence / 2)


def _require_confidence(confidence: float) -> None:
    require(0.0 < confidence < 1.0, "confidence", confidence, "above 0 and below 1")


def _require_finite(argument: str, array: np.ndarray) -> None:
    bad = int((~np.isfinite(array)).sum())
    require(bad == 0, argument, f"NaN or infinite at {bad} of {array.size} entries", "finite everywhere")
