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
from pallas_kernels.mosaic_gpu.products import ACCUMULATOR, ROWS, accumulator, accumulator_layout
from pallas_kernels.mosaic_gpu.ptx import Program

BY_ROW = plgpu.Layout.WGMMA.reduce(1)


def weigh(
    scores: jax.Array, seen: jax.Array, before: jax.Array, slope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Codes of a tile's weights, not yet joined; seen, reference and decay of each row.

    Codes are bits, two keys in a number: `[64, keys / 2]`.
    """
    per_row = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=BY_ROW)

    @plgpu.inline_mgpu(
        arg_types=(accumulator_layout(), BY_ROW, BY_ROW, BY_ROW),
        return_type=(accumulator(scores.shape[1] // 2), per_row, per_row, per_row),
    )
    def emit(_, scores, seen, before, slope):
        values = [asm.scalar(register) for register in scores.registers.flat]
        rows = [[asm.scalar(part) for part in of.registers.flat] for of in (seen, before, slope)]
        mine = [[i for i in range(len(values)) if i // 2 % 2 == row] for row in range(2)]

        def both_rows(p: Program, given: Sequence[str]) -> list[str]:
            states, scores = given[:6], given[6:]
            found, pairs = [], []
            for row in range(2):
                of_row = [scores[i] for i in mine[row]]
                highest = softmax.largest(p, of_row)
                found.append(softmax.reference(p, highest, *states[row::2]))
                pairs.append(softmax.weigh(p, of_row, found[row][1], states[4 + row]))
            alternating = [pair for both in zip(*pairs, strict=True) for pair in both]
            softmax.insist(p, alternating)
            return [value for both in zip(*found, strict=True) for value in both] + alternating

        given = [value for row in rows for value in row] + values
        found = _run(both_rows, given, 6 + len(values) // 2)
        like, columns = seen.registers.shape, scores.shape[1] // 2
        return (
            _array(found[6:], ACCUMULATOR.registers_shape((ROWS, columns)), ACCUMULATOR),
            *(_array(found[i : i + 2], like, seen.layout) for i in (0, 2, 4)),
        )

    return emit(scores, seen, before, slope)


def join(codes: jax.Array) -> jax.Array:
    """Codes as e4m3 numbers, the left operand of a product; keys `in_order`."""
    keys = 2 * codes.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(accumulator_layout(),),
        return_type=plgpu.ShapeDtypeStruct(
            (ROWS, keys), jnp.float8_e4m3fn, layout=plgpu.Layout.WGMMA_8BIT
        ),
    )
    def emit(_, codes):
        held = np.array([asm.scalar(r) for r in codes.registers.flat], dtype=object)
        held = held.reshape(keys // 16, 2, 2)  # 16 keys, 8 of them, row
        out = np.empty((keys // 16, 2), dtype=object)
        for part, row in np.ndindex(out.shape):
            both = [utils.bitcast(value, asm.i32()) for value in held[part, :, row]]
            (joined,) = _run(lambda p, given: [softmax.join(p, given)], both, 1)
            out[part, row] = asm.as_vector(joined, jnp.float8_e4m3fn)
        shape = fa.WGMMA_LAYOUT_8BIT.registers_shape((ROWS, keys))
        return fa.FragmentedArray(
            _registers=out.reshape(shape), _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=None
        )

    return emit(codes)


def add(totals: jax.Array, keep: jax.Array, product: jax.Array) -> jax.Array:
    """Totals keep + product."""
    layout = accumulator_layout()

    @plgpu.inline_mgpu(arg_types=(layout, BY_ROW, layout), return_type=accumulator(totals.shape[1]))
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
    write: Callable[[Program, Sequence[str]], list[str]], given: list[Any], count: int
) -> list[Any]:
    """A program on registers: `write` gets the names of those given and returns `count` results."""
    p = Program()
    found = write(p, [p.copy(f"${count + i}") for i in range(len(given))])
    for number, register in enumerate(found):
        p.emit("mov.b32", f"${number}", register)
    kinds = ["r" if value.type == asm.i32() else "f" for value in given]
    kind = kinds[-1]
    result = given[-1].type
    constraints = ",".join([f"={kind}"] * count + kinds)
    return asm.instructions(p.text(), [result] * count, given, constraints)


def _constant(value: float) -> Any:
    return utils.c(value, ir.F32Type.get())


def _array(values: list[Any], shape: tuple[int, ...], layout: Any) -> fa.FragmentedArray:
    return fa.FragmentedArray(
        _registers=asm.as_floats(values).reshape(shape), _layout=layout, _is_signed=None
    )
