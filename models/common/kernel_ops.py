"""Ops on kernels: quantised inputs become fp8 rows, products `pallas_kernels.quantized_matmul`.

The numbers are those of the plain Ops to the last bit, but where a norm or what comes before
attention is done on the way; these and products differ by how sums are rounded.
Nothing is chosen in silence: what no kernel can do is an error that says why.
"""

import dataclasses
import re
from typing import Any

import jax

from models.common import attention, layers
from models.common.layers import Ops
from models.common.quantizer import InputQuantizer, SiteRule
from models.common.recipes import KERNELS
from models.common.semantic import SemanticDialect
from pallas_kernels import (
    MODES,
    Deferred,
    Fp8Rows,
    Onto,
    Projected,
    TiledWeight,
    device,
    prepare_heads,
    quantize_rows,
    quantized_matmul,
    tile_weight,
)
from pallas_kernels.mosaic_gpu import operands, tables
from sdq import QTensor, formats
from sdq.rules import is_qtensor, path_of


def on_kernels(ops: Ops, mode: str = "accurate") -> Ops:
    """The same Ops with kernels for rounding, products and what comes before attention.

    Args:
      ops: what else they do stays.
      mode: of the products, as in `quantized_matmul`. "fast" sums up on tensor cores alone, which
        is as good where signs mix in each row of a kernel; nobody checks that they do.
    Raises:
      ValueError: there is no such mode, or blocks of inputs choose otherwise than in two stages.
    """
    ops = dataclasses.replace(ops, matmul=Products(mode))
    if ops.attention is attention.attention:
        ops = dataclasses.replace(ops, attention=prepared_attention)
    quantizer = ops.quantizer
    if not isinstance(quantizer, InputQuantizer | SemanticDialect):  # inputs stay bf16
        return ops
    for rule in quantizer.rules:
        if rule.rule not in (None, "two_stage"):
            raise ValueError(f"select: kernels choose in two stages, not by {rule.rule!r}")
    return dataclasses.replace(ops, quantizer=dataclasses.replace(quantizer, rounding=rounding))


def without_kernels(ops: Ops, params: Any) -> str | None:
    """Why kernels cannot compute with these parameters here; None if they can."""
    if reason := device.without_mosaic_gpu():
        return reason
    rules = ops.quantizer.rules if isinstance(ops.quantizer, InputQuantizer) else ()
    for rule in rules:
        if rule.format is not None and formats.parse(rule.format).family != "dialect":
            return f"inputs in {rule.format}: only dialect formats have fp8 numbers"
        if rule.rule not in (None, "two_stage"):
            return f"inputs chosen by {rule.rule}: kernels choose in two stages"
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor):
        # Others read inputs in bf16, as they read other formats.
        is_in_block = re.fullmatch(KERNELS, path_of(keys))
        if not (is_in_block and is_qtensor(leaf)):
            continue
        if reason := tables.misfit(leaf.format):
            return f"weights in {reason}"
        if leaf.shape[-2] % operands.STEP:
            return f"weights of {leaf.shape[-2]} channels: not a multiple of {operands.STEP}"
    return None


def rounding(
    x: jax.Array | Deferred,
    rule: SiteRule,
    sub_formatbooks: tuple[jax.Array, jax.Array] | None = None,
    tokens: jax.Array | None = None,
) -> tuple[Fp8Rows, Fp8Rows | None]:
    """A `quantizer.Rounding`."""
    assert rule.format is not None
    return quantize_rows(x, rule.format, sub_formatbooks=sub_formatbooks, tokens=tokens)


def prepared_attention(
    q: jax.Array | Projected, k: jax.Array | Projected, v: jax.Array, **options: Any
) -> jax.Array:
    """For `Ops.attention`: `attention.attention` with `prepare_heads`."""
    return attention.attention(q, k, v, prepare=prepare_heads, **options)


@dataclasses.dataclass(frozen=True, slots=True, weakref_slot=True)
class Products:
    """For `Ops.matmul`: as `layers.matmul`, but kernels multiply fp8 rows and tiled weights.

    Attributes:
      mode: of `quantized_matmul`.
    """

    mode: str = "accurate"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")

    def __call__(
        self,
        x: jax.Array | QTensor | Fp8Rows,
        kernel: jax.Array | QTensor | TiledWeight,
        *,
        bias: jax.Array | None = None,
        activation: str | None = None,
        onto: Onto | None = None,
    ) -> jax.Array:
        """activation(x kernel + bias), and what it is added to."""
        if isinstance(kernel, TiledWeight) or (
            isinstance(x, Fp8Rows) and isinstance(kernel, QTensor)
        ):
            return quantized_matmul(
                x, kernel, bias=bias, activation=activation, onto=onto, mode=self.mode
            )
        if isinstance(x, Fp8Rows):
            raise ValueError(f"no kernel multiplies {_kind(x)} by {_kind(kernel)}")
        return layers.matmul(x, kernel, bias=bias, activation=activation, onto=onto)


def tile_kernels(params: Any) -> Any:
    """Parameters whose QTensors `[*lead, K, N]` are reordered once for the Hopper kernel.

    Those in formats that it does not read stay: int8, which embedders may have.
    """

    def tiled(leaf: Any) -> Any:
        if not is_qtensor(leaf) or tables.misfit(leaf.format):
            return leaf
        tile = tile_weight
        for _ in range(leaf.ndim - 2):
            tile = jax.vmap(tile)
        return tile(leaf)

    return jax.tree.map(tiled, params, is_leaf=is_qtensor)


def _kind(operand: Any) -> str:
    return f"{type(operand).__name__} {list(operand.shape)}"
