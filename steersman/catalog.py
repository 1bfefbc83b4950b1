"""The list of systems: what each is, where it comes from, and how it is run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from steersman.errors import InputError, unknown_name


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        slug: its name on the command line.
        title: title of the paper.
        authors: its authors.
        year: year of publication.
        family: the room that it lives in.
        use: one line on when to use it.
        entry_point: dotted path of its algorithm or main function.
        study: dotted path of the study that checks the paper's claim.
        bibtex: the entry that :func:`cite` prints.
        presets: hyperparameters that suit a known environment, by name; ``"mujoco"`` holds for all of Gymnasium's
            MuJoCo tasks. The entry ``steps`` is how long to train there.
    """

    slug: str
    title: str
    authors: str
    year: int
    family: str
    use: str
    entry_point: str
    study: str
    bibtex: str
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def load(self) -> Any:
        """The algorithm class or function behind the entry point."""
        module, _, name = self.entry_point.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def load_study(self) -> Any:
        """The study's module."""
        return importlib.import_module(self.study)

    def preset(self, environment: str) -> dict[str, Any]:
        """Hyperparameters for an environment: its own, or those of its simulator, or ``"*"``, or none."""
        for name in (environment.partition(":")[2], environment, _simulator(environment), "*"):
            if name in self.presets:
                return dict(self.presets[name])
        return {}


def _simulator(environment: str) -> str:
    """``"mujoco"`` for one of Gymnasium's MuJoCo tasks, else an empty string."""
    import gymnasium

    spec = gymnasium.registry.get(environment.partition(":")[2] or environment)
    return "mujoco" if spec is not None and "envs.mujoco" in str(spec.entry_point) else ""


def _bibtex(kind: str, key: str, **entries: str) -> str:
    lines = [f"  {name} = {{{value}}}" for name, value in entries.items()]
    return f"@{kind}{{{key},\n" + ",\n".join(lines) + "\n}"


# Settings for well-known tasks. Classic control wants large steps and short batches; MuJoCo's locomotion wants what
# the paper used (Schulman et al., 2017, table 3), with observation and reward normalization.
_CARTPOLE = {
    "num_envs": 16,
    "num_steps": 128,
    "epochs": 10,
    "minibatches": 8,
    "learning_rate": "linear:1e-3:1e-4:300000",
    "steps": 300_000,
}
_PENDULUM = {
    "num_envs": 16,
    "num_steps": 128,
    "epochs": 10,
    "minibatches": 8,
    "gamma": 0.95,
    "reward_scale": 0.1,
    "initial_log_std": -0.5,
    "learning_rate": "linear:1e-3:0:400000",
    "steps": 400_000,
}
_LOCOMOTION = {
    "num_envs": 8,
    "num_steps": 256,
    "epochs": 10,
    "minibatches": 32,
    "learning_rate": "linear:3e-4:0:1000000",
    "normalize_observations": True,
    "normalize_rewards": True,
    "steps": 1_000_000,
}
_TRUST_REGION_CARTPOLE = {"num_envs": 16, "num_steps": 128, "steps": 300_000}
_TRUST_REGION_PENDULUM = {
    "num_envs": 16,
    "num_steps": 128,
    "gamma": 0.95,
    "reward_scale": 0.1,
    "initial_log_std": -0.5,
    "steps": 600_000,
}
_TRUST_REGION = {
    "CartPole-v1": _TRUST_REGION_CARTPOLE,
    "cartpole-discrete": _TRUST_REGION_CARTPOLE,
    "Pendulum-v1": _TRUST_REGION_PENDULUM,
    "pendulum-swingup": _TRUST_REGION_PENDULUM,
    "mujoco": {
        "num_envs": 8,
        "num_steps": 256,
        "normalize_observations": True,
        "normalize_rewards": True,
        "steps": 1_000_000,
    },
}
_FIRST_ORDER = {
    "CartPole-v1": _CARTPOLE,
    "cartpole-discrete": _CARTPOLE,
    "Pendulum-v1": _PENDULUM,
    "pendulum-swingup": _PENDULUM,
    "mujoco": _LOCOMOTION,
}

_SYSTEMS = [
    System(
        slug="ppo",
        title="Proximal Policy Optimization Algorithms",
        authors="Schulman, Wolski, Dhariwal, Radford, Klimov",
        year=2017,
        family="rl/on_policy",
        use="The default on-policy learner: first-order, forgiving, any network and action space.",
        entry_point="steersman.rl.on_policy.ppo.PPO",
        study="steersman.studies.ppo",
        bibtex=_bibtex(
            "article",
            "schulman2017ppo",
            title="Proximal Policy Optimization Algorithms",
            author="Schulman, John and Wolski, Filip and Dhariwal, Prafulla and Radford, Alec and Klimov, Oleg",
            journal="arXiv preprint arXiv:1707.06347",
            year="2017",
        ),
        presets=_FIRST_ORDER,
    ),
    System(
        slug="trpo",
        title="Trust Region Policy Optimization",
        authors="Schulman, Levine, Moritz, Jordan, Abbeel",
        year=2015,
        family="rl/on_policy",
        use="A hard, audited bound on every update with one number to choose, and almost no tuning.",
        entry_point="steersman.rl.on_policy.trpo.TRPO",
        study="steersman.studies.trpo",
        bibtex=_bibtex(
            "inproceedings",
            "schulman2015trpo",
            title="Trust Region Policy Optimization",
            author="Schulman, John and Levine, Sergey and Moritz, Philipp and Jordan, Michael and Abbeel, Pieter",
            booktitle="Proceedings of the 32nd International Conference on Machine Learning",
            pages="1889--1897",
            year="2015",
        ),
        presets=_TRUST_REGION,
    ),
    System(
        slug="spo",
        title="Simple Policy Optimization",
        authors="Xie, Zhang, Yang, Hutter, Xu",
        year=2025,
        family="rl/on_policy",
        use="PPO's loop with one line changed: ratios are pulled back, which deep networks and many epochs need.",
        entry_point="steersman.rl.on_policy.spo.SPO",
        study="steersman.studies.spo",
        bibtex=_bibtex(
            "inproceedings",
            "xie2025spo",
            title="Simple Policy Optimization",
            author="Xie, Zhengpeng and Zhang, Qiang and Yang, Fan and Hutter, Marco and Xu, Renjing",
            booktitle="Proceedings of the 42nd International Conference on Machine Learning",
            year="2025",
        ),
        presets=_FIRST_ORDER,
    ),
]

_BY_SLUG = {system.slug: system for system in _SYSTEMS}


def systems(family: str | None = None) -> list[System]:
    """All systems, or those of one family.

    Raises:
        InputError: nothing belongs to that family.
    """
    if family is None:
        return list(_SYSTEMS)
    families = {system.family for system in _SYSTEMS}
    found = [system for system in _SYSTEMS if system.family == family or system.family.split("/")[0] == family]
    if not found:
        raise unknown_name("family", family, families)
    return found


def get(slug: str) -> System:
    """The system with this slug.

    Raises:
        InputError: there is none, with the nearest slugs.
    """
    if slug not in _BY_SLUG:
        raise unknown_name("system", slug, _BY_SLUG)
    return _BY_SLUG[slug]


def cite(*slugs: str) -> str:
    """BibTeX of the systems named."""
    if not slugs:
        raise InputError("slugs is empty, but cite needs at least one system.")
    return "\n\n".join(get(slug).bibtex for slug in slugs)
