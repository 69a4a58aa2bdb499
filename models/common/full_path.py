"""Attention whose products multiply rounded numbers as well: then nothing large is left in bf16."""

import dataclasses

import jax

from models.common.attention import counting
from pallas_kernels import Projected, quantized_attention
from pallas_kernels.attention import rounding_weights_too
from sdq import formats


@dataclasses.dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True)
class FullPath:
    """For `Ops.attention`. A kernel where there is one, else the same arithmetic in plain jnp.

    Attributes:
      fmt_qk: dialect format of queries and keys; None is e4m3 (`pallas_kernels.attention`).
      fmt_pv: of the values, likewise; weights are e4m3.
      rotate: turn queries and keys by a Hadamard matrix first: 2 to 5 dB
        (docs/results/attention_error.md).
    """

    fmt_qk: str | None = None
    fmt_pv: str | None = None
    rotate: bool = True

    def __post_init__(self):
        for name in (self.fmt_qk, self.fmt_pv):
            if name is not None:
                formats.parse(name)

    def __call__(
        self,
        q: jax.Array | Projected,
        k: jax.Array | Projected,
        v: jax.Array,
        *,
        lengths: jax.Array | None = None,
    ) -> jax.Array:
        """As `models.common.attention.attention`."""
        return quantized_attention(
            q,
            k,
            v,
            fmt_qk=self.fmt_qk,
            fmt_pv=self.fmt_pv,
            rotate=self.rotate,
            mask=counting(lengths, k.shape[1]),
            implementation=rounding_weights_too(q),
        )
