"""Compile kernels for an H100 where there is none, and read what the assembler says of them.

    python -m tests.pallas_kernels.deviceless FOLDER matmul '[{"m": 4096, "n": 5120, "k": 5120}]'

Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt (the extra `aot`). A process of its own,
because both the platforms and the folder for dumps are read from the environment.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

CONFIG = pathlib.Path(__file__).parent / "h100.txtpb"


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What became of a kernel.

    Attributes:
      spilled: bytes stored because registers ran out.
      spills_between_products: accesses of such bytes from the first tensor core instruction to the
        last; 0 without nvdisasm.
      serialized: whether the assembler made tensor core instructions wait for each other.
      shared_memory: bytes.
      instructions: opcodes of the machine code; empty without nvdisasm.
    """

    spilled: int
    spills_between_products: int
    serialized: bool
    shared_memory: int
    instructions: frozenset[str]


def is_possible() -> bool:
    """Whether the compiler is installed."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def compiled(
    folder: pathlib.Path, cases: Sequence[dict[str, Any]], kernel: str = "matmul"
) -> list[Report]:
    """Compile a kernel for each case: arguments of its function in COMPILERS."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_ROOT": _cuda_root()}
    command = [sys.executable, "-m", __name__, str(folder), kernel, json.dumps(list(cases))]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [_report(folder / str(number)) for number in range(len(cases))]


def _cuda_root() -> str:
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [path for place in places for path in pathlib.Path(place).glob("*/bin/nvdisasm")]
    return str(found[0].parents[1]) if found else ""


def _report(folder: pathlib.Path) -> Report:
    log, resources = (next(folder.glob(f"*{end}")).read_text() for end in (".ptxas", ".txt"))
    listing = "".join(path.read_text() for path in folder.glob("*.sass_ctrl"))
    opcodes = re.findall(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]+)", listing)
    products = [i for i, opcode in enumerate(opcodes) if opcode.endswith("GMMA")]
    between = opcodes[products[0] : products[-1]] if products else []
    return Report(
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill stores", log))),
        spills_between_products=sum(opcode in ("LDL", "STL") for opcode in between),
        serialized="serialized" in log,
        shared_memory=int(re.findall(r"smem_scratch_bytes=(\d+)", resources)[0]),
        instructions=frozenset(opcodes),
    )


def compile_matmul(
    m: int,
    n: int,
    k: int,
    format: str = "sdq32:16",
    activation: str | None = None,
    out_dtype: str = "bfloat16",
    mode: str = "fast",
    onto: bool = False,
    **changes: int,
) -> None:
    """One case, for an H100; mode BF16 has bf16 rows, `changes` are of the heuristic's Config."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import sdq
    from pallas_kernels import Onto, quantized_matmul
    from pallas_kernels.mosaic_gpu.config import BF16, fitted, heuristic
    from pallas_kernels.mosaic_gpu.operands import tile_weight
    from pallas_kernels.rows import Fp8Rows

    q = jax.eval_shape(lambda w: sdq.quantize(w, format), jax.ShapeDtypeStruct((n, k), jnp.float32))
    rows = Fp8Rows(
        values=jax.ShapeDtypeStruct((m, k), jnp.float8_e4m3fn),
        exponents=jax.ShapeDtypeStruct((m, 1), jnp.int8),
        dtype=np.dtype(jnp.bfloat16),
        interleaved=True,
    )
    shapes = (
        jax.ShapeDtypeStruct((m, k), jnp.bfloat16) if mode == BF16 else rows,
        jax.eval_shape(tile_weight, q),
        jax.ShapeDtypeStruct((n,), jnp.float32),
        Onto(
            x=jax.ShapeDtypeStruct((m, n), out_dtype),
            gate=jax.ShapeDtypeStruct((1, n), jnp.float32),
        )
        if onto
        else None,
    )

    out_bytes = np.dtype(out_dtype).itemsize
    config = heuristic(mode, m, n, out_bytes)
    if changes:
        config = fitted(dataclasses.replace(config, **changes), out_bytes)

    def product(x: Any, w: Any, bias: Any, onto: Any) -> jax.Array:
        return quantized_matmul(
            x,
            w,
            bias=bias,
            activation=activation,
            out_dtype=out_dtype,
            onto=onto,
            implementation="mosaic_gpu",
            config=config,
        )

    _compile(product, *shapes)


def compile_quantizer(
    m: int,
    k: int,
    format: str = "sdq32:16",
    books: int = 0,
    residuals: int = 0,
    batch: int = 0,
    metadata: bool = True,
    activation: str | None = None,
    more: int = 0,
    **changes: Any,
) -> None:
    """One case, for an H100; `changes` are of the default Config.

    Args:
      m, k: of x.
      format: of the result.
      books: sub-formatbooks of a group.
      residuals: how many rows.
      batch: of the norm in front; 0 for none.
      metadata: whether it is wanted.
      activation: in front.
      more: channels in an array of their own.
      changes: of the default Config.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels import device
    from pallas_kernels.mosaic_gpu.quantizer import Norm, SubFormatbooks, quantize
    from pallas_kernels.mosaic_gpu.quantizer_task import default_config
    from sdq import formats

    fmt = formats.parse(format)
    assert fmt.block is not None
    config = default_config(k, fmt.block, norm=batch > 0)
    shape = jax.ShapeDtypeStruct
    optional: dict[str, Any] = {}
    if books:
        group = shape((m,), jnp.int32)
        optional["sub_formatbooks"] = SubFormatbooks(shape((65, books, 8), jnp.uint8), group)
    if residuals:
        optional["residual_of"] = shape((residuals,), jnp.int32)
    if more:
        optional["more"] = shape((m, more), jnp.bfloat16)
    gains = [shape((batch, k), jnp.float32)] * 2 if batch else []

    def quantised(x: Any, optional: dict[str, Any], gains: list[Any]) -> Any:
        return quantize(
            x,
            fmt,
            **optional,
            norm=Norm(*gains, eps=1e-6) if gains else None,
            activation=activation,
            metadata=metadata,
            config=dataclasses.replace(config, **changes),
            num_sms=device.current().cores,
        )

    _compile(quantised, shape((m, k - more), jnp.bfloat16), optional, gains)


def compile_attention(
    queries: int,
    keys: int,
    width: int = 128,
    block: int | None = None,
    out_dtype: str = "bfloat16",
    **changes: int,
) -> None:
    """One case, for an H100: 2 videos of 4 heads; `changes` are of the default config."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import device
    from pallas_kernels.mosaic_gpu.attention import AttentionConfig, attend
    from pallas_kernels.mosaic_gpu.attention_operands import KEYS, ONES, Operands

    shape, e4m3 = jax.ShapeDtypeStruct, jnp.float8_e4m3fn
    filled = -(-keys // KEYS) * KEYS
    operands = Operands(
        q=shape((8, queries, width), e4m3),
        slope=shape((8, queries), jnp.float32),
        k=shape((8, filled, width), e4m3),
        v=shape((8, width + ONES, filled), e4m3),
        v_scale=shape((8, width), jnp.float32),
    )

    def attended(*operands: Any) -> Any:
        return attend(
            *operands,
            heads=4,
            block=block,
            config=AttentionConfig(**changes),
            out_dtype=out_dtype,
            num_sms=device.current().cores,
        )

    _compile(attended, *operands)


def compile_heads(what: str, heads: int, width: int, videos: int = 1, norm: bool = True) -> None:
    """Queries or keys of 4099 tokens, turned and rotated; or in bf16, turned; or values."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import Projected, device
    from pallas_kernels.mosaic_gpu.heads import keys, prepared, queries, values

    def made(x: Any, gain: Any, rope: Any, center: Any) -> Any:
        sms = device.current().cores
        if what == "values":
            return values(Projected(x=x, heads=heads), num_sms=sms)
        of = Projected(x=x, heads=heads, gain=gain if norm else None, rope=rope, eps=1e-6)
        if what == "queries":
            return queries(of, rotate=True, num_sms=sms)
        if what == "prepared":
            return prepared(of, num_sms=sms)
        return keys(of, rotate=True, center=center, num_sms=sms)

    angles = jax.ShapeDtypeStruct((4099, width // 2), jnp.float32)
    _compile(
        made,
        jax.ShapeDtypeStruct((videos, 4099, heads * width), jnp.bfloat16),
        jax.ShapeDtypeStruct((heads * width,), jnp.float32),
        (angles, angles),
        jax.ShapeDtypeStruct((videos, heads, width), jnp.float32),
    )


COMPILERS = {
    "matmul": compile_matmul,
    "quantizer": compile_quantizer,
    "heads": compile_heads,
    "attention": compile_attention,
}


def _compile(function: Callable[..., Any], *shapes: Any) -> None:
    import jax
    import numpy as np
    from jax.experimental import topologies

    device = topologies.get_topology_desc(
        platform="cuda", target_config=CONFIG.read_text(), topology="1x1x1"
    ).devices
    mesh = jax.sharding.Mesh(np.array(device), ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda _: replicated, shapes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(function, in_shardings=shardings).lower(*shapes).compile()


def main(folder: str, kernel: str, cases: str) -> None:
    """Compile every case with a folder of its own for the dumps."""
    for number, case in enumerate(json.loads(cases)):
        place = pathlib.Path(folder) / str(number)
        place.mkdir(parents=True)
        os.environ["MOSAIC_GPU_DUMP_TO"] = str(place)
        COMPILERS[kernel](**case)


if __name__ == "__main__":
    main(*sys.argv[1:])
