"""The 4-bit matmul on a Hopper GPU: speed against XLA's bf16 and fp8 products, and error.

    python -m scripts.bench_matmul --out docs/results

Run `scripts.tune` first. All of a row is timed in one process, in turn; ratios are against XLA's
bf16 product of the same sizes. Errors are relative to float64 on the same quantised operands,
with float32 results. Set XLA_PYTHON_CLIENT_PREALLOCATE=false where PyTorch shall be timed too.
"""

import dataclasses
import functools
import json
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sdq
from pallas_kernels import device, quantize_rows, quantized_matmul, xla_fp8
from pallas_kernels.mosaic_gpu.operands import TiledWeight, tile_weight
from pallas_kernels.rows import fp8_rows
from pallas_kernels.workloads import LINEARS, Linear
from scripts import _results as results
from scripts._products import (
    FORMAT,
    SHORT,
    SHORT_PRODUCTS,
    SHORT_WEIGHTS,
    operands,
    program,
    seconds_of_each,
)
from scripts._timing import copy_bandwidth
from sdq import formats

MODES = ("fast", "accurate")
ERROR_SIZES = ((512, 5120, 1024), (512, 13824, 1024))  # m, k, n
ROWS = 64  # of each error that float64 computes
STEM = "matmul_hopper"
Errors = dict[str, dict[str, dict[str, float]]]  # by sizes, operands and way


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One workload.

    Attributes:
      linear: which.
      bf16_ms: milliseconds of XLA's bf16 product.
      ratios: times faster, by name.
      least_ms: what its 4-bit weights, fp8 rows and bf16 results need at the bandwidth of a copy.
    """

    linear: str
    bf16_ms: float
    bf16_tflops: float
    ratios: dict[str, float]
    least_ms: float


def ways(linear: Linear) -> dict[str, Callable[[], Any]]:
    """A call of each way to multiply, on random numbers.

    bf16 products get them unquantised: numbers of four significant bits would draw less power, and
    a GPU at its limit would multiply them up to a tenth faster.
    """
    made = operands(linear)

    def calls(product: Callable[..., Any], *operands: Any) -> Callable[[], Any]:
        return functools.partial(program(product), *operands)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16
        )

    found = {
        "XLA bf16": calls(product, made.x, made.w),
        "XLA fp8": calls(
            product,
            [rows.values for rows in made.rows],
            [sdq.to_fp8(weight)[0] for weight in made.weights],
        ),
    }
    for mode in MODES:
        ours = functools.partial(quantized_matmul, implementation="mosaic_gpu", mode=mode)
        found[mode] = calls(ours, made.rows, made.tiled)

        def from_bf16(x: jax.Array, w: TiledWeight, ours: Callable = ours) -> jax.Array:
            return ours(quantize_rows(x[None], FORMAT, implementation="mosaic_gpu").rows, w)

        found[f"{mode}, bf16 rows"] = calls(from_bf16, made.x, made.tiled)
    unquantised = functools.partial(quantized_matmul, implementation="mosaic_gpu")
    found["rows kept in bf16"] = calls(unquantised, made.x, made.tiled)
    # Of short ones only the dispatch would be seen.
    if linear.m > SHORT and (product_of_torch := torch_product(linear)) is not None:
        found["PyTorch fp8"] = product_of_torch
    return found


def speed(linear: Linear, bytes_per_second: float) -> Speed:
    """Time one workload in every way."""
    seconds = seconds_of_each(linear, ways(linear))
    base = seconds.pop("XLA bf16")
    bits = formats.parse(FORMAT).bits_per_element
    moved = bits / 8 * linear.n * linear.k + linear.m * linear.k + 2 * linear.m * linear.n
    return Speed(
        linear=str(linear),
        bf16_ms=1e3 * base,
        bf16_tflops=linear.operations / base / 1e12,
        ratios={name: base / value for name, value in seconds.items()},
        least_ms=1e3 * moved / bytes_per_second,
    )


def torch_product(linear: Linear) -> Callable[[], Any] | None:
    """PyTorch's row-wise scaled fp8 product; None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None

    def random(rows: int) -> Any:
        return torch.randn(rows, linear.k, device="cuda").to(torch.float8_e4m3fn)

    x, w = random(linear.m), random(linear.n)
    scales = [torch.ones(size, device="cuda") for size in ((linear.m, 1), (1, linear.n))]

    def product() -> types.SimpleNamespace:
        torch._scaled_mm(x, w.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
        return types.SimpleNamespace(block_until_ready=torch.cuda.synchronize)

    return product


def error_cases(m: int, k: int, n: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Operands `[m, k]` and `[n, k]` by description."""
    rng = np.random.RandomState(0)
    x, w = rng.randn(m, k), rng.randn(n, k)
    gelu = np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32)), np.float64)
    huge = np.where(np.arange(m)[:, None] == 3, x * 2.0**100, x)
    half = k // 2
    return {
        "signed": (x, w),
        "x >= 0": (abs(x), w),
        "GELU outputs": (gelu, w),
        "x, w >= 0": (abs(x), abs(w)),
        "one huge row": (huge, w),
        "sums that cancel": (
            np.concatenate([abs(x[:, :half]), abs(x[:, :half])], axis=1),
            np.concatenate([abs(w[:, :half]), -abs(w[:, :half])], axis=1),
        ),
    }


def errors(m: int, k: int, n: int) -> dict[str, dict[str, float]]:
    """Relative errors by description and implementation.

    Cancelling sums are compared with the sums of magnitudes: nothing is left of the sums.
    """
    found = {}
    for name, (x, w) in error_cases(m, k, n).items():
        q, kernel = (sdq.quantize(jnp.asarray(part, jnp.float32), FORMAT) for part in (x, w))
        rows, tiled = fp8_rows(q), tile_weight(kernel)
        numbers, columns = (np.asarray(sdq.dequantize(part), np.float64) for part in (q, kernel))
        exact = numbers[:ROWS] @ columns.T
        size = np.linalg.norm(exact)
        if name == "sums that cancel":
            size = np.linalg.norm(abs(numbers[:ROWS]) @ abs(columns.T))
        ways: dict[str, jax.Array] = {
            mode: quantized_matmul(q, tiled, implementation="mosaic_gpu", mode=mode)
            for mode in MODES
        }
        ways["XLA fp8"] = jax.jit(lambda x, w: xla_fp8.matmul(x, w, None, None, "float32"))(
            rows, kernel
        )
        ways["XLA bf16"] = jnp.matmul(
            jnp.asarray(numbers, jnp.bfloat16),
            jnp.asarray(columns.T, jnp.bfloat16),
            preferred_element_type=jnp.float32,
        )
        found[name] = {
            way: float(np.linalg.norm(np.asarray(y, np.float64)[:ROWS] - exact) / size)
            for way, y in ways.items()
        }
    return found


def to_markdown(speeds: list[Speed], wrong: Errors, where: dict[str, str]) -> str:
    """The page that goes into docs/results."""
    names = list(dict.fromkeys(name for row in speeds for name in row.ratios))
    lines = [
        "",
        "| linear | XLA bf16, ms | TFLOP/s | " + " | ".join(names) + " | least, ms |",
        "|---|" + "---|" * (len(names) + 3),
    ]
    for row in speeds:
        ratios = (f"{row.ratios[name]:.2f}x" if name in row.ratios else "" for name in names)
        lines.append(
            f"| {row.linear} | {row.bf16_ms:.3f} | {row.bf16_tflops:.0f} | {' | '.join(ratios)} | "
            f"{row.least_ms:.3f} |"
        )
    for size, cases in wrong.items():
        ways = list(next(iter(cases.values())))
        lines += ["", f"## Relative error, {size}", "", "| operands | " + " | ".join(ways) + " |"]
        lines.append("|---|" + "---|" * len(ways))
        for case, of in cases.items():
            lines.append(f"| {case} | " + " | ".join(f"{of[way]:.1e}" for way in ways) + " |")
    return results.page(
        "The 4-bit matmul",
        where,
        f"`{FORMAT}` weights, fp8 rows, bf16 results. Ratios: times faster than XLA's bf16 "
        "product; XLA's and PyTorch's fp8 products read 8-bit weights. With bf16 rows: quantised "
        "first, the choice of dialects included; rows kept in bf16: only weights are quantised. "
        f"Up to {SHORT} tokens: {SHORT_PRODUCTS} products a call, {SHORT_WEIGHTS} weights in turn, "
        "dispatched while other work runs. "
        "Least: the bytes that must move, at the speed of a copy. " + results.OF_EARLIER_RUNS,
        *lines,
    )


def main() -> None:
    """Measure and write JSON and Markdown."""
    parser = results.parser(__doc__)
    parser.add_argument(
        "--only",
        default="",
        help="workloads whose name holds this; of others, the folder's page keeps what was found "
        "with the same device and versions",
    )
    args = parser.parse_args()
    if not device.current().is_hopper:
        parser.error(f"needs a Hopper GPU, not {device.current().kind}")
    bandwidth = copy_bandwidth()
    where = results.environment("bench_matmul", copy=f"{bandwidth / 1e12:.2f} TB/s")
    before = results.kept(args.out, STEM, where)
    speeds = {row["linear"]: Speed(**row) for row in before.get("speed", ())}
    wrong: Errors = before.get("error", {})

    def keep() -> None:
        """What was measured so far."""
        rows = [speeds[name] for name in map(str, LINEARS) if name in speeds]
        document = {
            "environment": where,
            "speed": [dataclasses.asdict(row) for row in rows],
            "error": wrong,
        }
        if args.out:
            results.write(args.out, STEM, to_markdown(rows, wrong, where), document)

    for linear in LINEARS:
        if args.only in str(linear):
            speeds[str(linear)] = speed(linear, bandwidth)
            print(json.dumps(dataclasses.asdict(speeds[str(linear)])), flush=True)
            keep()
    for m, k, n in ERROR_SIZES:
        wrong[f"M = {m}, K = {k}, N = {n}"] = errors(m, k, n)
        keep()
    print(to_markdown(list(speeds.values()), wrong, where))


if __name__ == "__main__":
    main()
