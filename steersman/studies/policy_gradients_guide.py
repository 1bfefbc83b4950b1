"""Do the methods that hold a policy back lead those that do not, on equal footing? (arXiv:2401.13662)

The guide trains REINFORCE, A2C, TRPO, PPO and V-MPO on MuJoCo tasks for eight million steps and finds that the methods
with a trust region, a clip or a bound on the divergence lead. Here they swing up a pendulum with equal networks and
numbers of samples and grids of three values each; A2C gets such a grid for each of three lengths of rollout. A sixth
arm is PPO's loop without its clip, and a seventh, at one step size, V-MPO with the divergence of the policy from itself
that the guide's code has, whose return is reported and not judged. The theory is put to the test on exact tables.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from steersman.envs import as_problem
from steersman.mdp import (
    expected_return,
    monotone_step_size,
    natural_gradient_bound,
    natural_policy_gradient,
    random_mdp,
    softmax_policy_gradient,
    value_iteration,
)
from steersman.policies import Head
from steersman.rl.on_policy.a2c import A2C
from steersman.rl.on_policy.policy_gradients_guide import guide_algorithms
from steersman.rl.on_policy.ppo import PPO
from steersman.rl.on_policy.reinforce import REINFORCE
from steersman.rl.on_policy.trpo import TRPO
from steersman.rl.on_policy.vmpo import VMPO
from steersman.rl.references import Reference
from steersman.rl.surrogates import Unclipped
from steersman.studies.study import Report, Study
from steersman.studies.swing_up import SETTINGS, final_returns, swing_up
from steersman.training import Linear, Trained, train
from steersman.training.comparison import learning_curves
from steersman.training.figures import learning_curves as draw_curves
from steersman.training.figures import save_figure
from steersman.training.statistics import Band, curve_interval

_RATES = [3e-4, 1e-3, 3e-3]
#: For methods that take few steps: A2C, and REINFORCE above all.
_LARGE_RATES = [1e-3, 3e-3, 1e-2]
_BUDGETS = [0.01, 0.03, 0.1]
_HELD = ("PPO", "V-MPO", "TRPO")


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("policy-gradients-guide", budget, seed, folder)
    if study.budget == "full":
        return _mujoco(study)
    _swing_up(study)
    _theory(study)
    return study.report()


class ItsOwn(Reference):
    """The policy itself, as it is at every step: a divergence from it is zero and has no gradient."""

    def relabel(
        self, state: PyTree, rows: Any, learned: PyTree, parameters_of: Callable[..., PyTree], head: Head
    ) -> Any:
        return rows._replace(parameters=parameters_of(learned))


def _swing_up(study: Study) -> None:
    smoke = study.budget == "smoke"
    steps = 4_096 if smoke else 200_000
    seeds = [study.seed + i for i in range(1 if smoke else 5)]
    problem = swing_up()
    shared: dict[str, Any] = {**SETTINGS, "hidden": (8,)} if smoke else SETTINGS

    def first_order(kind: Any, rates: list[float], **changes: Any) -> Trained:
        algorithm = kind(**{**shared, "learning_rate": Linear(rates[0], 0.0, steps), **changes})
        sweep = {"learning_rate.start": rates}
        return train(algorithm, problem, steps=steps, seeds=seeds, sweep=sweep)

    # Returns need whole episodes, which take 200 steps here.
    whole = {"num_envs": 10, "num_steps": 200, "lam": 1.0}
    bounded = {name: value for name, value in shared.items() if name != "max_gradient_norm"}
    makers = {
        "REINFORCE": lambda: first_order(REINFORCE, _LARGE_RATES, **whole),
        "A2C, T=8": lambda: first_order(A2C, _LARGE_RATES, num_steps=8, minibatches=1),
        "A2C, T=16": lambda: first_order(A2C, _LARGE_RATES, num_steps=16, minibatches=1),
        "A2C, T=128": lambda: first_order(A2C, _LARGE_RATES),
        "TRPO": lambda: train(TRPO(**bounded), problem, steps=steps, seeds=seeds, sweep={"target_kl": _BUDGETS}),
        "PPO": lambda: first_order(PPO, _RATES),
        "V-MPO": lambda: first_order(VMPO, _RATES),
        "no clip": lambda: first_order(PPO, _RATES, surrogate=Unclipped()),
        "no bound": lambda: first_order(VMPO, [1e-3], reference=ItsOwn()),
    }
    # Every arm is one more program to compile; two of them show that the wiring holds.
    arms: dict[str, Trained] = {n: make() for n, make in makers.items() if not smoke or n in ("REINFORCE", "V-MPO")}

    curves: dict[tuple[str, float], np.ndarray] = {}
    mean: dict[tuple[str, float], float] = {}
    for name, trained in arms.items():
        returns = final_returns(trained).reshape(-1, len(seeds))
        course = learning_curves(trained, points=50)[1].reshape(len(returns), len(seeds), -1)
        reach = trained.metrics["kl"].max(axis=0).reshape(-1, len(seeds)).max(axis=1)
        for i, member in enumerate(trained.members[:: len(seeds)]):
            value = next(iter(member.settings.values()))
            curves[name, value], mean[name, value] = course[i], float(np.mean(returns[i]))
            study.row(
                arm=name,
                setting=f"{value:g}",
                mean_return=mean[name, value],
                lowest_seed=float(np.min(returns[i])),
                mean_over_training=float(np.nanmean(course[i])),
                largest_mean_kl=float(reach[i]),
            )

    def best(method: str) -> tuple[str, float]:
        """The setting of a method's grid with the highest mean return."""
        return max((arm for arm in mean if arm[0].startswith(method)), key=mean.__getitem__)

    def top(method: str) -> tuple[float, str]:
        """That mean return, and the same in words."""
        arm = best(method)
        length = "" if arm[0] == method else arm[0].removeprefix(f"{method}, ") + ", "
        return mean[arm], f"{mean[arm]:.0f} ({length}{arm[1]:g})"

    held = [name for name in _HELD if name in arms]
    for name in held:
        study.claim(
            f"{name} learns the task.",
            expected="mean return of the best setting >= -350",
            measured=top(name)[1],
            holds=top(name)[0] >= -350,
        )
    leader = max(held, key=lambda name: top(name)[0])
    for name in ("A2C", "REINFORCE"):
        if any(arm.startswith(name) for arm in arms):
            study.claim(
                f"{name}, which uses each sample once and holds nothing back, trails, at its best setting too.",
                expected="at least 250 below the best of PPO, V-MPO and TRPO",
                measured=f"{top(leader)[0] - top(name)[0]:.0f} below {leader}: {top(name)[1]} against {top(leader)[1]}",
                holds=top(leader)[0] - top(name)[0] >= 250,
            )
    if "no clip" in arms:
        study.claim(
            "Several epochs over a batch need something that holds the policy back: without the clip they do harm.",
            expected="at least 250 below PPO, both at their best step size",
            measured=f"{top('PPO')[0] - top('no clip')[0]:.0f} below: {top('no clip')[1]} against {top('PPO')[1]}",
            holds=top("PPO")[0] - top("no clip")[0] >= 250,
        )
    if "no bound" in arms:
        loose, kept = (("no bound", 1e-3), ("V-MPO", 1e-3))
        study.note(
            f"V-MPO with the divergence of the policy from itself (no bound) reaches {mean[loose]:.0f}, where V-MPO "
            f"reaches {mean[kept]:.0f} at the same step size, 0.001: on this task the return does not tell them apart. "
            "The largest mean divergence of an update does, and so do the tests."
        )
    drawn = {}
    for method in ("REINFORCE", "A2C", "no clip", "TRPO", "PPO", "V-MPO"):
        if any(name.startswith(method) for name in arms):
            name, value = best(method)
            samples = learning_curves(arms[name], points=50)[0]
            drawn[f"{name}, {value:g}"] = (samples, curve_interval(curves[name, value]))
    save_figure(draw_curves(drawn, label="legend"), study.figure("learning-curves"))


def _theory(study: Study) -> None:
    count, iterations = (2, 10) if study.budget == "smoke" else (20, 100)
    states, actions, discount, rates = 10, 4, 0.9, (0.1, 1.0)

    def ascend(key: Key[Array, ""]) -> tuple[Array, Array]:
        tables, rewards = jax.random.split(key)
        mdp = random_mdp(tables, states, actions, discount=discount)
        mdp = mdp.replace(reward=jax.random.uniform(rewards, (states, actions)))
        best = expected_return(mdp, value_iteration(mdp, tolerance=1e-10).policy)
        natural = jax.vmap(lambda rate: natural_policy_gradient(mdp, rate, iterations).returns)(jnp.asarray(rates))
        plain = softmax_policy_gradient(mdp, monotone_step_size(discount), iterations).returns
        return best - natural, best - plain

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(study.seed), count)
        natural, plain = (np.asarray(leaf) for leaf in jax.jit(jax.vmap(ascend))(keys))
        counts = jnp.arange(1, iterations + 1)
        bounds = np.stack([natural_gradient_bound(actions, discount, rate, counts) for rate in rates])
    share = natural[:, :, 1:] / bounds
    study.claim(
        f"Natural policy gradient stays within its bound on {count} random models, for both step sizes.",
        expected=f"ln A / (eta T) + 1 / ((1 - gamma)^2 T) is never exceeded for T <= {iterations}",
        measured=f"at most {share.max():.3f} of the bound",
        holds=bool(np.all(share <= 1.0)),
    )
    rise = -np.diff(plain, axis=-1)
    study.claim(
        "Softmax policy gradient with the step (1 - gamma)^3 / 8 never loses.",
        expected=f"the return rises in each of {iterations} steps on all {count} models",
        measured=f"smallest change {rise.min():+.2e}; {plain[:, -1].mean():.3f} from the optimum after "
        f"{plain[:, 0].mean():.3f} at the start",
        holds=bool(np.all(rise >= 0.0)),
    )

    def line(values: np.ndarray) -> Band:
        logarithm = np.log10(np.maximum(values, 1e-12))
        return Band(logarithm, logarithm, logarithm)

    after = np.arange(1, iterations + 1)
    drawn = {"softmax gradient, cautious step": (after, line(plain[:, 1:].mean(axis=0)))}
    for i, rate in enumerate(rates):
        drawn[f"natural gradient, step {rate:g}"] = (after, line(natural[:, i, 1:].mean(axis=0)))
        drawn[f"its bound, step {rate:g}"] = (after, line(bounds[i]))
    plot = draw_curves(drawn, x_label="iterations", y_label="log10 of the distance to the optimum", label="legend")
    save_figure(plot, study.figure("theory"))


_TASKS = ("HalfCheetah-v4", "Ant-v4", "Humanoid-v4", "Hopper-v4")


def _mujoco(study: Study) -> Report:
    """The guide's own comparison: four tasks, eight million steps, its settings."""
    steps, seeds = 8_000_000, [study.seed + i for i in range(3)]
    labels = {"reinforce": "REINFORCE", "a2c": "A2C", "trpo": "TRPO", "ppo": "PPO", "vmpo": "V-MPO"}
    for task in _TASKS:
        problem = as_problem(task)
        mean, drawn = {}, {}
        for name, algorithm in guide_algorithms(steps).items():
            trained = train(algorithm, problem, steps=steps, seeds=seeds)
            returns = final_returns(trained, samples=200_000)
            mean[labels[name]] = float(np.mean(returns))
            samples, curves = learning_curves(trained)
            drawn[labels[name]] = (samples, curve_interval(curves))
            study.row(task=task, arm=labels[name], mean_return=mean[labels[name]], lowest_seed=float(np.min(returns)))
        save_figure(draw_curves(drawn, label="legend"), study.figure(task.lower()))
        held, free = min(_HELD, key=mean.__getitem__), max(("REINFORCE", "A2C"), key=mean.__getitem__)
        study.claim(
            f"{task}: the methods that hold the policy back lead.",
            expected="PPO, V-MPO and TRPO each above REINFORCE and A2C",
            measured=f"the lowest of the three is {held} with {mean[held]:.0f}; {free} reaches {mean[free]:.0f}",
            holds=mean[held] > mean[free],
        )
    return study.report()
