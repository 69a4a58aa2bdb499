"""Products of fp8 tiles on the tensor cores that run while a warpgroup does something else.

`plgpu.wgmma` adds to an accumulator, so that a fresh one must be cleared first, and reading one
waits for all. Here a product begins with its first part (`begin`), several may be on their way, and
`arrived` waits until at most so many are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm

from pallas_kernels.mosaic_gpu import registers as asm

ROWS = 64  # of a product
STEP = 32  # fp8 numbers that an instruction adds up
SWIZZLE = 128  # bytes, of rows that are as long

ACCUMULATOR = fa.WGMMA_LAYOUT_ACC_32BIT


def accumulator_layout() -> Any:
    """A thread holds, of two rows eight apart, two of every eight columns, a number a register."""
    tiling = fa.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1)


def result(columns: int, dtype: Any = jnp.float32) -> plgpu.ShapeDtypeStruct:
    """`[64, columns]`: float32 in `accumulator_layout()`, or float16, two a register."""
    layout = accumulator_layout() if dtype == jnp.float32 else plgpu.Layout.WGMMA
    return plgpu.ShapeDtypeStruct((ROWS, columns), dtype, layout=layout)


def begin(a: Any, b: Any, dtype: Any = jnp.float32) -> jax.Array:
    """a b^T, on its way: not to be read before `arrived`.

    Args:
      a: e4m3 `[64, K]`: an SMEM ref of `memory.swizzled`, or an array in `Layout.WGMMA_8BIT`.
      b: SMEM ref of `memory.swizzled`, e4m3 `[N, K]`.
      dtype: of the sums: float32 or float16, which take half of the registers.
    Returns:
      a b^T, `result(N, dtype)`.
    """
    in_registers = isinstance(a, jax.Array)
    columns, depth = b.shape
    swizzle = min(depth, SWIZZLE)
    ref = plgpu.RefType((plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle)))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_8BIT if in_registers else ref, ref),
        return_type=result(columns, dtype),
    )
    def emit(_, a, b):
        if in_registers:
            a = fa.optimization_barrier(a)
        nvvm.wgmma_fence_aligned()
        a_base, a_step = (
            (None, 0) if in_registers else _descriptor(a, ROWS, swizzle, is_right=False)
        )
        b = utils.memref_transpose(b, (1, 0, 3, 2))
        b_base, b_step = _descriptor(b, columns, swizzle, is_right=True)
        held: list[Any] = []
        for step in range(depth // STEP):
            if in_registers:
                part = a[:, step * STEP : (step + 1) * STEP]
                left = [asm.from_vector(register) for register in part.registers.flat]
            else:
                left = [_advanced(a_base, step * a_step)]
            held = _multiply(held, left, _advanced(b_base, step * b_step), columns, dtype)
        nvvm.wgmma_commit_group_sync_aligned()
        return _fragmented(held, columns, dtype)

    return emit(a, b)


def arrived(*products: jax.Array, pending: int) -> tuple[jax.Array, ...]:
    """Products that may be read, once at most `pending` later ones are still on their way."""
    kinds = [result(product.shape[1], product.dtype) for product in products]

    @plgpu.inline_mgpu(
        arg_types=tuple(kind.layout for kind in kinds),
        return_type=tuple(kinds),
    )
    def emit(_, *products):
        nvvm.wgmma_wait_group_sync_aligned(pending)
        settled = fa.optimization_barrier(*products)
        return (settled,) if len(products) == 1 else tuple(settled)

    return emit(*products)


def _descriptor(ref: Any, size: int, swizzle: int, *, is_right: bool) -> tuple[Any, int]:
    """How `wgmma` finds an operand of `size` rows or columns, and bytes from step to step."""
    group = (swizzle, size) if is_right else (size, swizzle)
    (base, strides), _, fastest = mma_utils.create_descriptor(
        ref,
        swizzle=swizzle,
        large_tile=(swizzle,) * 2 if is_right else group,
        group_size=group,
        logical_k_major=is_right,
    )
    assert fastest == mma_utils.Dim.K and not strides[0]
    return base, strides[1][0]


def _advanced(descriptor: Any, by: int) -> Any:
    """Its address, the low half, moved by some bytes."""
    i64 = ir.IntegerType.get_signless(64)
    low = asm.add(arith.trunci(asm.i32(), descriptor), by >> 4)
    half = utils.c(32, i64)
    high = arith.shli(arith.shrui(descriptor, half), half)
    return arith.ori(arith.extui(i64, low), high)


def _multiply(held: list[Any], left: list[Any], right: Any, columns: int, dtype: Any) -> list[Any]:
    """One instruction: held + left right, or left right if nothing is held."""
    wide = jnp.dtype(dtype).itemsize == 4
    count = columns // 2 if wide else columns // 4
    names = iter(f"${i}" for i in range(2 * count + len(left) + 1))
    sums = "{" + ", ".join(next(names) for _ in range(count)) + "}"
    for _ in held:
        next(names)  # the same registers
    parts = [next(names) for _ in left]
    a = "{" + ", ".join(parts) + "}" if len(parts) > 1 else parts[0]
    text = (
        f"{{ .reg .pred add; setp.ne.b32 add, {int(bool(held))}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{columns}k{STEP}.{'f32' if wide else 'f16'}.e4m3.e4m3 "
        f"{sums}, {a}, {next(names)}, add, 1, 1; }}"
    )
    constraints = ["=f" if wide else "=r"] * count + [str(i) for i in range(len(held))]
    constraints += ["r"] * len(left) if len(left) > 1 else ["l"]
    constraints += ["l"]
    kind = ir.F32Type.get() if wide else asm.i32()
    return asm.instructions(text, [kind] * count, [*held, *left, right], ",".join(constraints))


def _fragmented(values: list[Any], columns: int, dtype: Any) -> fa.FragmentedArray:
    if jnp.dtype(dtype).itemsize == 4:
        layout, registers = ACCUMULATOR, asm.as_floats(values)
    else:
        layout = fa.WGMMA_LAYOUT
        registers = np.empty(len(values), dtype=object)
        registers[:] = [asm.as_vector(value, dtype) for value in values]
    shape = layout.registers_shape((ROWS, columns))
    return fa.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)
