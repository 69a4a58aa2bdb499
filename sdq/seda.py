"""SeDA: semantically correlated tokens share a sub-formatbook.

Anchors are salient tokens that are not alike. A token joins the anchor that it is most alike, if
alike enough and inside a window of space and time; a group allows each top one shape (or a few),
whichever fits all of its blocks best. Every block still takes the top that its own maximum asks
for, so a group spans every dynamic range, but equal values of two of its tokens are rounded alike,
and with one shape a top nothing is left to choose.

What alike means is the caller's: how tokens look at the text, or at each other (`saliency.py`).
Token numbers run over a grid (T, H, W), t slowest, as `patchify` makes them.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from sdq import formatbook, formats
from sdq.codecs import dialect
from sdq.formats import Format
from sdq.numerics import largest_magnitude
from sdq.quantize import blocked
from sdq.select import nearest_top, shape_errors

Grid = tuple[int, int, int]


def groups(
    alike: jax.Array,
    candidates: jax.Array,
    *,
    anchors: int,
    grid: Grid,
    window: Grid | None = None,
    least: float,
) -> jax.Array:
    """The group of each token: 0 .. anchors - 1, or `anchors` where it is alone.

    Args:
      alike: each candidate with every token, `[B, C, S]`, larger for more alike.
      candidates: token numbers, int32 `[B, C]`, most salient first. One becomes an anchor unless it
        would join an earlier one, until there are enough.
      anchors: groups, at most.
      grid: tokens along (T, H, W).
      window: how far an anchor reaches along each of them, in tokens; None is everywhere.
      least: what two tokens must exceed to belong together.
    Returns:
      int32 `[B, S]`. An anchor belongs to itself; of two anchors equally alike the first wins.
    """
    batch, count, tokens = alike.shape
    if tokens != grid[0] * grid[1] * grid[2]:
        raise ValueError(f"grid: {list(grid)} has other than {tokens} tokens")
    if not 0 < anchors <= count:
        raise ValueError(f"anchors: expected in [1, {count}], the candidates, got {anchors}")
    place = jnp.asarray(np.stack(np.unravel_index(np.arange(tokens), grid), axis=-1), jnp.int32)
    distance = jnp.abs(place[candidates][:, :, None] - place[None, None])  # [B, C, S, 3]
    reach = jnp.asarray(grid if window is None else window, jnp.int32)
    alike = jnp.where(jnp.all(distance <= reach[None, None, None], axis=-1), alike, -jnp.inf)
    alike = jnp.where(distance.sum(axis=-1) == 0, jnp.inf, alike)
    among = jnp.take_along_axis(alike, candidates[:, None], axis=2) > least  # [B, C, C]

    def choose(chosen: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        joins = jnp.any(chosen & among[:, :, number], axis=1)
        new = ~joins & (chosen.sum(axis=1) < anchors)
        return chosen.at[:, number].set(new), None

    chosen, _ = jax.lax.scan(choose, jnp.zeros((batch, count), bool), jnp.arange(count))
    alike = jnp.where(chosen[..., None], alike, -jnp.inf)
    group_of = jnp.cumsum(chosen, axis=1) - 1
    joined = jnp.take_along_axis(group_of, jnp.argmax(alike, axis=1), axis=1)
    return jnp.where(jnp.max(alike, axis=1) > least, joined, anchors).astype(jnp.int32)


def sub_formatbooks(
    x: jax.Array,
    group: jax.Array,
    fmt: str | Format,
    *,
    count: int,
    members: int = 1,
    by_block: bool = False,
) -> jax.Array:
    """What each group allows, for the inputs x of one linear.

    Args:
      x: tokens `[B, S, K]`, quantised along the last axis.
      group: of each token, `[B, S]`, in 0..count.
      fmt: a dialect format with more than one shape a top.
      count: groups; number `count` are the tokens that are alone, which allow everything.
      members: shapes of each top that a group allows.
      by_block: a sub-formatbook for each block of channels, not one for all of them.
    Returns:
      uint8 `[B, count + 1, G, 8]`, masks for `quantize(allowed=...)`: row `group` is a token's own;
      G is 1 where all blocks share.
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
    _, tokens, blocks = top.shape
    # Sums of integers, cut to where none can overflow: no order of summation, and so no sharding,
    # changes a choice.
    most = formatbook.COARSE_LIMIT * u.shape[-1] * tokens * (1 if by_block else blocks)
    loss = loss >> max(0, most.bit_length() - 31)
    books = blocks if by_block else 1
    place = group[..., None] * books + (jnp.arange(blocks)[None, None] if by_block else 0)

    def sums(loss: jax.Array, place: jax.Array) -> jax.Array:
        by_top = jax.ops.segment_sum(
            loss.reshape(-1, len(choices)), place.reshape(-1), num_segments=(count + 1) * books * 8
        )
        return by_top.reshape(count + 1, books, 8, len(choices))[:count]

    best = masks[jnp.argmin(jax.vmap(sums)(loss, place * 8 + top), axis=-1)]
    everything = jnp.full((len(x), 1, books, 8), (1 << book.shapes) - 1, jnp.uint8)
    return jnp.concatenate([best, everything], axis=1)


def allowed(sub_formatbooks: jax.Array, group: jax.Array) -> jax.Array:
    """Each token's sub-formatbook, uint8 `[B, S, G, 8]`."""
    return jnp.take_along_axis(sub_formatbooks, group[..., None, None], axis=1)
