"""How a block chooses its dialect: three ways and BlockDialect's own, as pure functions.

All take `u`, float32 `[..., G, block]`: magnitudes in half-units, |x| / 2^e, in [0, 16) for the
block's own exponent (smaller where the exponent window lifted it). All return uint8 ids `[..., G]`.

  exhaustive    every dialect, errors out of tables of 2048 bins
  lut           every dialect, errors out of tables of 64 bins; loses 0.05 dB
  two_stage     the block maximum gives the top, then one table read an element serves its four
                shapes: 1/16 of the reads; loses 0.1 to 0.23 dB
  blockdialect  the published baseline, for books with two shapes a top

Errors are sums of integers, hence exact: the same choice on every backend, in any order of
summation, with any sharding. With `importance` (float32, broadcastable to u, >= 0) each element's
error counts that much. With a sub-formatbook (`allowed`), two_stage compares only its members.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdq import formatbook
from sdq.formatbook import FIRST_TOP, SHAPES_PER_TOP, Book
from sdq.numerics import largest_magnitude

PACKED_ELEMENTS = 16  # elements whose errors sum inside a packed field


class Choice(NamedTuple):
    """How blocks choose.

    Attributes:
      rule: a key of RULES.
      importance: weights of the elements' errors, float32 like u, or None.
      allowed: a sub-formatbook for each row or block, uint8 `[..., 1 or G, 8]`: bit s of entry t
        says whether top t may take shape s; at least one bit each. Only for "two_stage". None
        allows all.
    """

    rule: str
    importance: jax.Array | None = None
    allowed: jax.Array | None = None


def choose(u: jax.Array, book: Book, choice: Choice) -> jax.Array:
    """Ids of the dialects, by the choice's rule."""
    if choice.allowed is None:
        return RULES[choice.rule](u, book, choice.importance)
    if choice.rule != "two_stage":
        raise ValueError(f"allowed: needs select='two_stage', got {choice.rule!r}")
    return two_stage(u, book, choice.importance, choice.allowed)


def bins(u: jax.Array, count: int = formatbook.BINS) -> jax.Array:
    """The table bin of each magnitude, int32 in [0, count): equal parts of [0, 16).

    Written as one fused multiply-add and a rounding, which is what a kernel does. On whole
    half-units, where the nearest magnitude may change, bins are closed below.
    """
    bin_ = jnp.round(u * (count / 16) - 0.5).astype(jnp.int32)
    return jnp.clip(bin_, 0, count - 1)


def exhaustive(u: jax.Array, book: Book, importance: jax.Array | None = None) -> jax.Array:
    """The dialect with the smallest squared error, magnitudes resolved to 11 bits."""
    return _smallest(u, book, formatbook.FINE_BINS, importance)


def lut(u: jax.Array, book: Book, importance: jax.Array | None = None) -> jax.Array:
    """The dialect with the smallest squared error, magnitudes resolved to 6 bits."""
    return _smallest(u, book, formatbook.BINS, importance)


def two_stage(
    u: jax.Array,
    book: Book,
    importance: jax.Array | None = None,
    allowed: jax.Array | None = None,
) -> jax.Array:
    """The top nearest to the block maximum, then the best of that top's (allowed) shapes."""
    top = nearest_top(largest_magnitude(u), book)
    if book.shapes == 1:
        return (top * SHAPES_PER_TOP).astype(jnp.uint8)
    errors = shape_errors(u, top, book, importance)
    if allowed is not None:
        allowed = jnp.broadcast_to(allowed, (*top.shape, 8))
        members = jnp.take_along_axis(allowed, top[..., None], axis=-1)[..., 0].astype(jnp.int32)
        is_member = (members[..., None] >> _along_last(errors)) & 1 == 1
        errors = jnp.where(is_member, errors, jnp.asarray(_largest(errors.dtype), errors.dtype))
    shape = jnp.argmin(errors, axis=-1).astype(jnp.int32)
    return (top * SHAPES_PER_TOP + shape).astype(jnp.uint8)


def shape_errors(
    u: jax.Array, top: jax.Array, book: Book, importance: jax.Array | None = None
) -> jax.Array:
    """Each shape's error beyond shape 0's, in quarters, summed over the block.

    Args:
      u: magnitudes `[..., G, block]`.
      top: of each block, int32 `[..., G]` in 0..7.
      book: with more than one shape a top.
      importance: weights like u.
    Returns:
      `[..., G, shapes]`: int32, or float32 with importance.
    """
    if importance is None:
        return _packed_shape_errors(u, top, book)
    table = jnp.asarray(formatbook.coarse_shape_errors(book), jnp.float32)
    each = table[top[..., None], bins(u)]  # [..., G, block, shapes]
    return jnp.sum(each * jnp.broadcast_to(importance, u.shape)[..., None], axis=-2)


def blockdialect(u: jax.Array, book: Book, importance: jax.Array | None = None) -> jax.Array:
    """BlockDialect's two stages: the maximum picks a pair, a count of elements its member.

    The maximum is truncated; the member with more elements in its beneficial range wins.
    A member's beneficial range lies between the midpoints from the value that only it has to the
    neighbours in the union of both. Magnitudes are truncated to half a half-unit first (its 5-bit
    fixed point). Ours: a tie of the counts goes to the first member.
    """
    if book.shapes != 2:
        raise ValueError(f"select='blockdialect' needs two shapes a top, not {book}")
    if importance is not None:
        raise ValueError("select='blockdialect' counts elements: no importance")
    truncated = jnp.floor(2.0 * u) / 2.0
    top = jnp.clip(jnp.floor(largest_magnitude(truncated)), FIRST_TOP, 15)
    top = top.astype(jnp.int32) - FIRST_TOP
    ranges = jnp.asarray(_beneficial_ranges(book))[top]  # [..., G, 2 members, 2 ends]
    low, high = ranges[..., 0], ranges[..., 1]
    inside = (truncated[..., None, :] >= low[..., None]) & (
        truncated[..., None, :] < high[..., None]
    )
    counts = jnp.sum(inside, axis=-1, dtype=jnp.int32)
    member = (counts[..., 1] > counts[..., 0]).astype(jnp.int32)
    return (top * SHAPES_PER_TOP + member).astype(jnp.uint8)


RULES = {rule.__name__: rule for rule in (exhaustive, lut, two_stage, blockdialect)}


def nearest_top(block_max: jax.Array, book: Book) -> jax.Array:
    """The book's top nearest to a block maximum, as the top field of an id: int32 in 0..7."""
    nearest = [
        min(book.tops, key=lambda top: abs(top - wanted)) - FIRST_TOP
        for wanted in range(FIRST_TOP, 16)
    ]
    wanted = jnp.clip(jnp.round(block_max), FIRST_TOP, 15).astype(jnp.int32)
    if nearest == list(range(8)):
        return wanted - FIRST_TOP
    return jnp.asarray(nearest, jnp.int32)[wanted - FIRST_TOP]


def _along_last(x: jax.Array) -> jax.Array:
    """0, 1, 2, ... along the last axis, with x's rank."""
    return jnp.arange(x.shape[-1]).reshape((1,) * (x.ndim - 1) + x.shape[-1:])


def _largest(dtype) -> float:
    return np.inf if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).max


def _smallest(u, book, count, importance):
    """The id whose table errors sum to the least; the lowest id among equals.

    One pair of dialects at a time, so that memory stays at one array of the size of u whatever the
    book.
    """
    if len(book.ids) == 1:
        return jnp.full(u.shape[:-1], book.ids[0], jnp.uint8)
    ids = jnp.asarray(book.ids, jnp.uint8).reshape(-1, 2)
    errors = formatbook.error_table(book, count)[list(book.ids)].reshape(-1, 2, count)
    bin_ = bins(u, count).astype(jnp.uint16)

    if importance is None:
        words = jnp.asarray((errors[:, 0] | errors[:, 1] << 16).astype(np.uint32))

        def pair_errors(pair):
            # Two 16-bit fields a word: one read and one add serve both dialects.
            word = _sum_of_groups(_read(words[pair], bin_))
            fields = word & jnp.uint32(0xFFFF), word >> 16
            return [jnp.sum(field.astype(jnp.int32), axis=-1) for field in fields]
    else:
        table = jnp.asarray(errors, jnp.float32)

        def pair_errors(pair):
            return [
                jnp.sum(_read(table[pair, member], bin_) * importance, axis=-1) for member in (0, 1)
            ]

    def challenge(pair, held):
        least, best = held
        for member, error in enumerate(pair_errors(pair)):
            better = error < least
            least = jnp.where(better, error, least)
            best = jnp.where(better, ids[pair, member], best)
        return least, best

    worst = jnp.inf if importance is not None else np.iinfo(np.int32).max
    dtype = jnp.float32 if importance is not None else jnp.int32
    nobody = jnp.full(u.shape[:-1], worst, dtype), jnp.zeros(u.shape[:-1], jnp.uint8)
    return jax.lax.fori_loop(0, len(ids), challenge, nobody)[1]


def _read(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index] for indices known to be in range, in the dtype they have.

    Plain indexing widens indices to int32 first, and XLA then keeps that wide copy alive through
    the loop.
    """
    return jax.lax.gather(
        table,
        index[..., None],
        jax.lax.GatherDimensionNumbers(
            offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,)
        ),
        slice_sizes=(1,),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def _sum_of_groups(words: jax.Array) -> jax.Array:
    """Packed words `[..., G, block]` summed 16 at a time, so that no field overflows."""
    block = words.shape[-1]
    group = min(PACKED_ELEMENTS, block)
    grouped = words.reshape(*words.shape[:-1], block // group, group)
    return jnp.sum(grouped, axis=-1)


def _packed_shape_errors(u: jax.Array, top: jax.Array, book: Book) -> jax.Array:
    """Summed coarse errors `[..., G, shapes]`: a table read and an add serve all shapes."""
    coarse = formatbook.coarse_shape_errors(book)
    fields = coarse[..., 1:].astype(np.int64) << (10 * np.arange(coarse.shape[-1] - 1))
    words = jnp.asarray(fields.sum(axis=-1).astype(np.int32))  # [8 tops, 64 bins]
    read = words.reshape(-1)[top[..., None] * formatbook.BINS + bins(u)]
    word = _sum_of_groups(read)
    sums = [jnp.zeros_like(top)]
    for _ in range(coarse.shape[-1] - 1):
        field = ((word + 512) & 1023) - 512  # the low 10 bits, signed
        sums.append(jnp.sum(field, axis=-1))
        word = (word - field) >> 10
    return jnp.stack(sums, axis=-1)


def _beneficial_ranges(book: Book) -> np.ndarray:
    """float32 `[8 tops, 2 members, (low, high)]` in half-units, derived from the dialects."""
    ranges = np.zeros((8, 2, 2), np.float32)
    for top in book.tops:
        pair = [set(d) for d in book.dialects if d[-1] == top]
        union = sorted(pair[0] | pair[1])
        for member in (0, 1):
            (own,) = pair[member] - pair[1 - member]
            at = union.index(own)
            ranges[top - FIRST_TOP, member] = (
                (union[at - 1] + own) / 2,
                (own + union[at + 1]) / 2,
            )
    return ranges
