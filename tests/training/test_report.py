import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from steersman.errors import InputError
from steersman.training.report import (
    ComparisonResult,
    SystemResult,
    format_seconds,
    number_format,
    render_report,
    write_report,
)

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects elements and text, and checks that tags close in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "p":
            self.words.append(" ")

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self):
        return [attributes["id"] for attributes in self.all("section")]


def animation():
    frames = [Image.new("RGB", (24, 16), (40 * i, 80, 120)) for i in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=50, loop=0)
    return buffer.getvalue()


def system(name, returns, points=30, **changes):
    returns = np.asarray(returns, dtype=float)
    rng = np.random.default_rng(len(name))
    samples = np.linspace(1000.0, 100_000.0, points)
    curves = returns[:, None] * (1 - np.exp(-samples / 30_000)) + rng.normal(size=(len(returns), points))
    curves[:, 0] = np.nan
    fields = {"title": f"The {name} paper", "config": {"learning_rate": 3e-4, "network": {"hidden": (64, 64)}}}
    fields |= {"seconds": 12.5, "episode": None}
    return SystemResult(name, returns=returns, curve_samples=samples, curve_returns=curves, **(fields | changes))


def comparison(*systems, **changes):
    fields = {"versions": {"python": "3.11.7", "jax": "0.10.2"}, "command": "steersman compare ppo spo --env Cart"}
    return ComparisonResult("CartPole-v1", {one.name: one for one in systems}, **(fields | changes))


@pytest.fixture(scope="module")
def two():
    apart = [490.0, 480.0, 470.0, 460.0, 450.0]
    first = system("ppo", [300.0, 310.0, 320.0, 330.0, 340.0], episode=animation(), episode_caption="seed 2, return 5")
    return comparison(first, system("spo", apart, config={"learning_rate": 1e-3}), evaluation="mean of 20 episodes")


@pytest.fixture(scope="module")
def two_page(two):
    return render_report(two)


def test_the_page_has_every_section_in_order(two_page):
    page = Page(two_page)
    assert page.sections == [
        "learning-curves",
        "final-returns",
        "improvement",
        "results",
        "episodes",
        "configuration",
        "versions",
        "repeat",
    ]
    assert page.all("h1") == [{}]
    assert "ppo against spo on CartPole-v1" in page.text
    assert "spo has the higher interquartile mean return: 470 [" in page.text.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "steersman compare ppo spo --env Cart",
        "3.11.7",
        "network.hidden",
        "[64, 64]",
        "mean of 20 episodes",
    ):
        assert words in page.text


def test_the_page_needs_nothing_from_outside(two_page):
    page = Page(two_page)
    links = {attributes["href"] for attributes in page.all("a")}
    rest = two_page
    for link in links:
        rest = rest.replace(f'<a href="{link}">', "")
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<iframe", rest)
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href"):
            value = attributes.get(name)
            assert value is None or tag == "a" or value.startswith(("data:image/", "#"))
    for target in re.findall(r"url\(([^)]*)\)", rest):
        assert target.startswith("#")


def test_ids_are_unique_and_references_resolve(two_page):
    page = Page(two_page)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes["href"][1:] for attributes in page.all("use")]
    targets += re.findall(r"url\(#([^)]*)\)", two_page)
    targets += [attributes["aria-labelledby"] for attributes in page.all("section")]
    assert targets
    assert set(targets) <= set(ids)


def test_the_page_speaks_to_every_reader(two_page):
    page = Page(two_page)
    metas = {attributes.get("name"): attributes["content"] for attributes in page.all("meta") if "name" in attributes}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert "prefers-color-scheme: dark" in two_page
    assert page.elements[0] == ("html", {"lang": "en"})
    for image in page.all("img"):
        assert "seed 2, return 5" in image["alt"]
        assert (image["width"], image["height"]) == ("24", "16")
    # The animation stands still for those who asked for it.
    assert [source["media"] for source in page.all("source")] == ["(prefers-reduced-motion: reduce)"]
    for figure in page.all("svg"):
        assert figure["role"] == "img"
        assert "ppo" in figure["aria-label"]
    assert all("scope" in attributes for attributes in page.all("th"))


def test_text_of_the_user_is_escaped(two_page):
    evil = "<script>alert('x')</script> & $x_1$ \"q\""
    one = system(evil, [1.0, 2.0], title=evil, config={evil: evil}, episode=animation(), episode_caption=evil)
    result = comparison(one, system("b#1d2126 id=", [2.0, 3.0]), versions={evil: evil}, command=evil, evaluation=evil)
    text = render_report(dataclasses.replace(result, environment=evil))
    page = Page(text)
    assert not page.all("script")
    # Title, verdict, facts, figures, table, episode, settings, versions, command.
    assert page.text.count(evil) >= 12
    assert "b#1d2126 id=" in page.text


def test_size_stays_small(two):
    many = {name: system(name, one.returns, points=5000) for name, one in two.systems.items()}
    assert len(render_report(dataclasses.replace(two, systems=many)).encode()) < 300_000


def test_a_single_run_has_a_page_too():
    result = comparison(system("ppo", [123.0]), command="", versions={})
    page = Page(render_report(result))
    assert page.sections == ["learning-curves", "results", "configuration"]
    assert "ppo reaches a return of 123 with its one seed. A single seed gives no interval" in page.text


def test_one_system_and_several_of_one_seed():
    page = Page(render_report(comparison(system("ppo", [1.0, 2.0, 3.0]))))
    assert page.sections[:3] == ["learning-curves", "final-returns", "results"]
    result = comparison(system("a", [1.0]), system("b", [3.0]), system("c", [2.0]))
    page = Page(render_report(result))
    assert "improvement" in page.sections
    assert "b has the highest interquartile mean return of 3 systems" in page.text
    assert result.summary()["systems"]["a"]["interval"] is None


def test_many_systems_fit():
    page = Page(render_report(comparison(*(system(f"system-{i}", [i, i + 1.5, i + 2.0]) for i in range(9)))))
    assert "row beats column" in page.text
    colours = {attributes["style"] for attributes in page.all("i")}
    assert len(colours) == 8


def test_curves_may_be_empty_or_have_no_episode():
    nothing = system("ppo", [1.0, 2.0], points=4)
    nothing = dataclasses.replace(nothing, curve_returns=np.full((2, 4), np.nan))
    assert "No episode ended during training." in Page(render_report(comparison(nothing))).text
    page = Page(render_report(comparison(nothing, system("spo", [1.0, 2.0]))))
    assert "No episode of ppo ended during training." in page.text
    empty = dataclasses.replace(nothing, curve_samples=np.zeros(0), curve_returns=np.zeros((2, 0)))
    assert "learning-curves" in Page(render_report(comparison(empty))).sections


def test_equal_returns_make_a_page():
    result = comparison(system("a", [500.0] * 3), system("b", [500.0] * 3))
    assert result.verdict().startswith("a and b have the same interquartile mean return, 500.")
    assert Page(render_report(result)).sections[1] == "final-returns"
    Page(render_report(comparison(system("zero", [0.0, 0.0]))))


def test_the_verdict_says_what_the_numbers_say():
    low, high = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [11.0, 12.0, 13.0, 14.0, 15.0, 16.0]
    clear = comparison(system("a", low), system("b", high)).verdict()
    assert clear.startswith("b has the higher interquartile mean return: 13.5 [")
    assert "The two intervals do not overlap." in clear
    assert clear.endswith("A run of b scores higher than a run of a with probability 1.00 [1.00, 1.00].")

    close = comparison(system("a", low), system("b", [1.1, 2.1, 3.1, 4.1, 5.1, 6.1])).verdict()
    assert "The two intervals overlap." in close
    assert close.endswith("These seeds do not settle whether it is better than a.")

    three = comparison(system("a", low), system("b", high), system("c", high[::-1])).verdict()
    assert "b and c have the same interquartile mean return" in three
    assert "Its interval overlaps that of c." in three
    assert "too narrow" in comparison(system("a", [1.0, 2.0])).verdict()


def test_summary_is_plain_json(two):
    found = json.loads(json.dumps(two.summary()))
    assert found["env"] == "CartPole-v1"
    assert found["systems"]["spo"]["returns"] == [490.0, 480.0, 470.0, 460.0, 450.0]
    # The middle three of five.
    assert found["systems"]["spo"]["iqm"] == pytest.approx(470.0)
    low, high = found["systems"]["spo"]["interval"]
    assert 450.0 <= low < 470.0 < high <= 490.0
    assert found["probability_of_improvement"] == {
        "ppo>spo": {"value": 0.0, "interval": [0.0, 0.0]},
        "spo>ppo": {"value": 1.0, "interval": [1.0, 1.0]},
    }


def test_writing_replaces_the_file_in_one_step(two, tmp_path, monkeypatch):
    path = write_report(two, tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8") == render_report(two)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]

    def fail(*_):
        raise OSError("disk full")

    before = path.read_bytes()
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(dataclasses.replace(two, environment="other"), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"returns": np.array([1.0, np.nan])}, r"returns of system 'ppo' is 'NaN or infinite for seed \[1\]'"),
        ({"returns": np.zeros(0)}, "returns' shape of system 'ppo'"),
        ({"curve_returns": np.zeros((3, 30))}, "curve_returns' shape of system 'ppo'"),
        ({"curve_samples": np.linspace(1.0, 0.0, 30)}, "curve_samples of system 'ppo'"),
        ({"curve_returns": np.full((2, 30), np.inf)}, "curve_returns of system 'ppo' is 'infinite'"),
        ({"seconds": -1.0}, "seconds of system 'ppo' is -1.0"),
        ({"episode": b"%PDF-1.7"}, "episode starts with b'%PDF-1.7'"),
    ],
)
def test_bad_results_are_named(changes, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(system("ppo", [1.0, 2.0]), **changes)


def test_bad_comparisons_are_named(two):
    with pytest.raises(InputError, match="systems is"):
        comparison()
    with pytest.raises(InputError, match="path is"):
        write_report(two, "report.pdf")


def test_written_numbers_and_durations():
    number = number_format([np.array([401.23, 499.9])])
    assert (number(480.04), number(-0.2), number(12345.6)) == (
        "480.0",
        "-0.2".replace("-", "\N{MINUS SIGN}"),
        "12,345.6",
    )
    assert number_format([np.array([-1000.0, 1000.0])])(-0.2) == "0"
    assert number_format([np.array([1e-9])])(1e-9) == "1e\N{MINUS SIGN}09"
    assert [format_seconds(s) for s in (0.42, 59.6, 200.0, 7500.0)] == [
        "0.42 s",
        "1 min 00 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
