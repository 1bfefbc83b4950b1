"""What the layout promises: rooms import only from rooms above them, and importing the package stays light."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "steersman"
ROOMS = [
    "errors", "envs", "networks", "policies", "returns", "objectives", "training", "rl", "control", "mdp", "diffusion",
    "language", "assurance", "studies", "catalog", "cli",
]  # fmt: skip
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "base"}


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _top_level_imports(tree):
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if node.module == "steersman":
                yield from (f"steersman.{alias.name}" for alias in node.names)
            else:
                yield node.module


def _every_import(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_from_rooms_above(path):
    room = _room(path)
    if room == "__init__":
        return
    assert path.stem not in FORBIDDEN_NAMES
    tree = ast.parse(path.read_text())
    for name in _every_import(tree):
        parts = name.split(".")
        if parts[0] == "steersman" and len(parts) > 1:
            assert ROOMS.index(parts[1]) <= ROOMS.index(room) or (room, parts[1]) == ("studies", "catalog"), (
                f"{path} imports {name}, which is in a room below its own"
            )
    heavy = {"torch", "mujoco", "gymnax", "matplotlib", "brax", "PIL", "numpyro"}
    for name in _top_level_imports(tree):
        assert name.split(".")[0] not in heavy, f"{path} imports {name} at module level"


def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import steersman; s = time.perf_counter() - t;"
        "heavy = {'torch', 'mujoco', 'matplotlib', 'plotly', 'gymnax', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy; assert s < 1.5, s"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=PACKAGE.parent)
