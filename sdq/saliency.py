"""What attention says about tokens: which ones matter, and which belong together.

A score is float32 `[B, S]` with mean 1 over the tokens of a video; a likeness is `[B, n, S]`, of n
chosen tokens with all. Everything is computed head by head from queries and keys
`[B, S, heads, width]` as they enter the attention, so that no S x S matrix is held.
"""

import jax
import jax.numpy as jnp


def attention_received(q: jax.Array, k: jax.Array, *, stride: int = 16) -> jax.Array:
    """The attention that each token receives, over all heads and every stride-th query.

    Args:
      q: queries of the video's tokens.
      k: their keys.
      stride: every how many queries are asked; 1 asks all.
    """
    if stride < 1:
        raise ValueError(f"stride: expected a number from 1 up, got {stride}")
    asked = q[:, ::stride]

    def head(total: jax.Array, qk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + jnp.sum(attention_weights(*qk), axis=1), None

    received, _ = jax.lax.scan(head, jnp.zeros(k.shape[:2]), (_heads_first(asked), _heads_first(k)))
    return _mean_one(received)


def distinct_attention(q: jax.Array, k: jax.Array) -> jax.Array:
    """How far each token's cross-attention is from the mean token's (total variation, over heads).

    A token that shows what a word says attends to that word; the background's tokens all attend
    alike.

    Args:
      q: queries of the video's tokens.
      k: keys of the text's tokens.
    """

    def head(total: jax.Array, qk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        weights = attention_weights(*qk)
        away = weights - jnp.mean(weights, axis=1, keepdims=True)
        return total + jnp.sum(jnp.abs(away), axis=-1), None

    distinct, _ = jax.lax.scan(head, jnp.zeros(q.shape[:2]), (_heads_first(q), _heads_first(k)))
    return _mean_one(distinct)


def text_similarity(q: jax.Array, k: jax.Array, tokens: jax.Array) -> jax.Array:
    """How alike tokens look at the text: the cosine of what sets them apart from the mean token.

    Two tokens that show the same thing look at the same words, wherever and whenever they are.

    Args:
      q: queries of the video's tokens.
      k: keys of the text's tokens.
      tokens: numbers int32 `[B, n]`, to compare all others with.
    Returns:
      Float32 `[B, n, S]`, in [-1, 1].
    """

    def head(
        total: tuple[jax.Array, jax.Array], qk: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        products, squares = total
        weights = attention_weights(*qk)
        away = weights - jnp.mean(weights, axis=1, keepdims=True)
        products += jnp.einsum("bnt,bst->bns", take_tokens(away, tokens), away)
        return (products, squares + jnp.sum(jnp.square(away), axis=-1)), None

    batch, count = tokens.shape
    nothing = jnp.zeros((batch, count, q.shape[1])), jnp.zeros(q.shape[:2])
    (products, squares), _ = jax.lax.scan(head, nothing, (_heads_first(q), _heads_first(k)))
    length = jnp.sqrt(squares)
    scale = jnp.take_along_axis(length, tokens, axis=1)[..., None] * length[:, None]
    return products / jnp.where(scale > 0, scale, 1.0)


def shared_attention(q: jax.Array, k: jax.Array, tokens: jax.Array) -> jax.Array:
    """The self-attention that tokens share with all others, in units of an even spread.

    The mean over heads of what one of `tokens` gives the other and of what the other gives it
    (among `tokens`). Ours, as the published text leaves it open.

    Args:
      q: queries of the video's tokens.
      k: their keys.
      tokens: numbers int32 `[B, n]`.
    Returns:
      Float32 `[B, n, S]`.
    """
    count, length = tokens.shape[1], q.shape[1]

    def head(total: jax.Array, qk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        q, k = qk
        given = attention_weights(take_tokens(q, tokens), k) * length  # [B, n, S]
        returned = attention_weights(q, take_tokens(k, tokens)) * count  # [B, S, n]
        return total + (given + jnp.swapaxes(returned, 1, 2)) / 2, None

    nothing = jnp.zeros((len(q), count, length))
    total, _ = jax.lax.scan(head, nothing, (_heads_first(q), _heads_first(k)))
    return total / q.shape[2]


def most_salient(score: jax.Array, count: int) -> jax.Array:
    """The `count` tokens with the highest scores, int32 `[B, count]`, highest first."""
    if not 0 < count <= score.shape[-1]:
        raise ValueError(f"count: expected in [1, {score.shape[-1]}], got {count}")
    return jax.lax.top_k(score, count)[1].astype(jnp.int32)


def attention_weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """Softmax over the keys of one head, float32 `[B, queries, keys]`."""
    scores = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)


def take_tokens(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of `[B, S, width]` by number `[B, n]`."""
    return jnp.take_along_axis(x, tokens[..., None], axis=1)


def _heads_first(x: jax.Array) -> jax.Array:
    """`[B, S, heads, width]` -> `[heads, B, S, width]`."""
    return jnp.moveaxis(x, 2, 0)


def _mean_one(score: jax.Array) -> jax.Array:
    mean = jnp.mean(score, axis=-1, keepdims=True)
    return score / jnp.where(mean > 0, mean, 1.0)
