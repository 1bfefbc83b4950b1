"""Critics that look at post-decision states: half-step advantages, and the dual critics of PDPPO.

Both fill the critic slot (:mod:`steersman.rl.critics`) of any on-policy method and need an environment that gives its
post-decision state.
"""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from steersman import returns
from steersman.envs.post_decision import ABILITY
from steersman.errors import InputError, require, require_number
from steersman.networks import MLP
from steersman.policies import Preprocess
from steersman.rl.critics import Critic, Examples, MakeNetwork, Outcome, ValueLoss
from steersman.training.experience import Experience
from steersman.training.schedules import Continuous, scalar


def read_post_decision(preprocess: Preprocess, experience: Experience) -> tuple[Float[Array, "T N size"], Array]:
    """What a critic sees of each post-decision state, and the reward of each decision ``[T, N]``.

    A post-decision state is seen like a state: its features, and the actor's memory before the step.

    Raises:
        InputError: the environment gave none.
    """
    for name in ("post_decision", "decision_reward"):
        if name not in experience.extras:
            raise InputError(
                f"info[{name!r}] is missing from the environment's steps: write the environment as a "
                "PostDecisionEnvironment, or wrap it in DeclaredPostDecision."
            )
    vector = jax.vmap(jax.vmap(preprocess))(experience.extras["post_decision"]).vector
    carry = jax.tree.leaves(experience.carry)
    return jnp.concatenate([vector, *carry], axis=-1), experience.extras["decision_reward"]


class HalfStepCritics(Critic):
    """One network for states and one for post-decision states, chained in a half-step advantage estimate.

    ``V`` and ``V^x`` are trained on the targets of :func:`steersman.returns.half_step_gae`, each with its own error.
    Because ``V^x`` enters as a temporal-difference target and not as a baseline, exact values give the exact mean
    advantage, and with ``lam_x = 1`` the advantages are those of ordinary generalized advantage estimation.

    Attributes:
        lam_x: trace through a step's chance: 1 lets all of it into the advantage, 0 trusts ``V^x`` instead.
    """

    lam_x: Continuous = scalar(0.9)

    needs: ClassVar[frozenset[str]] = frozenset({ABILITY})

    def __check_init__(self) -> None:
        require_number("lam_x", self.lam_x, at_least=0.0, at_most=1.0)

    def init(self, size: int, make: MakeNetwork, key: Key[Array, ""]) -> tuple[MLP, MLP]:
        state_key, post_key = jax.random.split(key)
        return make(size, state_key), make(size, post_key)

    def value(self, network: PyTree, vector: Float[Array, "... size"]) -> Float[Array, "..."]:
        return network[0](vector)[..., 0]

    def post_value(self, network: PyTree, vector: Float[Array, "... size"]) -> Float[Array, "..."]:
        """The value of what is seen after a decision."""
        return network[1](vector)[..., 0]

    def read(self, preprocess: Preprocess, experience: Experience) -> PyTree:
        return read_post_decision(preprocess, experience)

    def estimate(
        self,
        network: PyTree,
        read: PyTree,
        outcome: Outcome,
        gamma: Float[Array, ""] | float,
        lam: Float[Array, ""] | float,
    ) -> tuple[Float[Array, "T N"], PyTree]:
        post_vector, decision_reward = read
        post_value = self.post_value(network, post_vector)
        found = returns.half_step_gae(
            outcome.reward,
            outcome.scale(decision_reward),
            outcome.value,
            post_value,
            outcome.next_value,
            outcome.terminated,
            outcome.truncated,
            gamma,
            lam,
            self.lam_x,
        )
        return found.advantage, (found.target, found.post_target, post_value)

    def error(self, network: PyTree, examples: Examples, loss: ValueLoss) -> Float[Array, "..."]:
        vector, (post_vector, _) = examples.inputs
        target, post_target, old_post_value = examples.target
        before = loss(self.value(network, vector), examples.value, target)
        return before + loss(self.post_value(network, post_vector), old_post_value, post_target)


class DualCritics(Critic):
    """Several networks on one Monte Carlo return, of which the smallest (or largest) value counts (arXiv:2504.05150).

    Returns are standardized over the batch; the advantage of a step is its return less the combined value that the
    networks gave when the batch was collected, and the error is that of the combined value, so that at each sample
    only the network that was picked learns. Returns count nothing beyond the end of an episode or of the batch: give
    batches of whole episodes.

    With two exact critics and no reward from decisions, the mean advantage of an action is ``max(Q - V, 0)``: actions
    better than average are reinforced, the others are not held against the policy. It improves a policy, but is not
    the policy gradient; a critic that sees the effect of the action is no baseline.

    Attributes:
        sees: what each network looks at, ``"state"`` or ``"post-decision"``. ``("state", "post-decision")`` is the
            paper's pair, ``("state", "state")`` its twin-critic PPO, ``("post-decision",)`` its single critic.
        combine: ``"min"`` or ``"max"``.
    """

    sees: tuple[str, ...] = eqx.field(static=True, default=("state", "post-decision"), converter=tuple)
    combine: str = eqx.field(static=True, default="min")

    def __check_init__(self) -> None:
        known = {"state", "post-decision"}
        good = len(self.sees) > 0 and set(self.sees) <= known
        require(good, "sees", self.sees, 'a tuple of "state" and "post-decision", one for each network')
        require(self.combine in ("min", "max"), "combine", self.combine, '"min" or "max"')

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({ABILITY}) if "post-decision" in self.sees else frozenset()

    def init(self, size: int, make: MakeNetwork, key: Key[Array, ""]) -> list[MLP]:
        return [make(size, k) for k in jax.random.split(key, len(self.sees))]

    def _of(self, network: PyTree, what: str, vector: Array) -> Array:
        return self._combined([one(vector)[..., 0] for one, w in zip(network, self.sees, strict=True) if w == what])

    def _combined(self, values: list[Array]) -> Array:
        pick = jnp.minimum if self.combine == "min" else jnp.maximum
        return jax.tree.reduce(pick, values)

    def value(self, network: PyTree, vector: Float[Array, "... size"]) -> Float[Array, "..."]:
        """The combined value of the networks that see states; zero if none does."""
        if "state" not in self.sees:
            return jnp.zeros(vector.shape[:-1], vector.dtype)
        return self._of(network, "state", vector)

    def post_value(self, network: PyTree, vector: Float[Array, "... size"]) -> Float[Array, "..."]:
        """The combined value of the networks that see post-decision states; there must be one."""
        return self._of(network, "post-decision", vector)

    def both(self, network: PyTree, value: Float[Array, "..."], read: PyTree) -> Float[Array, "..."]:
        """The combined value of all networks, of which those that see states say `value`."""
        if not self.needs:
            return value
        post_value = self.post_value(network, read[0])
        return self._combined([value, post_value]) if "state" in self.sees else post_value

    def read(self, preprocess: Preprocess, experience: Experience) -> PyTree:
        return read_post_decision(preprocess, experience) if self.needs else ()

    def estimate(
        self,
        network: PyTree,
        read: PyTree,
        outcome: Outcome,
        gamma: Float[Array, ""] | float,
        lam: Float[Array, ""] | float,
    ) -> tuple[Float[Array, "T N"], PyTree]:
        del lam
        nothing = jnp.zeros_like(outcome.reward)
        earned = returns.discounted_return(outcome.reward, nothing, outcome.terminated, outcome.truncated, gamma)
        earned = returns.standardize(earned)
        value = self.both(network, outcome.value, read)
        return earned - value, (earned, value)

    def error(self, network: PyTree, examples: Examples, loss: ValueLoss) -> Float[Array, "..."]:
        vector, read = examples.inputs
        earned, old_value = examples.target
        return loss(self.both(network, self.value(network, vector), read), old_value, earned)
