"""The Hopper kernel where there is no GPU: interpreted on small operands, compiled on large."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from pallas_kernels.mosaic_gpu.config import (
    BASES,
    BF16,
    SHARED_MEMORY,
    TILE_K,
    Config,
    FewConfig,
    heuristic,
)
from pallas_kernels.mosaic_gpu.operands import TILE_N, tile_weight
from pallas_kernels.rows import fp8_rows, interleave
from tests.pallas_kernels import deviceless

SMALL = Config(tile_m=64, stages=2)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax 0.11")
@pytest.mark.parametrize(
    "m, n, k, fmt, config",
    [
        (128, 256, 256, "sdq32:16", SMALL),
        (128, 256, 256, "sdq32:32", Config(tile_m=64, stages=3)),
        (100, 200, 288, "sdq32:16", SMALL),  # no size a multiple of its tile
        (40, 64, 32, "dialectfp4:32", Config(tile_m=64, stages=2, warpgroups=1)),  # less than one
        (40, 64, 96, "sdq32:32", Config(tile_m=64, stages=5, warpgroups=1)),  # slots left empty
        (70, 72, 640, "sdq32:16", Config(tile_m=64, stages=2, promote=2)),  # 2 + 2 + 1 tiles of K
        (136, 128, 640, "sdq32:16", Config(tile_m=96, stages=3, promote=1)),
        (150, 128, 128, "sdq32:16", Config(tile_m=72, stages=2)),  # pieces of 64 and 8 rows
        (128, 384, 256, "e2m1:16", Config(tile_m=128, stages=3, promote=1, warpgroups=3)),
        (100, 200, 288, "sdq32:16", Config(tile_m=64, stages=2, x_bytes=2)),
        (40, 64, 256, "sdq32:32", Config(tile_m=48, stages=3, warpgroups=1, x_bytes=2)),
        (16, 200, 640, "sdq32:16", FewConfig(rows=16, warpgroups=2, stages=4)),  # 3 slots for 2
        (5, 64, 32, "dialectfp4:32", FewConfig(rows=8, warpgroups=3, stages=3)),  # 1 slot for 3
        (1, 200, 2048, "sdq32:16", FewConfig(rows=8, warpgroups=3, stages=6)),  # read as 16 rows
        (1, 72, 1024, "sdq32:32", FewConfig(rows=8, warpgroups=1, stages=2, x_bytes=2)),
        (1, 64, 640, "sdq32:16", FewConfig(rows=8, warpgroups=2, stages=4)),
        (40, 320, 384, "sdq32:32", FewConfig(rows=40, warpgroups=1, stages=2)),
        (8, 200, 1152, "sdq32:16", FewConfig(rows=8, warpgroups=3, stages=3)),  # 5 slots for 3
        (24, 128, 1664, "sdq32:16", FewConfig(rows=24, warpgroups=3, stages=6, x_bytes=2)),
    ],
)
def test_interpreted(rng, capfd, m, n, k, fmt, config):
    if isinstance(config, FewConfig) and jax.__version_info__ < (0, 12):
        pytest.skip(
            "the interpreter before jax 0.12 wants somebody to wait for the last free slots"
        )
    y, expected = interpreted(rng, m, n, k, fmt, config)
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert error < k**0.5 * 2**-24  # float32 sums of k exact products
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax 0.11")
@pytest.mark.parametrize(
    "m, n, k, config",
    [
        (200, 200, 288, SMALL),  # a piece a tile
        (100, 320, 256, Config(tile_m=136, stages=2, promote=1)),  # 64, 64 and 8 rows
        (600, 128, 128, Config(tile_m=256, stages=4)),  # room for three pieces, four in all
    ],
)
def test_interpreted_onto(rng, capfd, m, n, k, config):
    onto, gate = jnp.asarray(rng.randn(m, n), jnp.bfloat16), rng.randn(n)
    y, expected = interpreted(rng, m, n, k, "sdq32:16", config, onto, gate)
    in_float32 = k**0.5 * 2**-24 * abs(gate * expected).max()
    expected = np.asarray(onto, np.float64) + gate * expected
    assert y.dtype == onto.dtype
    assert (abs(y - expected) <= 2**-8 * abs(expected) + in_float32).all()  # rounded once
    assert "RACE" not in "".join(capfd.readouterr())


def interpreted(rng, m, n, k, fmt, config, onto=None, gate=None):
    """The kernel's result of random numbers, float32 or as `onto`; x w^T + bias in float64."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.mosaic_gpu.matmul import matmul
    from pallas_kernels.mosaic_gpu.matmul_few import matmul_few

    numbers = jnp.asarray(rng.randn(m, k) * np.exp2(rng.randint(-6, 6, (m, 1))), jnp.bfloat16)
    w = sdq.quantize(jnp.asarray(rng.randn(n, k), jnp.float32), fmt)
    bias = jnp.asarray(rng.randn(n), jnp.float32)
    tiled = tile_weight(w)
    if config.x_bytes == 2:
        x, values, exponents = numbers, interleave(numbers, run=2), None
    else:
        q = sdq.quantize(numbers, fmt)
        rows = fp8_rows(q)
        x, values = sdq.dequantize(q, jnp.float32), interleave(rows.values)
        exponents = rows.exponents[:, 0]
    fill = -n % TILE_N
    if onto is not None:
        gate = jnp.pad(jnp.asarray(gate, jnp.float32), (0, fill))
        added_to = jnp.pad(onto, ((0, 0), (0, fill))), gate
    y = (matmul_few if isinstance(config, FewConfig) else matmul)(
        jnp.pad(values, ((0, 0), (0, -k % TILE_K))),
        exponents,
        tiled,
        jnp.pad(bias, (0, fill)),
        **({} if onto is None else {"onto": added_to}),
        activation=lambda y: y,
        config=config,
        out_dtype=jnp.float32 if onto is None else onto.dtype,
        num_sms=2,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )[:, :n]
    expected = np.asarray(x, np.float64) @ np.asarray(sdq.dequantize(w), np.float64).T + np.asarray(
        bias, np.float64
    )
    return np.asarray(y), expected


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What the assembler says of each configuration, by its name."""
    shape = {"m": 4096, "n": 5120, "k": 5120}
    cases = {
        "fast": shape,
        "accurate": shape | {"mode": "accurate"},
        "accurate, in pairs": shape | {"m": 32760, "mode": "accurate"},
        "ragged": {"m": 1001, "n": 1001, "k": 1568, "format": "sdq32:32"},
        "gelu": shape | {"activation": "gelu"},
        "onto": shape | {"m": 32760, "onto": True},
        "accurate, onto": shape | {"mode": "accurate", "onto": True},
        "float32": shape | {"out_dtype": "float32"},
        "one row": {"m": 1, "n": 5120, "k": 5120},
        "one long row": {"m": 1, "n": 64, "k": 32768},  # the longest that is not filled up
        "one longer row": {"m": 1, "n": 64, "k": 33792},
        "few rows": {"m": 64, "n": 5120, "k": 5120},
        "few rows of float32": {"m": 64, "n": 200, "k": 800, "out_dtype": "float32"},
        "bf16": shape | {"mode": BF16},
        "few rows in bf16": shape | {"m": 64, "mode": BF16},
    }
    folder = tmp_path_factory.mktemp("dumps")
    return dict(zip(cases, deviceless.compiled(folder, list(cases.values())), strict=True))


@pytest.mark.skipif(not deviceless.is_possible(), reason="needs the extra `aot`")
def test_compiled_for_a_hopper_gpu(reports):
    for name, report in reports.items():
        # A few addresses, which are read once a tile.
        assert report.spilled <= (64 if name == "accurate, in pairs" else 0), name
        assert report.spills_between_products == 0, name
        assert not report.serialized, name
        assert report.shared_memory <= SHARED_MEMORY, name
        if report.instructions:
            product = "HGMMA" if "bf16" in name else "QGMMA"
            assert {product, "PRMT", "IDP", "UTMALDG"} <= report.instructions, name
            from_registers = not report.instructions.isdisjoint({"ST", "STG"})
            from_shared_memory = "UTMASTG" in report.instructions
            alone = name in ("one row", "one long row")
            assert (from_registers, from_shared_memory) == (alone, not alone), name


@pytest.mark.parametrize("size", [(16, 5), (21, 4), (3, 7), (1, 1), (8, 3)])
@pytest.mark.parametrize("width", [1, 4, 8])
def test_tiles_go_down_one_strip_and_up_the_next(size, width):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.mosaic_gpu.matmul import snake

    numbers = jnp.arange(size[0] * size[1])
    places = jax.vmap(lambda number: jnp.stack(snake(number, *size, width)))(numbers)
    assert len(set(map(tuple, places.tolist()))) == len(numbers)
    expected = jax.vmap(lambda number: jnp.stack(plgpu.planar_snake(number, size, 0, width)))
    np.testing.assert_array_equal(places, expected(numbers))


def test_bad_configurations_say_so():
    with pytest.raises(ValueError, match="width: expected a power of two, got 6"):
        Config(width=6)
    with pytest.raises(ValueError, match="tile_m: expected a multiple of 8 up to 256, got 100"):
        Config(tile_m=100)
    with pytest.raises(ValueError, match="tile_m: expected a multiple of 16 up to 256, got 184"):
        Config(tile_m=184, cluster=2)
    with pytest.raises(ValueError, match=r"stages: expected in \[2, 16\], got 1"):
        Config(stages=1)


def test_rows_of_another_width_are_refused():
    from pallas_kernels.mosaic_gpu.matmul import matmul

    with pytest.raises(ValueError, match="config: x_bytes is 2, but x is float8_e4m3fn"):
        matmul(
            jnp.zeros((8, 128), jnp.float8_e4m3fn),
            *[None] * 3,
            activation=None,
            config=heuristic(BF16, 8, 64),
            out_dtype=jnp.float32,
            num_sms=1,
        )


@pytest.mark.parametrize("mode", BASES)
@pytest.mark.parametrize("m", [1, 64, 100, 32760])
def test_the_heuristic_fits(mode, m):
    config = heuristic(mode, m, 5120, out_bytes=4)
    assert config.shared_memory(4) <= SHARED_MEMORY
    assert config.stages * config.x_bytes >= 3
    assert isinstance(config, FewConfig) == (m <= 64)
    assert (config.rows if m <= 64 else config.tile_m) < m + 64


@pytest.mark.parametrize("m, n, cluster", [(4096, 5120, 2), (4096, 128, 1), (65, 5120, 2)])
def test_only_blocks_with_a_partner_share_rows(m, n, cluster):
    assert heuristic("fast", m, n).cluster == cluster


@pytest.mark.parametrize(
    "mode, m, tile_m, cluster",
    [
        ("accurate", 32760, 192, 2),  # 171 x 20 pairs: 52 turns
        ("accurate", 4096, 184, 1),  # 23 x 40 blocks: 7 turns, as many as with 192 rows
        ("fast", 4096, 256, 2),  # 16 x 20 pairs: 5 turns
        ("fast", 512, 176, 2),  # 3 x 20 pairs: one turn
    ],
)
def test_the_last_turn_is_nearly_full(mode, m, tile_m, cluster):
    config = heuristic(mode, m, 5120, cores=132)
    assert (config.tile_m, config.cluster) == (tile_m, cluster)
