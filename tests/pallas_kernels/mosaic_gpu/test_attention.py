"""The Hopper attention where there is no GPU: interpreted on a few keys, compiled for many."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu.attention import AttentionConfig, heuristic
from pallas_kernels.mosaic_gpu.attention_operands import arranged, rounded
from pallas_kernels.mosaic_gpu.config import SHARED_MEMORY
from tests.pallas_kernels import deviceless
from tests.pallas_kernels.test_attention import exact, relative

H = 2
ALONE = AttentionConfig(stages=2, cluster=1)


def operands(rng, queries, keys, width=128):
    q = rng.randn(1, queries, H, width)
    return [jnp.asarray(x, jnp.float32) for x in (q, *rng.randn(2, 1, keys, H, width))]


def on_one_block(parts, keys):
    """All keys count; interpreted."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.mosaic_gpu.attention import attend

    return attend(
        *arranged(*parts, jnp.ones((1, keys), bool), 128**-0.5),
        heads=H,
        config=ALONE,
        out_dtype=jnp.float32,
        num_sms=1,
        interpret=plgpu.InterpretGPUParams(),
    )


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax 0.11")
@pytest.mark.parametrize(
    "queries, keys, counted, width, config",
    [
        (128, 256, 256, 128, ALONE),
        # No size a multiple of its tile.
        (201, 300, 300, 128, dataclasses.replace(ALONE, stages=3)),
        (70, 500, 320, 128, ALONE),  # masked keys
        (300, 384, 384, 128, AttentionConfig(stages=2)),
        (128, 256, 256, 64, ALONE),
    ],
)
def test_interpreted(rng, capfd, queries, keys, counted, width, config):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.mosaic_gpu.attention import attend

    mask = jnp.arange(keys)[None] < counted
    parts = rounded(*operands(rng, queries, keys, width), None, "sdq32:16")
    y = attend(
        *arranged(*parts, mask, width**-0.5),
        heads=H,
        config=config,
        out_dtype=jnp.float32,
        num_sms=2,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    y = y[:, :queries]
    # Each weight is some 3 % off; what is left of a mean of some hundred values is not much larger.
    assert relative(y, exact(*parts, mask, width**-0.5)) < 0.05
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax 0.11")
@pytest.mark.parametrize("block, stages", [(128, 2), (256, 2), (384, 3)])
def test_interpreted_block_by_block(rng, capfd, block, stages):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.mosaic_gpu.attention import attend

    parts = rounded(*operands(rng, 640, 640, 64), None, None)
    y = attend(
        *arranged(*parts, jnp.ones((1, 640), bool), 64**-0.5),
        heads=H,
        block=block,
        config=dataclasses.replace(heuristic(block), stages=stages),
        out_dtype=jnp.float32,
        num_sms=2,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    assert relative(y, exact(*parts, scale=64**-0.5, causal=block)) < 0.05
    assert "RACE" not in "".join(capfd.readouterr())


def test_blocks_are_whole_tiles():
    from pallas_kernels.mosaic_gpu.attention import attend

    x = jnp.zeros((2, 256, 64), jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match="block: expected a multiple of 256, got 128"):
        attend(
            x,
            *[x] * 4,
            heads=2,
            block=128,
            config=AttentionConfig(),
            out_dtype=jnp.float32,
            num_sms=2,
        )


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax 0.11")
def test_a_key_far_above_all_others_is_all_there_is(rng):
    """And the tiles after it, far below, are forgotten, not flushed into it."""
    q, k, v = operands(rng, 64, 384)
    k = k.at[:, 7].set(100 * q[:, 0])
    parts = rounded(q[:, :1].repeat(64, axis=1), k, v, None, None)
    y = on_one_block(parts, 384)
    values = np.asarray(parts[2].values, np.float64) * np.asarray(parts[2].scales)
    expected = np.broadcast_to(values[:, None, :, :, 7], y.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax 0.11")
@pytest.mark.parametrize("keys", [128, 256])
def test_a_nan_is_not_swallowed(rng, keys):
    """Of a query; of a key in the last tile, which may be the only one."""
    q, k, v = operands(rng, 64, keys)
    parts = rounded(q.at[0, 9, 0, 5].set(jnp.nan), k.at[0, -1, 1, 3].set(jnp.nan), v, None, None)
    y = on_one_block(parts, keys)
    bad = np.zeros(y.shape, bool)
    bad[0, 9, 0] = bad[0, :, 1] = True
    np.testing.assert_array_equal(np.isnan(y), bad)


@pytest.mark.skipif(not deviceless.is_possible(), reason="needs the extra `aot`")
def test_compiled_for_a_hopper_gpu(tmp_path):
    shape = {"queries": 4096, "keys": 4096}
    cases = {
        "clusters": shape,
        "one block": shape | {"cluster": 1},
        "narrow": shape | {"width": 64},
        "text": {"queries": 1008, "keys": 512},
        "causal": shape | {"block": 1024},
        "float32": shape | {"out_dtype": "float32"},
    }
    found = deviceless.compiled(tmp_path, list(cases.values()), "attention")
    for name, report in zip(cases, found, strict=True):
        assert report.spilled <= 64, name  # counters of the outer loops, not in the inner one
        assert not report.serialized, name
        assert report.shared_memory <= SHARED_MEMORY, name
        if report.instructions:
            assert {"QGMMA", "PRMT", "UTMALDG", "UTMASTG"} <= report.instructions, name
