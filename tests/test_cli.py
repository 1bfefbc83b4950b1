"""The command line, run in this process: what it prints, what it leaves on disk, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from steersman import catalog, cli
from steersman.errors import InputError


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def run_json(capsys, *arguments):
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


TINY = [
    "--set", "num_envs=4", "--set", "num_steps=8", "--set", "hidden=8", "--set", "epochs=1", "--set", "minibatches=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the command line, in a process of its own as a user would start it."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    command = [sys.executable, "-m", "steersman.cli", "train", "ppo", "--env", "cartpole-discrete", "--seeds", "2"]
    command += ["--steps", "64", "--episodes", "2", "--out", str(folder), "--json", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_train_writes_a_run_and_one_json_document(finished):
    folder, document = finished
    assert document["run"] == str(folder)
    assert (document["system"], document["env"]) == ("ppo", "cartpole-discrete")
    assert len(document["returns"]) == 2
    assert all(1 <= value <= 200 for value in document["returns"])
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "metrics.parquet", "checkpoints", "policies", "report.html"} <= names
    assert "<html" in (folder / "report.html").read_text()[:500].lower()


def test_evaluate_and_render(finished, capsys, tmp_path):
    folder, _ = finished
    picture = tmp_path / "episode.gif"
    document = run_json(capsys, "evaluate", str(folder), "--episodes", "3", "--render", str(picture))
    assert document["episodes"] == len(document["returns"]) == 6
    low, high = document["interval"]
    assert low <= document["mean"] <= high
    assert picture.read_bytes()[:6] in (b"GIF89a", b"GIF87a")


def test_resume_continues_with_the_saved_settings(finished, capsys):
    folder, _ = finished
    document = run_json(capsys, "train", "--resume", str(folder), "--steps", "96", "--episodes", "2")
    assert document["run"] == str(folder)
    status, _, err = run(capsys, "train", "ppo", "--resume", str(folder))
    assert status == 2
    assert "system, env and set must not be" in err


def test_systems(capsys):
    document = run_json(capsys, "systems")
    assert {"ppo", "trpo", "spo"} <= {entry["slug"] for entry in document}
    assert all(set(entry) == {"slug", "title", "family", "entry_point", "study"} for entry in document)
    status, out, _ = run(capsys, "systems", "--family", "rl")
    assert status == 0
    assert "Trust Region" in out


def test_compare(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        catalog.System, "preset", lambda self, env: {"num_envs": 4, "num_steps": 8, "hidden": "8", "minibatches": 2}
    )
    report = tmp_path / "out" / "report.html"
    arguments = ["compare", "ppo", "spo", "--env", "cartpole-discrete", "--seeds", "2", "--steps", "64"]
    document = run_json(capsys, *arguments, "--episodes", "2", "--out", str(report))
    assert set(document["systems"]) == {"ppo", "spo"}
    assert all(len(entry["returns"]) == 2 for entry in document["systems"].values())
    assert document["report"] == str(report)
    assert document["probability_of_improvement"]
    assert report.stat().st_size > 10_000


def test_study_exit_status_and_document(capsys, tmp_path, monkeypatch):
    from steersman.studies import Study, ppo

    def stub(holds):
        def fake(budget, seed, folder):
            study = Study("ppo", budget, seed, folder)
            study.claim("c", expected="e", measured="m", holds=holds)
            study.row(a=1.0, b="x")
            return study.report()

        return fake

    for holds, expected in ((True, 0), (False, 1)):
        monkeypatch.setattr(ppo, "run", stub(holds))
        status, out, _ = run(capsys, "study", "ppo", "--out", str(tmp_path), "--json")
        assert status == expected
        document = json.loads(out)
        assert set(document) >= {"slug", "budget", "seed", "seconds", "claims", "table", "figures"}
        assert document["claims"] == [{"text": "c", "expected": "e", "measured": "m", "holds": holds}]
        assert run(capsys, "study", "ppo", "--out", str(tmp_path))[0] == expected


def test_demonstrate_writes_either_format(capsys, tmp_path):
    from steersman.envs.lerobot_datasets import read_lerobot_dataset
    from steersman.envs.minari_datasets import read_minari

    places = {"lerobot": tmp_path / "gate", "minari": tmp_path / "gate-v0"}
    arguments = ["demonstrate", "obstacle-gate", "--episodes", "8", "--seed", "3", "--set", "noise=0.1"]
    documents = {}
    for name, out in places.items():
        documents[name] = run_json(capsys, *arguments, "--format", name, "--out", str(out))
        assert documents[name].pop("format") == name
        assert documents[name].pop("out") == str(out)
    assert documents["lerobot"] == documents["minari"]
    document = documents["lerobot"]
    assert (document["task"], document["episodes"]) == ("obstacle-gate", 8)
    sets = read_lerobot_dataset(places["lerobot"]), read_minari("gate-v0", root=tmp_path)
    for found in sets:
        assert found.num_steps == document["steps"]
        assert found.returns.mean() == pytest.approx(document["mean_return"])
        assert found.successes.mean() == pytest.approx(document["success"])
    status, out, err = run(capsys, *arguments, "--out", str(places["lerobot"]))
    assert (status, out) == (2, "")
    assert "must be new: nothing is overwritten" in err
    assert run(capsys, *arguments, "--out", str(tmp_path / "other"))[0] == 0


def test_cite(capsys):
    status, out, _ = run(capsys, "cite", "ppo", "trpo")
    assert status == 0
    assert out.count("@") == 2
    assert "Schulman" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "pop", "--env", "CartPole-v1"], "Unknown system 'pop': did you mean .*'ppo'"),
        (["train", "ppo", "--env", "CartPol-v1"], "Unknown environment 'CartPol-v1': did you mean 'CartPole-v1'"),
        (["train", "ppo"], "env is missing"),
        (["train", "onedp", "--env", "cartpole-discrete"], "system is 'onedp', which this command does not train"),
        (["train"], "system is missing"),
        (["train", "ppo", "--env", "cartpole-discrete", "--set", "learning_rat=1"], "did you mean 'learning_rate'"),
        (
            ["train", "ppo", "--env", "cartpole-discrete", "--set", "learning_rate"],
            "set is 'learning_rate'.*NAME=VALUE",
        ),
        (["train", "ppo", "--env", "cartpole-discrete", "--set", "learning_rate=fast"], "learning_rate is 'fast'"),
        (["train", "ppo", "--env", "cartpole-discrete", "--set", "epochs=2.5"], r"epochs is '2\.5'.*whole number"),
        (["train", "ppo", "--env", "cartpole-discrete", "--set", "surrogate=Klip"], "surrogate is 'Klip'.*Clip"),
        (["train", "ppo", "--env", "cartpole-discrete", "--seeds", "0"], "seeds is 0"),
        (["train", "ppo", "--env", "cartpole-discrete", "--steps", "-5"], "steps is -5"),
        (["evaluate", "/nowhere"], "is not a run folder"),
        (["compare", "ppo", "ppo", "--env", "cartpole-discrete"], "each may be named only once"),
        # Told before anything is trained.
        (["compare", "ppo", "--env", "cartpole-discrete", "--out", "somewhere"], "out is 'somewhere'"),
        (["study", "pppo"], "Unknown system"),
        (["study", "ppo", "--seed", "-1"], "seed is -1"),
        (["demonstrate", "detour-reech", "--out", "x"], "Unknown task 'detour-reech': did you mean 'detour-reach'"),
        (["demonstrate", "detour-reach", "--out", "x", "--set", "noize=1"], "Unknown setting .* did you mean 'noise'"),
        (["demonstrate", "detour-reach", "--out", "x", "--episodes", "0"], "episodes is 0"),
        (["demonstrate", "detour-reach", "--out", "x", "--set", "noise=-1"], "noise is -1"),
        (["demonstrate", "detour-reach", "--out", "x", "--format", "minari"], "name is 'x', but it must be"),
        (["cite", "xyzzy"], "Unknown system"),
        (["systems", "--family", "zzz"], "Unknown family"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(capsys, arguments, message, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_an_unknown_option_is_status_2(capsys):
    status, _, err = run(capsys, "train", "ppo", "--evn", "CartPole-v1")
    assert status == 2
    assert "--env" in err


def test_slots_are_filled_by_name():
    """Any part of a slot's kind that needs no further arguments, also where the slot is empty or is to be emptied."""
    texts = {
        "surrogate": "LearnedKL",
        "surrogate.bound": "0.1",
        "reference": "MovingAverageReference",
        "reference.decay": "0.5",
        "phase": "FixUp",
        "phase.rows": "64",
        "critic": "NoCritic",
        "optimizer": "SGD",
        "alternatives": "ModelActions",
    }
    algorithm = cli.build(catalog.get("ppo"), texts, 1000)
    slots = {name: type(getattr(algorithm, name)).__name__ for name in texts if "." not in name}
    assert slots == {name: text for name, text in texts.items() if "." not in name}
    assert float(algorithm.surrogate.bound) == pytest.approx(0.1)
    assert (float(algorithm.reference.decay), algorithm.phase.rows) == (0.5, 64)
    assert cli.build(catalog.get("fixpo"), {"phase": "none"}, 1000).phase is None
    with pytest.raises(InputError, match=r"critic is 'FixUp'.*StateCritic"):
        cli.build(catalog.get("ppo"), {"critic": "FixUp"}, 1000)


def test_settings_are_parsed_by_what_they_replace():
    system = catalog.get("ppo")
    texts = {
        "surrogate": "AdaptiveKL",
        "surrogate.target": "0.02",
        "learning_rate": "linear:1e-3:0",
        "hidden": "32,16",
        "normalize_observations": "true",
        "value_clip": "0.3",
        "num_envs": "8",
        "minibatches": "64",
    }
    algorithm = cli.build(system, texts, 1000)
    assert type(algorithm.surrogate).__name__ == "AdaptiveKL"
    assert float(algorithm.surrogate.target) == pytest.approx(0.02)
    assert float(algorithm.learning_rate.steps) == 1000
    assert algorithm.hidden == (32, 16)
    assert algorithm.normalize_observations is True
    assert float(algorithm.value_clip) == pytest.approx(0.3)
    with pytest.raises(InputError, match="true or false"):
        cli.build(system, {"normalize_observations": "maybe"}, 1000)


def test_presets_are_settings_that_every_system_accepts():
    for system in catalog.systems():
        for settings in system.presets.values():
            chosen = {name: value for name, value in settings.items() if name != "steps"}
            cli.build(system, chosen, 1000)


def test_help_of_every_command_has_an_example(capsys):
    for command in ("systems", "train", "evaluate", "compare", "study", "demonstrate", "cite", "demo"):
        status, out, _ = run(capsys, command, "--help")
        assert status == 0
        assert "Example: steersman" in out


def test_completion_can_be_written(tmp_path):
    target = Path(tmp_path) / "completion"
    command = [sys.executable, "-m", "steersman.cli", "--tyro-write-completion", "bash", str(target)]
    subprocess.run(command, check=True)
    assert "steersman" in target.read_text()
