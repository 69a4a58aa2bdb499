"""32-bit registers of a thread inside `plgpu.inline_mgpu`: names for MLIR operations."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

Register = Any  # an MLIR value of type i32


def i32() -> ir.Type:
    """The type of a register; needs the MLIR context of a lowering."""
    return ir.IntegerType.get_signless(32)


def constant(value: int) -> Register:
    """The low 32 bits of a number."""
    signed = int(np.uint32(value & 0xFFFFFFFF).astype(np.int32))
    return utils.c(signed, i32())


def add(a: Register, b: Register | int) -> Register:
    """a + b."""
    return arith.addi(a, _register(b))


def multiply(a: Register, b: Register | int) -> Register:
    """The low 32 bits of a b."""
    return arith.muli(a, _register(b))


def both(a: Register, b: Register | int) -> Register:
    """Bitwise and."""
    return arith.andi(a, _register(b))


def either(a: Register, b: Register | int) -> Register:
    """Bitwise or."""
    return arith.ori(a, _register(b))


def shift_right(a: Register, by: int) -> Register:
    """Zeros come in on the left."""
    return arith.shrui(a, constant(by)) if by else a


def shift_left(a: Register, by: int) -> Register:
    """Zeros come in on the right."""
    return arith.shli(a, constant(by)) if by else a


def thread() -> Register:
    """Of this warpgroup, 0 .. 127."""
    return both(_asm("mov.u32 $0, %tid.x;"), 127)


def permute(low: Register, high: Register, selector: Register | int) -> Register:
    """Four of the eight bytes of (low, high), named by the low four nibbles of the selector."""
    return _asm("prmt.b32 $0, $1, $2, $3;", low, high, _register(selector))


def dot_bytes(bytes_: Register, by: int, plus: Register) -> Register:
    """plus + the sum of the products of two registers' four unsigned bytes."""
    return _asm("dp4a.u32.u32 $0, $1, $2, $3;", bytes_, constant(by), plus)


def address(ref: Any) -> Register:
    """Where an SMEM ref begins, in shared memory."""
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def load_words(at: Register, count: int, offset: int = 0) -> list[Register]:
    """2 or 4 words of shared memory, aligned to as many."""
    kind = ir.VectorType.get((count,), i32())
    words = llvm.load(kind, _pointer(at, offset), alignment=4 * count)
    return [vector.extract(words, [], [i]) for i in range(count)]


def kept(a: Register) -> Register:
    """a, which no compiler makes anew where it is used: each lane sends it to itself."""
    return _asm(
        "{ .reg .b32 lane; mov.u32 lane, %laneid; shfl.sync.idx.b32 $0, $1, lane, 31, -1; }", a
    )


def scalar(value: Any) -> Register:
    """A register that Mosaic holds as a vector of one."""
    return vector.extract(value, [], [0]) if isinstance(value.type, ir.VectorType) else value


def as_vectors(values: Sequence[Any]) -> np.ndarray:
    """float32 or 32-bit scalars as Mosaic holds them, vectors of one."""
    one = ir.VectorType.get((1,), values[0].type)
    held = np.empty(len(values), dtype=object)
    held[:] = [vector.broadcast(one, value) for value in values]
    return held


def as_vector(register: Register, dtype: Any) -> Any:
    """Four bytes as a vector of four e4m3 numbers or two bf16 ones."""
    one = utils.dtype_to_ir_type(jnp.dtype(dtype))
    count = 4 // jnp.dtype(dtype).itemsize
    bits = ir.VectorType.get((count,), ir.IntegerType.get_signless(32 // count))
    return utils.bitcast(utils.bitcast(register, bits), ir.VectorType.get((count,), one))


def from_vector(value: Any) -> Register:
    """The inverse of as_vector."""
    return utils.bitcast(value, i32())


def instructions(
    text: str, results: Sequence[Any], operands: Sequence[Any], constraints: str
) -> list[Any]:
    """PTX that must stay where it is, and the registers that it writes."""
    if len(results) == 1:
        return [
            llvm.inline_asm(results[0], list(operands), text, constraints, has_side_effects=True)
        ]
    struct = llvm.StructType.get_literal(list(results))
    found: Any = llvm.inline_asm(struct, list(operands), text, constraints, has_side_effects=True)
    return [llvm.extractvalue(kind, found, [i]) for i, kind in enumerate(results)]


def _register(value: Register | int) -> Register:
    return constant(value) if isinstance(value, int) else value


def _pointer(at: Register, offset: int) -> Any:
    pointer = llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), at)
    if not offset:
        return pointer
    return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def _asm(text: str, *operands: Register) -> Register:
    return llvm.inline_asm(i32(), list(operands), text, "=r" + ",r" * len(operands))
