"""Attention of 4-bit and fp8 operands on a Hopper GPU: speed and error against cuDNN in bf16.

    python -m scripts.bench_attention --out docs/results

All of a length and a number of heads is timed in one process, in turn. Errors are relative to
float64 on the same rounded operands, of some queries of the first and the last head. Set
XLA_PYTHON_CLIENT_PREALLOCATE=false where PyTorch shall be timed too.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.common.attention import attention
from pallas_kernels import device, quantized_attention
from pallas_kernels.mosaic_gpu.attention import AttentionConfig, attend
from pallas_kernels.mosaic_gpu.attention_operands import Rounded, arranged, rounded
from scripts import _results as results
from scripts._timing import SETTLED, side_by_side_seconds

FORMAT = "sdq32:16"
SIZES = ((32760, 40), (75600, 40), (32760, 12))  # tokens, heads
WIDTH = 128
KERNELS: dict[str, tuple[AttentionConfig, Any]] = {
    "two that share": (AttentionConfig(), jnp.bfloat16),
    "one block": (AttentionConfig(cluster=1), jnp.bfloat16),
    "three stages": (AttentionConfig(stages=3), jnp.bfloat16),
    "float32 results": (AttentionConfig(), jnp.float32),
}
TEXT = (
    "One video; medians. Kernel: of operands that are rounded already; from bf16: rounding "
    "included, 4 bits in plain jnp. Error: relative, against float64 on the same rounded operands."
)
ROWS = 64  # queries of a head that float64 computes


def operands(tokens: int, heads: int) -> list[jax.Array]:
    """Random bf16 `[1, tokens, heads, WIDTH]`: scores spread by 1.5, values with a mean."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (1, tokens, heads, WIDTH)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:3])
    mean = jax.random.normal(keys[3], (1, 1, *shape[2:]), jnp.bfloat16)
    return [1.5 * q, k, v + 0.5 * mean]


def exact(parts: tuple[Rounded, ...], rows: np.ndarray, heads: list[int]) -> np.ndarray:
    """float64 of rounded operands, `[heads, rows, WIDTH]`."""

    def of_heads(part: Rounded) -> np.ndarray:
        return np.asarray(
            (part.values.astype(jnp.float32) * part.scales)[0, np.array(heads)], float
        )

    q, k, v = map(of_heads, parts)
    scores = np.einsum("hsd,hld->hsl", q[:, rows], k) * WIDTH**-0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hsl,hdl->hsd", weights, v)


def numbers(parts: tuple[Rounded, ...]) -> list[jax.Array]:
    """What the rounded operands stand for, bf16 `[1, tokens, heads, WIDTH]`."""
    q, k, v = ((x.values.astype(jnp.float32) * x.scales).astype(jnp.bfloat16) for x in parts)
    return [jnp.swapaxes(x, 1, 2) for x in (q, k, jnp.swapaxes(v, 2, 3))]


def measure(tokens: int, heads: int) -> dict[str, dict[str, float]]:
    """Milliseconds, times faster than cuDNN and error, by name."""
    x = operands(tokens, heads)
    parts = jax.jit(functools.partial(rounded, fmt_qk=FORMAT, fmt_pv=FORMAT))(*x)
    everything = jnp.ones((1, tokens), bool)
    laid_out = jax.jit(functools.partial(arranged, scale=WIDTH**-0.5))(*parts, everything)
    rows = np.sort(np.random.RandomState(0).choice(tokens, ROWS, replace=False))
    ends = [0, heads - 1]
    expected = exact(parts, rows, ends)

    def relative(got: np.ndarray) -> float:
        return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))

    def error(y: jax.Array) -> float:
        return relative(np.asarray(y[0, rows][:, np.array(ends)], np.float64).swapaxes(0, 1))

    cudnn = jax.jit(functools.partial(attention, implementation="cudnn"))
    timed: dict[str, Callable[[], Any]] = {"cuDNN bf16": functools.partial(cudnn, *x)}
    errors = {"cuDNN bf16": error(cudnn(*numbers(parts)))}
    for name, (config, out_dtype) in KERNELS.items():
        kernel = functools.partial(
            attend,
            heads=heads,
            config=config,
            out_dtype=out_dtype,
            num_sms=device.current().cores,
        )
        name = f"kernel, {name}"
        timed[name] = functools.partial(jax.jit(kernel), *laid_out)
        errors[name] = error(timed[name]())
    for name, formats in (("4 bits", (FORMAT, FORMAT)), ("fp8", (None, None))):
        whole = functools.partial(quantized_attention, implementation="mosaic_gpu")
        whole = functools.partial(whole, fmt_qk=formats[0], fmt_pv=formats[1])
        timed[f"from bf16, {name}"] = functools.partial(jax.jit(whole), *x)
    for name, other in OTHERS.items():
        try:
            run = other(tokens, heads)
            jax.block_until_ready(run())
            timed[name] = run
        except Exception as reason:  # another library's; say so and go on
            print(f"{name}: {type(reason).__name__}: {str(reason)[:300]}", flush=True)
    seconds = side_by_side_seconds(timed, at_least=SETTLED)
    base = seconds["cuDNN bf16"]
    found = {
        name: {"ms": 1e3 * one, "times": base / one}
        | ({"error": errors[name]} if name in errors else {})
        for name, one in seconds.items()
    }
    rounded_once = np.asarray(expected.astype(jnp.bfloat16), np.float64)
    return found | {"float64, rounded to bf16": {"error": relative(rounded_once)}}


def pallas_attention(tokens: int, heads: int) -> Callable[[], Any]:
    """jax's own Pallas kernel for Hopper, f16; whole tiles only."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2)
    filled = -(-tokens // 128) * 128
    run = jax.jit(functools.partial(attention_mgpu.attention, config=config))
    return functools.partial(run, *(x.astype(jnp.float16) for x in operands(filled, heads)))


def torch_attention(tokens: int, heads: int) -> Callable[[], Any]:
    """PyTorch's flash attention, bf16."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x = [torch.randn(1, heads, tokens, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in "qkv"]

    def attend() -> types.SimpleNamespace:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(*x)
        return types.SimpleNamespace(block_until_ready=torch.cuda.synchronize)

    return attend


OTHERS: dict[str, Callable[[int, int], Callable[[], Any]]] = {
    "jax's Pallas kernel, f16": pallas_attention,
    "PyTorch's flash attention, bf16": torch_attention,
}


def to_lines(tokens: int, heads: int, found: dict[str, dict[str, float]]) -> list[str]:
    """A table for a size."""
    operations = 4 * tokens**2 * WIDTH * heads
    lines = ["", f"## {tokens} tokens, {heads} heads of {WIDTH}", ""]
    lines += ["| | ms | TFLOP/s | against cuDNN | error |", "|---|---|---|---|---|"]
    for name, row in found.items():
        cells = [name, "", "", "", f"{row['error']:.2e}" if "error" in row else ""]
        if "ms" in row:
            rate = operations / row["ms"] / 1e9
            cells[1:4] = f"{row['ms']:.2f}", f"{rate:.0f}", f"{row['times']:.2f}x"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure and write JSON and Markdown."""
    parser = results.parser(__doc__)
    args = parser.parse_args()
    if reason := device.without_mosaic_gpu():
        parser.error(reason)
    where = results.environment("bench_attention", formats=FORMAT)
    found, lines = {}, []
    for tokens, heads in SIZES:
        found[f"{tokens} x {heads}"] = measure(tokens, heads)
        lines += to_lines(tokens, heads, found[f"{tokens} x {heads}"])
        print("\n".join(lines[-20:]), flush=True)
        if args.out:  # after each, so that what was measured stays
            page = results.page("Attention on fp8 tensor cores", where, TEXT, *lines)
            document = {"environment": where, "results": found}
            results.write(args.out, "attention_hopper", page, document)


if __name__ == "__main__":
    main()
