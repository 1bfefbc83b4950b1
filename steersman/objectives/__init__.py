"""Losses per element, and how they are aggregated: array functions for JAX and PyTorch alike."""

from steersman.objectives.aggregation import (
    aggregate,
    mean,
    sequence_mean,
    sequence_sum_mean,
    token_mean,
)
from steersman.objectives.diagnostics import approximate_kl, clip_fraction, explained_variance, ratio_deviation
from steersman.objectives.entropy import clamped_entropy, entropy, k1_kl, k2_kl, k3_kl
from steersman.objectives.mpo import temperature_loss, temperature_weights, top_half
from steersman.objectives.penalties import adaptive_kl
from steersman.objectives.surrogates import (
    Surrogate,
    clipped,
    decoupled_clipped,
    dual_clipped,
    kl_penalized,
    policy_gradient,
    spo,
    unclipped,
)
from steersman.objectives.values import clipped_value_error, expectile_error, huber, squared_error

__all__ = [
    "Surrogate",
    "adaptive_kl",
    "aggregate",
    "approximate_kl",
    "clamped_entropy",
    "clip_fraction",
    "clipped",
    "clipped_value_error",
    "decoupled_clipped",
    "dual_clipped",
    "entropy",
    "expectile_error",
    "explained_variance",
    "huber",
    "k1_kl",
    "k2_kl",
    "k3_kl",
    "kl_penalized",
    "mean",
    "policy_gradient",
    "ratio_deviation",
    "sequence_mean",
    "sequence_sum_mean",
    "spo",
    "squared_error",
    "temperature_loss",
    "temperature_weights",
    "token_mean",
    "top_half",
    "unclipped",
]
