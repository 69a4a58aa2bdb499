"""Kernels for GPU and TPU that read sdq's formats directly. Knows sdq, never models."""

from pallas_kernels.api import Explanation, quantized_matmul, supports, which
from pallas_kernels.attention import quantized_attention
from pallas_kernels.deferred import Activated, Concatenated, Deferred, Normed, computed
from pallas_kernels.mosaic_gpu.config import MODES
from pallas_kernels.mosaic_gpu.operands import TiledWeight, tile_weight
from pallas_kernels.onto import Onto
from pallas_kernels.prepare import prepare_heads
from pallas_kernels.projected import Projected, joined, prepared
from pallas_kernels.quantize import Quantized, quantize_rows
from pallas_kernels.reference import ACTIVATIONS
from pallas_kernels.rows import Fp8Rows, fp8_rows

__all__ = [
    "ACTIVATIONS",
    "MODES",
    "Activated",
    "Concatenated",
    "Deferred",
    "Explanation",
    "Fp8Rows",
    "Normed",
    "Onto",
    "Projected",
    "Quantized",
    "TiledWeight",
    "computed",
    "fp8_rows",
    "joined",
    "prepare_heads",
    "prepared",
    "quantize_rows",
    "quantized_attention",
    "quantized_matmul",
    "supports",
    "tile_weight",
    "which",
]
