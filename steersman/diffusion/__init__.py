"""Generative policies: noise processes, denoisers, samplers, and the systems that train, combine and speed them up."""

from steersman.diffusion.cloning import Cloned, Cloning, DenoiserRecipe, EncoderRecipe, MLPRecipe
from steersman.diffusion.denoiser import Denoiser, Matched, NetworkDenoiser, on_process
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.likelihood import flow_log_prob
from steersman.diffusion.losses import denoising_loss, prediction_errors
from steersman.diffusion.mixtures import Mixture, MixtureDenoiser
from steersman.diffusion.predictions import PREDICTIONS, Prediction, read_prediction, write_prediction
from steersman.diffusion.processes import (
    EDM,
    ContinuousProcess,
    ContinuousVP,
    DiscreteVP,
    Grid,
    NoiseProcess,
    RectifiedFlow,
)
from steersman.diffusion.samplers import (
    DDIM,
    DDPM,
    Chain,
    DPMSolver,
    FlowSolver,
    Sampler,
    Step,
    StochasticSampler,
    sample,
    transition_log_prob,
)
from steersman.diffusion.scaling import Scaling, normalize_observation

__all__ = [
    "DDIM",
    "DDPM",
    "EDM",
    "PREDICTIONS",
    "Chain",
    "ChunkGenerator",
    "Cloned",
    "Cloning",
    "ContinuousProcess",
    "ContinuousVP",
    "DPMSolver",
    "Denoiser",
    "DenoiserRecipe",
    "DiscreteVP",
    "EncoderRecipe",
    "FlowSolver",
    "Grid",
    "MLPRecipe",
    "Matched",
    "Mixture",
    "MixtureDenoiser",
    "NetworkDenoiser",
    "NoiseProcess",
    "Prediction",
    "RectifiedFlow",
    "Sampler",
    "Scaling",
    "Step",
    "StochasticSampler",
    "denoising_loss",
    "flow_log_prob",
    "normalize_observation",
    "on_process",
    "prediction_errors",
    "read_prediction",
    "sample",
    "transition_log_prob",
    "write_prediction",
]
