"""What a denoising network predicts, and the exact way from each of these to every other."""

from __future__ import annotations

import equinox as eqx
from jaxtyping import Array, Float

from steersman.errors import unknown_name

#: What a network may predict of ``x = alpha a + sigma e``: the noise ``e``, the clean sample ``a``, the velocity
#: ``alpha e - sigma a`` of variance-preserving processes (Salimans and Ho, 2022, arXiv:2202.00512), the flow
#: ``e - a`` of straight paths, or the score ``-e / sigma``.
PREDICTIONS = ("noise", "sample", "velocity", "flow", "score")


class Prediction(eqx.Module):
    """A network's prediction at one noisy chunk, as noise and as clean sample; each follows from the other.

    Attributes:
        noise: the noise ``e`` in it ``[..., H, D]``.
        sample: the clean chunk ``a`` behind it ``[..., H, D]``.
    """

    noise: Float[Array, "..."]
    sample: Float[Array, "..."]


def check_prediction(kind: str) -> None:
    """Raises InputError unless `kind` is one of ``PREDICTIONS``."""
    if kind not in PREDICTIONS:
        raise unknown_name("prediction", kind, PREDICTIONS)


def read_prediction(
    kind: str,
    value: Float[Array, "..."],
    x: Float[Array, "..."],
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
) -> Prediction:
    """Reads what a network returned at ``x = alpha a + sigma e``.

    Each is the linear map that the definition of its kind gives. The sample does not follow from the noise where
    ``alpha`` is 0, nor the noise from the sample where ``sigma`` is 0; a network of flows knows both there.

    Args:
        kind: one of ``PREDICTIONS``.
        value: the network's output.
        x: the noisy chunk.
        alpha: scale of the sample in it, broadcasting against `x`.
        sigma: scale of the noise in it.
    """
    check_prediction(kind)
    if kind == "flow":
        total = alpha + sigma
        return Prediction((x + alpha * value) / total, (x - sigma * value) / total)
    if kind == "velocity":
        total = alpha**2 + sigma**2
        return Prediction((sigma * x + alpha * value) / total, (alpha * x - sigma * value) / total)
    if kind == "sample":
        return Prediction((x - alpha * value) / sigma, value)
    noise = value if kind == "noise" else -sigma * value
    return Prediction(noise, (x - sigma * noise) / alpha)


def write_prediction(
    kind: str,
    sample: Float[Array, "..."],
    noise: Float[Array, "..."],
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
) -> Float[Array, "..."]:
    """What a network of `kind` should have returned for this sample and noise: the target of its training."""
    check_prediction(kind)
    if kind == "noise":
        return noise
    if kind == "sample":
        return sample
    if kind == "velocity":
        return alpha * noise - sigma * sample
    if kind == "flow":
        return noise - sample
    return -noise / sigma
