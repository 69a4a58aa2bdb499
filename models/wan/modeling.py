"""The Wan transformer in Flax Linen: `Wan(config).apply({"params": params}, x, t, text)`.

Computes in `dtype`; norms, modulation, rotary embedding, softmax and the timestep's network are
float32. The blocks are stacked along axis 0 of their parameters and run by one `nn.scan`.

Named intermediates: `apply(..., mutable=["intermediates"])` also returns the input of every linear
and the output of every block, stacked over the blocks.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.common.layers import (
    AffineLayerNorm,
    Input,
    Linear,
    Ops,
    RMSNorm,
    modulated_norm,
    patchify,
    sinusoid,
    unpatchify,
)
from models.common.rope import apply_rope, rope_table
from models.wan.config import WanConfig

IMAGE_EPS = 1e-5  # of the norms around the image embedding


class Wan(nn.Module):
    """Predicts the flow (or whatever it was trained for) of a noisy latent video.

    With `remat`, the backward pass keeps the results of matrix products only and computes the rest
    of a block again: on an H100 a fifth of the memory and two thirds of the time.
    """

    config: WanConfig
    ops: Ops = Ops()
    dtype: Any = jnp.bfloat16
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, text: jax.Array, image: jax.Array | None = None
    ) -> jax.Array:
        """Run the network.

        Args:
          x: `[B, T, H, W, in_channels]`.
          t: timesteps in [0, 1000], `[B]`, or `[B, S]` for one of each token.
          text: embeddings `[B, tokens, text_width]`, zeros behind the text.
          image: embeddings `[B, tokens, image_width]` for a config that has an image_width.
        Returns:
          `[B, T, H, W, out_channels]` in float32.
        """
        config = self.config
        if (image is None) != (config.image_width is None):
            raise ValueError(
                f"image: this config {'needs' if image is None else 'takes no'} image embeddings"
            )
        size = (x.shape[1], x.shape[2], x.shape[3])
        rope = rope_table(config.grid(size), config.rope_widths, config.rope_theta)
        steps = t if t.ndim == 2 else t[:, None]

        tokens = self._linear("patch_embedding", patchify(x, config.patch).astype(self.dtype))
        context = self._linear("text_in", text.astype(self.dtype))
        context = self._linear("text_out", jax.nn.gelu(context, approximate=True))
        if image is not None:
            image = ImageEmbedding(config, self.ops, name="image_embedding")(
                image.astype(self.dtype)
            )
        # The timestep's own network runs in float32, as in the original.
        time = self._linear("time_in", sinusoid(steps, config.time_width))
        time = self._linear("time_out", jax.nn.silu(time)).astype(self.dtype)
        modulation = self._linear("time_projection", jax.nn.silu(time), 6 * config.width)
        modulation = modulation.astype(jnp.float32).reshape(*steps.shape, 6, config.width)

        block = Block
        if self.remat:
            keep = jax.checkpoint_policies.dots_saveable
            block = nn.remat(Block, policy=keep, prevent_cse=False)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.layers,
        )(config, self.ops, name="blocks")
        tokens, _ = blocks(tokens, context, image, modulation, rope)

        table = self.param(
            "head_modulation", nn.initializers.normal(config.width**-0.5), (2, config.width)
        )
        shift, scale = _modulation(table, time.astype(jnp.float32)[..., None, :])
        tokens = modulated_norm(tokens, shift, scale, config.eps)
        out = self._linear("head", tokens, config.out_channels * math.prod(config.patch))
        return unpatchify(out.astype(jnp.float32), size, config.patch)

    def _linear(self, name: str, x: jax.Array, features: int | None = None) -> jax.Array:
        linear = Linear(features or self.config.width, self.ops, name=name)
        return linear(self.ops.quantize_input(x, name))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward network on tokens `[B, S, D]`."""

    config: WanConfig
    ops: Ops

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array,
        image: jax.Array | None,
        modulation: jax.Array,
        rope: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, None]:
        """Modulation is `[B, 1 or S, 6, D]`; returns (tokens, None), as `nn.scan` wants it."""
        config = self.config
        table = self.param(
            "modulation", nn.initializers.normal(config.width**-0.5), (6, config.width)
        )
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(table, modulation)

        h = modulated_norm(x, shift1, scale1, config.eps)
        x = _gated(x, SelfAttention(config, self.ops, name="self_attn")(h, rope), gate1)

        h = AffineLayerNorm(config.eps, name="cross_norm")(x)
        x = x + CrossAttention(config, self.ops, name="cross_attn")(h, context, image)

        h = modulated_norm(x, shift2, scale2, config.eps)
        x = _gated(x, FeedForward(config, self.ops, name="ffn")(h), gate2)
        self.sow("intermediates", "output", x, reduce_fn=_latest)
        return x, None


class SelfAttention(nn.Module):
    """Attention among the tokens of the video; q and k are normed over D, then rotated."""

    config: WanConfig
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
        """`[B, S, D]` -> `[B, S, D]`."""
        config = self.config
        h = _quantized(self, x, "self_attn/qkv")
        q, k, v = (Linear(config.width, self.ops, name=name)(h) for name in "qkv")
        q = RMSNorm(config.eps, name="norm_q")(q)
        k = RMSNorm(config.eps, name="norm_k")(k)
        q, k, v = (_heads(part, config.heads) for part in (q, k, v))
        out = self.ops.attention(apply_rope(q, *rope), apply_rope(k, *rope), v)
        h = _quantized(self, out.reshape(x.shape), "self_attn/o")
        return Linear(config.width, self.ops, name="o")(h)


class CrossAttention(nn.Module):
    """Attention from the tokens of the video to the text and, added to it, to the image."""

    config: WanConfig
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array, image: jax.Array | None) -> jax.Array:
        """`[B, S, D]` -> `[B, S, D]`."""
        config = self.config
        q = Linear(config.width, self.ops, name="q")(_quantized(self, x, "cross_attn/q"))
        q = _heads(RMSNorm(config.eps, name="norm_q")(q), config.heads)

        def attend(source: jax.Array, site: str, suffix: str) -> jax.Array:
            h = _quantized(self, source, site)
            k = Linear(config.width, self.ops, name=f"k{suffix}")(h)
            v = Linear(config.width, self.ops, name=f"v{suffix}")(h)
            k = RMSNorm(config.eps, name=f"norm_k{suffix}")(k)
            return self.ops.attention(q, _heads(k, config.heads), _heads(v, config.heads))

        out = attend(text, "cross_attn/kv", "")
        if image is not None:
            out = out + attend(image, "cross_attn/kv_image", "_image")
        h = _quantized(self, out.reshape(x.shape), "cross_attn/o")
        return Linear(config.width, self.ops, name="o")(h)


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    config: WanConfig
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, S, D]` -> `[B, S, D]`."""
        up = Linear(self.config.ffn_width, self.ops, name="up")
        down = Linear(self.config.width, self.ops, name="down")
        h = jax.nn.gelu(up(_quantized(self, x, "ffn/up")), approximate=True)
        return down(_quantized(self, h, "ffn/down"))


class ImageEmbedding(nn.Module):
    """Norm, Linear, exact GELU, Linear, norm."""

    config: WanConfig
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, tokens, image_width]` -> `[B, tokens, D]`."""
        x = AffineLayerNorm(IMAGE_EPS, name="norm_in")(x)
        up = Linear(x.shape[-1], self.ops, name="up")
        down = Linear(self.config.width, self.ops, name="down")
        x = up(self.ops.quantize_input(x, "image_embedding/up"))
        x = jax.nn.gelu(x, approximate=False)
        x = down(self.ops.quantize_input(x, "image_embedding/down"))
        return AffineLayerNorm(IMAGE_EPS, name="norm_out")(x)


def _quantized(module: Any, x: jax.Array, site: str) -> Input:
    """The input of a block's linears, quantised if the Ops say so; sown as an intermediate."""
    module.sow("intermediates", site.rpartition("/")[2] + "_input", x, reduce_fn=_latest)
    return module.ops.quantize_input(x, f"blocks/{site}")


def _latest(_: Any, x: jax.Array) -> jax.Array:
    return x


def _modulation(table: jax.Array, steps: jax.Array) -> list[jax.Array]:
    """Table `[n, D]` + steps `[B, 1 or S, 1 or n, D]` -> n arrays `[B, 1 or S, D]`, float32."""
    summed = table.astype(jnp.float32)[None, None] + steps
    return [summed[:, :, i] for i in range(table.shape[0])]


def _gated(x: jax.Array, update: jax.Array, gate: jax.Array) -> jax.Array:
    """x + update * gate, summed in float32."""
    return (x.astype(jnp.float32) + update.astype(jnp.float32) * gate).astype(x.dtype)


def _heads(x: jax.Array, heads: int) -> jax.Array:
    """`[B, S, D]` -> `[B, S, heads, D / heads]`."""
    return x.reshape(*x.shape[:2], heads, -1)
