"""What the contestants share: their equal settings, and how they answer the driver.

A contestant is a process that stays alive. It reads one request per line from standard input, a JSON object, and
answers each with one line of JSON on standard output. This file runs in both environments, Steersman's and the
peers', and imports neither.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

NUM_ENVS = 64
NUM_STEPS = 32
BATCH = NUM_ENVS * NUM_STEPS
HIDDEN = (64, 64)
EPOCHS = 4
MINIBATCHES = 8
LEARNING_RATE = 1e-3
ADAM_EPSILON = 1e-5
LAMBDA = 0.95
CLIP = 0.2
VALUE_COEFFICIENT = 0.5
MAX_GRADIENT_NORM = 0.5

#: Episodes of one evaluation.
EVALUATION_EPISODES = 16


class Task(NamedTuple):
    """What differs between the tasks.

    Attributes:
        name: the environment, by the same name in gymnax and in Gymnasium.
        gamma: discount.
        reward_scale: factor on rewards while learning.
        threshold: mean evaluation return at which the task counts as learned.
        episode_steps: where an episode is cut.
    """

    name: str
    gamma: float
    reward_scale: float
    threshold: float
    episode_steps: int


TASKS = {
    "CartPole-v1": Task("CartPole-v1", 0.99, 1.0, 475.0, 500),
    "Pendulum-v1": Task("Pendulum-v1", 0.95, 0.1, -250.0, 200),
}


class Enough(Exception):  # noqa: N818 - it ends a run that went well
    """The driver has seen what it wanted; training stops."""


def answer_requests(handle: Callable[[dict], dict], packages: Sequence[str]) -> None:
    """Answers requests until standard input ends; an error is an answer too.

    Args:
        handle: makes an answer of a request.
        packages: whose versions are told first.
    """
    # What a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    versions = {name: importlib.metadata.version(name) for name in packages}
    answer({"ready": True, "versions": {"python": platform.python_version(), **versions}})
    for line in sys.stdin:
        try:
            answer(handle(json.loads(line)))
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


def milliseconds(call: Callable[[], object], repeats: int) -> list[float]:
    """How long each of some calls takes that follow one which is not counted."""
    call()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - began))
    return taken


def serve(
    stretch: Callable[[Task, int, int], None],
    learn: Callable[[Task, int, int, Callable[[int, float], None]], None],
    packages: Sequence[str],
) -> None:
    """Answers requests to train PPO until standard input ends.

    Args:
        stretch: called with ``(task, iterations, seed)``; trains a new agent for so many iterations and returns when
            its parameters are there.
        learn: called with ``(task, seed, interval, evaluated)``; trains a new agent and calls
            ``evaluated(iterations, mean return)`` after every `interval` iterations, until that raises
            :class:`Enough`.
        packages: whose versions are told.
    """

    def handle(request: dict) -> dict:
        task = TASKS[request["task"]]
        if request["do"] != "stretch":
            return {"evaluations": _learn(learn, task, request)}
        began, worked = time.perf_counter(), time.process_time()
        stretch(task, request["iterations"], request["seed"])
        seconds, processor_seconds = time.perf_counter() - began, time.process_time() - worked
        return {"steps": request["iterations"] * BATCH, "seconds": seconds, "processor_seconds": processor_seconds}

    answer_requests(handle, packages)


def _learn(learn: Callable, task: Task, request: dict) -> list[tuple[int, float, float]]:
    """Evaluations as ``(environment steps, seconds since the request, mean return)``.

    Training goes on until the threshold has been reached and ``at_least`` iterations are done, or ``at_most`` are.
    """
    evaluations: list[tuple[int, float, float]] = []
    began = time.perf_counter()

    def evaluated(iterations: int, mean_return: float) -> None:
        evaluations.append((iterations * BATCH, time.perf_counter() - began, mean_return))
        reached = any(value >= task.threshold for _, _, value in evaluations)
        if iterations >= request["at_most"] or (reached and iterations >= request["at_least"]):
            raise Enough

    with contextlib.suppress(Enough):
        learn(task, request["seed"], request["interval"], evaluated)
    return evaluations
