"""Kernels for GPU and TPU that read sdq's formats directly. Knows sdq, never models."""

from pallas_kernels.api import Explanation, quantized_matmul, supports, which

__all__ = ["Explanation", "quantized_matmul", "supports", "which"]
