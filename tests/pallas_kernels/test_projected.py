import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Projected, joined, prepare_heads, prepared, quantized_attention
from pallas_kernels.projected import each_head_normed

B, S, H, D = 2, 5, 3, 64


@pytest.fixture
def x(rng):
    """With a norm over each head alone, and angles."""
    angles = 6 * rng.rand(S, D // 2)
    return Projected(
        x=jnp.asarray(3 * rng.randn(B, S, H * D), jnp.float32),
        gain=jnp.asarray(1 + rng.rand(D), jnp.float32),
        rope=(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)),
        heads=H,
        eps=1e-3,
    )


def test_a_norm_may_be_over_each_head_alone(x):
    found = prepared(dataclasses.replace(x, rope=None))
    heads = np.asarray(x.x, np.float64).reshape(B, S, H, D)
    rms = np.sqrt((heads**2).mean(axis=-1, keepdims=True) + x.eps)
    np.testing.assert_allclose(found, heads / rms * np.asarray(x.gain), rtol=1e-5)


def test_one_head_is_all_heads(x):
    one = dataclasses.replace(x, x=x.x[..., :D], heads=1)
    np.testing.assert_array_equal(prepared(one), prepared(x)[:, :, :1])


def test_what_is_normed_is_not_normed_again(x):
    once = each_head_normed(x)
    assert once.gain is None and each_head_normed(once) is once
    np.testing.assert_array_equal(prepared(once), prepared(x))
    over_all = dataclasses.replace(x, gain=jnp.tile(x.gain, H))
    assert each_head_normed(over_all) is over_all


def test_parts_join_to_one_sequence(x, rng):
    """Each with its own norm; a part without angles is not turned."""
    other = Projected(
        x=jnp.asarray(rng.randn(B, 4, H * D), jnp.float32),
        gain=jnp.asarray(rng.rand(H * D), jnp.float32),
        heads=H,
        eps=1e-6,
    )
    for parts in ((x, other), (other, x)):
        expected = jnp.concatenate([prepared(part) for part in parts], axis=1)
        np.testing.assert_allclose(prepared(joined(*parts)), expected, rtol=1e-6, atol=1e-6)


def test_attention_norms_each_head_first(x, rng):
    x = dataclasses.replace(x, x=x.x.astype(jnp.bfloat16))
    v = jnp.asarray(rng.randn(B, S, H, D), jnp.bfloat16)
    y = quantized_attention(x, x, v, implementation="plain")
    normed = each_head_normed(x)
    assert normed.dtype == jnp.bfloat16
    expected = quantized_attention(normed, normed, v, implementation="plain")
    np.testing.assert_array_equal(y, expected)


def test_heads_are_prepared_without_a_kernel(x):
    np.testing.assert_array_equal(prepare_heads(x), prepared(x))
    with pytest.raises(ValueError, match="mosaic_gpu cannot do this"):
        prepare_heads(x, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="expected one of mosaic_gpu, reference, got 'jnp'"):
        prepare_heads(x, implementation="jnp")
