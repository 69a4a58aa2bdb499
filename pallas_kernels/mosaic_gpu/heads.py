"""Queries, keys and values as an attention reads them, from linears' results.

Written plainly, norm, rotary embedding, Hadamard rotation, rounding and transposition each pass
over memory. Here, for our attention, queries are read once, keys and values twice, and nothing but
e4m3 is written; for one in bf16, queries and keys are read and written once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import heads_program, values_program
from pallas_kernels.mosaic_gpu.attention_operands import (
    E4M3,
    KEYS,
    NORM_TOP,
    ONES,
    QUERIES,
    WIDTHS,
    Rounded,
    of_largest,
)
from pallas_kernels.mosaic_gpu.heads_program import Task
from pallas_kernels.mosaic_gpu.ptx_kernel import run
from pallas_kernels.projected import Projected
from sdq.numerics import exponent_of, power_of_two
from sdq.rotate import hadamard

WORDS_OF_16_WARPS = 48  # that a lane may hold of x, or registers spill
WORDS_OF_12_WARPS = 80
WARPS_OF_VALUES = 8


def misfit(x: Projected) -> str | None:
    """Why these kernels cannot read x; None if they can."""
    *_, width = x.shape
    channels = x.x.shape[-1]
    if x.dtype != jnp.bfloat16:
        return f"{x.dtype} numbers, not bfloat16"
    if width not in WIDTHS:
        return f"heads of {width}; only {', '.join(map(str, WIDTHS))}"
    if channels > 64 * WORDS_OF_12_WARPS:
        return f"{channels} channels, which do not fit into the registers of a warp"
    return None


@functools.partial(jax.jit, static_argnames="num_sms")
def prepared(x: Projected, *, num_sms: int) -> jax.Array:
    """bf16 `[B, S, H, D]`, normed and turned in float32 and rounded once; `misfit` says of what."""
    task = _task(x, heads_program.PREPARED, False, None, filled=x.shape[1])
    (values,) = _call(task, _inputs(x), num_sms)
    return values.reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("rotate", "num_sms"))
def queries(x: Projected, *, rotate: bool, num_sms: int) -> Rounded:
    """e4m3 with an exponent a query.

    Args:
      x: bf16; norm and rotary embedding are done here, in float32.
      rotate: whether heads are multiplied by a normalised Hadamard matrix then.
      num_sms: of the GPU.
    Returns:
      `[B, H, S, D]`, S filled up to a multiple of QUERIES; scales `[B, H, S, 1]`. Queries with NaN
      or Inf are NaN.
    """
    task = _task(x, heads_program.QUERIES, rotate, None, filled=_up(x.shape[1], QUERIES))
    values, exponents = _call(task, _inputs(x), num_sms)
    exponents = exponents.reshape(task.videos, task.filled, task.heads).swapaxes(1, 2)
    return Rounded(_by_head(values, task), power_of_two(exponents)[..., None])


@functools.partial(jax.jit, static_argnames=("rotate", "num_sms"))
def keys(x: Projected, *, rotate: bool, center: jax.Array | None, num_sms: int) -> Rounded:
    """e4m3 with an exponent for the keys of a head: two passes, the first finds the largest.

    Args:
      x: as of `queries`.
      rotate: likewise.
      center: float32 `[B, H, D]`, subtracted from the keys of a video before that; or None.
      num_sms: of the GPU.
    Returns:
      `[B, H, L, D]`, L filled up to a multiple of KEYS by the first key; scales `[B, H, 1, 1]`.
      Heads with NaN or Inf are NaN.
    """
    # Norms are the same before they are rotated.
    task = _task(x, heads_program.NORMS, False, center, filled=x.shape[1])
    (squares,) = _call(task, _inputs(x, center), num_sms)
    # Squares are positive: their bits are ordered as they are, with NaN on top.
    bits = jax.lax.bitcast_convert_type(squares.reshape(*x.shape[:2], x.heads), jnp.int32)
    largest = jax.lax.bitcast_convert_type(bits.max(axis=1), jnp.float32)
    exponent = (exponent_of(largest) >> 1) - NORM_TOP
    factor = jnp.where(jnp.isfinite(largest), power_of_two(-exponent), jnp.nan)
    if rotate and center is not None:
        center = hadamard(center, center.shape[-1])
    task = _task(x, heads_program.KEYS, rotate, center, filled=_up(x.shape[1], KEYS))
    (values,) = _call(task, _inputs(x, center) | {"factor": factor}, num_sms)
    return Rounded(_by_head(values, task), power_of_two(exponent)[:, :, None, None])


@functools.partial(jax.jit, static_argnames="num_sms")
def values(x: Projected, *, num_sms: int) -> Rounded:
    """e4m3 with an exponent a channel, transposed, in `attention_operands.in_order`.

    Args:
      x: bf16 as a linear gives it.
      num_sms: of the GPU.
    Returns:
      `[B, H, D + ONES, L]`, L filled up to a multiple of KEYS by zeros, the last channels ones;
      scales `[B, H, D, 1]`. Channels with NaN or Inf are NaN.
    """
    videos, tokens, count, width = x.shape
    task = values_program.Task(
        videos=videos,
        tokens=tokens,
        filled=_up(tokens, KEYS),
        heads=count,
        width=width,
        ones=ONES,
        warps=WARPS_OF_VALUES,
    )
    largest = jnp.max(jnp.abs(x.x), axis=1).astype(jnp.float32)
    exponent = of_largest(largest)
    factor = jnp.where(jnp.isfinite(largest), power_of_two(-exponent), jnp.nan)
    shape = (videos, count, width + ONES, task.filled)
    (found,) = _kernel(
        values_program.program(task),
        (x.x, factor),
        (jax.ShapeDtypeStruct(shape, E4M3),),
        blocks=min(4 * num_sms, pl.cdiv(task.units, task.warps)),
        warps=task.warps,
    )
    return Rounded(found, power_of_two(exponent).reshape(videos, count, width, 1))


def _task(x: Projected, what: str, rotate: bool, center: jax.Array | None, *, filled: int) -> Task:
    videos, tokens, count, width = x.shape
    words = count * width // 64
    return Task(
        what=what,
        videos=videos,
        tokens=tokens,
        filled=filled,
        heads=count,
        width=width,
        top=NORM_TOP,
        eps=None if x.gain is None else x.eps,
        rope=x.rope is not None,
        rotate=rotate,
        center=center is not None,
        warps=16 if words <= WORDS_OF_16_WARPS else 12,
    )


def _inputs(x: Projected, center: jax.Array | None = None) -> dict[str, jax.Array]:
    """By their names in a Task."""
    _, tokens, count, width = x.shape
    found = {"x": x.x}
    if x.gain is not None:
        found["gain"] = _checked("gain", x.gain, (count * width,))
    for name, angles in zip(("cos", "sin"), x.rope or (), strict=False):
        found[name] = _checked(name, angles, (tokens, width // 2))
    if center is not None:
        found["center"] = _checked("center", center, (x.shape[0], count, width))
    return found


def _checked(name: str, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if x.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(x.shape)}")
    return x.astype(jnp.float32)


def _call(task: Task, inputs: dict[str, jax.Array], num_sms: int) -> Any:
    values = jax.ShapeDtypeStruct((task.videos * task.heads, task.filled, task.width), E4M3)
    if task.what == heads_program.PREPARED:
        values = jax.ShapeDtypeStruct((task.rows, task.heads * task.width), jnp.bfloat16)
    outputs = {
        "values": values,
        "exponents": jax.ShapeDtypeStruct((task.rows, task.heads), jnp.int32),
        "norms": jax.ShapeDtypeStruct((task.rows, task.heads), jnp.float32),
    }
    return _kernel(
        heads_program.program(task),
        tuple(inputs[name] for name in task.arguments if name in inputs),
        tuple(outputs[name] for name in task.arguments if name in outputs),
        blocks=min(num_sms, pl.cdiv(task.rows, task.warps)),
        warps=task.warps,
    )


def _kernel(
    text: str,
    inputs: tuple[jax.Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    *,
    blocks: int,
    warps: int,
) -> Any:
    call = plgpu.kernel(
        functools.partial(run, text),
        out_type=outputs,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warps // 4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return call(*inputs)


def _by_head(values: jax.Array, task: Task) -> jax.Array:
    return values.reshape(task.videos, task.heads, task.filled, task.width)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
