"""Can a memory be learned without backpropagation through time, and is a step then cheaper? (arXiv:2311.04082)

A mass is held at the origin; its noisy position is seen, its velocity is not. Linear-Gaussian policies with one number
of memory are trained by PPO with a sampled memory (S2PG), by PPO with backpropagation through 5 and 20 steps, without a
memory, and by GPOMDP with a sampled memory. All start from the same random maps around a gain that stabilizes. Noise
stays as it is: a standard deviation of 2 on actions with PPO, 1 with GPOMDP, and 0.3 on memories. The critic of the PPO
arms sees the true state besides the memory; the policies do not. What is judged is the exact discounted return of 100
steps of the learned controller with its noise switched off, by a recursion of covariances, beside exactly known optima.
Noise, start and learning rates were chosen on seeds 100 to 104, which are never judged.

Then one PPO epoch over 51,200 transitions with a gated unit of 64 numbers is timed for both ways of training it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from steersman.control import LinearController, controller_cost, least_cost
from steersman.envs import HiddenVelocity, PlanarQuadrotor, Problem, as_problem
from steersman.errors import NonFiniteError
from steersman.policies import Architecture, NetworkPolicy
from steersman.policies.partial_view import PartialView
from steersman.policies.sampled_memory import (
    BackpropagatedLinearMemory,
    BackpropagatedMemory,
    LinearKernel,
    LinearMemory,
    SampledMemory,
)
from steersman.rl.on_policy.policy_gradient import PolicyGradient
from steersman.rl.on_policy.ppo import PPO
from steersman.rl.on_policy.s2pg import S2PG, EpisodicS2PG
from steersman.rl.on_policy.truncated_bptt import TruncatedBPTT
from steersman.studies.study import Report, Study
from steersman.studies.swing_up import final_returns
from steersman.training import Linear, train
from steersman.training.algorithm import InteractiveAlgorithm
from steersman.training.figures import Estimate, interval_plot, save_figure

_GAMMA, _HORIZON = 0.98, 100
_RATES = (3e-3, 1e-2)
_GPOMDP_RATE = 0.03
# Found by scipy over the exact cost: u = -1.089 y, and one number of memory.
_BEST_STATIC = LinearController.static([[-1.0893935]])
_BEST_MEMORY = ([[0.58294865]], [[-1.07774605]], [[-2.74592046]], [[-8.055838]])


def run(budget: str = "cpu", seed: int = 0, folder: str | Path | None = None) -> Report:
    """Runs the study; see the module."""
    study = Study("s2pg", budget, seed, folder)
    if study.budget == "full":
        return _mujoco(study)
    smoke = study.budget == "smoke"
    seeds = [seed + i for i in range(2 if smoke else 5)]
    _regulation(study, seeds, steps=4_000 if smoke else 1_000_000, batches=1 if smoke else 400)
    _epochs(study, smoke)
    return study.report()


def arms(steps: int) -> dict[str, InteractiveAlgorithm]:
    """What is compared: PPO arms that differ in the memory alone, and GPOMDP."""
    start: dict[str, Any] = {
        "initial_gain": 0.3,
        "initial_feedback": [[-0.5]],
        "initial_log_std": math.log(0.3),
        "learn_std": False,
    }
    settings: dict[str, Any] = {
        "num_envs": 40,
        "num_steps": _HORIZON,
        "gamma": _GAMMA,
        "hidden": (16, 16),
        "epochs": 4,
        "minibatches": 8,
        "max_gradient_norm": None,
        "reward_scale": 0.1,
        "initial_log_std": math.log(2.0),
        "learning_rate": Linear(_RATES[0], 0.0, steps),
    }

    def seen(architecture: Architecture) -> Architecture:
        return PartialView(architecture, (0,))

    unrolled = seen(BackpropagatedLinearMemory(1, **start))
    return {
        "without memory": PPO(architecture=seen(LinearMemory(0, **start)), **settings),
        "PPO-S2PG": S2PG(architecture=seen(LinearMemory(1, **start)), **settings),
        "BPTT, 5 steps": TruncatedBPTT(architecture=unrolled, truncation=5, **settings),
        "BPTT, 20 steps": TruncatedBPTT(architecture=unrolled, truncation=20, **settings),
        "GPOMDP-S2PG": EpisodicS2PG(
            architecture=LinearMemory(1, **start),
            num_episodes=500,
            horizon=_HORIZON,
            gamma=_GAMMA,
            initial_log_std=0.0,
            learning_rate=_GPOMDP_RATE,
        ),
    }


def linear_controller(policy: NetworkPolicy) -> LinearController:
    """The controller that a policy with a linear kernel is without its noise."""
    network: Any = policy.network
    while not isinstance(network, LinearKernel):
        network = network.network
    size, weight = network.size, network.weight
    rows, columns = weight.shape[0] - size, size
    return LinearController(
        weight[rows:, :columns], weight[rows:, columns:], weight[:rows, :columns], weight[:rows, columns:]
    )


def _regulation(study: Study, seeds: list[int], steps: int, batches: int) -> None:
    plain, privileged = HiddenVelocity(), HiddenVelocity(privileged=True)

    def value(controller: LinearController) -> float:
        return -float(controller_cost(plain, controller, _GAMMA, horizon=_HORIZON))

    references = {
        "state seen": -float(least_cost(plain, _GAMMA, horizon=_HORIZON, state_seen=True)),
        "optimum (LQG)": -float(least_cost(plain, _GAMMA, horizon=_HORIZON)),
        "best with one number": value(LinearController(*_BEST_MEMORY)),
        "best without memory": value(_BEST_STATIC),
    }
    for name, number in references.items():
        _row(study, "reference", name, worst=number, median=number, best=number)
    found: dict[str, np.ndarray] = {}
    smoke = study.budget == "smoke"
    # Each arm is a program of its own to compile.
    chosen = ["PPO-S2PG", "GPOMDP-S2PG"] if smoke else list(arms(steps))
    for name in chosen:
        algorithm = arms(steps)[name]
        episodic = isinstance(algorithm, PolicyGradient)
        problem = Problem((plain if episodic else privileged).environment())
        swept = "learning_rate" if episodic else "learning_rate.start"
        by_rate: dict[float, np.ndarray] = {}
        for rate in (_GPOMDP_RATE,) if episodic else _RATES[: 1 if smoke else None]:
            length: Any = {"iterations": batches} if episodic else {"steps": steps}
            try:
                trained = train(algorithm, problem, seeds=seeds, sweep={swept: [rate]}, **length)
            except NonFiniteError:
                # Some seed's controller became unstable beyond what a float can hold.
                _row(study, "regulation", f"{name}, rate {rate:g}: diverged")
                continue
            policies: Any = [trained.policy(i) for i in range(len(seeds))]
            values = np.asarray([value(linear_controller(policy)) for policy in policies])
            by_rate[rate] = values
            numbers = {"worst": values.min(), "median": np.median(values), "best": values.max()}
            _row(study, "regulation", f"{name}, rate {rate:g}", **{k: float(v) for k, v in numbers.items()})
        if by_rate:
            found[name] = max(by_rate.values(), key=lambda values: float(np.median(values)))
    _judge(study, found, references)
    estimates = {name: Estimate(float(np.median(values)), points=values) for name, values in found.items()}
    lines = {name: Estimate(number) for name, number in references.items()}
    # An arm that swings out of the picture would hide all others; the table has its number.
    shown = {
        name: Estimate(max(e.value, -40.0), points=np.maximum(e.points, -40.0) if len(e.points) else ())
        for name, e in {**lines, **estimates}.items()
    }
    figure = interval_plot(shown, x_label="return of 100 steps")
    save_figure(figure, study.figure("regulation"))


def _judge(study: Study, found: dict[str, np.ndarray], references: dict[str, float]) -> None:
    none = np.asarray([-math.inf])
    without, sampled = found.get("without memory", none), found.get("PPO-S2PG", none)
    median = float(np.median(without))
    study.claim(
        "Without a memory, PPO comes near the best memoryless controller and not beyond.",
        expected="median return from -33 to -28.29, no seed beyond",
        measured=f"median {median:.2f}, seeds {without.min():.2f} to {without.max():.2f}",
        holds=median >= -33.0 and float(without.max()) <= references["best without memory"] + 1e-3,
    )
    study.claim(
        "PPO with a sampled memory learns to estimate what it does not see.",
        expected="median >= -14, best seed >= -11",
        measured=f"median {np.median(sampled):.2f}, best {sampled.max():.2f}",
        holds=float(np.median(sampled)) >= -14.0 and float(sampled.max()) >= -11.0,
    )
    both = np.concatenate([sampled, found.get("GPOMDP-S2PG", none)])
    study.claim(
        "Every seed with a sampled memory does, with PPO and with GPOMDP.",
        expected="every seed >= -17",
        measured=f"worst of PPO {sampled.min():.2f}, of GPOMDP {found.get('GPOMDP-S2PG', none).min():.2f}",
        holds=float(both.min()) >= -17.0,
    )
    best = max(float(values.max()) for values in [none, *found.values()])
    study.claim(
        "No arm beats the optimum of what is observed: nothing of the velocity leaks.",
        expected=f"no seed above {references['optimum (LQG)']:.2f}",
        measured=f"best of all {best:.2f}",
        holds=best <= references["optimum (LQG)"],
    )


def _epochs(study: Study, smoke: bool) -> None:
    """Seconds of one PPO epoch over the same number of transitions, for minibatches of several sizes."""
    transitions = 1_024 if smoke else 51_200
    size, length = (4, 32) if smoke else (64, 32)
    sizes = [256] if smoke else [32, 256, 2_048]
    seconds: dict[tuple[str, int], float] = {}
    for minibatch in sizes:
        shared: dict[str, Any] = {"hidden": (64, 64), "minibatches": transitions // minibatch}
        short = {"num_envs": transitions // length, "num_steps": length, **shared}
        algorithms = {
            "S2PG": lambda epochs, s=short: S2PG(
                architecture=SampledMemory(size, previous_action=False), epochs=epochs, **s
            ),
            "BPTT, 32 steps": lambda epochs, s=short: TruncatedBPTT(
                architecture=BackpropagatedMemory(size), truncation=length, epochs=epochs, **s
            ),
        }
        if smoke:
            algorithms.pop("BPTT, 32 steps")
        elif minibatch == sizes[-1]:
            long = {"num_envs": transitions // (16 * length), "num_steps": 16 * length, **shared}
            algorithms["S2PG, rollouts 16 times as long"] = lambda epochs, s=long: S2PG(
                architecture=SampledMemory(size, previous_action=False), epochs=epochs, **s
            )
        for name, make in algorithms.items():
            seconds[name, minibatch] = _seconds_per_epoch(make, (1,) if smoke else (1, 3))
            _row(study, "epoch", f"{name}, minibatches of {minibatch}", seconds=seconds[name, minibatch])
    ratios = {size: seconds.get(("BPTT, 32 steps", size), math.nan) / seconds["S2PG", size] for size in sizes}
    study.claim(
        "An epoch with a sampled memory is at least five times faster than with backpropagation through 32 steps.",
        expected="at least 5 times, minibatches of 32 transitions as published",
        measured=", ".join(f"{ratio:.1f} times at {size}" for size, ratio in ratios.items()),
        holds=ratios[sizes[0]] >= 5.0,
    )
    longer = seconds.get(("S2PG, rollouts 16 times as long", sizes[-1]), math.nan) / seconds["S2PG", sizes[-1]]
    study.claim(
        "What a sampled memory costs does not depend on how far back it reaches.",
        expected="the same within 25 % where rollouts are 16 times as long",
        measured=f"{longer:.2f} times",
        holds=0.8 <= longer <= 1.25,
    )
    bars = {f"{name}, {size}": Estimate(1e3 * value) for (name, size), value in seconds.items()}
    figure = interval_plot(bars, x_label="ms per epoch")
    save_figure(figure, study.figure("epochs"))


def _seconds_per_epoch(make: Callable[[int], PPO], counts: tuple[int, ...], repeats: int = 3) -> float:
    """Seconds of an update for each epoch beyond the least of `counts`, compiled; the best of some runs."""
    problem, times = Problem(PlanarQuadrotor().environment()), []
    state, experience = _batch(make(1), problem)
    for epochs in counts:
        algorithm, best = make(epochs), math.inf
        for repeat in range(repeats + 1):
            began = time.perf_counter()
            jax.block_until_ready(_learn(algorithm, state, experience))
            best = best if repeat == 0 else min(best, time.perf_counter() - began)
        times.append(best)
    return times[0] if len(counts) == 1 else max((times[-1] - times[0]) / (counts[-1] - counts[0]), 1e-9)


@eqx.filter_jit
def _learn(algorithm: Any, state: PyTree, experience: PyTree) -> PyTree:
    return algorithm.update(state, experience)[0].learned


@eqx.filter_jit
def _batch(algorithm: Any, problem: Problem) -> tuple[PyTree, PyTree]:
    state = algorithm.init(problem, jax.random.key(0))
    policy, collector = algorithm.behaviour(state), algorithm.collector
    return state, collector.collect(problem, policy, collector.init(problem, policy, jax.random.key(1)))[0]


def _row(study: Study, part: str, arm: str, **cells: Any) -> None:
    nothing = dict.fromkeys(("worst", "median", "best", "seconds"), float("nan"))
    study.row(part=part, arm=arm, **{**nothing, **cells})


# What a policy sees of each task: positions and angles. Velocities, and contact forces where there are some, follow.
_TASKS = {"Ant-v5": 13, "HalfCheetah-v5": 8, "Hopper-v5": 5, "Humanoid-v5": 22, "Walker2d-v5": 8}


def _mujoco(study: Study) -> Report:
    """The paper's scale: hidden velocities, 25 seeds, five million steps, critics that see the whole state."""
    steps, seeds = 5_000_000, [study.seed + i for i in range(25)]
    settings: dict[str, Any] = {
        "num_envs": 64,
        "num_steps": 128,
        "epochs": 10,
        "minibatches": 64,
        "learning_rate": 3e-4,
        "initial_log_std": math.log(0.5),
        "normalize_observations": True,
        "normalize_rewards": True,
    }
    final: dict[str, dict[str, np.ndarray]] = {}
    for task, positions in _TASKS.items():
        problem, seen = as_problem(task), tuple(range(positions))
        kinds = {
            "S2PG": S2PG(architecture=PartialView(SampledMemory(128), seen), **settings),
            "BPTT, 32 steps": TruncatedBPTT(
                architecture=PartialView(BackpropagatedMemory(128), seen), truncation=32, **settings
            ),
            "without memory": PPO(architecture=PartialView(SampledMemory(0, (128, 64)), seen), **settings),
        }
        final[task] = {}
        for name, algorithm in kinds.items():
            trained = train(algorithm, problem, steps=steps, seeds=seeds)
            returns = final_returns(trained, samples=100_000)
            final[task][name] = returns
            numbers = {"worst": returns.min(), "median": np.median(returns), "best": returns.max()}
            cells = {k: float(v) for k, v in numbers.items()}
            _row(study, task, name, **cells, seconds=trained.seconds)
    near = [
        float(np.median(returns["S2PG"]) >= 0.9 * np.median(returns["BPTT, 32 steps"])) for returns in final.values()
    ]
    study.claim(
        "With hidden velocities a sampled memory does about as well as backpropagation through time, or better.",
        expected="at least 0.9 times the median return on most tasks",
        measured=f"{sum(near):.0f} of {len(near)} tasks",
        holds=sum(near) > len(near) / 2,
    )
    return study.report()
