"""The transformer of diffusion policies as the network of a denoiser."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from steersman.errors import require, require_count
from steersman.networks.denoiser_arguments import check_arguments, check_sizes
from steersman.networks.linear import Draw, Linear, draw_parameters
from steersman.networks.mlp import mish
from steersman.networks.time_embedding import SinusoidalTime


class Attention(eqx.Module):
    """Dot-product attention with several heads (Vaswani et al., 2017, arXiv:1706.03762).

    Attributes:
        query: of the rows that ask.
        key_value: keys and values of the tokens that answer, one after the other.
        output: on the heads' results.
        heads: number of heads.
        causal: whether row ``i`` sees tokens ``0 .. i`` alone.
    """

    query: Linear
    key_value: Linear
    output: Linear
    heads: int = eqx.field(static=True)
    causal: bool = eqx.field(static=True)

    def __init__(self, width: int, heads: int, causal: bool, draw: Draw):
        """Makes the parts.

        Args:
            width: of rows and tokens.
            heads: number of heads; divides the width.
            causal: whether later tokens are hidden.
            draw: where random numbers come from.
        """
        self.query = Linear(width, width, draw)
        self.key_value = Linear(width, 2 * width, draw)
        self.output = Linear(width, width, draw)
        self.heads = heads
        self.causal = causal

    def __call__(self, rows: Float[Array, "H W"], tokens: Float[Array, "S W"]) -> Float[Array, "H W"]:
        """What each row reads of the tokens."""
        width = rows.shape[1]
        queries = jax.vmap(self.query)(rows).reshape(rows.shape[0], self.heads, -1)
        keys, values = jnp.split(jax.vmap(self.key_value)(tokens), 2, axis=1)
        keys, values = (part.reshape(tokens.shape[0], self.heads, -1) for part in (keys, values))
        logits = jnp.einsum("qhd,khd->hqk", queries, keys) / jnp.sqrt(jnp.asarray(width / self.heads, rows.dtype))
        if self.causal:
            seen = jnp.arange(rows.shape[0])[:, None] >= jnp.arange(tokens.shape[0])
            logits = jnp.where(seen, logits, -jnp.inf)
        read = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits, axis=-1), values)
        return jax.vmap(self.output)(read.reshape(rows.shape[0], width))


class DecoderLayer(eqx.Module):
    """Attention among the rows of the chunk, attention to the condition, two linear layers; each on a normalized input.

    Attributes:
        attention: among the rows.
        cross: to the tokens of the condition.
        wide: first linear layer, four times as wide, with GELU.
        narrow: second linear layer.
        norms: before each of the three.
    """

    attention: Attention
    cross: Attention
    wide: Linear
    narrow: Linear
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm, eqx.nn.LayerNorm]

    def __init__(self, width: int, heads: int, causal: bool, draw: Draw):
        """Makes the parts.

        Args:
            width: of rows and tokens.
            heads: number of heads.
            causal: whether a row sees no later one.
            draw: where random numbers come from.
        """
        self.attention = Attention(width, heads, causal, draw)
        self.cross = Attention(width, heads, False, draw)
        self.wide = Linear(width, 4 * width, draw)
        self.narrow = Linear(4 * width, width, draw)
        self.norms = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)

    def __call__(self, rows: Float[Array, "H W"], tokens: Float[Array, "S W"]) -> Float[Array, "H W"]:
        """Applies the layer."""
        normed = jax.vmap(self.norms[0])(rows)
        rows = rows + self.attention(normed, normed)
        rows = rows + self.cross(jax.vmap(self.norms[1])(rows), tokens)
        wide = jax.nn.gelu(jax.vmap(self.wide)(jax.vmap(self.norms[2])(rows)), approximate=False)
        return rows + jax.vmap(self.narrow)(wide)


class TransformerDenoiser(eqx.Module):
    """The transformer of diffusion policy (Chi et al., 2023, arXiv:2303.04137, section III-A): a decoder over the rows.

    Each row of the noisy chunk is a token that sees itself and earlier rows, and attends to the condition: one token of
    the time and one of each frame, encoded by two linear layers with Mish between them. Every row sees every frame.

    Attributes:
        time_features: of the time.
        entry: from a row to a token.
        frame: from a frame's part of the condition to a token; None where the condition is empty.
        positions: learned, of the rows ``[H, W]``.
        condition_positions: learned, of the time and the frames ``[1 + frames, W]``.
        encoder: two linear layers on the condition's tokens.
        layers: of the decoder.
        norm: before the output.
        output: from a token to a row.
        chunk_shape: ``(H, D)``.
        condition_size: length ``C`` of the condition.
        frames: into how many tokens the condition is cut.
    """

    time_features: SinusoidalTime
    entry: Linear
    frame: Linear | None
    positions: Float[Array, "H W"]
    condition_positions: Float[Array, "S W"]
    encoder: tuple[Linear, Linear]
    layers: list[DecoderLayer]
    norm: eqx.nn.LayerNorm
    output: Linear
    chunk_shape: tuple[int, int] = eqx.field(static=True)
    condition_size: int = eqx.field(static=True)
    frames: int = eqx.field(static=True)

    def __init__(
        self,
        chunk_shape: tuple[int, int],
        condition_size: int,
        width: int = 256,
        *,
        depth: int = 8,
        heads: int = 4,
        frames: int = 1,
        causal: bool = True,
        key: Key[Array, ""],
    ):
        """Makes a network with fresh parameters.

        Args:
            chunk_shape: rows and action dimensions ``(H, D)``.
            condition_size: length ``C`` of the condition; zero for none.
            width: of the tokens, even; `heads` divides it.
            depth: number of layers.
            heads: of each attention.
            frames: into how many tokens of equal length the condition is cut: the frames of a window, as
                :class:`~steersman.networks.WindowEncoder` puts them one after the other.
            causal: whether a row sees no later one.
            key: randomness of the initialization.

        Raises:
            InputError: a size is not usable, or does not divide another.
        """
        rows, actions = check_sizes(chunk_shape, condition_size)
        require_count("width", width, minimum=4)
        require_count("depth", depth)
        require_count("heads", heads)
        require_count("frames", frames)
        require(width % heads == 0 and width % 2 == 0, "width", width, f"even and a multiple of heads, {heads}")
        require(condition_size % frames == 0, "condition_size", condition_size, f"a multiple of frames, {frames}")
        size = condition_size // frames

        def build(draw: Draw) -> tuple:
            entry, output = Linear(actions, width, draw), Linear(width, actions, draw)
            frame = Linear(size, width, draw) if size else None
            # Uniform numbers of the standard deviation 0.02 that transformers' positions usually have.
            positions, condition_positions = draw((rows, width), 833), draw((1 + (frames if size else 0), width), 833)
            encoder = Linear(width, 4 * width, draw), Linear(4 * width, width, draw)
            layers = [DecoderLayer(width, heads, causal, draw) for _ in range(depth)]
            return entry, output, frame, positions, condition_positions, encoder, layers

        parts = draw_parameters(build, key)
        self.entry, self.output, self.frame, self.positions, self.condition_positions, self.encoder, self.layers = parts
        self.time_features = SinusoidalTime(width)
        self.norm = eqx.nn.LayerNorm(width)
        self.chunk_shape = (rows, actions)
        self.condition_size = condition_size
        self.frames = frames

    def __call__(
        self, x: Float[Array, "H D"], time: Float[Array, ""], condition: Float[Array, " C"]
    ) -> Float[Array, "H D"]:
        """The prediction.

        Args:
            x: the noisy chunk.
            time: what the noise process tells of the level; a level's number for the usual discrete processes.
            condition: the encoded observation.
        """
        check_arguments(x, condition, self.chunk_shape, self.condition_size)
        tokens = self.time_features(time)[None]
        if self.frame is not None:
            tokens = jnp.concatenate([tokens, jax.vmap(self.frame)(condition.reshape(self.frames, -1))])
        first, second = self.encoder
        tokens = jax.vmap(lambda token: second(mish(first(token))))(tokens + self.condition_positions)
        hidden = jax.vmap(self.entry)(x) + self.positions
        for layer in self.layers:
            hidden = layer(hidden, tokens)
        return jax.vmap(lambda token: self.output(self.norm(token)))(hidden)
