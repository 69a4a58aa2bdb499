"""SeDA: semantically correlated tokens share a sub-formatbook.

Salient tokens are anchors. A token joins the anchor with which it shares most attention inside a
window of space and time; a group allows each top one shape (or a few), whichever fits all of its
blocks best. Every block still takes the top that its own maximum asks for, so a group spans every
dynamic range, but equal values of two of its tokens are rounded alike far more often, and with one
shape a top nothing is left to choose.

Token numbers run over a grid (T, H, W), t slowest, as `patchify` makes them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from sdq import formatbook, formats, saliency
from sdq.codecs import dialect
from sdq.formats import Format
from sdq.numerics import largest_magnitude
from sdq.quantize import blocked
from sdq.select import nearest_top, shape_errors

Grid = tuple[int, int, int]


def groups(
    q: jax.Array,
    k: jax.Array,
    anchors: jax.Array,
    *,
    grid: Grid,
    window: Grid,
    least: float = 1.0,
) -> jax.Array:
    """The group of each token: the number of its anchor, or `anchors.shape[1]` where it is alone.

    The attention that a token and an anchor share is the mean over heads of what the anchor gives
    the token and of what the token gives the anchor (among the anchors), each in units of an even
    spread. Ours, as the published text leaves it open.

    Args:
      q, k: queries and keys of self-attention `[B, S, heads, width]`.
      anchors: token numbers, int32 `[B, n]`.
      grid: tokens along (T, H, W).
      window: how far an anchor reaches along each of them, in tokens.
      least: shared attention below which a token stays alone; 1 is an even spread.
    Returns:
      int32 `[B, S]`. An anchor belongs to itself; of two anchors at equal attention the first wins.
    """
    batch, tokens, heads, _ = q.shape
    if tokens != grid[0] * grid[1] * grid[2]:
        raise ValueError(f"grid: {list(grid)} has other than {tokens} tokens")
    count = anchors.shape[1]
    of_anchors = functools.partial(_take_tokens, tokens=anchors)

    def head(total: jax.Array, qk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        q, k = qk
        given = saliency.attention_weights(of_anchors(q), k) * tokens  # [B, n, S]
        returned = saliency.attention_weights(q, of_anchors(k)) * count  # [B, S, n]
        return total + (given + jnp.swapaxes(returned, 1, 2)) / 2, None

    nothing = jnp.zeros((batch, count, tokens))
    by_head = jnp.moveaxis(q, 2, 0), jnp.moveaxis(k, 2, 0)
    shared = jax.lax.scan(head, nothing, by_head)[0] / heads
    place = jnp.asarray(np.stack(np.unravel_index(np.arange(tokens), grid), axis=-1), jnp.int32)
    distance = jnp.abs(place[anchors][:, :, None] - place[None, None])
    near = jnp.all(distance <= jnp.asarray(window, jnp.int32)[None, None, None], axis=-1)
    shared = jnp.where(near, shared, -jnp.inf)
    shared = jnp.where(distance.sum(axis=-1) == 0, jnp.inf, shared)
    joined = jnp.argmax(shared, axis=1)
    return jnp.where(jnp.max(shared, axis=1) > least, joined, count).astype(jnp.int32)


def sub_formatbooks(
    x: jax.Array, group: jax.Array, fmt: str | Format, *, count: int, members: int = 1
) -> jax.Array:
    """What each group allows, for the inputs x of one linear.

    Args:
      x: tokens `[B, S, K]`, quantised along the last axis.
      group: of each token, `[B, S]`, in 0..count.
      fmt: a dialect format with more than one shape a top.
      count: groups; number `count` are the tokens that are alone, which allow everything.
      members: shapes of each top that a group allows.
    Returns:
      uint8 `[B, count + 1, 8]`, masks for `quantize(allowed=...)`: row `group` is a token's own.
    """
    fmt = formats.parse(fmt)
    book = formatbook.BOOKS[fmt.book or ""]
    if not 0 < members <= book.shapes:
        raise ValueError(f"members: expected in [1, {book.shapes}], got {members}")
    u = dialect.scaled(blocked(x.astype(jnp.float32), -1, fmt)).u
    top = nearest_top(largest_magnitude(u), book)  # [B, S, G]
    errors = shape_errors(u, top, book)  # [B, S, G, shapes]
    choices = list(itertools.combinations(range(book.shapes), members))
    masks = jnp.asarray([sum(1 << shape for shape in chosen) for chosen in choices], jnp.uint8)
    # What a block would lose with each choice of members.
    loss = jnp.stack([errors[..., list(chosen)].min(axis=-1) for chosen in choices], axis=-1)
    most = formatbook.COARSE_LIMIT * u.shape[-1]
    sums = jax.vmap(functools.partial(_sums_by_top, count=count, most=most))(loss, top, group)
    best = masks[jnp.argmin(sums, axis=-1)]  # [B, count, 8]
    everything = jnp.full((len(x), 1, 8), (1 << book.shapes) - 1, jnp.uint8)
    return jnp.concatenate([best, everything], axis=1)


def allowed(sub_formatbooks: jax.Array, group: jax.Array) -> jax.Array:
    """Each token's sub-formatbook, uint8 `[B, S, 8]`."""
    return jnp.take_along_axis(sub_formatbooks, group[..., None], axis=1)


def _sums_by_top(
    loss: jax.Array, top: jax.Array, group: jax.Array, *, count: int, most: int
) -> jax.Array:
    """Losses int32 `[S, G, choices]`, at most `most`, summed over a group's blocks of equal top.

    int32 `[count, 8, choices]`. A token's sum is cut to where no sum can overflow: integers, so
    that no order of summation, and so no sharding, changes a choice.
    """
    tokens, blocks, _ = loss.shape
    shift = max(0, (most * blocks * tokens).bit_length() - 31)
    by_top = jax.nn.one_hot(top, 8, dtype=jnp.int32)  # [S, G, 8]
    of_token = jnp.einsum("sgt,sgc->stc", by_top, loss) >> shift
    return jax.ops.segment_sum(of_token, group, num_segments=count + 1)[:count]


def _take_tokens(x: jax.Array, *, tokens: jax.Array) -> jax.Array:
    """Rows of `[B, S, width]` by number `[B, n]`."""
    return jnp.take_along_axis(x, tokens[..., None], axis=1)
