"""Products of tiles on the tensor cores that run while a warpgroup does something else.

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
from pallas_kernels.mosaic_gpu.config import ROWS

STEP = 32  # bytes of each row that an instruction multiplies
SWIZZLE = 128  # bytes, of rows that are as long, or longer

KINDS = {1: "e4m3", 2: "bf16"}  # by the bytes of a number
OPERANDS = {1: plgpu.Layout.WGMMA_8BIT, 2: plgpu.Layout.WGMMA}  # in registers

ACCUMULATOR = fa.WGMMA_LAYOUT_ACC_32BIT


def accumulator_layout() -> Any:
    """A thread holds, of two rows eight apart, two of every eight columns, a number a register."""
    tiling = fa.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1)


def result(columns: int, dtype: Any = jnp.float32) -> plgpu.ShapeDtypeStruct:
    """`[64, columns]`: float32 in `accumulator_layout()`, or float16, two a register."""
    layout = accumulator_layout() if dtype == jnp.float32 else plgpu.Layout.WGMMA
    return plgpu.ShapeDtypeStruct((ROWS, columns), dtype, layout=layout)


def begin(a: Any, b: Any, dtype: Any = jnp.float32, onto: jax.Array | None = None) -> jax.Array:
    """a b^T, on its way: not to be read before `arrived`.

    Args:
      a: e4m3 or bf16 `[64, K]`: an SMEM ref of `memory.swizzled`, or an array in the layout of
        OPERANDS.
      b: SMEM ref of `memory.swizzled`, of the same dtype, `[N, K]`.
      dtype: of the sums: float32, or float16, which take half of the registers.
      onto: an arrived product that this one is added to.
    Returns:
      a b^T, `result(N, dtype)`.
    """
    in_registers = isinstance(a, jax.Array)
    columns, depth = b.shape
    bytes_ = jnp.dtype(b.dtype).itemsize
    swizzle = min(depth * bytes_, SWIZZLE)
    tiling = plgpu.TilingTransform((8, swizzle // bytes_))
    ref = plgpu.RefType((tiling, plgpu.SwizzleTransform(swizzle)))
    kind = result(columns, dtype)
    earlier = () if onto is None else (onto,)
    step = STEP // bytes_

    @plgpu.inline_mgpu(
        arg_types=(OPERANDS[bytes_] if in_registers else ref, ref, *(kind.layout for _ in earlier)),
        return_type=kind,
    )
    def emit(_, a, b, *earlier):
        if in_registers:
            a = fa.optimization_barrier(a)
        nvvm.wgmma_fence_aligned()
        b = utils.memref_transpose(b, (1, 0, 3, 2))
        rights = _descriptors(b, columns, depth, swizzle, is_right=True)
        if in_registers:
            parts = [a[:, at : at + step] for at in range(0, depth, step)]
            lefts = [[asm.from_vector(held) for held in part.registers.flat] for part in parts]
        else:
            lefts = [[part] for part in _descriptors(a, ROWS, depth, swizzle, is_right=False)]
        held = [asm.scalar(register) for sums in earlier for register in sums.registers.flat]
        for left, right in zip(lefts, rights, strict=True):
            held = _multiply(held, left, right, dtype, (columns, bytes_))
        nvvm.wgmma_commit_group_sync_aligned()
        return _fragmented(held, columns, dtype)

    return emit(a, b, *earlier)


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


def in_pairs(sums: jax.Array) -> jax.Array:
    """Float32 sums in the layout that Pallas knows, `plgpu.Layout.WGMMA`."""

    @plgpu.inline_mgpu(
        arg_types=(accumulator_layout(),),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def emit(_, sums):
        return sums.to_layout(fa.WGMMA_LAYOUT)

    return emit(sums)


def _descriptors(ref: Any, size: int, depth: int, swizzle: int, *, is_right: bool) -> list[Any]:
    """How each instruction finds its part of an operand of `size` rows or columns."""
    group = (depth, size) if is_right else (size, depth)
    (base, (tiling, strides)), _, fastest = mma_utils.create_descriptor(
        ref, swizzle=swizzle, group_size=group, logical_k_major=is_right
    )
    assert fastest == mma_utils.Dim.K
    *far, near = strides
    within = tiling[0] if tiling else 1 << 30  # instructions before the next `far`
    steps = range(depth * utils.bytewidth(ir.MemRefType(ref.type).element_type) // STEP)
    return [_advanced(base, sum(far) * (i // within) + near * (i % within)) for i in steps]


def _advanced(descriptor: Any, by: int) -> Any:
    """Its address, the low half, moved by some bytes."""
    i64 = ir.IntegerType.get_signless(64)
    low = asm.add(arith.trunci(asm.i32(), descriptor), by >> 4)
    half = utils.c(32, i64)
    high = arith.shli(arith.shrui(descriptor, half), half)
    return arith.ori(arith.extui(i64, low), high)


def _multiply(
    held: list[Any], left: list[Any], right: Any, dtype: Any, size: tuple[int, int]
) -> list[Any]:
    """One instruction: held + left right, or left right if nothing is held.

    `size` is the columns of the result and the bytes of a number.
    """
    columns, bytes_ = size
    wide = jnp.dtype(dtype).itemsize == 4
    count = columns // 2 if wide else columns // 4
    in_registers = len(left) > 1
    names = iter(f"${i}" for i in range(2 * count + len(left) + 1))
    sums = "{" + ", ".join(next(names) for _ in range(count)) + "}"
    for _ in held:
        next(names)  # the same registers
    parts = [next(names) for _ in left]
    a = "{" + ", ".join(parts) + "}" if in_registers else parts[0]
    numbers = ", ".join(["1, 1", *["0"] * (bytes_ - 1) * (1 if in_registers else 2)])
    text = (
        f"{{ .reg .pred add; setp.ne.b32 add, {int(bool(held))}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{columns}k{STEP // bytes_}."
        f"{'f32' if wide else 'f16'}.{KINDS[bytes_]}.{KINDS[bytes_]} "
        f"{sums}, {a}, {next(names)}, add, {numbers}; }}"
    )
    constraints = ["=f" if wide else "=r"] * count + [str(i) for i in range(len(held))]
    constraints += ["r"] * len(left) if in_registers else ["l"]
    constraints += ["l"]
    kind = ir.F32Type.get() if wide else asm.i32()
    return asm.instructions(text, [kind] * count, [*held, *left, right], ",".join(constraints))


def _fragmented(values: list[Any], columns: int, dtype: Any) -> fa.FragmentedArray:
    if jnp.dtype(dtype).itemsize == 4:
        layout, registers = ACCUMULATOR, asm.as_vectors(values)
    else:
        layout = fa.WGMMA_LAYOUT
        registers = np.empty(len(values), dtype=object)
        registers[:] = [asm.as_vector(value, dtype) for value in values]
    shape = layout.registers_shape((ROWS, columns))
    return fa.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)
