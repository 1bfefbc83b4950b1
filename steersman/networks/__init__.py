"""Neural building blocks that Equinox lacks."""

from steersman.networks.crops import CroppedEncoder, KeyedEncoder
from steersman.networks.denoiser_mlp import MLPDenoiser
from steersman.networks.denoiser_transformer import TransformerDenoiser
from steersman.networks.encoders import ConvEncoder, PointNet, ResNet18, WindowEncoder, spatial_softmax
from steersman.networks.mlp import ACTIVATIONS, MLP, mish, orthogonal
from steersman.networks.temporal_unet import TemporalUNet
from steersman.networks.time_embedding import OctaveTime, SinusoidalTime

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "ConvEncoder",
    "CroppedEncoder",
    "KeyedEncoder",
    "MLPDenoiser",
    "OctaveTime",
    "PointNet",
    "ResNet18",
    "SinusoidalTime",
    "TemporalUNet",
    "TransformerDenoiser",
    "WindowEncoder",
    "mish",
    "orthogonal",
    "spatial_softmax",
]
