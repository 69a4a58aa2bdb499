import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdq import saliency


def qk(batch=2, tokens=48, heads=3, width=8, keys=None):
    key_q, key_k = jax.random.split(jax.random.key(0))
    return (
        jax.random.normal(key_q, (batch, tokens, heads, width)),
        jax.random.normal(key_k, (batch, keys or tokens, heads, width)),
    )


def weights(q, k):
    """All attention weights in float64, `[B, heads, queries, keys]`."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("stride", [1, 5])
def test_attention_received_is_the_column_sums(stride):
    q, k = qk()
    expected = weights(q[:, ::stride], k).sum(axis=(1, 2))
    expected /= expected.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        saliency.attention_received(q, k, stride=stride), expected, rtol=1e-5
    )


def test_distinct_attention_is_the_distance_from_the_mean_token():
    q, k = qk(keys=7)
    away = weights(q, k)
    away = np.abs(away - away.mean(axis=2, keepdims=True)).sum(axis=(1, 3))
    expected = away / away.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(saliency.distinct_attention(q, k), expected, rtol=1e-5)


def test_tokens_that_look_at_the_same_words_are_alike():
    q, k = qk(keys=7)
    tokens = jnp.array([[3, 30], [0, 47]], jnp.int32)
    away = weights(q, k)
    away = np.moveaxis(away - away.mean(axis=2, keepdims=True), 1, 2).reshape(2, 48, -1)
    away /= np.linalg.norm(away, axis=-1, keepdims=True)
    expected = np.stack([away[b, tokens[b]] @ away[b].T for b in range(2)])
    got = saliency.text_similarity(q, k, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(got)[0, 0, 3], 1.0, rtol=1e-5)


def test_shared_attention_is_the_mean_of_both_directions():
    q, k = qk()
    tokens = jnp.array([[5, 20, 40], [0, 17, 47]], jnp.int32)
    got = saliency.shared_attention(q, k, tokens)
    for b, numbers in enumerate(np.asarray(tokens)):
        given = weights(q[b : b + 1], k[b : b + 1]).mean(axis=1)[0, numbers]
        returned = weights(q[b : b + 1], k[b : b + 1, numbers]).mean(axis=1)[0]
        np.testing.assert_allclose(got[b], (given * 48 + returned.T * 3) / 2, rtol=1e-4)


def test_tokens_that_look_at_their_word_are_distinct():
    q, k = qk(batch=1, tokens=40, heads=1, keys=4)
    q = 0.1 * q.at[0, 11].set(100 * k[0, 2])
    assert int(saliency.distinct_attention(q, k).argmax()) == 11


def test_equal_tokens_are_equally_salient():
    q, k = qk()
    same = jnp.broadcast_to(k[:, :1], k.shape)
    np.testing.assert_allclose(saliency.attention_received(q, same), 1.0, rtol=1e-5)
    alike = jnp.broadcast_to(q[:, :1], q.shape)
    assert np.isfinite(saliency.distinct_attention(alike, k)).all()
    tokens = jnp.zeros((2, 1), jnp.int32)
    assert np.isfinite(saliency.text_similarity(alike, k, tokens)).all()


def test_most_salient_are_the_largest_in_order():
    score = jnp.array([[0.5, 3.0, 0.1, 2.0], [1.0, 0.0, 4.0, 2.0]])
    np.testing.assert_array_equal(saliency.most_salient(score, 2), [[1, 3], [2, 3]])


def test_no_square_of_the_tokens_is_held():
    shape = jax.ShapeDtypeStruct((1, 8192, 2, 16), jnp.bfloat16)
    run = jax.jit(lambda q, k: saliency.attention_received(q, k, stride=64))
    memory = run.lower(shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8192 * 8192


@pytest.mark.parametrize("count", [0, 5])
def test_bad_counts_are_refused(count):
    with pytest.raises(ValueError, match="count"):
        saliency.most_salient(jnp.ones((1, 4)), count)


def test_bad_stride_is_refused():
    with pytest.raises(ValueError, match="stride"):
        saliency.attention_received(*qk(), stride=0)
