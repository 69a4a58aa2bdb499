"""Activations in front of the quantiser, on rows that threads hold in registers."""

from collections.abc import Callable, Sequence

from pallas_kernels.mosaic_gpu.ptx import Program, Register, real

ROOT = 0.7978845608028654  # of 2 / pi
CUBIC = 0.044715


def activate(p: Program, activation: str, words: Sequence[Register]) -> None:
    """Replace the two bf16 numbers of each word by their activations, float32 inside."""
    function = PROGRAMS[activation]
    for word in words:
        low, high = (function(p, number) for number in p.pair_as_reals(word))
        p.emit("cvt.rn.bf16x2.f32", word, high, low)


def _gelu(p: Program, x: Register) -> Register:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    square = p.let("mul.rn.f32", x, x)
    inner = p.let("fma.rn.f32", square, real(ROOT * CUBIC), real(ROOT))
    tanh = p.let("tanh.approx.f32", p.let("mul.rn.f32", x, inner))
    half = p.let("mul.rn.f32", x, real(0.5))
    return p.let("fma.rn.f32", half, tanh, half)


PROGRAMS: dict[str, Callable[[Program, Register], Register]] = {"gelu": _gelu}
