"""Projected: queries or keys as a linear gives them, and what comes before attention.

Whoever attends may do norm and rotary embedding in the pass that it needs anyway.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Projected:
    """Stands for heads `[B, S, H, D]`.

    Attributes:
      x: `[B, S, H D]`.
      gain: of a root mean square norm: `[H D]` over all heads of a token, `[D]` over each head
        alone; None: no norm.
      rope: cosines and sines `[S, D / 2]` of the angles by which pairs of channels are turned after
        it, float32; None: they are not.
      heads: H.
      eps: added to the mean square.
    """

    x: jax.Array
    gain: jax.Array | None = None
    rope: tuple[jax.Array, jax.Array] | None = None
    heads: int = dataclasses.field(metadata={"static": True})
    eps: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the heads."""
        batch, length, channels = self.x.shape
        return batch, length, self.heads, channels // self.heads

    @property
    def ndim(self) -> int:
        """Likewise."""
        return 4

    @property
    def dtype(self) -> jnp.dtype:
        """Of x."""
        return self.x.dtype


def projected(x: jax.Array | Projected) -> Projected:
    """Heads `[B, S, H, D]` as Projected."""
    if isinstance(x, Projected):
        return x
    return Projected(x=x.reshape(*x.shape[:2], -1), heads=x.shape[2])


def prepared(x: jax.Array | Projected, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """`[B, S, H, D]`, normed and turned; rounded to dtype, x's by default, after each."""
    dtype = dtype or x.dtype
    if not isinstance(x, Projected):
        return x.astype(dtype)
    y = _normed(x, dtype).astype(dtype).reshape(x.shape)
    return y if x.rope is None else apply_rope(y, *x.rope)


def each_head_normed(x: jax.Array | Projected) -> jax.Array | Projected:
    """The same after a norm over each head alone, rounded to x's dtype; others as they are."""
    if not isinstance(x, Projected) or x.gain is None or x.gain.size == x.x.shape[-1]:
        return x
    return dataclasses.replace(x, x=_normed(x, x.dtype), gain=None)


def joined(*parts: Projected) -> Projected:
    """One sequence of the tokens of all parts, each after its own norm; what has no rope stays."""

    def angles(part: Projected) -> tuple[jax.Array, jax.Array]:
        _, tokens, _, width = part.shape
        still = jnp.ones((tokens, width // 2), jnp.float32)
        return part.rope or (still, jnp.zeros_like(still))

    cos, sin = (jnp.concatenate(each) for each in zip(*map(angles, parts), strict=True))
    x = jnp.concatenate([_normed(part, part.dtype) for part in parts], axis=1)
    return Projected(x=x, rope=(cos, sin), heads=parts[0].heads)


def every(x: jax.Array | Projected, step: int) -> jax.Array | Projected:
    """Tokens 0, step, 2 step, ..."""
    if not isinstance(x, Projected):
        return x[:, ::step]
    rope = None if x.rope is None else (x.rope[0][::step], x.rope[1][::step])
    return dataclasses.replace(x, x=x.x[:, ::step], rope=rope)


def rms_norm(
    x: jax.Array, gain: jax.Array, eps: float, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """Root mean square norm over the last axis with a weight, float32 inside; rounded to dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    gain = gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + gain.shape)
    return (x32 * gain).astype(dtype or x.dtype)


def _normed(x: Projected, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`[B, S, H D]`, rounded to dtype if there is a norm."""
    if x.gain is None:
        return x.x
    heads = x.x if x.gain.size == x.x.shape[-1] else x.x.reshape(x.shape)
    return rms_norm(heads, x.gain, x.eps, dtype).reshape(x.x.shape)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate pairs (2i, 2i + 1) of x `[B, S, heads, width]` by tables `[S, width / 2]`."""
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
