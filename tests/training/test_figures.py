import numpy as np
import pytest
from PIL import Image

from steersman.errors import InputError
from steersman.training import figures
from steersman.training.statistics import Band


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.25, "0.25"),
        (-50.0, "\N{MINUS SIGN}50"),
        (5000.0, "5,000"),
        (20_000.0, "20k"),
        (200_000.0, "200k"),
        (999_950.0, "1M"),
        (1_250_000.0, "1.25M"),
        (-3e9, "\N{MINUS SIGN}3B"),
    ],
)
def test_axis_numbers(value, text):
    assert figures.format_count(value) == text


def test_decimation_keeps_means_and_the_end():
    samples = np.arange(1.0, 1001.0)
    curves = np.stack([samples, np.where(samples <= 500, np.nan, 7.0)])
    x, blocks = figures.decimate(samples, curves, points=100)
    assert x.shape == (100,)
    assert x[-1] == 1000.0
    np.testing.assert_allclose(blocks[0], np.arange(5.5, 1000.0, 10.0))
    np.testing.assert_array_equal(blocks[1], [np.nan] * 50 + [7.0] * 50)
    assert figures.decimate(samples, curves, points=1000)[1] is curves


def test_labels_move_apart_as_little_as_possible():
    np.testing.assert_allclose(figures.spread([0.1, 0.5, 0.52], 0.1), [0.1, 0.46, 0.56])
    assert figures.spread([], 0.1) == []


def test_figures_are_saved_and_inlined(tmp_path):
    x, value = np.arange(5.0), np.arange(5.0)
    curves = {"a": (x, Band(value, value - 1, value + 1)), "b": (x, Band(value, value, value))}
    figure = figures.learning_curves(curves, x_label="time [s]", size=(4.0, 3.0))
    with Image.open(figures.save_figure(figure, tmp_path / "new" / "figure.png")) as image:
        assert image.size == (800, 600)
    assert figures.save_figure(figure, tmp_path / "figure.svg").read_text().startswith("<?xml")
    text = figures.inline_svg(figure, "one", "A figure")
    assert text == figures.inline_svg(figure, "one", "A figure")
    assert ">time [s]</text>" in text
    assert "var(--series-0, #1192f4)" in text
    estimates = {"a": figures.Estimate(1.0, 0.5, 1.5, [0.2, 1.8]), "b": figures.Estimate(2.0)}
    assert ">b</text>" in figures.inline_svg(figures.interval_plot(estimates), "two", "Intervals")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: figures.learning_curves({}), "curves is"),
        (lambda: figures.interval_plot({}), "estimates is"),
        (lambda: figures.performance_profiles(np.zeros(2), {}), "profiles is"),
        (lambda: figures.improvement_plot({}), "pairs is"),
        (lambda: figures.save_figure(figures.interval_plot({"a": figures.Estimate(1.0)}), "a.bmp"), "path is 'a.bmp'"),
        (lambda: figures.inline_svg(figures.interval_plot({"a": figures.Estimate(1.0)}), "1 2", ""), "prefix is '1 2'"),
        (
            lambda: figures.learning_curves({"a": (np.zeros(1), Band(*np.zeros((3, 1))))}, label="inside"),
            "label is 'inside'",
        ),
    ],
)
def test_bad_figures_are_named(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_curves_without_points_are_drawn_empty():
    nothing = np.zeros(0)
    figure = figures.learning_curves({"a": (nothing, Band(nothing, nothing, nothing))})
    assert "environment steps" in figures.inline_svg(figure, "empty", "Nothing")
