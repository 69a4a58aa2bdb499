import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.attention import attention
from models.common.full_path import FullPath
from pallas_kernels import quantized_attention

WAYS = [FullPath(), FullPath(rotate=False), FullPath(fmt_qk="sdq32:16", fmt_pv="sdq32:32")]


def operands(rng, length=100, keys=300, width=64):
    return [jnp.asarray(rng.randn(2, n, 3, width), jnp.bfloat16) for n in (length, keys, keys)]


@pytest.mark.parametrize("way, least", list(zip(WAYS, (25, 25, 16), strict=True)))
def test_it_is_attention_but_for_rounding(rng, way, least):
    q, k, v = operands(rng)
    y, exact = way(q, k, v), attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert y.shape == q.shape and y.dtype == q.dtype
    off = np.linalg.norm(y.astype(jnp.float32) - exact) / np.linalg.norm(exact)
    assert least < -20 * np.log10(off) < 32


def test_keys_after_the_length_do_not_count(rng):
    q, k, v = operands(rng)
    lengths = jnp.asarray([200, 300], jnp.int32)
    y = FullPath()(q, k.at[0, 200:].set(1e4), v.at[0, 200:].set(jnp.nan), lengths=lengths)
    expected = FullPath()(q[:1], k[:1, :200], v[:1, :200])
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (y[:1], expected)), atol=0.02)


def test_it_computes_what_the_kernel_does_in_one_program(rng):
    q, k, v = operands(rng)
    y = jax.jit(FullPath(rotate=False))(q, k, v)
    expected = quantized_attention(q, k, v, implementation="plain")
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (y, expected)), atol=0.02)


def test_an_unknown_format_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match="unknown format"):
        FullPath(fmt_qk="fp3")
