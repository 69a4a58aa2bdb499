"""The fused quantiser of activations on Hopper: bf16 rows to the fp8 rows that the matmul reads.

One pass over memory: 2 bytes of an element are read, 1 is written. The result is that of
`sdq.quantize(x, fmt, select="two_stage")` to the last bit, NaN and Inf included.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.config import SHARED_MEMORY, THREADS
from pallas_kernels.mosaic_gpu.operands import STEP
from pallas_kernels.mosaic_gpu.ptx_kernel import run
from pallas_kernels.mosaic_gpu.quantizer_norm import arranged
from pallas_kernels.mosaic_gpu.quantizer_program import program
from pallas_kernels.mosaic_gpu.quantizer_tables import element_table
from pallas_kernels.mosaic_gpu.quantizer_task import (
    WARP,
    WORDS_HELD,
    Config,
    Task,
    default_config,
    words_held,
)
from pallas_kernels.mosaic_gpu.tables import look_up_table
from pallas_kernels.rows import Fp8Rows
from sdq.formats import Format


class Written(NamedTuple):
    """What the kernel writes.

    Attributes:
      rows: M, interleaved.
      residuals: of n of them, or None.
      metadata: a byte for each block, uint8 `[M + n, G]`, as in a QTensor's scales; or None. Means
        nothing in residuals of rows with NaN or Inf.
    """

    rows: Fp8Rows
    residuals: Fp8Rows | None
    metadata: jax.Array | None


class SubFormatbooks(NamedTuple):
    """What each row's blocks may choose from.

    Attributes:
      books: uint8 `[groups, 1 or G, 8]`: bit s of entry t says whether top t may take shape s; at
        least one bit each.
      group: of each row, int32 `[M]`, in 0..groups - 1.
    """

    books: jax.Array
    group: jax.Array


class Norm(NamedTuple):
    """A layer norm in front: LN(x) gain + shift in float32, then rounded to bf16.

    Attributes:
      gain: float32 `[B, K]`, for M / B rows each; 1 + scale of a modulation.
      shift: float32 `[B, K]`.
      eps: added to the variance.
    """

    gain: jax.Array
    shift: jax.Array
    eps: float


def misfit(fmt: Format, length: int) -> str | None:
    """Why rows of `length` channels cannot be quantised so; None if they can."""
    if fmt.family != "dialect":
        return f"{fmt}: only dialect formats have e4m3 values"
    if fmt.block not in (STEP // 2, STEP):
        return f"{fmt}: blocks must be of 16 or 32"
    if length <= 0 or length % STEP:
        return f"K = {length}: must be a multiple of {STEP}"
    threads, most = max(WORDS_HELD.items())
    if words_held(length, fmt.block, threads) > most:
        return f"K = {length}: does not fit the registers of a thread block"
    return None


def quantize(
    x: jax.Array,
    fmt: Format,
    *,
    more: jax.Array | None = None,
    sub_formatbooks: SubFormatbooks | None = None,
    residual_of: jax.Array | None = None,
    norm: Norm | None = None,
    activation: str | None = None,
    metadata: bool = False,
    config: Config | None = None,
    num_sms: int,
) -> Written:
    """Quantise rows; each block takes the top nearest to its maximum, then the best of its shapes.

    Args:
      x: bf16 `[M, K]`, K a multiple of 32.
      fmt: a dialect format with blocks of 16 or 32.
      more: bf16 `[M, K']`, K' a multiple of 32: channels of the same rows, behind those of x.
      sub_formatbooks: the choice of each row, for formats with more than one shape a top.
      residual_of: numbers of rows, int32 `[n]`: what quantising leaves over of them is quantised
        too, with a free choice.
      norm: what to do with x first.
      activation: what then, rounded to bf16 again; one of `quantizer_activation.PROGRAMS`.
      metadata: whether the blocks' bytes are wanted.
      config: how; None for the default of this K.
      num_sms: of the GPU.
    Raises:
      NotImplementedError: the kernel cannot do this format or K.
    """
    if x.ndim != 2 or x.dtype != jnp.bfloat16:
        raise ValueError(f"x: expected bfloat16 [M, K], got {x.dtype}{list(x.shape)}")
    rows, length = x.shape
    if more is not None:
        _check_more(more, rows)
        length += more.shape[1]
    if reason := misfit(fmt, length):
        raise NotImplementedError(reason)
    assert fmt.block is not None
    task = Task(
        rows=rows,
        length=length,
        format=fmt,
        config=config or default_config(length, fmt.block, norm=norm is not None),
        metadata=metadata,
        books=0 if sub_formatbooks is None else sub_formatbooks.books.shape[1],
        residuals=0 if residual_of is None else residual_of.shape[0],
        eps=None if norm is None else norm.eps,
        batch=1 if norm is None else norm.gain.shape[0],
        activation=activation,
        more=0 if more is None else more.shape[1],
    )
    if task.shared_bytes > SHARED_MEMORY:
        raise ValueError(
            f"config: {task.rows_at_once} rows of K = {length} and the tables need "
            f"{task.shared_bytes} bytes of shared memory, a thread block has {SHARED_MEMORY}"
        )
    inputs = {"x": x} if more is None else {"x": x, "more": more}
    if sub_formatbooks is not None:
        _check_sub_formatbooks(sub_formatbooks, task)
        inputs |= sub_formatbooks._asdict()
    if residual_of is not None:
        _check_residual_of(residual_of, task)
        inputs["tokens"] = residual_of
    if norm is not None:
        _check_norm(norm, task)
        inputs["modulation"] = arranged(norm.gain, norm.shift, task)
    return _quantize(task, inputs, num_sms)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _quantize(task: Task, inputs: dict[str, jax.Array], num_sms: int) -> Written:
    """The kernel on arguments by their names."""
    m, n = task.rows, task.residuals
    outputs = {
        "values": jax.ShapeDtypeStruct((m, task.length), jnp.float8_e4m3fn),
        "exponents": jax.ShapeDtypeStruct((m, 1), jnp.int8),
        "residual_values": jax.ShapeDtypeStruct((n, task.length), jnp.float8_e4m3fn),
        "residual_exponents": jax.ShapeDtypeStruct((n, 1), jnp.int8),
        "metadata": jax.ShapeDtypeStruct((m + n, task.blocks), jnp.uint8),
    }
    names = [name for name in task.arguments if name in outputs]
    inputs["table"] = jnp.asarray(element_table(task.book))
    inputs["dialects"] = jnp.asarray(look_up_table(task.format))
    out_type = tuple(outputs[name] for name in names)
    if m == 0:
        empty = [jnp.zeros(part.shape, part.dtype) for part in out_type]
        return _written(**dict(zip(names, empty, strict=True)))
    call = plgpu.kernel(
        functools.partial(run, program(task)),
        out_type=out_type,
        grid=(min(num_sms, -(-(m + n) // task.rows_at_once)),),
        grid_names=("block",),
        num_threads=task.config.warps * WARP // THREADS,
        thread_name="warpgroup",
        scratch_types={"shared": plgpu.SMEM((task.shared_bytes,), jnp.uint8)},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    found = call(*(inputs[name] for name in task.arguments if name in inputs))
    return _written(**dict(zip(names, found, strict=True)))


def _written(
    values: jax.Array,
    exponents: jax.Array,
    residual_values: jax.Array | None = None,
    residual_exponents: jax.Array | None = None,
    metadata: jax.Array | None = None,
) -> Written:
    def rows(values: jax.Array, exponents: jax.Array) -> Fp8Rows:
        dtype = np.dtype(jnp.bfloat16)
        return Fp8Rows(values=values, exponents=exponents, dtype=dtype, interleaved=True)

    residuals = None
    if residual_values is not None and residual_exponents is not None:
        residuals = rows(residual_values, residual_exponents)
    return Written(rows(values, exponents), residuals, metadata)


def _check_more(more: jax.Array, rows: int) -> None:
    fits = more.ndim == 2 and len(more) == rows and more.shape[1] and not more.shape[1] % STEP
    if not fits or more.dtype != jnp.bfloat16:
        raise ValueError(
            f"more: expected bfloat16[{rows}, a multiple of {STEP}], "
            f"got {more.dtype}{list(more.shape)}"
        )


def _check_sub_formatbooks(sub: SubFormatbooks, task: Task) -> None:
    rows, blocks = task.rows, task.blocks
    if task.book.shapes == 1:
        raise ValueError(f"sub_formatbooks: {task.format} has nothing to choose")
    books, group = sub
    fits = books.ndim == 3 and books.shape[1] in (1, blocks) and books.shape[2] == 8
    if not fits or books.dtype != jnp.uint8:
        raise ValueError(
            f"books: expected uint8[groups, 1 or {blocks}, 8], got {books.dtype}{list(books.shape)}"
        )
    if group.shape != (rows,) or group.dtype != jnp.int32:
        raise ValueError(f"group: expected int32[{rows}], got {group.dtype}{list(group.shape)}")


def _check_residual_of(tokens: jax.Array, task: Task) -> None:
    if tokens.ndim != 1 or tokens.dtype != jnp.int32:
        raise ValueError(f"residual_of: expected int32[n], got {tokens.dtype}{list(tokens.shape)}")
    if task.residuals and not task.rows:
        raise ValueError(f"residual_of: {tokens.shape[0]} rows of an x that has none")


def _check_norm(norm: Norm, task: Task) -> None:
    for name, part in (("gain", norm.gain), ("shift", norm.shift)):
        if part.shape != (task.batch, task.length) or part.dtype != jnp.float32:
            raise ValueError(
                f"{name}: expected float32[B, {task.length}], got {part.dtype}{list(part.shape)}"
            )
    if not task.batch or task.rows % task.batch:
        raise ValueError(f"norm: {task.rows} rows are not {task.batch} equal parts")
