"""The training loop and what it stands on: collection, checkpoints, metrics, evaluation, comparison."""

from steersman.training.algorithm import Algorithm, InteractiveAlgorithm, IterativeAlgorithm, Metrics
from steersman.training.averaging import Average, MovingAverage
from steersman.training.collect import Collector, EpisodeStatistics, Rollout
from steersman.training.comparison import compare
from steersman.training.dynamics_model import EnsembleLearner, KnownModel, bootstrapped_return, rollout_model
from steersman.training.episode_filter import EpisodeFilter
from steersman.training.episodes import Episodes, PopulationEpisodes
from steersman.training.evaluation import Evaluation, evaluate, evaluate_members, record_episode, render
from steersman.training.experience import Experience
from steersman.training.hyperparameters import Member, apply_settings, hyperparameters
from steersman.training.loop import Trained, train
from steersman.training.minibatches import minibatch_epochs, shuffled
from steersman.training.normalization import RewardScaler, RunningMoments
from steersman.training.optimizers import SGD, Adam, AdamW, Optimizer
from steersman.training.replay import Replay, Transition, transitions
from steersman.training.schedules import Linear, Schedule, WarmupCosine, resolve, scalar
from steersman.training.staleness import Stale
from steersman.training.step_sizes import Polyak, polyak_sps

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Algorithm",
    "Average",
    "Collector",
    "EnsembleLearner",
    "EpisodeFilter",
    "EpisodeStatistics",
    "Episodes",
    "Evaluation",
    "Experience",
    "InteractiveAlgorithm",
    "IterativeAlgorithm",
    "KnownModel",
    "Linear",
    "Member",
    "Metrics",
    "MovingAverage",
    "Optimizer",
    "Polyak",
    "PopulationEpisodes",
    "Replay",
    "RewardScaler",
    "Rollout",
    "RunningMoments",
    "Schedule",
    "Stale",
    "Trained",
    "Transition",
    "WarmupCosine",
    "apply_settings",
    "bootstrapped_return",
    "compare",
    "evaluate",
    "evaluate_members",
    "hyperparameters",
    "minibatch_epochs",
    "polyak_sps",
    "record_episode",
    "render",
    "resolve",
    "rollout_model",
    "scalar",
    "shuffled",
    "train",
    "transitions",
]
