"""Queries and keys as the Hopper attention reads them, from a linear's result in one pass.

Written plainly, norm, rotary embedding, Hadamard rotation and rounding each pass over memory. Not
called by `quantized_attention` yet: it has only been run by `tests/.../ptx_machine.py` so far.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.attention_operands import E4M3, NORM_TOP, WIDTHS, Rounded
from pallas_kernels.mosaic_gpu.heads_program import KEYS, NORMS, QUERIES, Task, program
from pallas_kernels.mosaic_gpu.ptx_kernel import run
from sdq.numerics import exponent_of, power_of_two

WORDS_OF_16_WARPS = 48  # that a lane may hold of x, or registers spill
WORDS_OF_12_WARPS = 80


class Norm(NamedTuple):
    """Root mean square norm over all heads of a token.

    Attributes:
      gain: float32 `[H D]`.
      eps: added to the mean square.
    """

    gain: jax.Array
    eps: float


class Rope(NamedTuple):
    """Angles by which neighbours are turned, as complex numbers.

    Attributes:
      cos: float32 `[S, D / 2]`.
      sin: likewise.
    """

    cos: jax.Array
    sin: jax.Array


def queries(
    x: jax.Array,
    heads: int,
    *,
    norm: Norm | None = None,
    rope: Rope | None = None,
    rotate: bool = False,
    num_sms: int,
) -> Rounded:
    """e4m3 with an exponent a query.

    Args:
      x: bf16 `[B, S, H D]`, D of WIDTHS.
      heads: H.
      norm: comes first; None: no norm.
      rope: comes second, likewise.
      rotate: whether heads are multiplied by a normalised Hadamard matrix, third.
      num_sms: of the GPU.
    Returns:
      `[B, H, S, D]`, scales `[B, H, S, 1]`. Queries with NaN or Inf are NaN.
    """
    task, inputs = _task(x, heads, QUERIES, norm, rope, rotate, None)
    values, exponents = _call(task, inputs, num_sms)
    exponents = exponents.reshape(*x.shape[:2], heads).swapaxes(1, 2)
    return Rounded(_by_head(values, task), power_of_two(exponents)[..., None])


def keys(
    x: jax.Array,
    heads: int,
    *,
    norm: Norm | None = None,
    rope: Rope | None = None,
    rotate: bool = False,
    center: jax.Array | None = None,
    num_sms: int,
) -> Rounded:
    """e4m3 with an exponent for the keys of a head: two passes, the first finds the largest.

    Args:
      x: as of `queries`, like the rest.
      heads: H.
      norm: comes first.
      rope: second.
      rotate: third.
      center: what is subtracted from the keys of a video then, float32 `[B, H D]`.
      num_sms: of the GPU.
    Returns:
      `[B, H, S, D]`, scales `[B, H, 1, 1]`. Heads with NaN or Inf are NaN.
    """
    task, inputs = _task(x, heads, NORMS, norm, rope, rotate, center)
    (squares,) = _call(task, inputs, num_sms)
    # Squares are positive: their bits are ordered as they are, with NaN on top.
    bits = jax.lax.bitcast_convert_type(squares.reshape(*x.shape[:2], heads), jnp.int32)
    largest = jax.lax.bitcast_convert_type(bits.max(axis=1), jnp.float32)
    exponent = (exponent_of(largest) >> 1) - NORM_TOP
    factor = jnp.where(jnp.isfinite(largest), power_of_two(-exponent), jnp.nan)
    (values,) = _call(dataclasses.replace(task, what=KEYS), inputs | {"factor": factor}, num_sms)
    return Rounded(_by_head(values, task), power_of_two(exponent)[:, :, None, None])


def _task(
    x: jax.Array,
    heads: int,
    what: str,
    norm: Norm | None,
    rope: Rope | None,
    rotate: bool,
    center: jax.Array | None,
) -> tuple[Task, dict[str, jax.Array]]:
    """And its inputs by their names."""
    if x.ndim != 3 or x.dtype != jnp.bfloat16 or x.shape[-1] % heads:
        raise ValueError(f"x: expected bfloat16 [B, S, {heads} D], got {x.dtype}{list(x.shape)}")
    videos, tokens, channels = x.shape
    width = channels // heads
    if width not in WIDTHS:
        raise ValueError(f"x: expected heads of {' or '.join(map(str, WIDTHS))}, got {width}")
    words = channels // 64
    if words > WORDS_OF_12_WARPS:
        raise ValueError(f"x: {channels} channels do not fit into the registers of a warp")
    inputs = {"x": x}
    if norm is not None:
        inputs["gain"] = _checked("gain", norm.gain, (channels,))
    if rope is not None:
        inputs["cos"] = _checked("cos", rope.cos, (tokens, width // 2))
        inputs["sin"] = _checked("sin", rope.sin, (tokens, width // 2))
    if center is not None:
        inputs["center"] = _checked("center", center, (videos, channels))
    task = Task(
        what=what,
        videos=videos,
        tokens=tokens,
        heads=heads,
        width=width,
        top=NORM_TOP,
        eps=None if norm is None else norm.eps,
        rope=rope is not None,
        rotate=rotate,
        center=center is not None,
        warps=16 if words <= WORDS_OF_16_WARPS else 12,
    )
    return task, inputs


def _checked(name: str, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if x.shape != shape or x.dtype != jnp.float32:
        raise ValueError(f"{name}: expected float32{list(shape)}, got {x.dtype}{list(x.shape)}")
    return x


def _call(task: Task, inputs: dict[str, jax.Array], num_sms: int) -> Any:
    outputs = {
        "values": jax.ShapeDtypeStruct((task.videos * task.heads, task.tokens, task.width), E4M3),
        "exponents": jax.ShapeDtypeStruct((task.rows, task.heads), jnp.int32),
        "norms": jax.ShapeDtypeStruct((task.rows, task.heads), jnp.float32),
    }
    call = plgpu.kernel(
        functools.partial(run, program(task)),
        out_type=tuple(outputs[name] for name in task.arguments if name in outputs),
        grid=(min(num_sms, pl.cdiv(task.rows, task.warps)),),
        grid_names=("block",),
        num_threads=task.warps // 4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return call(*(inputs[name] for name in task.arguments if name in inputs))


def _by_head(values: jax.Array, task: Task) -> jax.Array:
    return values.reshape(task.videos, task.heads, task.tokens, task.width)
