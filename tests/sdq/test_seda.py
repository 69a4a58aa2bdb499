import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdq import dequantize, fake_quantize, packing, quantize, seda, sqnr_db
from sdq.formatbook import SDQ32, coarse_shape_errors

GRID = (3, 4, 4)
groups = jax.jit(seda.groups, static_argnames=("anchors", "grid", "window"))
sub_formatbooks = jax.jit(
    seda.sub_formatbooks, static_argnames=("fmt", "count", "members", "by_block")
)
CANDIDATES = jnp.array([(5, 20, 40, 41), (0, 17, 47, 9)], jnp.int32)


@pytest.fixture
def alike(rng):
    """Of four candidates with all 48 tokens, candidates among each other symmetric."""
    vectors = rng.randn(2, 48, 3)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    chosen = np.take_along_axis(vectors, np.asarray(CANDIDATES)[..., None], axis=1)
    return jnp.asarray(np.einsum("bnd,bsd->bns", chosen, vectors), jnp.float32)


def test_candidates_that_would_join_an_earlier_one_are_no_anchors(alike):
    group = np.asarray(groups(alike, CANDIDATES, anchors=3, grid=GRID, least=0.3))
    for b in range(2):
        anchors = []
        for number, token in enumerate(np.asarray(CANDIDATES[b])):
            if len(anchors) < 3 and all(alike[b, other, token] <= 0.3 for other in anchors):
                anchors.append(number)
        rows = np.array(alike[b])[anchors]
        for row, number in enumerate(anchors):
            rows[row, CANDIDATES[b, number]] = np.inf
        expected = np.where(rows.max(axis=0) > 0.3, rows.argmax(axis=0), 3)
        np.testing.assert_array_equal(group[b], expected)
    assert 3 in group  # someone stays alone
    assert len(np.unique(group)) > 2


def test_no_token_beyond_the_window_joins(alike):
    window = (0, 1, 4)
    group = groups(alike, CANDIDATES, anchors=4, grid=GRID, window=window, least=-2.0)
    place = np.stack(np.unravel_index(np.arange(48), GRID), axis=-1)
    for b in range(2):
        members = {g: np.flatnonzero(np.asarray(group[b]) == g) for g in range(4)}
        for g, tokens in members.items():
            anchor = next(
                (
                    t
                    for t in np.asarray(CANDIDATES[b])
                    if t in tokens and (np.abs(place[tokens] - place[t]) <= window).all()
                ),
                None,
            )
            assert len(tokens) == 0 or anchor is not None, (b, g)


def test_with_an_endless_threshold_anchors_are_alone_in_their_groups(alike):
    group = np.asarray(groups(alike, CANDIDATES, anchors=4, grid=GRID, least=1e9))
    assert (group != 4).sum() == 8
    for b in range(2):
        np.testing.assert_array_equal(group[b, CANDIDATES[b]], np.arange(4))


@pytest.mark.parametrize(
    "options, words", [({"grid": (1, 4, 4)}, "grid"), ({"anchors": 5}, "anchors: expected in")]
)
def test_impossible_groups_are_refused(alike, options, words):
    with pytest.raises(ValueError, match=words):
        groups(alike, CANDIDATES, **({"anchors": 2, "grid": GRID, "least": 0.0} | options))


@pytest.fixture
def tokens():
    """Three kinds of tokens, each group of one kind, and some that are alone: x, group."""
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (2, 60, 96))
    kind = jnp.arange(60)[None, :, None] % 4
    x = jnp.where(kind == 1, jnp.sign(x) * jnp.abs(x) ** 2.5, x)
    x = jnp.where(kind == 2, jnp.tanh(3 * x), x)
    return x, jnp.broadcast_to(jnp.arange(60) % 4, (2, 60)).astype(jnp.int32)


def numpy_sub_formatbooks(x, group, count, members, by_block):
    """Slow, one group, top and block at a time."""
    table = coarse_shape_errors(SDQ32)
    q = quantize(jnp.asarray(x), "sdq32:16", select="two_stage")
    below, _ = (np.asarray(part) for part in packing.unpack_metadata(q.scales))
    step = 2.0 ** (np.asarray(q.outer, np.float64) - below)
    blocks = np.abs(np.asarray(x, np.float64)).reshape(*x.shape[:2], -1, 16)
    u = blocks / step[..., None]
    tops = np.clip(np.rint(u.max(axis=-1)), 8, 15).astype(int) - 8
    bins = np.clip(np.rint(u * 4 - 0.5), 0, 63).astype(int)
    parts = [[n] for n in range(u.shape[2])] if by_block else [range(u.shape[2])]
    choices = list(itertools.combinations(range(4), members))
    result = np.full((len(x), count + 1, len(parts), 8), 15, np.uint8)
    for b, g, (n, part), top in itertools.product(
        range(len(x)), range(count), enumerate(parts), range(8)
    ):
        mine = np.asarray(group[b]) == g
        its_bins, its_tops = bins[b, mine][:, part], tops[b, mine][:, part]
        errors = table[top][its_bins[its_tops == top]].sum(axis=-2)
        sums = [errors[:, list(chosen)].min(axis=-1).sum() for chosen in choices]
        result[b, g, n, top] = sum(1 << shape for shape in choices[int(np.argmin(sums))])
    return result


@pytest.mark.parametrize("members, by_block", [(1, False), (2, False), (1, True)])
def test_a_group_allows_the_members_with_the_least_summed_errors(tokens, members, by_block):
    x, group = tokens
    options = {"count": 3, "members": members, "by_block": by_block}
    got = sub_formatbooks(x, group, "sdq32:16", **options)
    np.testing.assert_array_equal(got, numpy_sub_formatbooks(x, group, **options))


@pytest.mark.parametrize("by_block", [False, True])
def test_tokens_of_a_group_use_its_shapes_and_the_others_choose_freely(tokens, by_block):
    x, group = tokens
    books = sub_formatbooks(x, group, "sdq32:16", count=3, by_block=by_block)
    mask = seda.allowed(books, group)
    q = quantize(x, "sdq32:16", select="two_stage", allowed=mask)
    _, ids = packing.unpack_metadata(q.scales)
    shape, top = np.asarray(ids) % 4, np.asarray(ids) // 4
    masks = np.broadcast_to(mask, (*top.shape, 8))
    used = np.take_along_axis(masks, top[..., None], axis=-1)[..., 0]
    assert ((used >> shape) & 1).all()
    free = quantize(x, "sdq32:16", select="two_stage")
    alone = np.asarray(group) == 3
    np.testing.assert_array_equal(q.codes[alone], free.codes[alone])
    np.testing.assert_array_equal(q.scales[alone], free.scales[alone])


def test_one_shape_a_top_leaves_only_the_maximum_to_look_at(tokens):
    x, group = tokens
    mask = seda.allowed(sub_formatbooks(x, group, "sdq32:16", count=3), group)
    grouped = np.asarray(group) != 3
    # Other elements below the maximum change nothing in the choice.
    blocks = x.reshape(2, 60, -1, 16)
    largest = jnp.abs(blocks) == jnp.abs(blocks).max(axis=-1, keepdims=True)
    other = jnp.where(largest, blocks, 0.3 * blocks).reshape(x.shape)
    scales = [
        np.asarray(quantize(v, "sdq32:16", select="two_stage", allowed=mask).scales)[grouped]
        for v in (x, other)
    ]
    np.testing.assert_array_equal(*scales)


def test_sharing_costs_little_and_more_members_or_books_cost_less(tokens):
    x, group = tokens
    free = float(sqnr_db(x, fake_quantize(x, "sdq32:16", select="two_stage")))

    def cost(**options):
        books = sub_formatbooks(x, group, "sdq32:16", count=3, **options)
        mask = seda.allowed(books, group)
        shared = dequantize(quantize(x, "sdq32:16", select="two_stage", allowed=mask))
        return free - float(sqnr_db(x, shared))

    assert 1.5 > cost() > cost(members=2) > cost(members=4) == 0
    assert cost() > cost(by_block=True) > 0


def test_sums_do_not_overflow():
    """Many tokens with wide rows, all in one group: the same choice as one token has."""
    x = jax.random.normal(jax.random.key(0), (1, 1, 512))
    many = jnp.broadcast_to(x, (1, 40_000, 512))
    one = sub_formatbooks(x, jnp.zeros((1, 1), jnp.int32), "sdq32:16", count=1)
    all_ = sub_formatbooks(many, jnp.zeros((1, 40_000), jnp.int32), "sdq32:16", count=1)
    np.testing.assert_array_equal(one, all_)


@pytest.mark.parametrize("members", [0, 5])
def test_impossible_members_are_refused(tokens, members):
    with pytest.raises(ValueError, match="members"):
        sub_formatbooks(*tokens, "sdq32:16", count=3, members=members)


def test_allowed_is_checked():
    x = jnp.ones((4, 32))
    with pytest.raises(ValueError, match="two_stage"):
        quantize(x, "sdq32:16", allowed=jnp.full((4, 1, 8), 15, jnp.uint8))
    with pytest.raises(ValueError, match=r"allowed: expected uint8\[4, 1 or 2, 8\]"):
        quantize(x, "sdq32:16", select="two_stage", allowed=jnp.ones((4, 3, 8), jnp.uint8))
