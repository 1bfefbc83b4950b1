"""Does SPO's surrogate hold probability ratios within their bound where PPO's clip does not? (arXiv:2401.16025)

First on one fixed batch, optimized until the losses come to rest, then on the pendulum swing-up in two settings that
strain a surrogate: a deep network, and many epochs over each batch. The paper's claim of higher returns concerns much
larger tasks; here it is the mechanism that is judged, and the return only where many epochs make it matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from steersman.envs import as_problem
from steersman.networks import MLP
from steersman.policies import Categorical
from steersman.rl.on_policy import PPO, SPO
from steersman.rl.surrogates import Clip, QuadraticRatio, Surrogate, SurrogateInputs, Unclipped
from steersman.studies.study import Report, Study
from steersman.studies.swing_up import SETTINGS, final_returns, swing_up
from steersman.training import Linear, Trained, train
from steersman.training.comparison import learning_curves
from steersman.training.figures import learning_curves as draw_curves
from steersman.training.figures import save_figure
from steersman.training.statistics import curve_interval

_EPSILON = 0.2


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("spo", budget, seed, folder)
    if study.budget == "full":
        return _mujoco(study)
    smoke = study.budget == "smoke"
    seeds = [seed + i for i in range(2 if smoke else 5)]
    _fixed_batch(study, seeds, steps=20 if smoke else 2_000)
    _swing_up(study, seeds, steps=4_096 if smoke else 60_000)
    return study.report()


def optimize_fixed_batch(surrogate: Surrogate, key: Key[Array, ""], steps: int) -> Float[Array, "steps 1024"]:
    """Ratio of every sample after each full-batch Adam step on a fixed batch from a uniform policy.

    Sixteen contexts, four actions, 1,024 samples; advantages are standard normal for each context and action, with
    noise of deviation 0.5 for each sample.
    """
    contexts, actions, count = 16, 4, 1024
    keys = jax.random.split(key, 5)
    context = jax.random.randint(keys[0], (count,), 0, contexts)
    action = jax.random.randint(keys[1], (count,), 0, actions)
    advantage = jax.random.normal(keys[2], (contexts, actions))[context, action]
    advantage = advantage + 0.5 * jax.random.normal(keys[3], (count,))
    network = MLP(contexts, actions, (64, 64), "tanh", output_gain=0.0, key=keys[4])
    head, inputs = Categorical(actions), jax.nn.one_hot(context, contexts)
    old_log_prob = -jnp.log(float(actions))
    optimizer = optax.adam(3e-3)

    def log_ratio(network: MLP) -> Array:
        return head.log_prob(network(inputs), action) - old_log_prob

    def loss(network: MLP) -> Array:
        zeros = jnp.zeros(count)
        return jnp.mean(surrogate(log_ratio(network), advantage, SurrogateInputs(zeros, zeros, zeros), ()))

    def step(running: tuple, _: None) -> tuple[tuple, Array]:
        network, state = running
        updates, state = optimizer.update(cast(Any, jax.grad(loss)(network)), state)
        network = cast(MLP, jax.tree.map(jnp.add, network, updates))
        return (network, state), jnp.exp(log_ratio(network))

    return jax.lax.scan(step, (network, optimizer.init(cast(Any, network))), None, length=steps)[1]


def _fixed_batch(study: Study, seeds: list[int], steps: int) -> None:
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    surrogates = {"SPO": QuadraticRatio(_EPSILON), "PPO-clip": Clip(_EPSILON), "unclipped": Unclipped()}
    deviation, outside, drift, curves = {}, {}, {}, {}
    for name, surrogate in surrogates.items():

        def summarize(key: Key[Array, ""], surrogate: Surrogate = surrogate) -> tuple[Array, Array]:
            distance = jnp.abs(optimize_fixed_batch(surrogate, key, steps) - 1.0)
            return jnp.mean(distance, axis=1), jnp.mean(distance[-1] > 1.5 * _EPSILON)

        distance, beyond = jax.jit(jax.vmap(summarize))(keys)
        distance = np.asarray(distance)
        deviation[name] = float(distance[:, -1].mean())
        outside[name] = float(beyond.mean())
        earlier = distance[:, -min(501, steps)]
        drift[name] = float(np.abs(distance[:, -1] / earlier - 1).max())
        thinned = slice(None, None, max(1, steps // 200))
        curves[name] = (np.arange(1, steps + 1)[thinned], curve_interval(distance[:, thinned]))
        study.row(
            part="fixed batch",
            arm=name,
            ratio_deviation=deviation[name],
            beyond_bound=outside[name],
            max_kl=float("nan"),
            mean_return=float("nan"),
        )
    study.claim(
        "On a fixed batch SPO's ratios come to rest within their bound.",
        expected="mean |r - 1| <= 0.2, at most 6 % beyond 0.3, change over the last 500 steps < 2 %",
        measured=f"{deviation['SPO']:.3f}, {outside['SPO']:.1%}, {drift['SPO']:.2%}",
        holds=deviation["SPO"] <= _EPSILON and outside["SPO"] <= 0.06 and drift["SPO"] < 0.02,
    )
    study.claim(
        "PPO's clip lets go of ratios beyond its bound and does not bring them back.",
        expected="at least 20 % beyond 0.3",
        measured=f"{outside['PPO-clip']:.1%} (mean |r - 1| {deviation['PPO-clip']:.3f})",
        holds=outside["PPO-clip"] >= 0.20,
    )
    study.claim(
        "Without either, ratios run away.",
        expected="mean |r - 1| >= 1",
        measured=f"{deviation['unclipped']:.2f}",
        holds=deviation["unclipped"] >= 1.0,
    )
    figure = draw_curves(curves, x_label="Adam steps on one batch", y_label="mean |ratio - 1|", label="legend")
    save_figure(figure, study.figure("fixed-batch"))


def _swing_up(study: Study, seeds: list[int], steps: int) -> None:
    stresses = {
        "deep": {"hidden": (64,) * 7, "epochs": 10, "minibatches": 8},
        "many epochs": {"hidden": (64,) * 4, "epochs": 60, "minibatches": 4},
    }
    if study.budget == "smoke":
        stresses = {"deep": {"hidden": (8,) * 3, "epochs": 2, "minibatches": 8}}
    problem = swing_up()
    rates = [3e-4, 1e-3]
    for stress, settings in stresses.items():
        found, curves = {}, {}
        for name, kind in {"SPO": SPO, "PPO-clip": PPO}.items():
            surrogate = QuadraticRatio(_EPSILON) if kind is SPO else Clip(_EPSILON)
            # Everything but the surrogate is equal, the critic's loss included.
            algorithm = kind(surrogate=surrogate, value_clip=None, learning_rate=1e-3, **{**SETTINGS, **settings})
            trained = train(algorithm, problem, steps=steps, seeds=seeds, sweep={"learning_rate": rates})
            arms = _by_rate(trained, rates, len(seeds))
            best = max(arms, key=lambda rate: arms[rate]["mean_return"])
            found[name] = arms[best]
            samples, values = learning_curves(trained, points=30)
            first = rates.index(best) * len(seeds)
            curves[name] = (samples, curve_interval(values[first : first + len(seeds)]))
            for rate, numbers in arms.items():
                study.row(part=stress, arm=f"{name}, rate {rate:g}", **numbers)
        spo, ppo = found["SPO"], found["PPO-clip"]
        study.claim(
            f"{stress.capitalize()}: SPO's ratios deviate less than PPO's.",
            expected="mean |r - 1| at most 0.6 times PPO's",
            measured=f"{spo['ratio_deviation']:.3f} against {ppo['ratio_deviation']:.3f}",
            holds=spo["ratio_deviation"] <= 0.6 * ppo["ratio_deviation"],
        )
        study.claim(
            f"{stress.capitalize()}: SPO's largest divergence over training is far below PPO's.",
            expected="max KL at most 0.2 times PPO's",
            measured=f"{spo['max_kl']:.3f} against {ppo['max_kl']:.3f}",
            holds=spo["max_kl"] <= 0.2 * ppo["max_kl"],
        )
        gap = spo["mean_return"] - ppo["mean_return"]
        study.claim(
            f"{stress.capitalize()}: SPO's return is not worse than PPO's.",
            expected="at most 40 below",
            measured=f"{spo['mean_return']:.0f} against {ppo['mean_return']:.0f}",
            holds=gap >= -40,
        )
        if stress == "many epochs":
            study.claim(
                "Many epochs: SPO reaches at least PPO's return.",
                expected="mean return >= PPO's",
                measured=f"{spo['mean_return']:.0f} against {ppo['mean_return']:.0f}",
                holds=gap >= 0,
            )
        save_figure(draw_curves(curves, label="legend"), study.figure(stress.replace(" ", "-")))


def _by_rate(trained: Trained, rates: list[float], seeds: int) -> dict[float, dict[str, Any]]:
    """Numbers of each learning rate, over its seeds."""
    returns = final_returns(trained).reshape(len(rates), seeds).mean(axis=1)
    last = slice(-5, None)
    deviation = trained.metrics["ratio_deviation"][last].mean(axis=0).reshape(len(rates), seeds).mean(axis=1)
    reach = trained.metrics["max_kl"].max(axis=0).reshape(len(rates), seeds).mean(axis=1)
    return {
        rate: {
            "ratio_deviation": float(deviation[i]),
            "beyond_bound": float("nan"),
            "max_kl": float(reach[i]),
            "mean_return": float(returns[i]),
        }
        for i, rate in enumerate(rates)
    }


_TASKS = ("Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "HumanoidStandup-v5", "Walker2d-v5")


def _mujoco(study: Study) -> Report:
    """The paper's own comparison: six tasks, policies of three and of seven layers, ten million steps, five seeds."""
    steps, seeds = 10_000_000, [study.seed + i for i in range(5)]
    shared = {
        "num_envs": 8,
        "num_steps": 256,
        "epochs": 10,
        "minibatches": 4,
        "learning_rate": Linear(3e-4, 0.0, steps),
        "normalize_observations": True,
        "normalize_rewards": True,
        "value_clip": 0.2,
    }
    losses: dict[str, list[float]] = {"SPO": [], "PPO-clip": []}
    for task in _TASKS:
        problem = as_problem(task)
        for name, kind in {"SPO": SPO, "PPO-clip": PPO}.items():
            returns = {}
            for depth in (3, 7):
                trained = train(kind(hidden=(256,) * depth, **shared), problem, steps=steps, seeds=seeds)
                returns[depth] = float(np.mean(final_returns(trained, samples=100_000)))
                study.row(
                    part=task,
                    arm=f"{name}, {depth} layers",
                    ratio_deviation=float(trained.metrics["ratio_deviation"][-50:].mean()),
                    beyond_bound=float("nan"),
                    max_kl=float(trained.metrics["max_kl"].max()),
                    mean_return=returns[depth],
                )
            losses[name].append((returns[3] - returns[7]) / max(abs(returns[3]), 1.0))
    spo, ppo = (float(np.mean(losses[name])) for name in ("SPO", "PPO-clip"))
    study.claim(
        "Going from three to seven layers costs SPO less return than PPO.",
        expected="a smaller relative loss of return, averaged over the tasks",
        measured=f"{spo:.1%} against {ppo:.1%}",
        holds=spo < ppo,
    )
    return study.report()
