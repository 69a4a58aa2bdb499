import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common import attention as module
from models.common.attention import attention


def operands(rng, length, keys, dtype=jnp.float32):
    shape = lambda n: (2, n, 3, 8)  # noqa: E731
    return [jnp.asarray(rng.randn(*shape(n)), dtype) for n in (length, keys, keys)]


def in_float64(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("length, keys", [(7, 7), (33, 5), (1, 9)])
@pytest.mark.parametrize("at_once", [2**24, 2 * 3 * 9 * 4, 1], ids=["whole", "some", "one"])
def test_equals_float64(rng, monkeypatch, length, keys, at_once):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once)
    q, k, v = operands(rng, length, keys)
    np.testing.assert_allclose(attention(q, k, v), in_float64(q, k, v), atol=2e-6)


@pytest.mark.parametrize("at_once", [2**24, 2 * 3 * 9 * 4], ids=["whole", "some"])
def test_keys_after_the_length_do_not_count(rng, monkeypatch, at_once):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once)
    q, k, v = operands(rng, 33, 9)
    lengths = jnp.asarray([4, 9], jnp.int32)
    out = attention(q, k.at[0, 4:].set(100.0), v, lengths=lengths)
    for video, length in enumerate((4, 9)):
        expected = in_float64(q[video, None], k[video, None, :length], v[video, None, :length])
        np.testing.assert_allclose(out[video, None], expected, atol=2e-6)


def test_bfloat16_is_summed_in_float32(rng):
    q, k, v = operands(rng, 16, 4096, jnp.bfloat16)
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, float), in_float64(q, k, v), atol=2e-3)


def test_a_long_sequence_holds_no_square_matrix():
    length = 32_768
    x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    text = jax.jit(attention).lower(x, x, x).as_text()
    assert f"{length}x{length}" not in text
    memory = jax.jit(attention).lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * module.SCORES_AT_ONCE * 4


def test_gradient_of_chunks_equals_that_of_the_whole(rng, monkeypatch):
    q, k, v = operands(rng, 9, 9)

    def gradient():
        return jax.grad(lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v))), (0, 1, 2))(q, k, v)

    whole = gradient()
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 100)
    for chunked, expected in zip(gradient(), whole, strict=True):
        np.testing.assert_allclose(chunked, expected, atol=1e-6)


def test_unknown_implementation_is_refused(rng):
    with pytest.raises(ValueError, match="implementation: expected one of cudnn, chunked"):
        attention(*operands(rng, 4, 4), implementation="flash")
