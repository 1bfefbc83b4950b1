"""Any objective goes with any update rule and any policy class: each pair of them is tried for a few gradient steps."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steersman.envs import Problem
from steersman.envs.dynamics import DiscreteCartPole, Pendulum
from steersman.policies.sampled_memory import SampledMemory
from steersman.rl.fix_up import FixUp
from steersman.rl.mpo_surrogate import WeightedLikelihood
from steersman.rl.on_policy import TRPO, FirstOrder, SinglePath
from steersman.rl.references import MovingAverageReference, UpdateStart
from steersman.rl.surrogates import AdaptiveKL, Clip, FixedKL, LearnedKL, QuadraticRatio, Score, Unclipped
from steersman.training.optimizers import SGD
from steersman.training.step_sizes import Polyak

_BOUND = 0.01
_TARGET = 0.005
_CAP = 0.5

OBJECTIVES = {
    "clip": Clip(),
    "unclipped": Unclipped(),
    "score": Score(),
    "quadratic ratio": QuadraticRatio(),
    "fixed KL": FixedKL(),
    "adaptive KL": AdaptiveKL(),
    "learned KL": LearnedKL(bound=_BOUND),
    "weighted likelihood": WeightedLikelihood(),
}
RULES = {
    "Adam": {},
    "SGD": {"optimizer": SGD()},
    "averaged reference": {"reference": MovingAverageReference()},
    "reference at the start": {"reference": UpdateStart()},
    "fix-up": {"phase": FixUp(bound=_BOUND, rows=8), "learning_rate": 0.03},
    "Polyak": {"optimizer": Polyak(target=10.0, cap=_CAP), "learning_rate": 1.0},
    "natural": None,
}
POLICIES = {
    "feed-forward": {"hidden": (4,)},
    "unrolled memory": {"hidden": (4,), "memory": 3},
    "sampled memory": {"hidden": (4,), "architecture": SampledMemory(size=3, hidden=(4,))},
}
PROBLEMS = {"discrete": Problem(DiscreteCartPole()), "continuous": Problem(Pendulum().environment())}

# Every objective meets every rule. Policies and problems change from one pair to the next so that each of them meets
# every objective and every rule as well.
KINDS = list(itertools.product(POLICIES, PROBLEMS))
CASES = [
    (objective, rule, *KINDS[(i + j) % len(KINDS)])
    for i, objective in enumerate(OBJECTIVES)
    for j, rule in enumerate(RULES)
]


def test_the_cases_cover_every_pair():
    for first, second in itertools.combinations(range(4), 2):
        sizes = (len(OBJECTIVES), len(RULES), len(POLICIES), len(PROBLEMS))
        assert len({(case[first], case[second]) for case in CASES}) == sizes[first] * sizes[second], (first, second)


def make(objective, rule, policy):
    shared = {"num_envs": 4, "num_steps": 8, **POLICIES[policy]}
    if RULES[rule] is None:
        small = {"cg_iterations": 3, "critic_epochs": 1, "critic_minibatches": 2, "target_kl": _TARGET}
        return TRPO(sampling=SinglePath(surrogate=OBJECTIVES[objective]), **small, **shared)
    first_order = {"epochs": 2, "minibatches": 2, "learning_rate": 3e-3} | RULES[rule]
    return FirstOrder(surrogate=OBJECTIVES[objective], **first_order, **shared)


# Dozens of programs, each of which runs once: optimizing them would cost more than it saves.
_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def once(function, *arguments):
    """Calls a function of PyTrees, compiled without optimization."""
    arrays, static = eqx.partition(arguments, eqx.is_array)
    shape = {}

    def of_arrays(arrays):
        result = function(*eqx.combine(arrays, static))
        result, shape["static"] = eqx.partition(result, eqx.is_array)
        return result

    return eqx.combine(jax.jit(of_arrays, compiler_options=_OPTIONS)(arrays), shape["static"])


def begin(algorithm, problem):
    state = algorithm.init(problem, jax.random.key(0))
    rollout = algorithm.collector.init(problem, state.actor, jax.random.key(1))
    return state, algorithm.collector.collect(problem, state.actor, rollout)[0]


def with_slots(algorithm, begun):
    """A state with the same networks and experience, and what this algorithm's own slots start with."""
    if isinstance(algorithm, TRPO):
        moments = optax.flatten(optax.scale_by_adam()).init(begun.critic)
        return eqx.tree_at(lambda s: (s.optimizer, s.method), begun, (moments, ()))
    method = begun.method._replace(
        surrogate=algorithm.surrogate.init(), reference=algorithm.reference.init(begun.learned)
    )
    optimizer = algorithm._optimizer().init(begun.learned)
    return eqx.tree_at(lambda s: (s.optimizer, s.method), begun, (optimizer, method))


@pytest.fixture(scope="module")
def experiences():
    """One batch for each policy class and problem."""
    return {
        (policy, problem): once(begin, make("clip", "Adam", policy), PROBLEMS[problem]) for policy, problem in KINDS
    }


@pytest.mark.parametrize(("objective", "rule", "policy", "problem"), CASES)
def test_a_few_steps(objective, rule, policy, problem, experiences):
    algorithm = make(objective, rule, policy)
    begun, experience = experiences[policy, problem]
    state = with_slots(algorithm, begun)
    after, metrics = once(lambda algorithm, *arguments: algorithm.update(*arguments), algorithm, state, experience)
    for name, value in metrics.items():
        assert np.isfinite(np.asarray(value, float)).all(), name
    moved = 0.0
    for new, old in zip(jax.tree.leaves(after.learned), jax.tree.leaves(state.learned), strict=True):
        assert bool(jnp.all(jnp.isfinite(new)))
        moved += float(jnp.sum((new - old) ** 2))
    assert moved > 0.0
    if rule == "fix-up":
        assert float(metrics["max_kl"]) <= _BOUND
    if rule == "natural":
        assert float(metrics["kl"]) <= _TARGET * (1 + 1e-3)
    if rule == "Polyak":
        # Four steps, none longer than the cap times the length that gradients are clipped to.
        assert moved**0.5 <= 4 * _CAP * 0.5 * (1 + 1e-3)
