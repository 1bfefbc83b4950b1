"""Generative policies: noise processes, denoisers, samplers, and the systems that train, combine and speed them up."""

from steersman.diffusion.cloning import Cloned, Cloning, DenoiserRecipe, EncoderRecipe, MLPRecipe
from steersman.diffusion.combination import Combined, CombinedPrediction, UnderConditions, combine
from steersman.diffusion.composition_error import best_weights, endpoint_error_bound, error_power, error_products
from steersman.diffusion.denoiser import Denoiser, Matched, NetworkDenoiser, on_process, same_process
from steersman.diffusion.denoising_chain import (
    ChainHead,
    ChainPolicy,
    DenoisingChains,
    Transitions,
    TunedFrom,
    WholeChunks,
)
from steersman.diffusion.distillation import ConsistencyDenoiser, ConsistencyDistillation
from steersman.diffusion.dppo import DPPO, DenoisingClip, DenoisingDiscount
from steersman.diffusion.execution import BidirectionalDecoding, TemporalEnsemble
from steersman.diffusion.flow_policy import FlowArchitecture, FlowHead, FlowPolicy, FlowSample
from steersman.diffusion.fpo import FPO, LimitedRatio
from steersman.diffusion.generator import ChunkGenerator
from steersman.diffusion.gorl import StageLoop, flow_cloning
from steersman.diffusion.gpc import Views, compose, reweighted
from steersman.diffusion.latent_actions import (
    Decoder,
    GenerativeDecoder,
    LatentActions,
    LatentParams,
    LatentPolicy,
    LatentPPO,
    Unchanged,
)
from steersman.diffusion.lerobot import LeRobotPolicy, load_lerobot, save_lerobot
from steersman.diffusion.likelihood import flow_log_prob
from steersman.diffusion.losses import denoising_loss, prediction_errors
from steersman.diffusion.mcdp import (
    ImageRecipe,
    PointCloudRecipe,
    VectorRecipe,
    WeightSweep,
    check_modalities,
    compose_modalities,
    weight_sweep,
)
from steersman.diffusion.mixtures import Mixture, MixtureDenoiser
from steersman.diffusion.offline_improvement import OfflineImprovement, exploring_chains
from steersman.diffusion.onedp import OneDP, reverse_kl_surrogate
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
from steersman.diffusion.rl_100 import RL100
from steersman.diffusion.rti_dp import DiscreteActions, RealTimeIteration, scale_discrete
from steersman.diffusion.samplers import (
    DDIM,
    DDPM,
    Chain,
    DPMSolver,
    FlowSolver,
    OneCall,
    Sampler,
    Step,
    StochasticSampler,
    sample,
    transition_log_prob,
)
from steersman.diffusion.scaling import Scaling, normalize_observation
from steersman.diffusion.sgac import SelfGuidedPolicy, activation_guidance, agree, self_guided
from steersman.diffusion.superposition import Superposition, SuperpositionMemory
from steersman.diffusion.warm_start import contraction, estimate_start, warm_grid
from steersman.diffusion.weight_search import Search, choose_weights, play, search_weights, simplex

__all__ = [
    "DDIM",
    "DDPM",
    "DPPO",
    "EDM",
    "FPO",
    "PREDICTIONS",
    "RL100",
    "BidirectionalDecoding",
    "Chain",
    "ChainHead",
    "ChainPolicy",
    "ChunkGenerator",
    "Cloned",
    "Cloning",
    "Combined",
    "CombinedPrediction",
    "ConsistencyDenoiser",
    "ConsistencyDistillation",
    "ContinuousProcess",
    "ContinuousVP",
    "DPMSolver",
    "Decoder",
    "Denoiser",
    "DenoiserRecipe",
    "DenoisingChains",
    "DenoisingClip",
    "DenoisingDiscount",
    "DiscreteActions",
    "DiscreteVP",
    "EncoderRecipe",
    "FlowArchitecture",
    "FlowHead",
    "FlowPolicy",
    "FlowSample",
    "FlowSolver",
    "GenerativeDecoder",
    "Grid",
    "ImageRecipe",
    "LatentActions",
    "LatentPPO",
    "LatentParams",
    "LatentPolicy",
    "LeRobotPolicy",
    "LimitedRatio",
    "MLPRecipe",
    "Matched",
    "Mixture",
    "MixtureDenoiser",
    "NetworkDenoiser",
    "NoiseProcess",
    "OfflineImprovement",
    "OneCall",
    "OneDP",
    "PointCloudRecipe",
    "Prediction",
    "RealTimeIteration",
    "RectifiedFlow",
    "Sampler",
    "Scaling",
    "Search",
    "SelfGuidedPolicy",
    "StageLoop",
    "Step",
    "StochasticSampler",
    "Superposition",
    "SuperpositionMemory",
    "TemporalEnsemble",
    "Transitions",
    "TunedFrom",
    "Unchanged",
    "UnderConditions",
    "VectorRecipe",
    "Views",
    "WeightSweep",
    "WholeChunks",
    "activation_guidance",
    "agree",
    "best_weights",
    "check_modalities",
    "choose_weights",
    "combine",
    "compose",
    "compose_modalities",
    "contraction",
    "denoising_loss",
    "endpoint_error_bound",
    "error_power",
    "error_products",
    "estimate_start",
    "exploring_chains",
    "flow_cloning",
    "flow_log_prob",
    "load_lerobot",
    "normalize_observation",
    "on_process",
    "play",
    "prediction_errors",
    "read_prediction",
    "reverse_kl_surrogate",
    "reweighted",
    "same_process",
    "sample",
    "save_lerobot",
    "scale_discrete",
    "search_weights",
    "self_guided",
    "simplex",
    "transition_log_prob",
    "warm_grid",
    "weight_sweep",
    "write_prediction",
]
