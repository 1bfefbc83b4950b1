"""The training loop and what it stands on: collection, checkpoints, metrics, evaluation, comparison."""

from steersman.training.algorithm import Algorithm, InteractiveAlgorithm, IterativeAlgorithm, Metrics
from steersman.training.collect import Collector, EpisodeStatistics, Rollout
from steersman.training.comparison import compare
from steersman.training.evaluation import Evaluation, evaluate, evaluate_members, record_episode, render
from steersman.training.experience import Experience
from steersman.training.hyperparameters import Member, apply_settings, hyperparameters
from steersman.training.loop import Trained, train
from steersman.training.minibatches import minibatch_epochs, shuffled
from steersman.training.normalization import RewardScaler, RunningMoments
from steersman.training.schedules import Linear, Schedule, resolve, scalar

__all__ = [
    "Algorithm",
    "Collector",
    "EpisodeStatistics",
    "Evaluation",
    "Experience",
    "InteractiveAlgorithm",
    "IterativeAlgorithm",
    "Linear",
    "Member",
    "Metrics",
    "RewardScaler",
    "Rollout",
    "RunningMoments",
    "Schedule",
    "Trained",
    "apply_settings",
    "compare",
    "evaluate",
    "evaluate_members",
    "hyperparameters",
    "minibatch_epochs",
    "record_episode",
    "render",
    "resolve",
    "scalar",
    "shuffled",
    "train",
]
