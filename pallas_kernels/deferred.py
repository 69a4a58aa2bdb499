"""What is about to be made before it is rounded, so that whoever rounds it does it on the way."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.reference import ACTIVATIONS


class _FromX:
    """What numbers that are made of an x have in common."""

    __slots__ = ()
    x: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x."""
        return self.x.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of x, which the numbers are rounded to."""
        return self.x.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Normed(_FromX):
    """Stands for LN(x) gain + shift `[B, S, K]`, float32 inside.

    Attributes:
      x: `[B, S, K]`.
      gain: float32 `[1 or B, 1 or S, K]`; 1 + scale of a modulation.
      shift: likewise.
      eps: added to the variance.
    """

    x: jax.Array
    gain: jax.Array
    shift: jax.Array
    eps: float = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Activated(_FromX):
    """Stands for activation(x), float32 inside.

    Attributes:
      x: `[B, S, K]`.
      activation: a name in ACTIVATIONS.
    """

    x: jax.Array
    activation: str | None = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Concatenated(_FromX):
    """Stands for the channels of x and behind them those of more, `[B, S, K + K']`.

    Attributes:
      x: `[B, S, K]`.
      more: `[B, S, K']`, of the same dtype.
    """

    x: jax.Array
    more: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of both."""
        return (*self.x.shape[:-1], self.x.shape[-1] + self.more.shape[-1])


Deferred = Normed | Activated | Concatenated


def computed(x: jax.Array | Deferred) -> jax.Array:
    """The numbers, in x's dtype."""
    if isinstance(x, Normed):
        return (layer_norm(x.x, x.eps) * x.gain + x.shift).astype(x.dtype)
    if isinstance(x, Activated):
        return ACTIVATIONS[x.activation](x.x.astype(jnp.float32)).astype(x.dtype)
    if isinstance(x, Concatenated):
        return jnp.concatenate([x.x, x.more], axis=-1)
    return x


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """Layer norm over the last axis without parameters, in and returned as float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
