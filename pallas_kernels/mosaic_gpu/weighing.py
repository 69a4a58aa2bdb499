"""`softmax.py` on tiles in the registers of a warpgroup."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math

from pallas_kernels.mosaic_gpu import registers as asm
from pallas_kernels.mosaic_gpu import softmax
from pallas_kernels.mosaic_gpu.config import ROWS
from pallas_kernels.mosaic_gpu.products import ACCUMULATOR, accumulator_layout, result
from pallas_kernels.mosaic_gpu.ptx import Program

BY_ROW = plgpu.Layout.WGMMA.reduce(1)


def weigh(
    scores: jax.Array, seen: jax.Array, before: jax.Array, slope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Codes of a tile's weights, not yet joined; what was seen, offset and decay of each row.

    Scores and codes are float16 `[64, keys]` in `Layout.WGMMA`.
    """
    per_row = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=BY_ROW)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, BY_ROW, BY_ROW, BY_ROW),
        return_type=(result(scores.shape[1], jnp.float16), per_row, per_row, per_row),
    )
    def emit(_, scores, seen, before, slope):
        values = [asm.from_vector(register) for register in scores.registers.flat]
        states = [[asm.scalar(part) for part in of.registers.flat] for of in (seen, before, slope)]

        def both_rows(p: Program, given: Sequence[str]) -> list[str]:
            pairs, states = given[: len(values)], given[len(values) :]
            rows = pairs[0::2], pairs[1::2]
            highest = softmax.largest(p, rows)
            found, codes = [], []
            for row, mine in enumerate(rows):
                seen, before, slope = states[row::2]
                one = softmax.half(p, highest, row)
                seen, offset, pair, decay = softmax.reference(p, one, seen, before, slope)
                found.append((seen, offset, decay))
                codes.append(softmax.weigh(p, mine, pair, softmax.twice(p, slope, "rn")))
            alternating = [code for both in zip(*codes, strict=True) for code in both]
            softmax.insist(p, alternating)
            return alternating + [value for both in zip(*found, strict=True) for value in both]

        given = values + [value for of in states for value in of]
        kinds = [asm.i32()] * len(values) + [ir.F32Type.get()] * 6
        found = _run(both_rows, given, kinds)
        codes, states = found[: len(values)], found[len(values) :]
        like = seen.registers.shape
        return (
            _pairs(codes, scores.registers.shape),
            *(_array(states[i : i + 2], like, seen.layout) for i in (0, 2, 4)),
        )

    return emit(scores, seen, before, slope)


def join(codes: jax.Array) -> jax.Array:
    """Codes as e4m3 numbers, the left operand of a product; keys `in_order`."""
    keys = codes.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(
            (ROWS, keys), jnp.float8_e4m3fn, layout=plgpu.Layout.WGMMA_8BIT
        ),
    )
    def emit(_, codes):
        held = np.array([asm.from_vector(r) for r in codes.registers.flat], dtype=object)
        held = held.reshape(keys // 16, 2, 2)  # 16 keys, 8 of them, row
        out = np.empty((keys // 16, 2), dtype=object)
        for part, row in np.ndindex(out.shape):
            both = list(held[part, :, row])
            (joined,) = _run(lambda p, given: [softmax.join(p, given)], both, [asm.i32()])
            out[part, row] = asm.as_vector(joined, jnp.float8_e4m3fn)
        shape = fa.WGMMA_LAYOUT_8BIT.registers_shape((ROWS, keys))
        return fa.FragmentedArray(
            _registers=out.reshape(shape), _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=None
        )

    return emit(codes)


def add(totals: jax.Array, keep: jax.Array, product: jax.Array) -> jax.Array:
    """Totals keep + product."""
    layout = accumulator_layout()

    @plgpu.inline_mgpu(arg_types=(layout, BY_ROW, layout), return_type=result(totals.shape[1]))
    def emit(_, totals, keep, product):
        factors = [asm.scalar(part) for part in keep.registers.flat]
        pairs = zip(totals.registers.flat, product.registers.flat, strict=True)
        out = [
            math.fma(asm.scalar(total), factors[i // 2 % 2], asm.scalar(part))
            for i, (total, part) in enumerate(pairs)
        ]
        for i in (-1, -3):  # the sum of the weights is there twice: a register less
            out[i] = _constant(0.0)
        return _array(out, totals.registers.shape, ACCUMULATOR)

    return emit(totals, keep, product)


def divide(totals: jax.Array, width: int) -> jax.Array:
    """The first columns by the one behind them, which sums up the weights; 0 where that is 0."""

    @plgpu.inline_mgpu(
        arg_types=(accumulator_layout(),),
        return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def emit(_, totals):
        values = [asm.scalar(register) for register in totals.registers.flat]
        count = width // 2
        zero, one = _constant(0.0), _constant(1.0)
        inverse = []
        for half in range(2):
            weights = values[count + 2 * half]
            is_zero = arith.cmpf(arith.CmpFPredicate.OEQ, weights, zero)
            inverse.append(arith.select(is_zero, zero, arith.divf(one, weights)))
        out = [arith.mulf(value, inverse[i // 2 % 2]) for i, value in enumerate(values[:count])]
        shape = ACCUMULATOR.registers_shape((ROWS, width))
        return _array(out, shape, ACCUMULATOR).to_layout(fa.WGMMA_LAYOUT)

    return emit(totals)


def _run(
    write: Callable[[Program, Sequence[str]], list[str]], given: list[Any], kinds: list[Any]
) -> list[Any]:
    """A program on registers: `write` gets the names of those given, returns one of each kind."""
    p = Program()
    found = write(p, [p.copy(f"${len(kinds) + i}") for i in range(len(given))])
    for number, register in enumerate(found):
        p.emit("mov.b32", f"${number}", register)

    def letter(kind: Any) -> str:
        return "r" if kind == asm.i32() else "f"

    constraints = [f"={letter(kind)}" for kind in kinds]
    constraints += [letter(value.type) for value in given]
    return asm.instructions(p.text(), kinds, given, ",".join(constraints))


def _constant(value: float) -> Any:
    return utils.c(value, ir.F32Type.get())


def _pairs(registers: list[Any], shape: tuple[int, ...]) -> fa.FragmentedArray:
    held = np.array([asm.as_vector(register, jnp.float16) for register in registers], dtype=object)
    return fa.FragmentedArray(
        _registers=held.reshape(shape), _layout=fa.WGMMA_LAYOUT, _is_signed=None
    )


def _array(values: list[Any], shape: tuple[int, ...], layout: Any) -> fa.FragmentedArray:
    return fa.FragmentedArray(
        _registers=asm.as_vectors(values).reshape(shape), _layout=layout, _is_signed=None
    )
