"""The Policy protocol, and what acts directly."""

from steersman.policies.chunks import ChunkCarry, ChunkPolicy
from steersman.policies.feedback import LinearFeedback
from steersman.policies.heads import (
    Categorical,
    DiagonalGaussian,
    GaussianParameters,
    Head,
    MultiCategorical,
    TanhGaussian,
    head_for,
)
from steersman.policies.network import ActorNetwork, Architecture, FeedForward, NetworkPolicy, Recurrent, make_policy
from steersman.policies.policy import Mode, Policy, Record, StochasticPolicy, Wrapper
from steersman.policies.preprocessing import Features, Preprocess, Standardize
from steersman.policies.storage import PolicyFileError, check_policy, load_policy, policy_fits, save_policy
from steersman.policies.tabular import Tabular, TabularStochastic
from steersman.policies.windows import Window
from steersman.policies.wrappers import ActionFilter, ClipToBox, ObservationFilter, ObservationNoise

__all__ = [
    "ActionFilter",
    "ActorNetwork",
    "Architecture",
    "Categorical",
    "ChunkCarry",
    "ChunkPolicy",
    "ClipToBox",
    "DiagonalGaussian",
    "Features",
    "FeedForward",
    "GaussianParameters",
    "Head",
    "LinearFeedback",
    "Mode",
    "MultiCategorical",
    "NetworkPolicy",
    "ObservationFilter",
    "ObservationNoise",
    "Policy",
    "PolicyFileError",
    "Preprocess",
    "Record",
    "Recurrent",
    "Standardize",
    "StochasticPolicy",
    "Tabular",
    "TabularStochastic",
    "TanhGaussian",
    "Window",
    "Wrapper",
    "check_policy",
    "head_for",
    "load_policy",
    "make_policy",
    "policy_fits",
    "save_policy",
]
