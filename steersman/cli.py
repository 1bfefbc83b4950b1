"""The command line: list, train, evaluate, compare, study, demonstrate, cite, demo."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from steersman import catalog
from steersman.errors import InputError, RunError, SteersmanError


@dataclasses.dataclass(frozen=True)
class Systems:
    """List the systems.

    Example: steersman systems --family rl/on_policy
    """

    family: str | None = None
    """Only this family."""
    json: bool = False
    """Print one JSON document instead of a table."""

    def run(self) -> int:
        """Runs the command."""
        found = catalog.systems(self.family)
        if self.json:
            names = ("slug", "title", "family", "entry_point", "study")
            _print_json([{name: getattr(system, name) for name in names} for system in found])
            return 0
        table = _table("system", "family", "paper", "when to use it")
        for system in found:
            table.add_row(system.slug, system.family, f"{system.title} ({system.year})", system.use)
        _console().print(table)
        return 0


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a system on an environment and write a run folder.

    Example: steersman train ppo --env CartPole-v1 --seeds 5 --set surrogate.epsilon=0.1
    """

    system: Positional[str | None] = None
    """The system's slug (see: steersman systems); not needed with --resume."""
    env: str | None = None
    """The environment's name: Steersman's own, gymnax's or Gymnasium's."""
    seeds: int = 1
    """How many seeds are trained side by side."""
    steps: int | None = None
    """Environment steps for each seed; the system's preset for the environment if left out."""
    resume: Path | None = None
    """Continue the run in this folder."""
    out: Path | None = None
    """The run folder; runs/<system>-<env>-<time> if left out."""
    set_: Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="NAME=VALUE")] = ()
    """A hyperparameter, by dotted name; may be repeated. Values: numbers, true/false, lists such as 64,64, a schedule
    linear:START:END[:STEPS], or the name of a surrogate."""
    devices: int | None = None
    """Shard over this many devices."""
    episodes: int = 32
    """Evaluation episodes for each trained policy."""
    json: bool = False
    """Print one JSON document instead of a table."""

    def run(self) -> int:
        """Runs the command."""
        from steersman.training.runs import read_config

        if self.resume is not None:
            if self.system is not None or self.env is not None or self.set_:
                raise InputError("resume was given, so system, env and set must not be: they are in the run folder.")
            config = read_config(self.resume)
            missing = {"system", "env", "settings", "steps", "members"} - set(config)
            if missing:
                raise RunError(f"{self.resume}/config.yaml lacks {', '.join(sorted(missing))} and cannot be resumed.")
            seeds = [int(m["seed"]) for m in config["members"]]
            return self._train(self.resume, config, self.steps or int(config["steps"]), seeds, resume=True)
        if self.system is None:
            raise InputError("system is missing: name one of " + ", ".join(s.slug for s in catalog.systems()) + ".")
        if self.env is None:
            raise InputError("env is missing: name an environment, for example --env CartPole-v1.")
        system = catalog.get(self.system)
        settings = system.preset(self.env)
        steps = int(settings.pop("steps", 1_000_000)) if self.steps is None else self.steps
        settings.pop("steps", None)
        settings |= _assignments(self.set_)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = self.out or Path("runs") / f"{self.system}-{self.env.replace(':', '-')}-{stamp}"
        config = {"system": self.system, "env": self.env, "settings": settings, "steps": steps}
        return self._train(folder, config, steps, self.seeds, resume=False)

    def _train(self, folder: Path, config: dict[str, Any], steps: int, seeds: Any, *, resume: bool) -> int:
        from steersman import envs, training
        from steersman.training.comparison import judge
        from steersman.training.progress import Progress
        from steersman.training.report import ComparisonResult, write_report
        from steersman.training.runs import versions

        problem = envs.as_problem(config["env"])
        system = catalog.get(config["system"])
        # A schedule that names no length of its own ends with the run as it was first planned, also when resumed.
        algorithm = build(system, config["settings"], int(config["steps"]))
        trained = training.train(
            algorithm,
            problem,
            steps=steps,
            seeds=seeds,
            run=folder,
            resume=resume,
            config=config,
            progress=Progress(title=system.slug),
            devices=self.devices,
        )
        result = judge(system.slug, trained, episodes=self.episodes, title=system.title)
        command = f"steersman train {system.slug} --env {config['env']} --seeds {len(trained.members)} --steps {steps}"
        command += "".join(f" --set {name}={value}" for name, value in config["settings"].items())
        report = ComparisonResult(config["env"], {system.slug: result}, versions(), command)
        write_report(report, folder / "report.html")
        if self.json:
            returns = [float(value) for value in result.returns]
            _print_json({"run": str(folder), "system": system.slug, "env": config["env"], "returns": returns})
            return 0
        table = _table("seed", "mean return")
        for member, value in zip(trained.members, result.returns, strict=True):
            table.add_row(str(member.seed), f"{value:.1f}")
        console = _console()
        console.print(table)
        console.print(f"run     {folder}\nreport  {folder / 'report.html'}")
        return 0


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Play episodes with the policies of a run.

    Example: steersman evaluate runs/ppo-CartPole-v1 --episodes 100 --render episode.gif
    """

    run_folder: Positional[Annotated[Path, arg(metavar="RUN")]]
    """The run folder."""
    episodes: int = 32
    """Episodes for each trained policy."""
    render: Path | None = None
    """Write an animation of one episode to this file (.gif)."""
    seed: int = 0
    """Seed of the episodes' starts."""
    json: bool = False
    """Print one JSON document instead of a table."""

    def run(self) -> int:
        """Runs the command."""
        import numpy as np

        from steersman import envs, training
        from steersman.policies import load_policy
        from steersman.training.evaluation import Evaluation
        from steersman.training.runs import atomic, read_config

        config = read_config(self.run_folder)
        folders = sorted((self.run_folder / "policies").glob("*"))
        if not folders:
            raise RunError(f"run folder {self.run_folder} holds no policies yet: its training has not finished.")
        problem = envs.as_problem(config["env"])
        policies = [load_policy(folder) for folder in folders]
        results = [training.evaluate(p, problem, episodes=self.episodes, seed=self.seed) for p in policies]
        everything = Evaluation(
            np.concatenate([r.returns for r in results]), np.concatenate([r.lengths for r in results])
        )
        low, high = everything.interval()
        if self.render is not None:
            picture = training.render(training.record_episode(policies[0], problem, seed=self.seed), problem)
            try:
                with atomic(self.render) as temporary:
                    temporary.write_bytes(picture)
            except OSError as error:
                raise InputError(
                    f"render is {str(self.render)!r}, which cannot be written ({error.strerror})."
                ) from error
        if self.json:
            _print_json(
                {
                    "run": str(self.run_folder),
                    "episodes": len(everything.returns),
                    "mean": everything.mean,
                    "interval": [low, high],
                    "returns": everything.returns.tolist(),
                }
            )
            return 0
        table = _table("policy", "mean return", "mean length")
        for folder, result in zip(folders, results, strict=True):
            table.add_row(folder.name, f"{result.mean:.1f}", f"{result.lengths.mean():.0f}")
        console = _console()
        console.print(table)
        console.print(f"mean {everything.mean:.1f}, 95 % interval [{low:.1f}, {high:.1f}]")
        if self.render is not None:
            console.print(f"rendering  {self.render}")
        return 0


@dataclasses.dataclass(frozen=True)
class Compare:
    """Train several systems side by side and report which is better, and how surely.

    Example: steersman compare ppo trpo spo --env Pendulum-v1 --seeds 10
    """

    systems: Positional[tuple[str, ...]]
    """The systems' slugs."""
    env: str
    """The environment's name."""
    seeds: int = 5
    """Seeds of each system."""
    steps: int | None = None
    """Environment steps for each seed; each system's preset if left out."""
    episodes: int = 32
    """Evaluation episodes of each trained policy."""
    out: Path | None = None
    """Where the report goes; reports/<env>/report.html if left out."""
    json: bool = False
    """Print one JSON document instead of a table."""

    def run(self) -> int:
        """Runs the command."""
        from steersman import envs, training
        from steersman.training.report import check_report_path

        if not self.systems:
            raise InputError("systems is empty: name at least one of " + ", ".join(s.slug for s in catalog.systems()))
        if len(set(self.systems)) != len(self.systems):
            raise InputError(f"systems is {', '.join(self.systems)}, but each may be named only once.")
        chosen = [catalog.get(slug) for slug in self.systems]
        problem = envs.as_problem(self.env)
        algorithms, steps = {}, {}
        for system in chosen:
            settings = system.preset(self.env)
            preset = int(settings.pop("steps", 1_000_000))
            steps[system.slug] = preset if self.steps is None else self.steps
            algorithms[system.slug] = build(system, settings, steps[system.slug])
        report = check_report_path(self.out or Path("reports") / self.env.replace(":", "-") / "report.html", "out")
        _make_folder(report.parent)
        command = f"steersman compare {' '.join(self.systems)} --env {self.env} --seeds {self.seeds}"
        command += f" --steps {self.steps}" if self.steps is not None else ""
        result = training.compare(
            algorithms,
            problem,
            steps=steps,
            seeds=self.seeds,
            episodes=self.episodes,
            titles={system.slug: system.title for system in chosen},
            report=report,
            progress=True,
            command=command,
        )
        summary = result.summary()
        if self.json:
            _print_json({"env": self.env, **summary, "report": str(report)})
            return 0
        table = _table("system", "IQM", "95 % interval", "returns of the seeds")
        for slug, row in summary["systems"].items():
            low, high = row["interval"]
            each = "  ".join(f"{value:.0f}" for value in row["returns"])
            table.add_row(slug, f"{row['iqm']:.1f}", f"[{low:.1f}, {high:.1f}]", each)
        console = _console()
        console.print(table)
        for pair, value in summary["probability_of_improvement"].items():
            probability = value["value"] if isinstance(value, dict) else value
            console.print(f"P({pair}) = {probability:.2f}")
        console.print(f"report  {report.resolve()}", soft_wrap=True)
        return 0


@dataclasses.dataclass(frozen=True)
class Study:
    """Check a paper's main claim on this machine. Exit status 0: every claim holds; 1: one does not; 2: could not run.

    Example: steersman study spo --budget cpu
    """

    slug: Positional[str]
    """The system's slug."""
    budget: Literal["smoke", "cpu", "full"] = "cpu"
    """smoke: seconds, judges nothing; cpu: minutes; full: the paper's own scale."""
    seed: int = 0
    """Seed of the whole study."""
    out: Path | None = None
    """Where figures go; reports/<slug> if left out."""
    json: bool = False
    """Print one JSON document instead of a table."""

    def run(self) -> int:
        """Runs the command."""
        from steersman.studies import run_study

        report = run_study(self.slug, budget=self.budget, seed=self.seed, folder=self.out)
        if self.json:
            _print_json(report.to_json())
            return 0 if report.holds else 1
        console = _console()
        if report.table:
            table = _table(*report.table[0])
            for row in report.table:
                table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
            console.print(table)
        claims = _table("claim", "expected", "measured", "holds")
        for claim in report.claims:
            verdict = {None: "not judged", True: "[green]yes[/]", False: "[red]no[/]"}[claim.holds]
            claims.add_row(claim.text, claim.expected, claim.measured, verdict)
        console.print(claims)
        for note in report.notes:
            console.print(f"note: {note}")
        for figure in report.figures:
            console.print(f"figure  {figure}", soft_wrap=True)
        console.print(f"{report.seconds:.0f} s")
        return 0 if report.holds else 1


@dataclasses.dataclass(frozen=True)
class Demonstrate:
    """Let a task's scripted expert play, and write its episodes as a dataset to learn from.

    Example: steersman demonstrate detour-reach --episodes 200 --format lerobot --out data/detour
    """

    task: Positional[str]
    """The task: detour-reach, drifting-goal, obstacle-gate, pick-and-place or push-t."""
    out: Path
    """The dataset's folder, which must be new. For Minari its name ends with a version, as in data/detour-v0."""
    episodes: int = 100
    """How many."""
    format: Literal["lerobot", "minari"] = "lerobot"
    """LeRobot's format v3.0, or Minari's."""
    seed: int = 0
    """Seed of everything random."""
    set_: Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="NAME=VALUE")] = ()
    """A setting of the task, such as noise=0.1; may be repeated."""
    json: bool = False
    """Print one JSON document instead of a line."""

    def run(self) -> int:
        """Runs the command."""
        from steersman.envs.lerobot_datasets import check_new_folder, write_lerobot_dataset
        from steersman.envs.minari_datasets import check_new_dataset, write_minari
        from steersman.envs.scripted_experts import demonstrate

        # What cannot be written is told before anything is played.
        if self.format == "minari":
            check_new_dataset(self.out.name, self.out.parent)
        else:
            check_new_folder(self.out)
        settings = {name: _literal(text) for name, text in _assignments(self.set_).items()}
        recorded = demonstrate(self.task, self.episodes, self.seed, **settings)
        if self.format == "minari":
            description = f"Episodes of the scripted expert of {self.task}."
            write_minari(self.out.name, recorded, root=self.out.parent, algorithm="script", description=description)
        else:
            write_lerobot_dataset(self.out, recorded)
        success = None if recorded.successes is None else float(recorded.successes.mean())
        document = {
            "task": self.task,
            "format": self.format,
            "out": str(self.out),
            "episodes": len(recorded),
            "steps": recorded.num_steps,
            "mean_return": float(recorded.returns.mean()),
            "success": success,
        }
        if self.json:
            _print_json(document)
            return 0
        succeeded = "" if success is None else f", success {success:.2f}"
        console = _console()
        console.print(
            f"{document['episodes']} episodes, {document['steps']} steps, mean return {document['mean_return']:.2f}"
            + succeeded
        )
        console.print(f"dataset  {self.out}", soft_wrap=True)
        return 0


@dataclasses.dataclass(frozen=True)
class Cite:
    """Print the BibTeX entries of systems.

    Example: steersman cite ppo trpo
    """

    slugs: Positional[tuple[str, ...]]
    """The systems' slugs."""
    json: bool = False
    """Print one JSON document instead of the entries."""

    def run(self) -> int:
        """Runs the command."""
        entries = catalog.cite(*self.slugs)
        if self.json:
            _print_json({slug: catalog.get(slug).bibtex for slug in self.slugs})
        else:
            print(entries)
        return 0


@dataclasses.dataclass(frozen=True)
class Demo:
    """The main job in under two minutes: train three systems on a real task, compare them, and leave a report.

    Example: steersman demo
    """

    out: Path = Path("reports/demo/report.html")
    """Where the report goes."""
    json: bool = False
    """Print one JSON document instead of a table."""

    def run(self) -> int:
        """Runs the command."""
        return Compare(
            systems=("ppo", "trpo", "spo"), env="CartPole-v1", seeds=5, steps=200_000, out=self.out, json=self.json
        ).run()


Command = (
    Annotated[Systems, tyro.conf.subcommand("systems")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[Demonstrate, tyro.conf.subcommand("demonstrate")]
    | Annotated[Cite, tyro.conf.subcommand("cite")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def build(system: catalog.System, settings: dict[str, Any], steps: int) -> Any:
    """The system's algorithm with settings given as text or numbers.

    Args:
        system: a catalog entry.
        settings: hyperparameters by dotted name.
        steps: length of training, where a schedule that names no length ends.
    """
    from steersman.training.algorithm import InteractiveAlgorithm
    from steersman.training.hyperparameters import apply_settings, get_hyperparameter

    entry = system.load()
    if not (isinstance(entry, type) and issubclass(entry, InteractiveAlgorithm)):
        raise InputError(
            f"system is {system.slug!r}, which this command does not train: it works on policies or data of yours, or "
            f"in stages of its own; see its page, and 'steersman study {system.slug}'."
        )
    algorithm = entry()
    values: dict[str, Any] = {}
    for name, text in sorted(settings.items(), key=lambda item: item[0].count(".")):
        first, _, rest = name.partition(".")
        # A hyperparameter of a part that was itself replaced is the new part's.
        owner, inner = (values[first], rest) if rest and first in values else (algorithm, name)
        values[name] = parse(get_hyperparameter(owner, inner), text, name, steps)
    return apply_settings(algorithm, values)


def parse(current: Any, given: Any, name: str, steps: int) -> Any:
    """Turns the text of ``--set name=text`` into a value of the kind that the hyperparameter has now.

    Raises:
        InputError: the text is no such value.
    """
    import equinox as eqx

    from steersman.training import Linear, Schedule

    text = str(given).strip()
    if text.lower() != "none" and isinstance(current, eqx.Module) and not isinstance(current, Schedule):
        # A slot: it can be filled with any part of its kind that needs no further arguments.
        kinds = _parts_like(current)
        if text not in kinds:
            raise InputError(f"{name} is {text!r}, but it must be one of {', '.join(sorted(kinds))}.")
        return kinds[text]()
    if current is None and text in (kinds := _optional_parts()):
        return kinds[text]()
    try:
        if text.startswith("linear:"):
            parts = [float(part) for part in text.split(":")[1:]]
            if len(parts) not in (2, 3):
                raise ValueError
            return Linear(parts[0], parts[1], parts[2] if len(parts) == 3 else steps)
        if text.lower() == "none":
            return None
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, int):
            return int(text)
        if isinstance(current, tuple):
            return tuple(int(part) for part in text.strip("()[]").split(",") if part.strip())
        if isinstance(current, str):
            return text
        return float(text)
    except (ValueError, KeyError):
        kind = {bool: "true or false", int: "a whole number", tuple: "a list such as 64,64"}.get(
            type(current), "a number or linear:START:END[:STEPS]"
        )
        raise InputError(f"{name} is {text!r}, but it must be {kind}.") from None


def _parts_like(part: Any) -> dict[str, Any]:
    """Every part that fits the slot that `part` is in, by name."""
    import equinox as eqx

    kind = type(part).__mro__[type(part).__mro__.index(eqx.Module) - 1]
    return _without_arguments(kind)


def _optional_parts() -> dict[str, Any]:
    """The parts that fill slots which are empty by default, by name."""
    from steersman.policies import Architecture
    from steersman.rl import alternatives, alternatives_from_model, alternatives_from_q, fix_up, phases

    del alternatives_from_model, alternatives_from_q, fix_up  # imported so that their classes are known
    kinds = (Architecture, phases.Phase, alternatives.AlternativeSource)
    return {name: found for kind in kinds for name, found in _without_arguments(kind).items()}


def _without_arguments(kind: Any) -> dict[str, Any]:
    """The concrete subclasses of a class, itself among them, that can be made without arguments."""
    found = {}
    for each in [kind, *kind.__subclasses__()]:
        if each is not kind:
            found |= _without_arguments(each)
        elif not inspect.isabstract(each) and all(
            parameter.default is not parameter.empty for parameter in inspect.signature(each).parameters.values()
        ):
            found[each.__name__] = each
    return found


def _assignments(texts: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise InputError(f"set is {text!r}, but it must be NAME=VALUE, for example learning_rate=3e-4.")
        found[name.strip()] = value.strip()
    return found


def _literal(text: str) -> Any:
    """The value of a setting that has no kind yet: a number, true, false, none or a list; else the text itself."""
    plain = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out is {str(folder)!r}, which cannot be made ({error.strerror}).") from error


def _print_json(document: Any) -> None:
    # JSON has no NaN: a seed that has no return yet is null.
    print(json.dumps(_finite(document), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    return None if isinstance(value, float) and value - value != 0.0 else value


def _console() -> Any:
    from rich.console import Console

    return Console()


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(*columns, show_lines=False, header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    return table


def _use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next run starts at once."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(root) / "steersman" / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``steersman`` command."""
    _use_compilation_cache()
    command = tyro.cli(Command, prog="steersman", description=_DESCRIPTION, args=arguments)
    try:
        status = command.run()
    except SteersmanError as error:
        from steersman.errors import NonFiniteError

        print(f"steersman: {error}", file=sys.stderr)
        status = 1 if isinstance(error, NonFiniteError) else 2
    except KeyboardInterrupt:
        print("steersman: interrupted; continue with: steersman train --resume RUN", file=sys.stderr)
        status = 130
    sys.exit(status)


_DESCRIPTION = """Policy optimization and control: train, compare and check policies.

Shell completion: steersman --tyro-write-completion bash ~/.local/share/bash-completion/completions/steersman"""


if __name__ == "__main__":
    main()
