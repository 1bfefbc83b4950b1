"""The Policy protocol, and what acts directly."""

from steersman.policies.heads import (
    Categorical,
    DiagonalGaussian,
    GaussianParameters,
    Head,
    MultiCategorical,
    TanhGaussian,
    head_for,
)
from steersman.policies.network import ActorNetwork, FeedForward, NetworkPolicy, Recurrent, make_policy
from steersman.policies.policy import Mode, Policy, Record, StochasticPolicy, Wrapper
from steersman.policies.preprocessing import Preprocess, Standardize

__all__ = [
    "ActorNetwork",
    "Categorical",
    "DiagonalGaussian",
    "FeedForward",
    "GaussianParameters",
    "Head",
    "Mode",
    "MultiCategorical",
    "NetworkPolicy",
    "Policy",
    "Preprocess",
    "Record",
    "Recurrent",
    "Standardize",
    "StochasticPolicy",
    "TanhGaussian",
    "Wrapper",
    "head_for",
    "make_policy",
]
