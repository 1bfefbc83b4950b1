"""Neural building blocks that Equinox lacks."""

from steersman.networks.mlp import ACTIVATIONS, MLP, orthogonal

__all__ = ["ACTIVATIONS", "MLP", "orthogonal"]
