"""What an MMDiT makes of timestep, guidance and text before its blocks see them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.common.attention import counting
from models.common.layers import (
    AffineLayerNorm,
    Linear,
    Ops,
    read_at,
    sinusoid,
    split_heads,
    stack,
)
from models.mmdit.blocks import modulation
from models.mmdit.config import MMDiTConfig
from pallas_kernels import Onto


class Embedder(nn.Module):
    """Linear, SiLU, Linear; `site` is its name."""

    width: int
    ops: Ops
    site: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, 1, K]` -> `[B, 1, D]`, in x's dtype."""
        quantize = self.ops.quantizer.quantize
        h = Linear(self.width, self.ops, name="in")(quantize(x, f"{self.site}/in", None))
        hidden = quantize(jax.nn.silu(h), f"{self.site}/out", None)
        return Linear(self.width, self.ops, name="out")(hidden)


class Refiner(nn.Module):
    """Reads the text by some blocks of its own, gated by the timestep and the mean of the text."""

    config: MMDiTConfig
    ops: Ops
    dtype: Any

    @nn.compact
    def __call__(self, text: jax.Array, t: jax.Array, lengths: jax.Array | None) -> jax.Array:
        """Refine the text.

        Args:
          text: `[B, tokens, text_width]`.
          t: timesteps, `[B]`.
          lengths: how many tokens of each text count, or None for all.
        Returns:
          `[B, tokens, D]`; those that do not count are finite and mean nothing.
        """
        config = self.config
        counts = counting(lengths, text.shape[1])
        counts = jnp.ones((1, text.shape[1]), bool) if counts is None else counts
        mean = jnp.mean(text.astype(jnp.float32), axis=1, keepdims=True, where=counts[..., None])
        time = sinusoid(t[:, None], config.time_width)
        vec = Embedder(config.width, self.ops, "refiner/time", name="time")(time)
        vec = vec + Embedder(config.width, self.ops, "refiner/pooled", name="pooled")(mean)
        vec = jax.nn.silu(vec).astype(self.dtype)

        h = self.ops.quantizer.quantize(text.astype(self.dtype), "refiner/text_in", None)
        x = Linear(config.width, self.ops, name="text_in")(h)
        layers = stack(RefinerLayer, config.refiner_blocks, shared=2)(
            config, self.ops, name="layers"
        )
        x, _ = layers(x, vec, lengths, None)
        return x


class RefinerLayer(nn.Module):
    """Self-attention and a feed-forward network, each behind a gate."""

    config: MMDiTConfig
    ops: Ops

    @nn.compact
    def __call__(
        self, x: jax.Array, vec: jax.Array, lengths: jax.Array | None, state: None
    ) -> tuple[jax.Array, None]:
        """`[B, tokens, D]` and what opens the gates `[B, 1, D]` -> tokens, None."""
        config, ops = self.config, self.ops
        h = read_at(self, vec, "refiner/layers/gates", None)
        gate1, gate2 = modulation(Linear(2 * config.width, ops, name="gates")(h), 2)

        norm = AffineLayerNorm(config.eps, name="norm1")(x)
        h = read_at(self, norm, "refiner/layers/qkv", None)
        q, k, v = (
            split_heads(Linear(config.width, ops, name=name)(h), config.heads) for name in "qkv"
        )
        out = ops.attention(q, k, v, lengths=lengths).reshape(x.shape)
        h = read_at(self, out, "refiner/layers/o", None)
        x = Linear(config.width, ops, name="o")(h, Onto(x=x, gate=gate1))

        norm = AffineLayerNorm(config.eps, name="norm2")(x)
        h = read_at(self, norm, "refiner/layers/up", None)
        h = jax.nn.silu(Linear(config.mlp_width, ops, name="up")(h))
        h = read_at(self, h, "refiner/layers/down", None)
        return Linear(config.width, ops, name="down")(h, Onto(x=x, gate=gate2)), state
