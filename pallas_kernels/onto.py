"""What a product is added to: the stream of tokens that a block's linears update."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Onto:
    """For `quantized_matmul`: the result is x + gate y.

    Attributes:
      x: `[..., S, N]`, of the result's shape and dtype.
      gate: float32 that broadcasts to it, with as many axes; None: 1.
    """

    x: jax.Array
    gate: jax.Array | None = None

    def plus(self, y: jax.Array) -> jax.Array:
        """x + gate y, float32 inside, in x's dtype."""
        return (self.x.astype(jnp.float32) + self.gated(y)).astype(self.x.dtype)

    def gated(self, y: jax.Array) -> jax.Array:
        """gate y, float32."""
        y = y.astype(jnp.float32)
        return y if self.gate is None else y * self.gate

    @property
    def is_shared(self) -> bool:
        """Whether all tokens of a video have the same gate."""
        return self.gate is None or self.gate.shape[-2] == 1

    @property
    def row(self) -> jax.Array | None:
        """The gate `[N]` that all rows share, float32; None if they do not."""
        if self.gate is None:
            return jnp.ones(self.x.shape[-1], jnp.float32)
        shared = math.prod(self.gate.shape[:-1]) == 1
        return self.gate.reshape(-1).astype(jnp.float32) if shared else None
