"""The documentation is true: its Python runs, its commands parse, its links lead somewhere, no system lacks a page."""

import dataclasses
import re
import shlex
import sys
import types
import typing
from pathlib import Path

import pytest
import tyro
import yaml

from steersman import catalog, cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """First line number and text of each fenced block in a language, but those marked ``.no-run``."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match[1] == language and "no-run" not in match[2]:
            yield text.count("\n", 0, match.start(3)), match[3]


def name_of(page):
    return str(page.relative_to(ROOT))


def in_nav(entry):
    """Files that a navigation names, at any depth."""
    if isinstance(entry, str):
        return {entry}
    return set().union(*(in_nav(part) for part in (entry.values() if isinstance(entry, dict) else entry)))


NAV = in_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
COMMANDS = {typing.get_args(member)[1].name: typing.get_args(member)[0] for member in typing.get_args(cli.Command)}


def parsed(line):
    """What a command line means; nothing is run."""
    words = shlex.split(line, comments=True)
    assert words[0] == "steersman", line
    try:
        return tyro.cli(cli.Command, prog="steersman", args=words[1:])
    except SystemExit:
        pytest.fail(f"does not parse: {line}")


def shell_commands():
    """Each line of a shell block that calls steersman, with its page."""
    for page in PAGES:
        for _, text in blocks(page, "bash"):
            for line in text.splitlines():
                if line.startswith("steersman ") and "--tyro" not in line:
                    yield name_of(page), line


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "python"))], ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """All blocks of a page, in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    # Classes that a block defines are looked up by the name of their module.
    module = types.ModuleType("documentation")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code in blocks(page, "python"):
        # Blank lines in front make a traceback point into the page.
        exec(compile("\n" * line + code, str(page), "exec"), module.__dict__)


def test_every_page_is_in_the_navigation():
    found = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert found == NAV


@pytest.mark.parametrize("system", catalog.systems(), ids=lambda system: system.slug)
def test_every_system_has_a_page(system):
    page = f"systems/{system.slug}.md"
    assert page in NAV
    text = (DOCS / page).read_text()
    assert system.bibtex in text
    assert f"<!-- study:{system.slug} -->" in text
    assert "<!-- /study -->" in text
    for heading in ("What it gives", "When to prefer it", "Example", "Guarantees", "Study", "Source"):
        assert f"\n## {heading}\n" in text, heading
    listed = (DOCS / "systems" / "index.md").read_text(), (ROOT / "README.md").read_text()
    assert f"]({system.slug}.md)" in listed[0]
    assert f"`{system.slug}`" in listed[1]


def anchors(page):
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_internal_links_resolve(page):
    text = FENCE.sub("", page.read_text())
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)} links to {target}#{anchor}"


def test_named_commands_exist(capsys):
    with pytest.raises(SystemExit) as ended:
        tyro.cli(cli.Command, prog="steersman", args=["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    for page in PAGES:
        for name in re.findall(r"`steersman (\w+)", page.read_text()):
            assert name in COMMANDS, f"{name_of(page)} names steersman {name}"
    table = (DOCS / "command-line.md").read_text()
    assert all(f"`steersman {name}`" in table for name in COMMANDS)


def test_named_options_exist():
    known = {"help"} | {
        field.name.strip("_").replace("_", "-") for kind in COMMANDS.values() for field in dataclasses.fields(kind)
    }
    for name in re.findall(r"`--([\w-]+)", (DOCS / "command-line.md").read_text()):
        assert name in known, f"command-line.md names --{name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_example_in_help_parses(name):
    example = re.search(r"^\s*Example: (.+)$", COMMANDS[name].__doc__, re.MULTILINE)
    assert example is not None
    assert isinstance(parsed(example[1]), COMMANDS[name])


@pytest.mark.parametrize(("page", "line"), list(shell_commands()))
def test_shell_blocks_parse(page, line):
    """The command parses, its systems exist, and its settings are such as they have."""
    command = parsed(line)
    one = getattr(command, "system", None) or getattr(command, "slug", None)
    several = getattr(command, "systems", None) or getattr(command, "slugs", None) or ()
    for slug in (*several, *([one] if one else [])):
        assert catalog.get(slug).slug == slug
    settings = dict(text.split("=", 1) for text in getattr(command, "set_", ()))
    if one and settings:
        cli.build(catalog.get(one), settings, 1000)


def test_named_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"^make (\w+)|`make (\w+)`", text, re.MULTILINE):
            assert set(name) & targets, f"{name_of(page)} names make {''.join(name)}"
