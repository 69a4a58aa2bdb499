"""quantized_matmul: one product, several implementations, none chosen in silence."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import device, reference, tuning, xla_fp8
from pallas_kernels.mosaic_gpu import operands, tables
from pallas_kernels.mosaic_gpu.config import BF16, MODES, Config, FewConfig
from pallas_kernels.mosaic_gpu.operands import TiledWeight
from pallas_kernels.onto import Onto
from pallas_kernels.rows import Fp8Rows, fp8_rows, interleave
from sdq import QTensor

IMPLEMENTATIONS = ("mosaic_gpu", "xla_fp8", "reference")  # the first that fits is taken


class Explanation(NamedTuple):
    """Which implementation is taken, and why none of those before it.

    Attributes:
      implementation: its name.
      refused: reasons by name.
    """

    implementation: str
    refused: dict[str, str]


def quantized_matmul(
    x: jax.Array | QTensor | Fp8Rows,
    w: QTensor | TiledWeight,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    onto: Onto | None = None,
    implementation: str | None = None,
    mode: str = "accurate",
    config: Config | FewConfig | None = None,
) -> jax.Array:
    """activation(x w^T + bias), summed in float32 and rounded once.

    Args:
      x: `[..., K]`: a QTensor quantised along its last axis, Fp8Rows, or plain numbers, which only
        the reference takes in float32.
      w: N rows of K: a QTensor `[N, K]` quantised along its last axis or `[K, N]` along its first
        (stored alike); or a TiledWeight, which saves reordering it on every call.
      bias: `[N]`, or None.
      activation: None or "gelu" (by tanh).
      out_dtype: of the result; x's by default.
      onto: what the result is added to. "mosaic_gpu" does so in the same pass, before it rounds, if
        numbers have 16 bits, there are more than 64 rows, and all have the same gate.
      implementation: one of IMPLEMENTATIONS; None takes the first that fits (`which` says why).
      mode: of "mosaic_gpu" with quantised rows: "accurate" adds up in float32 after each 256
        channels; "fast" leaves sums to the tensor cores, which is as good where signs mix, and up
        to a tenth wrong over thousands of numbers of one sign. Up to 64 rows both are accurate.
      config: how "mosaic_gpu" cuts the work, whatever the mode; None looks it up for the shape.
    Returns:
      `[..., N]`.
    Raises:
      ValueError: operands that no implementation takes, or that the one asked for does not.
    """
    _check(x, w, bias, activation, mode)
    out_dtype = np.dtype(out_dtype or (x.dtype if onto is None else onto.x.dtype))
    _check_onto(onto, (*x.shape[:-1], rows_of(w)), out_dtype)
    chosen = which(x, w).implementation if implementation is None else implementation
    if reason := supports(chosen, x, w):
        raise ValueError(f"quantized_matmul: {chosen} cannot do this: {reason}")
    if chosen == "mosaic_gpu":
        config = config or tuning.choose(
            mode if isinstance(x, QTensor | Fp8Rows) else BF16,
            math.prod(x.shape[:-1]),
            x.shape[-1],
            rows_of(w),
            device.current(),
            out_dtype.itemsize,
        )
        together = (
            onto is not None
            and onto.row is not None
            and out_dtype.itemsize == 2
            and isinstance(config, Config)
        )
        y = _mosaic_gpu(x, w, bias, activation, onto if together else None, out_dtype, config)
        return y if together or onto is None else onto.plus(y)
    if config is not None:
        raise ValueError(f"config: only mosaic_gpu has one, not {chosen}")
    assert isinstance(w, QTensor)
    exact = out_dtype if onto is None else np.dtype(np.float32)
    if chosen == "xla_fp8":
        rows = fp8_rows(x) if isinstance(x, QTensor) else x
        assert isinstance(rows, Fp8Rows)
        y = xla_fp8.matmul(rows, w, bias, activation, exact)
    else:
        y = reference.matmul(x, w, bias, activation, exact)
    return y if onto is None else onto.plus(y)


def which(x: jax.Array | QTensor | Fp8Rows, w: QTensor | TiledWeight) -> Explanation:
    """What `quantized_matmul` takes for these operands (arrays or their shapes).

    Raises:
      ValueError: none fits.
    """
    refused: dict[str, str] = {}
    for name in IMPLEMENTATIONS:
        reason = supports(name, x, w)
        if reason is None and name == "xla_fp8" and device.current().platform != "gpu":
            reason = "no fp8 tensor cores here; ask for it by name"
        if reason is None:
            return Explanation(name, refused)
        refused[name] = reason
    raise ValueError(f"quantized_matmul: no implementation fits: {refused}")


def supports(
    implementation: str, x: jax.Array | QTensor | Fp8Rows, w: QTensor | TiledWeight
) -> str | None:
    """Why an implementation cannot multiply these operands here; None if it can."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
        )
    if implementation == "mosaic_gpu":
        return _mosaic_gpu_misfit(x, w)
    if isinstance(w, TiledWeight):
        return "w is a TiledWeight, which only mosaic_gpu reads"
    if implementation == "xla_fp8":
        return _fp8_misfit(x) or (
            None if w.format.family == "dialect" else f"w: {w.format} numbers are not fp8 numbers"
        )
    return None


def _mosaic_gpu_misfit(x: jax.Array | QTensor | Fp8Rows, w: QTensor | TiledWeight) -> str | None:
    if reason := device.without_mosaic_gpu():
        return reason
    if isinstance(x, QTensor | Fp8Rows):
        if reason := _fp8_misfit(x):
            return reason
    elif x.dtype != jnp.bfloat16:
        return f"x: {x.dtype} numbers; cast them to bfloat16 or quantise them"
    if reason := tables.misfit(w.format):
        return f"w: {reason}"
    if x.shape[-1] % operands.STEP:
        return f"K = {x.shape[-1]} is not a multiple of {operands.STEP}"
    return None


def _fp8_misfit(x: jax.Array | QTensor | Fp8Rows) -> str | None:
    if isinstance(x, QTensor) and (x.format.family != "dialect" or x.axis != -1):
        return f"x: {x!r} is not rows of fp8 numbers"
    return None if isinstance(x, QTensor | Fp8Rows) else "x: expected quantised rows"


def rows_of(w: QTensor | TiledWeight) -> int:
    """N."""
    return w.count if isinstance(w, TiledWeight) else w.codes.shape[0]


def _mosaic_gpu(
    x: jax.Array | QTensor | Fp8Rows,
    w: QTensor | TiledWeight,
    bias: jax.Array | None,
    activation: str | None,
    onto: Onto | None,
    out_dtype: np.dtype,
    config: Config | FewConfig,
) -> jax.Array:
    from pallas_kernels.mosaic_gpu.matmul import matmul  # takes a second to import
    from pallas_kernels.mosaic_gpu.matmul_few import matmul_few

    values, exponents = _kernel_rows(x)
    tiled = w if isinstance(w, TiledWeight) else operands.tile_weight(w)
    n, (*lead, k) = rows_of(w), values.shape
    values = values.reshape(-1, k)
    m = len(values)
    few = isinstance(config, FewConfig)  # which fills up rows itself, if need be
    fill_m = 0 if few else -m % operands.TILE_M
    fill_n, fill_k = -n % operands.TILE_N, -k % operands.TILE_K
    added_to = {}
    if onto is not None:
        assert onto.row is not None
        x_of_onto = jnp.pad(onto.x.reshape(m, n), ((0, fill_m), (0, fill_n)))
        added_to["onto"] = x_of_onto, jnp.pad(onto.row, (0, fill_n))
    product: Any = matmul_few if few else matmul
    y = product(
        jnp.pad(values, ((0, fill_m), (0, fill_k))),
        None if exponents is None else jnp.pad(exponents.reshape(-1), (0, fill_m)),
        tiled,
        None if bias is None else jnp.pad(bias.astype(jnp.float32), (0, fill_n)),
        **added_to,
        activation=reference.ACTIVATIONS[activation],
        config=config,
        out_dtype=out_dtype,
        num_sms=device.current().cores,
    )
    return y[:m, :n].reshape(*lead, n)


def _kernel_rows(x: jax.Array | QTensor | Fp8Rows) -> tuple[jax.Array, jax.Array | None]:
    """Rows `[..., K]` in the kernel's order, and their exponents."""
    if not isinstance(x, QTensor | Fp8Rows):
        return interleave(jnp.asarray(x), run=2), None
    rows = fp8_rows(x) if isinstance(x, QTensor) else x
    values = rows.values if rows.interleaved else interleave(rows.values)
    return values, rows.exponents


def _check_onto(onto: Onto | None, shape: tuple[int, ...], out_dtype: np.dtype) -> None:
    if onto is None:
        return
    if onto.x.shape != shape or onto.x.dtype != out_dtype:
        raise ValueError(
            f"onto: expected x {out_dtype}{list(shape)}, got {onto.x.dtype}{list(onto.x.shape)}"
        )
    gate = shape if onto.gate is None else onto.gate.shape
    if len(gate) != len(shape) or any(
        mine not in (1, all_) for mine, all_ in zip(gate, shape, strict=True)
    ):
        raise ValueError(
            f"onto: expected a gate that broadcasts to {list(shape)}, got {list(gate)}"
        )


def _check(
    x: jax.Array | QTensor | Fp8Rows,
    w: QTensor | TiledWeight,
    bias: jax.Array | None,
    activation: str | None,
    mode: str,
) -> None:
    if not isinstance(w, QTensor | TiledWeight):
        raise ValueError(f"w: expected a QTensor or a TiledWeight, got {type(w).__name__}")
    if isinstance(w, QTensor) and w.ndim != 2:
        raise ValueError(f"w: expected two axes, got {w!r}")
    if not x.shape or x.shape[-1] != w.length:
        raise ValueError(f"x: expected [..., {w.length}], got {list(x.shape)}")
    if bias is not None and bias.shape != (rows_of(w),):
        raise ValueError(f"bias: expected [{rows_of(w)}], got {list(bias.shape)}")
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(map(repr, reference.ACTIVATIONS))
        raise ValueError(f"activation: expected one of {known}, got {activation!r}")
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
