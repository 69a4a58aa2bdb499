"""The MMDiT in Flax Linen: `MMDiT(config).apply({"params": params}, x, t, text, pooled, ...)`.

Computes in `dtype`; norms, modulation, rotary embedding, softmax and the networks of timestep,
guidance and pooled text are float32. Double and single blocks are stacked along axis 0 of their
parameters and run by one scan each.

Named intermediates: `apply(..., mutable=["intermediates"])` also returns the input of every linear
and the output of every block, stacked over the blocks.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.common.layers import (
    Linear,
    Ops,
    modulated_norm,
    patchify,
    sinusoid,
    stack,
    unpatchify,
)
from models.common.rope import rope_table
from models.mmdit.blocks import DoubleBlock, Rope, SingleBlock, modulation
from models.mmdit.config import MMDiTConfig
from models.mmdit.embedders import Embedder, Refiner
from pallas_kernels import Deferred


class MMDiT(nn.Module):
    """Predicts the flow of a noisy latent video.

    With `remat`, the backward pass keeps the results of matrix products only and computes the rest
    of a block again.
    """

    config: MMDiTConfig
    ops: Ops = Ops()
    dtype: Any = jnp.bfloat16
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        text: jax.Array,
        pooled: jax.Array,
        *,
        text_lengths: jax.Array | None = None,
        guidance: jax.Array | None = None,
        cond: jax.Array | None = None,
        state: Any = None,
    ) -> jax.Array | tuple[jax.Array, Any]:
        """Run the network.

        Args:
          x: `[B, T, H, W, in_channels]`.
          t: timesteps in [0, 1000], `[B]`.
          text: embeddings `[B, tokens, text_width]`.
          pooled: embedding of the whole text, `[B, pooled_width]`.
          text_lengths: how many tokens of each text count, the first ones: int32 `[B]`, each at
            least 1; None: all. For a config whose text comes last.
          guidance: scales of guidance, `[B]`, for a config that has guidance.
          cond: `[B, T, H, W, cond_channels]` for a config that has them; Open-Sora's are a mask of
            the pixels that are given, then these, zeros elsewhere.
          state: what `ops.quantizer` remembers, stacked over the double blocks: it knows the
            video's tokens, which single blocks do not see apart.
        Returns:
          `[B, T, H, W, out_channels]` in float32; with a state, that and the new state.
        """
        config = self.config
        self._check(text_lengths, guidance, cond)
        size = (x.shape[1], x.shape[2], x.shape[3])
        rope = rope_table(config.grid(size), config.rope_widths, config.rope_theta)
        rope_of_all = _with_text(rope, text.shape[1], config.text_first)

        img = self._linear("img_in", patchify(x, config.patch).astype(self.dtype))
        if cond is not None:
            patches = patchify(cond, config.patch).astype(self.dtype)
            img = img + self._linear("cond_in", patches)
        if config.refiner_blocks:
            refiner = Refiner(config, self.ops, self.dtype, name="refiner")
            txt = refiner(text, t, text_lengths)
        else:
            txt = self._linear("txt_in", text.astype(self.dtype))
        vec = jax.nn.silu(self._vector(t, pooled, guidance)).astype(self.dtype)
        lengths = None if text_lengths is None else text_lengths + img.shape[1]

        double = stack(DoubleBlock, config.double_blocks, shared=3, remat=self.remat)
        streams, new_state = double(config, self.ops, name="double_blocks")(
            (img, txt), vec, rope, lengths, state
        )
        tokens = jnp.concatenate(streams[::-1] if config.text_first else streams, axis=1)
        single = stack(SingleBlock, config.single_blocks, shared=3, remat=self.remat)
        tokens, _ = single(config, self.ops, name="single_blocks")(
            tokens, vec, rope_of_all, lengths, None
        )
        first = txt.shape[1] if config.text_first else 0
        img = tokens[:, first : first + img.shape[1]]

        shift, scale = modulation(self._linear("head_modulation", vec, 2 * config.width), 2)
        last = modulated_norm(img, shift, scale, config.eps)
        out = self._linear("head", last, config.out_channels * math.prod(config.patch))
        video = unpatchify(out.astype(jnp.float32), size, config.patch)
        return video if state is None else (video, new_state)

    def _vector(self, t: jax.Array, pooled: jax.Array, guidance: jax.Array | None) -> jax.Array:
        """What modulates all tokens, before its SiLU: `[B, 1, D]` in float32."""
        width = self.config.time_width
        inputs = {"time": sinusoid(t[:, None], width)}
        if guidance is not None:
            inputs["guidance"] = sinusoid(1000 * guidance.astype(jnp.float32)[:, None], width)
        inputs["pooled"] = pooled.astype(jnp.float32)[:, None]
        parts = [
            Embedder(self.config.width, self.ops, name, name=name)(x) for name, x in inputs.items()
        ]
        return sum(parts[1:], start=parts[0])

    def _linear(self, name: str, x: jax.Array | Deferred, features: int | None = None) -> jax.Array:
        linear = Linear(features or self.config.width, self.ops, name=name)
        return linear(self.ops.quantizer.quantize(x, name, None))

    def _check(
        self,
        text_lengths: jax.Array | None,
        guidance: jax.Array | None,
        cond: jax.Array | None,
    ) -> None:
        config = self.config
        for name, given, wanted in (
            ("guidance", guidance, config.guidance),
            ("cond", cond, config.cond_channels is not None),
        ):
            if (given is not None) != wanted:
                raise ValueError(f"{name}: this config {'needs it' if wanted else 'takes none'}")
        if text_lengths is not None and config.text_first:
            raise ValueError("text_lengths: padding in the middle of the sequence would count")


def _with_text(rope: Rope, tokens: int, text_first: bool) -> Rope:
    """Angles of the whole sequence: the text's tokens are not turned."""

    def longer(table: jax.Array, value: float) -> jax.Array:
        still = jnp.full((tokens, table.shape[1]), value, table.dtype)
        return jnp.concatenate([still, table] if text_first else [table, still])

    cos, sin = rope
    return longer(cos, 1.0), longer(sin, 0.0)
