import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steersman.errors import InputError, InputTypeError
from steersman.training.statistics import (
    curve_interval,
    estimator_stats,
    hold_last,
    interquartile_mean,
    mean,
    median,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    probability_of_improvement_interval,
    stratified_bootstrap_interval,
)

SCORES = hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 3)), elements=st.integers(-5, 5).map(float))


def test_aggregates_of_hand_computed_scores():
    scores = np.array([[0.0, 10.0], [1.0, 20.0], [2.0, 30.0], [3.0, 100.0]])
    assert mean(scores) == pytest.approx(166 / 8)
    # Task means are 1.5 and 40.
    assert median(scores) == pytest.approx(20.75)
    # Of the sorted eight the middle four are 2, 3, 10, 20.
    assert interquartile_mean(scores) == pytest.approx(8.75)
    assert optimality_gap(scores, target=2.0) == pytest.approx(np.mean([2, 0, 1, 0, 0, 0, 0, 0]))


def test_a_single_task_may_leave_out_its_axis():
    runs = [4.0, 1.0, 2.0, 9.0, 100.0]
    for statistic in (mean, median, interquartile_mean, optimality_gap):
        assert statistic(runs) == pytest.approx(statistic(np.array(runs)[:, None]))
    assert median(runs) == 4.0
    assert interquartile_mean(runs) == pytest.approx(5.0)
    assert interquartile_mean([1.0, 2.0, 9.0]) == pytest.approx(4.0)


@settings(max_examples=20, deadline=None)
@given(SCORES)
def test_leading_axes_are_kept_and_the_order_of_runs_does_not_matter(scores):
    stacked = np.stack([scores, scores[::-1] + 1.0])
    for statistic in (mean, median, interquartile_mean):
        expected = statistic(scores)
        np.testing.assert_allclose(statistic(stacked), [expected, expected + 1.0], atol=1e-12)
    assert interquartile_mean(scores) == pytest.approx(scipy.stats.trim_mean(scores, 0.25, axis=None))


def test_bootstrap_of_two_runs_is_known_by_enumeration():
    # Resampled means are 0, 3 and 6 with probabilities 1/4, 1/2, 1/4.
    assert stratified_bootstrap_interval([0.0, 6.0], mean) == (0.0, 6.0)
    assert stratified_bootstrap_interval([0.0, 6.0], mean, confidence=0.4) == (3.0, 3.0)


def test_runs_are_resampled_within_each_task():
    # Were whole runs or pooled scores resampled, the mean of both tasks would vary by tens.
    scores = np.array([[0.0, 100.0], [0.0, 100.0], [0.0, 100.0]])
    assert stratified_bootstrap_interval(scores, mean) == (50.0, 50.0)
    # Tasks are independent: both means are extreme together with probability 1/16 only, so the ends are reached at
    # 87.6% and not at 87.4%.
    scores = np.array([[0.0, 0.0], [1.0, 1.0]])
    assert stratified_bootstrap_interval(scores, mean, samples=40_000, confidence=0.89) == (0.0, 1.0)
    assert stratified_bootstrap_interval(scores, mean, samples=40_000, confidence=0.86) == (0.25, 0.75)


def test_bootstrap_agrees_with_scipy_and_with_the_closed_form():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=40)
    low, high = stratified_bootstrap_interval(scores, mean, samples=20_000)
    width = scipy.stats.norm.ppf(0.975) * scores.std() / np.sqrt(40)
    np.testing.assert_allclose([low, high], [scores.mean() - width, scores.mean() + width], atol=0.03)

    reference = scipy.stats.bootstrap((scores,), np.median, method="percentile", n_resamples=20_000, rng=rng)
    found = stratified_bootstrap_interval(scores, median, samples=20_000)
    np.testing.assert_allclose(found, reference.confidence_interval, atol=0.03)


def test_intervals_of_normal_scores_cover_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        low, high = stratified_bootstrap_interval(rng.normal(size=20), samples=400, seed=seed)
        hits += low <= 0.0 <= high
    assert 0.88 <= hits / 300 <= 0.99


def test_one_run_gives_a_degenerate_interval():
    assert stratified_bootstrap_interval([3.5]) == (3.5, 3.5)
    assert probability_of_improvement_interval([1.0], [0.0]) == (1.0, 1.0)
    band = curve_interval([[1.0, 2.0]])
    np.testing.assert_array_equal(band, [[1.0, 2.0]] * 3)


def test_a_statistic_that_takes_one_array_works_too():
    scores = np.arange(12.0).reshape(6, 2)
    assert stratified_bootstrap_interval(scores, np.mean) == stratified_bootstrap_interval(scores, mean)
    with pytest.raises(InputError, match="statistic's result"):
        stratified_bootstrap_interval(scores, lambda one: one.mean(axis=0), samples=10)


def test_the_seed_decides():
    scores = np.random.default_rng(0).normal(size=10)
    first = stratified_bootstrap_interval(scores, seed=1)
    assert first == stratified_bootstrap_interval(scores, seed=1)
    assert first != stratified_bootstrap_interval(scores, seed=2)


def test_large_inputs_are_computed_in_parts_with_the_same_meaning():
    scores = np.random.default_rng(0).normal(size=(60, 50))
    low, high = stratified_bootstrap_interval(scores, mean, samples=2000)
    width = 1.96 * np.sqrt(scores.var(axis=0).mean() / scores.size)
    np.testing.assert_allclose([low, high], [scores.mean() - width, scores.mean() + width], atol=0.1 * width)


@settings(max_examples=20, deadline=None)
@given(SCORES, st.integers(1, 5), st.integers(0, 100))
def test_probability_of_improvement_is_the_mann_whitney_statistic(x, runs, seed):
    y = np.random.default_rng(seed).integers(-5, 6, size=(runs, x.shape[1])).astype(float)
    u = scipy.stats.mannwhitneyu(x, y, axis=0, method="asymptotic").statistic
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(u / (len(x) * runs)))
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1.0)


def test_ties_count_half():
    assert probability_of_improvement([1.0, 2.0], [1.0, 1.0]) == 0.75
    assert probability_of_improvement([5.0, 5.0], [5.0]) == 0.5


def test_interval_of_the_probability_of_improvement_by_enumeration():
    # A resample of x beats y = 1 with 0, 1 or 2 of its two runs: 1/4, 1/2, 1/4.
    assert probability_of_improvement_interval([0.0, 2.0], [1.0]) == (0.0, 1.0)
    assert probability_of_improvement_interval([0.0, 2.0], [1.0], confidence=0.4) == (0.5, 0.5)
    # A second task on which x always wins lifts every value to the mean with 1.
    x, y = np.array([[0.0, 5.0], [2.0, 5.0]]), np.array([[1.0, 1.0]])
    assert probability_of_improvement_interval(x, y) == (0.5, 1.0)


def test_performance_profile_counts_runs_above():
    band = performance_profile([[1.0, 10.0], [3.0, 10.0]], [0.0, 1.0, 2.0, 3.0, 10.0])
    np.testing.assert_allclose(band.value, [1.0, 0.75, 0.75, 0.5, 0.0])
    np.testing.assert_allclose(band.low, [1.0, 0.5, 0.5, 0.5, 0.0])
    np.testing.assert_allclose(band.high, [1.0, 1.0, 1.0, 0.5, 0.0])


def test_curve_interval_is_the_interval_at_each_point():
    rng = np.random.default_rng(0)
    curves = rng.normal(size=(8, 5))
    band = curve_interval(curves, samples=8000)
    for k in range(5):
        assert band.value[k] == pytest.approx(interquartile_mean(curves[:, k]))
        expected = stratified_bootstrap_interval(curves[:, k], samples=8000, seed=k)
        np.testing.assert_allclose([band.low[k], band.high[k]], expected, atol=0.08)
    # Points share their resamples: a constant offset between two curves' points is an exact offset of the band.
    band = curve_interval(np.stack([curves[:, 0], curves[:, 0] + 2.0], axis=1))
    np.testing.assert_allclose(np.diff(band, axis=1), 2.0)


def test_curves_start_where_their_runs_do():
    nan = np.nan
    band = curve_interval([[nan, nan, 1.0, 1.0], [nan, 3.0, 3.0, 3.0]], mean)
    np.testing.assert_array_equal(band.value, [nan, 3.0, 2.0, 2.0])
    np.testing.assert_array_equal(band.low, [nan, 3.0, 1.0, 1.0])
    np.testing.assert_array_equal(band.high, [nan, 3.0, 3.0, 3.0])


def test_hold_last_fills_gaps_but_not_the_start():
    nan = np.nan
    held = hold_last([[nan, 1.0, nan, nan, 4.0], [nan] * 5])
    np.testing.assert_array_equal(held, [[nan, 1.0, 1.0, 1.0, 4.0], [nan] * 5])


def test_estimator_stats_of_hand_computed_replicates():
    found = estimator_stats([1.0, 2.0, 6.0], 2.5)
    assert found.bias == pytest.approx(0.5)
    assert found.variance == pytest.approx(7.0)
    assert found.mean_squared_error == pytest.approx(7.25)
    expected = scipy.stats.t.interval(0.95, 2, loc=0.5, scale=np.sqrt(7 / 3))
    np.testing.assert_allclose(found.bias_interval, expected)
    assert found.total_variance == pytest.approx(7.0)
    np.testing.assert_allclose(found.total_variance_interval, found.variance_interval)


def test_estimator_stats_of_vectors():
    replicates = np.random.default_rng(0).normal([1.0, -2.0], [1.0, 3.0], size=(50, 2))
    found = estimator_stats(replicates, [1.0, 0.0])
    np.testing.assert_allclose(found.variance, np.var(replicates, axis=0, ddof=1))
    assert found.total_variance == pytest.approx(found.variance.sum())
    low, high = found.bias_interval
    assert low[1] < -2.0 < high[1]
    constant = estimator_stats(np.ones((4, 2)), 1.0)
    np.testing.assert_array_equal(constant.variance_interval, np.zeros((2, 2)))


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_estimator_intervals_cover_the_truth(draw):
    # 400 experiments of 200 replicates, as components of one estimator; both distributions have variance one.
    rng = np.random.default_rng(1)
    replicates = getattr(rng, draw)(size=(200, 400))
    found = estimator_stats(replicates, 0.0 if draw == "normal" else 1.0)
    for (low, high), truth in ((found.bias_interval, 0.0), (found.variance_interval, 1.0)):
        assert 0.86 <= np.mean((low <= truth) & (truth <= high)) <= 0.99


def test_five_systems_take_well_under_a_second():
    systems = np.random.default_rng(0).normal(size=(5, 10))
    start = time.perf_counter()
    for returns in systems:
        stratified_bootstrap_interval(returns)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mean([1.0, np.nan, 2.0]), InputError, "scores is NaN or infinite in 1 of 3 runs .run 1."),
        (lambda: stratified_bootstrap_interval([[1.0, np.inf]]), InputError, "scores is NaN or infinite in 1 of 1"),
        (lambda: median([]), InputError, "scores has shape"),
        (lambda: mean(["a"]), InputTypeError, "scores is"),
        (lambda: mean(3.0), InputError, "scores has shape"),
        (lambda: stratified_bootstrap_interval(np.ones((2, 3, 4))), InputError, "scores has shape"),
        (lambda: stratified_bootstrap_interval([1.0], samples=0), InputError, "samples is 0"),
        (lambda: stratified_bootstrap_interval([1.0], samples=True), InputTypeError, "samples is True"),
        (lambda: stratified_bootstrap_interval([1.0], confidence=95.0), InputError, "confidence is 95"),
        (lambda: stratified_bootstrap_interval([1.0], seed=-1), InputError, "seed is -1"),
        (lambda: optimality_gap([1.0], target=np.nan), InputError, "target is nan"),
        (lambda: probability_of_improvement([1.0], [np.nan]), InputError, "y is NaN or infinite"),
        (lambda: probability_of_improvement([1.0], [[1.0, 2.0]]), InputError, "number of tasks of x and y"),
        (lambda: performance_profile([1.0], [[1.0]]), InputError, "thresholds is"),
        (lambda: curve_interval([1.0]), InputError, "curves has shape"),
        (lambda: curve_interval([[1.0, np.inf]]), InputError, "curves is 'infinite at 1 points'"),
        (lambda: estimator_stats([1.0], 0.0), InputError, "replicates is"),
        (lambda: estimator_stats([1.0, np.nan], 0.0), InputError, "replicates is 'NaN or infinite at 1 of 2"),
        (lambda: estimator_stats([1.0, 2.0], np.nan), InputError, "truth is"),
        (lambda: estimator_stats([1.0, 2.0], [0.0, 0.0]), InputError, "truth has shape"),
        (lambda: estimator_stats([1.0, 2.0], 0.0, confidence=1.0), InputError, "confidence is 1.0"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
