"""The blocks of an MMDiT: video and text attend to each other, in two streams or in one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.common.layers import (
    FeedForward,
    Heads,
    Linear,
    Ops,
    latest,
    modulated_norm,
    read_at,
    split_heads,
)
from models.mmdit.config import MMDiTConfig
from pallas_kernels import Concatenated, Deferred, Onto, Projected, joined

Rope = tuple[jax.Array, jax.Array]


class DoubleBlock(nn.Module):
    """Joint attention and feed-forward networks, each stream with weights of its own."""

    config: MMDiTConfig
    ops: Ops

    @nn.compact
    def __call__(
        self,
        streams: tuple[jax.Array, jax.Array],
        vec: jax.Array,
        rope: Rope,
        lengths: jax.Array | None,
        state: Any,
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """Run the block.

        Args:
          streams: tokens of the video and of the text, `[B, S, D]` each.
          vec: what modulates, after its SiLU, `[B, 1, D]`.
          rope: angles of the video's tokens; the text's are not turned.
          lengths: how many tokens of the whole sequence count, or None for all.
          state: what `ops.quantizer` remembers of the video's tokens.
        Returns:
          (streams, state).
        """
        config, quantizer = self.config, self.ops.quantizer
        img, txt = streams
        h = read_at(self, vec, "double_blocks/modulation", None)
        img_mod, txt_mod = (
            modulation(Linear(6 * config.width, self.ops, name=name)(h), 6)
            for name in ("img_mod", "txt_mod")
        )
        img_attn, txt_attn = (
            Stream(config, self.ops, f"double_blocks/{name}", name=name)
            for name in ("img_attn", "txt_attn")
        )
        x = modulated_norm(img, img_mod[0], img_mod[1], config.eps)
        queries, keys, values = img_attn(x, rope, state)
        txt_x = modulated_norm(txt, txt_mod[0], txt_mod[1], config.eps)
        txt_queries, txt_keys, txt_values = txt_attn(txt_x, None, None)
        # In this order, so that what is learned about x knows the tokens' groups. Padded text is
        # seen like other text here.
        state = quantizer.saw_attention(queries, keys, "double_blocks/self_attn", state)
        state = quantizer.saw_attention(queries, txt_keys, "double_blocks/cross_attn", state)
        state = quantizer.saw_input(x, "double_blocks/img_attn/qkv", state)

        out = self.ops.attention(
            joined(*self._ordered(queries, txt_queries)),
            joined(*self._ordered(keys, txt_keys)),
            jnp.concatenate(self._ordered(values, txt_values), axis=1),
            lengths=lengths,
        )
        first = (txt if config.text_first else img).shape[1]
        parts = (out[:, :first], out[:, first:])
        img_out, txt_out = (
            part.reshape(stream.shape)
            for part, stream in zip(self._ordered(*parts), streams, strict=True)
        )
        img = img_attn.output(img_out, state, Onto(x=img, gate=img_mod[2]))
        txt = txt_attn.output(txt_out, None, Onto(x=txt, gate=txt_mod[2]))
        state = quantizer.saw_input(img_out, "double_blocks/img_attn/o", state)

        x = modulated_norm(img, img_mod[3], img_mod[4], config.eps)
        img, state = self._mlp("img_mlp")(x, state, Onto(x=img, gate=img_mod[5]))
        txt_x = modulated_norm(txt, txt_mod[3], txt_mod[4], config.eps)
        txt, _ = self._mlp("txt_mlp")(txt_x, None, Onto(x=txt, gate=txt_mod[5]))
        self.sow("intermediates", "img_output", img, reduce_fn=latest)
        self.sow("intermediates", "txt_output", txt, reduce_fn=latest)
        return (img, txt), state

    def _ordered(self, of_video: Any, of_text: Any) -> tuple[Any, Any]:
        """As they follow each other in the sequence; its own inverse."""
        return (of_text, of_video) if self.config.text_first else (of_video, of_text)

    def _mlp(self, name: str) -> FeedForward:
        return FeedForward(self.config.mlp_width, self.ops, f"double_blocks/{name}", name=name)


class Stream(nn.Module):
    """The linears around attention of one stream; `site` is its name."""

    config: MMDiTConfig
    ops: Ops
    site: str

    def setup(self) -> None:
        """Their parameters."""
        config = self.config
        self.q, self.k, self.v, self.o = (Linear(config.width, self.ops) for _ in "qkvo")
        self.norm_q, self.norm_k = (Heads(config.heads, config.eps, alone=True) for _ in "qk")

    def __call__(
        self, x: jax.Array | Deferred, rope: Rope | None, state: Any
    ) -> tuple[Projected, Projected, jax.Array]:
        """Queries, keys and values of tokens `[B, S, D]`."""
        h = read_at(self, x, f"{self.site}/qkv", state)
        q, k, v = self.q(h), self.k(h), self.v(h)
        return self.norm_q(q, rope), self.norm_k(k, rope), split_heads(v, self.config.heads)

    def output(self, x: jax.Array, state: Any, onto: Onto) -> jax.Array:
        """`[B, S, D]` -> `[B, S, D]`, after attention, added to what is there."""
        return self.o(read_at(self, x, f"{self.site}/o", state), onto)


class SingleBlock(nn.Module):
    """Attention beside a feed-forward network, on the tokens of both streams in one sequence."""

    config: MMDiTConfig
    ops: Ops

    @nn.compact
    def __call__(
        self, x: jax.Array, vec: jax.Array, rope: Rope, lengths: jax.Array | None, state: Any
    ) -> tuple[jax.Array, Any]:
        """As DoubleBlock, on one sequence `[B, S, D]`; the state stays as it is."""
        config = self.config
        h = read_at(self, vec, "single_blocks/modulation", None)
        shift, scale, gate = modulation(Linear(3 * config.width, self.ops, name="mod")(h), 3)

        norm = modulated_norm(x, shift, scale, config.eps)
        h = read_at(self, norm, "single_blocks/qkv_up", None)
        q, k, v = (Linear(config.width, self.ops, name=name)(h) for name in "qkv")
        up = Linear(config.mlp_width, self.ops, activation="gelu", name="up")(h)
        queries = Heads(config.heads, config.eps, alone=True, name="norm_q")(q, rope)
        keys = Heads(config.heads, config.eps, alone=True, name="norm_k")(k, rope)
        out = self.ops.attention(queries, keys, split_heads(v, config.heads), lengths=lengths)
        both = Concatenated(x=out.reshape(x.shape), more=up)
        h = read_at(self, both, "single_blocks/out", None)
        x = Linear(config.width, self.ops, name="out")(h, Onto(x=x, gate=gate))
        self.sow("intermediates", "output", x, reduce_fn=latest)
        return x, state


def modulation(x: jax.Array, count: int) -> list[jax.Array]:
    """`[B, 1, count D]` -> count arrays `[B, 1, D]`, float32: shift, scale, gate, shift, ..."""
    return jnp.split(x.astype(jnp.float32), count, axis=-1)
