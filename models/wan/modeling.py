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
    FeedForward,
    Heads,
    Linear,
    Ops,
    latest,
    modulated_norm,
    patchify,
    read_at,
    sinusoid,
    split_heads,
    stack,
    unpatchify,
)
from models.common.rope import rope_table
from models.wan.config import WanConfig
from pallas_kernels import Deferred, Onto, Projected, computed

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
        self,
        x: jax.Array,
        t: jax.Array,
        text: jax.Array,
        image: jax.Array | None = None,
        state: Any = None,
    ) -> jax.Array | tuple[jax.Array, Any]:
        """Run the network.

        Args:
          x: `[B, T, H, W, in_channels]`.
          t: timesteps in [0, 1000], `[B]`, or `[B, S]` for one of each token.
          text: embeddings `[B, tokens, text_width]`, zeros behind the text.
          image: embeddings `[B, tokens, image_width]` for a config that has an image_width.
          state: what `ops.quantizer` remembers, stacked over the blocks.
        Returns:
          `[B, T, H, W, out_channels]` in float32; with a state, that and the new state.
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

        blocks = stack(Block, config.layers, shared=4, remat=self.remat)(
            config, self.ops, name="blocks"
        )
        tokens, new_state = blocks(tokens, context, image, modulation, rope, state)

        table = self.param(
            "head_modulation", nn.initializers.normal(config.width**-0.5), (2, config.width)
        )
        shift, scale = _modulation(table, time.astype(jnp.float32)[..., None, :])
        last = modulated_norm(tokens, shift, scale, config.eps)
        out = self._linear("head", last, config.out_channels * math.prod(config.patch))
        video = unpatchify(out.astype(jnp.float32), size, config.patch)
        return video if state is None else (video, new_state)

    def _linear(self, name: str, x: jax.Array | Deferred, features: int | None = None) -> jax.Array:
        linear = Linear(features or self.config.width, self.ops, name=name)
        return linear(self.ops.quantizer.quantize(x, name, None))


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
        state: Any,
    ) -> tuple[jax.Array, Any]:
        """Modulation is `[B, 1 or S, 6, D]`; returns (tokens, state), as `nn.scan` wants it."""
        config = self.config
        table = self.param(
            "modulation", nn.initializers.normal(config.width**-0.5), (6, config.width)
        )
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(table, modulation)

        h = modulated_norm(x, shift1, scale1, config.eps)
        onto = Onto(x=x, gate=gate1)
        x, state = SelfAttention(config, self.ops, name="self_attn")(h, rope, state, onto)

        h = AffineLayerNorm(config.eps, name="cross_norm")(x)
        onto = Onto(x=x)
        cross = CrossAttention(config, self.ops, name="cross_attn")
        x, state = cross(h, context, image, state, onto)

        h = modulated_norm(x, shift2, scale2, config.eps)
        onto = Onto(x=x, gate=gate2)
        x, state = FeedForward(config.ffn_width, self.ops, "blocks/ffn", name="ffn")(h, state, onto)
        self.sow("intermediates", "output", x, reduce_fn=latest)
        return x, state


class SelfAttention(nn.Module):
    """Attention among the tokens of the video; q and k are normed over D, then rotated."""

    config: WanConfig
    ops: Ops

    @nn.compact
    def __call__(
        self, x: jax.Array | Deferred, rope: tuple[jax.Array, jax.Array], state: Any, onto: Onto
    ) -> tuple[jax.Array, Any]:
        """`[B, S, D]` -> `[B, S, D]`, added to what is there; state."""
        config, quantizer = self.config, self.ops.quantizer
        h = read_at(self, x, "blocks/self_attn/qkv", state)
        q, k, v = (Linear(config.width, self.ops, name=name)(h) for name in "qkv")
        queries = Heads(config.heads, config.eps, name="norm_q")(q, rope)
        keys = Heads(config.heads, config.eps, name="norm_k")(k, rope)
        # In this order, so that what is learned about x knows the tokens' groups.
        state = quantizer.saw_attention(queries, keys, "blocks/self_attn", state)
        state = quantizer.saw_input(x, "blocks/self_attn/qkv", state)
        out = self.ops.attention(queries, keys, split_heads(v, config.heads)).reshape(x.shape)
        h = read_at(self, out, "blocks/self_attn/o", state)
        state = quantizer.saw_input(out, "blocks/self_attn/o", state)
        return Linear(config.width, self.ops, name="o")(h, onto), state


class CrossAttention(nn.Module):
    """Attention from the tokens of the video to the text and, added to it, to the image."""

    config: WanConfig
    ops: Ops

    @nn.compact
    def __call__(
        self,
        x: jax.Array | Deferred,
        text: jax.Array,
        image: jax.Array | None,
        state: Any,
        onto: Onto,
    ) -> tuple[jax.Array, Any]:
        """`[B, S, D]` -> `[B, S, D]`, added to what is there; state."""
        config, quantizer = self.config, self.ops.quantizer
        q = Linear(config.width, self.ops, name="q")(read_at(self, x, "blocks/cross_attn/q", state))
        state = quantizer.saw_input(x, "blocks/cross_attn/q", state)
        queries = Heads(config.heads, config.eps, name="norm_q")(q)

        def attend(source: jax.Array, site: str, suffix: str) -> tuple[jax.Array, Projected]:
            h = read_at(self, source, f"blocks/{site}", None)
            k = Linear(config.width, self.ops, name=f"k{suffix}")(h)
            v = Linear(config.width, self.ops, name=f"v{suffix}")(h)
            keys = Heads(config.heads, config.eps, name=f"norm_k{suffix}")(k)
            return self.ops.attention(queries, keys, split_heads(v, config.heads)), keys

        out, keys = attend(text, "cross_attn/kv", "")
        state = quantizer.saw_attention(queries, keys, "blocks/cross_attn", state)
        if image is not None:
            out = out + attend(image, "cross_attn/kv_image", "_image")[0]
        out = out.reshape(x.shape)
        h = read_at(self, out, "blocks/cross_attn/o", state)
        state = quantizer.saw_input(out, "blocks/cross_attn/o", state)
        return Linear(config.width, self.ops, name="o")(h, onto), state


class ImageEmbedding(nn.Module):
    """Norm, Linear, exact GELU, Linear, norm."""

    config: WanConfig
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, tokens, image_width]` -> `[B, tokens, D]`."""
        h = AffineLayerNorm(IMAGE_EPS, name="norm_in")(x)
        up = Linear(x.shape[-1], self.ops, name="up")
        down = Linear(self.config.width, self.ops, name="down")
        x = up(self.ops.quantizer.quantize(h, "image_embedding/up", None))
        x = jax.nn.gelu(x, approximate=False)
        x = down(self.ops.quantizer.quantize(x, "image_embedding/down", None))
        return computed(AffineLayerNorm(IMAGE_EPS, name="norm_out")(x))


def _modulation(table: jax.Array, steps: jax.Array) -> list[jax.Array]:
    """Table `[n, D]` + steps `[B, 1 or S, 1 or n, D]` -> n arrays `[B, 1 or S, D]`, float32."""
    summed = table.astype(jnp.float32)[None, None] + steps
    return [summed[:, :, i] for i in range(table.shape[0])]
