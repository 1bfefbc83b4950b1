"""Post-decision proximal policy optimization (Felizardo et al., 2025, arXiv:2504.05150)."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import optax

from steersman.errors import require_number
from steersman.rl.critics import Critic
from steersman.rl.on_policy.first_order import FirstOrder
from steersman.rl.post_decision_critics import DualCritics, HalfStepCritics
from steersman.rl.surrogates import Clip, Surrogate
from steersman.training.schedules import Continuous, scalar


class PDPPO(FirstOrder):
    """PPO for steps that split into a known decision and random noise: one critic before the decision, one after.

    The critic is the slot that changes. :class:`~steersman.rl.post_decision_critics.HalfStepCritics`, the default,
    chains both values in the advantage estimate, and with ``critic.lam_x = 1`` is PPO.
    :class:`~steersman.rl.post_decision_critics.DualCritics` is the paper's own rule; :meth:`paper` gives it with the
    settings of the authors' code. With :class:`~steersman.rl.critics.StateCritic` this is PPO.

    Attributes:
        surrogate: the clipped ratio. An action of several numbers has one ratio, the joint one.
        critic: what estimates values, and how they become advantages.
        critic_rate: the critics' step size in units of ``learning_rate``.
    """

    surrogate: Surrogate = eqx.field(default_factory=Clip)
    critic: Critic = eqx.field(default_factory=HalfStepCritics)
    critic_rate: Continuous = scalar(3.0)

    def __check_init__(self) -> None:
        require_number("critic_rate", self.critic_rate, above=0.0)

    @classmethod
    def paper(cls, combine: str = "min", **settings: Any) -> PDPPO:
        """The paper's mode, with the settings of the authors' code where none are given.

        Six environments of 100 steps: batches should hold whole episodes, as returns count nothing beyond them.

        Args:
            combine: ``"min"`` (the authors' rule) or ``"max"`` of the two values.
            **settings: hyperparameters that replace the authors'.
        """
        authors = {
            "critic": DualCritics(combine=combine),
            "surrogate": Clip(0.21),
            "num_envs": 6,
            "num_steps": 100,
            "epochs": 40,
            "minibatches": 1,
            "gamma": 0.991,
            "hidden": (128, 128),
            "learning_rate": 4e-4,
            "critic_rate": 3.0,
            "entropy_coefficient": 0.012,
            "value_coefficient": 0.5,
            "max_gradient_norm": 1.0,
            "normalize_advantages": False,  # the returns are, once
        }
        return cls(**{**authors, **settings})

    def _optimizer(self) -> optax.GradientTransformationExtraArgs:
        def faster(step: Any, params: Any = None) -> Any:
            return step._replace(critic=jax.tree.map(lambda leaf: self.critic_rate * leaf, step.critic))

        return optax.with_extra_args_support(optax.chain(super()._optimizer(), optax.stateless(faster)))
