"""Every objective is one function for JAX and PyTorch: same values, same gradients, and right ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steersman import objectives as o

B, V = 6, 5
RNG = np.random.default_rng(0)
LOG_RATIO = RNG.normal(scale=0.6, size=(B, V))
ADVANTAGE = RNG.normal(size=(B, V))
OTHER = RNG.normal(size=(B, V))
POSITIVE = RNG.uniform(0.1, 0.6, size=(B, V))
MASK = RNG.uniform(size=(B, V)) < 0.7
MASK[2] = False
LOGITS = np.where(RNG.uniform(size=(B, V)) < 0.2, -np.inf, 2.0 * RNG.normal(size=(B, V)))
LOGITS[1] = -np.inf
# One choice is left, and its logit is finite differences' only unknown.
LOGITS[3] = [-np.inf, 0.3, -np.inf, -np.inf, -np.inf]

#: name: (function, arrays, how many of them, from the first, are differentiated)
OBJECTIVES = {
    "policy_gradient": (o.policy_gradient, (LOG_RATIO, ADVANTAGE), 2),
    "unclipped": (o.unclipped, (LOG_RATIO, ADVANTAGE), 2),
    "unclipped per sequence": (o.unclipped, (LOG_RATIO, ADVANTAGE[:, :1]), 2),
    "clipped": (functools.partial(o.clipped, clip_low=0.2), (LOG_RATIO, ADVANTAGE), 1),
    "clipped apart": (functools.partial(o.clipped, clip_low=2.0, clip_high=0.3), (LOG_RATIO, ADVANTAGE), 1),
    "clipped per token": (o.clipped, (LOG_RATIO, ADVANTAGE, POSITIVE, 2 * POSITIVE), 1),
    "dual_clipped": (functools.partial(o.dual_clipped, clip_low=0.2, dual_clip=1.5), (LOG_RATIO, ADVANTAGE), 1),
    "dual_clipped per token": (o.dual_clipped, (LOG_RATIO, ADVANTAGE, POSITIVE, POSITIVE, 1 + POSITIVE), 1),
    "decoupled_clipped": (
        functools.partial(o.decoupled_clipped, epsilon=0.2),
        (LOG_RATIO, OTHER, 0.5 * OTHER, ADVANTAGE),
        1,
    ),
    "decoupled_clipped per token": (o.decoupled_clipped, (LOG_RATIO, OTHER, 0.5 * OTHER, ADVANTAGE, POSITIVE), 1),
    # Where the weight is bounded the log-probability is a constant in it: differences see no gradient there.
    "decoupled_clipped, bounded": (
        lambda a, *log_probs: o.decoupled_clipped(*log_probs, a, 0.2, 1.3),
        (ADVANTAGE, LOG_RATIO, OTHER, 0.5 * OTHER),
        1,
    ),
    "spo": (functools.partial(o.spo, epsilon=0.2), (LOG_RATIO, ADVANTAGE), 2),
    "spo per token": (o.spo, (LOG_RATIO, ADVANTAGE, POSITIVE), 3),
    "kl_penalized": (functools.partial(o.kl_penalized, beta=0.7), (LOG_RATIO, ADVANTAGE, POSITIVE), 3),
    "top_half": (lambda a: o.mean(a, o.top_half(a)), (ADVANTAGE,), 1),
    "temperature_weights": (functools.partial(o.temperature_weights, temperature=0.7), (ADVANTAGE,), 1),
    "temperature_weights of what counts": (
        lambda a, p, m: o.temperature_weights(a, o.mean(p), m),
        (ADVANTAGE, POSITIVE, MASK),
        2,
    ),
    "temperature_loss": (functools.partial(o.temperature_loss, temperature=0.7, epsilon=0.1), (ADVANTAGE,), 1),
    "temperature_loss of what counts": (
        lambda p, m, a: o.temperature_loss(a, o.mean(p), 0.1, m > 0.3),
        (POSITIVE, POSITIVE, ADVANTAGE),
        1,
    ),
    "entropy": (o.entropy, (LOGITS,), 1),
    "entropy of what is allowed": (o.entropy, (ADVANTAGE, MASK), 1),
    "clamped_entropy": (functools.partial(o.clamped_entropy, share=0.5), (ADVANTAGE,), 1),
    "k1_kl": (o.k1_kl, (LOG_RATIO, OTHER), 2),
    "k2_kl": (o.k2_kl, (LOG_RATIO, OTHER), 2),
    "k3_kl": (o.k3_kl, (LOG_RATIO, OTHER), 2),
    "squared_error": (o.squared_error, (ADVANTAGE, OTHER), 2),
    "huber": (functools.partial(o.huber, delta=0.5), (ADVANTAGE, OTHER), 2),
    "expectile_error": (functools.partial(o.expectile_error, expectile=0.7), (ADVANTAGE, OTHER), 2),
    "clipped_value_error": (functools.partial(o.clipped_value_error, clip=0.5), (ADVANTAGE, LOG_RATIO, OTHER), 1),
    "clipped_value_error, huber": (
        functools.partial(o.clipped_value_error, clip=0.5, error=functools.partial(o.huber, delta=0.5)),
        (ADVANTAGE, LOG_RATIO, OTHER),
        1,
    ),
    "mean": (o.mean, (ADVANTAGE, MASK), 1),
    "token_mean": (functools.partial(o.token_mean, budget=9), (ADVANTAGE, MASK), 1),
    "sequence_mean": (o.sequence_mean, (ADVANTAGE, MASK), 1),
    "sequence_sum_mean": (functools.partial(o.sequence_sum_mean, budget=8), (ADVANTAGE, MASK), 1),
    "aggregate, weights per sequence": (
        lambda loss, mask, weights: o.aggregate(loss, mask, "dapo", weights),
        (ADVANTAGE, MASK, POSITIVE[:, 0]),
        1,
    ),
    "aggregate, weights per token": (
        lambda loss, mask, weights: o.aggregate(loss, mask, "dr_grpo", weights, budget=8.0),
        (ADVANTAGE, MASK, POSITIVE),
        1,
    ),
    "adaptive_kl": (lambda beta, kl: o.adaptive_kl(beta, kl, 0.3), (ADVANTAGE, POSITIVE), 1),
    "approximate_kl": (o.approximate_kl, (LOG_RATIO, MASK), 1),
    "ratio_deviation": (o.ratio_deviation, (LOG_RATIO, MASK), 1),
    "clip_fraction": (lambda r, m: o.clip_fraction(r, 0.2, mask=m) + 0.0 * o.mean(r), (LOG_RATIO, MASK), 1),
    "explained_variance": (o.explained_variance, (ADVANTAGE, OTHER, MASK), 2),
}


def in_jax(function, arrays, differentiated):
    """Value and gradients of a weighted sum of the result, compiled."""

    def scalar(*free):
        result = function(*free, *map(jnp.asarray, arrays[differentiated:]))
        return jnp.sum(result * jnp.cos(jnp.arange(result.size)).reshape(result.shape)), result

    with jax.enable_x64(True):
        free = tuple(map(jnp.asarray, arrays[:differentiated]))
        gradient = jax.grad(scalar, argnums=tuple(range(differentiated)), has_aux=True)
        gradients, result = jax.jit(gradient)(*free)
        return np.asarray(result), [np.asarray(g) for g in gradients]


@functools.cache
def jax_answer(name):
    return in_jax(*OBJECTIVES[name])


def test_everything_in_the_room_is_here():
    tested = {name.split(",")[0].split(" ")[0] for name in OBJECTIVES}
    assert tested == set(o.__all__) - {"Surrogate"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(name):
    function, arrays, differentiated = OBJECTIVES[name]
    result, gradients = jax_answer(name)
    weight = np.cos(np.arange(result.size)).reshape(result.shape)
    np.testing.assert_allclose(function(*arrays), result, rtol=1e-12, atol=1e-14)  # NumPy arrays will do as well

    def scalar(changed):
        return np.sum(np.asarray(function(*changed)) * weight)

    step = 1e-6
    for i in range(differentiated):
        for index in np.ndindex(*arrays[i].shape):
            if not np.isfinite(arrays[i][index]):
                assert gradients[i][index] == 0.0
                continue
            up, down = arrays[i].copy(), arrays[i].copy()
            up[index] += step
            down[index] -= step
            slope = (scalar((*arrays[:i], up, *arrays[i + 1 :])) - scalar((*arrays[:i], down, *arrays[i + 1 :]))) / (
                2 * step
            )
            assert gradients[i][index] == pytest.approx(slope, rel=1e-6, abs=1e-8), (i, index)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_torch_agrees(name):
    torch = pytest.importorskip("torch")
    function, arrays, differentiated = OBJECTIVES[name]
    result, gradients = jax_answer(name)
    tensors = [torch.tensor(array) for array in arrays]
    for tensor in tensors[:differentiated]:
        tensor.requires_grad_()
    value = function(*tensors)
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value.detach().numpy(), result, rtol=1e-12, atol=1e-14)
    weight = torch.cos(torch.arange(result.size, dtype=torch.float64)).reshape(result.shape)
    (value * weight).sum().backward()
    for tensor, gradient in zip(tensors[:differentiated], gradients, strict=True):
        np.testing.assert_allclose(tensor.grad.numpy(), gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_vmap_over_a_leading_axis_is_a_loop(name):
    function, arrays, _ = OBJECTIVES[name]
    stacked = [jnp.asarray(np.stack([array, array[::-1]])) for array in arrays]
    batched = jax.jit(jax.vmap(function))(*stacked)
    for i, which in enumerate((slice(None), slice(None, None, -1))):
        alone = function(*(array[which].astype(np.float32 if array.dtype == float else bool) for array in arrays))
        np.testing.assert_allclose(batched[i], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_single_precision_stays_single(name):
    function, arrays, _ = OBJECTIVES[name]
    with jax.enable_x64(True):
        shapes = [jax.ShapeDtypeStruct(a.shape, jnp.float32 if a.dtype == float else a.dtype) for a in arrays]
        assert jax.eval_shape(function, *shapes).dtype == jnp.float32
