import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdq import dequantize, fake_quantize, packing, quantize, seda, sqnr_db
from sdq.formatbook import SDQ32, coarse_shape_errors
from tests.sdq.test_saliency import qk, weights

GRID = (3, 4, 4)
EVERYWHERE = (3, 4, 4)


def make_groups(window=EVERYWHERE, least=1.0, anchors=((5, 20, 40), (0, 17, 47))):
    q, k = qk()
    anchors = jnp.array(anchors, jnp.int32)
    return q, k, anchors, seda.groups(q, k, anchors, grid=GRID, window=window, least=least)


def shared_attention(q, k, anchors):
    """float64 `[B, n, S]` from the words of the docstring."""
    given = weights(q, k).mean(axis=1)
    out = []
    for b, numbers in enumerate(np.asarray(anchors)):
        returned = weights(q[b : b + 1], k[b : b + 1, numbers]).mean(axis=1)[0]
        out.append((given[b, numbers] * 48 + returned.T * len(numbers)) / 2)
    return np.stack(out)


def test_groups_take_the_anchor_with_most_shared_attention():
    q, k, anchors, group = make_groups()
    shared = shared_attention(q, k, anchors)
    expected = np.where(shared.max(axis=1) > 1, shared.argmax(axis=1), 3)
    for b in range(2):
        expected[b, anchors[b]] = np.arange(3)
    np.testing.assert_array_equal(group, expected)
    assert 3 in np.asarray(group)  # someone stays alone
    assert len(np.unique(group)) == 4


def test_no_token_beyond_the_window_joins():
    *_, anchors, group = make_groups(window=(0, 1, 4), least=0.0)
    place = np.stack(np.unravel_index(np.arange(48), GRID), axis=-1)
    joined = np.asarray(group)
    for b in range(2):
        distance = np.abs(place[:, None] - place[np.asarray(anchors[b])][None])
        near = (distance <= (0, 1, 4)).all(axis=-1)
        for token in range(48):
            assert (joined[b, token] == 3) == (not near[token].any())
            assert joined[b, token] == 3 or near[token, joined[b, token]]


def test_with_an_endless_threshold_anchors_are_alone_in_their_groups():
    *_, anchors, group = make_groups(least=1e9)
    assert (np.asarray(group) != 3).sum() == 6
    for b in range(2):
        np.testing.assert_array_equal(np.asarray(group)[b, anchors[b]], np.arange(3))


def test_grid_must_hold_the_tokens():
    q, k = qk()
    with pytest.raises(ValueError, match="grid"):
        seda.groups(q, k, jnp.zeros((2, 1), jnp.int32), grid=(1, 4, 4), window=EVERYWHERE)


@pytest.fixture
def tokens():
    """Three kinds of tokens, each group of one kind, and some that are alone: x, group."""
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (2, 60, 96))
    kind = jnp.arange(60)[None, :, None] % 4
    x = jnp.where(kind == 1, jnp.sign(x) * jnp.abs(x) ** 2.5, x)
    x = jnp.where(kind == 2, jnp.tanh(3 * x), x)
    return x, jnp.broadcast_to(jnp.arange(60) % 4, (2, 60)).astype(jnp.int32)


def numpy_sub_formatbooks(x, group, count, members):
    """Slow, one group, top and block at a time."""
    import itertools

    table = coarse_shape_errors(SDQ32)
    result = np.full((len(x), count + 1, 8), 15, np.uint8)
    q = quantize(jnp.asarray(x), "sdq32:16", select="two_stage")
    below, _ = (np.asarray(part) for part in packing.unpack_metadata(q.scales))
    step = 2.0 ** (np.asarray(q.outer, np.float64) - below)
    blocks = np.abs(np.asarray(x, np.float64)).reshape(*x.shape[:2], -1, 16)
    u = blocks / step[..., None]
    tops = np.clip(np.rint(u.max(axis=-1)), 8, 15).astype(int) - 8
    bins = np.clip(np.rint(u * 4 - 0.5), 0, 63).astype(int)
    for b in range(len(x)):
        for g in range(count):
            mine = np.asarray(group[b]) == g
            for top in range(8):
                sums = []
                for chosen in itertools.combinations(range(4), members):
                    errors = table[top][bins[b, mine][tops[b, mine] == top]].sum(axis=-2)
                    sums.append(errors[:, list(chosen)].min(axis=-1).sum())
                best = list(itertools.combinations(range(4), members))[int(np.argmin(sums))]
                result[b, g, top] = sum(1 << shape for shape in best)
    return result


@pytest.mark.parametrize("members", [1, 2])
def test_a_group_allows_the_members_with_the_least_summed_errors(tokens, members):
    x, group = tokens
    got = seda.sub_formatbooks(x, group, "sdq32:16", count=3, members=members)
    np.testing.assert_array_equal(got, numpy_sub_formatbooks(x, group, 3, members))


def test_tokens_of_a_group_use_its_shapes_and_the_others_choose_freely(tokens):
    x, group = tokens
    books = seda.sub_formatbooks(x, group, "sdq32:16", count=3)
    mask = seda.allowed(books, group)
    q = quantize(x, "sdq32:16", select="two_stage", allowed=mask)
    _, ids = packing.unpack_metadata(q.scales)
    shape, top = np.asarray(ids) % 4, np.asarray(ids) // 4
    used = np.take_along_axis(np.asarray(mask), top, axis=-1)
    assert ((used >> shape) & 1).all()
    free = quantize(x, "sdq32:16", select="two_stage")
    alone = np.asarray(group) == 3
    np.testing.assert_array_equal(q.codes[alone], free.codes[alone])
    np.testing.assert_array_equal(q.scales[alone], free.scales[alone])


def test_one_shape_a_top_leaves_only_the_maximum_to_look_at(tokens):
    x, group = tokens
    mask = seda.allowed(seda.sub_formatbooks(x, group, "sdq32:16", count=3), group)
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


def test_sharing_costs_little_and_two_members_cost_less(tokens):
    x, group = tokens
    free = float(sqnr_db(x, fake_quantize(x, "sdq32:16", select="two_stage")))
    cost = []
    for members in (1, 2, 4):
        books = seda.sub_formatbooks(x, group, "sdq32:16", count=3, members=members)
        mask = seda.allowed(books, group)
        shared = dequantize(quantize(x, "sdq32:16", select="two_stage", allowed=mask))
        cost.append(free - float(sqnr_db(x, shared)))
    assert 1.5 > cost[0] > cost[1] > cost[2] == 0


def test_sums_do_not_overflow():
    """Many tokens with wide rows, all in one group: the same choice as one token has."""
    x = jax.random.normal(jax.random.key(0), (1, 1, 512))
    many = jnp.broadcast_to(x, (1, 40_000, 512))
    one = seda.sub_formatbooks(x, jnp.zeros((1, 1), jnp.int32), "sdq32:16", count=1)
    all_ = seda.sub_formatbooks(many, jnp.zeros((1, 40_000), jnp.int32), "sdq32:16", count=1)
    np.testing.assert_array_equal(one, all_)


@pytest.mark.parametrize("members", [0, 5])
def test_impossible_members_are_refused(tokens, members):
    with pytest.raises(ValueError, match="members"):
        seda.sub_formatbooks(*tokens, "sdq32:16", count=3, members=members)


def test_allowed_is_checked():
    x = jnp.ones((4, 32))
    with pytest.raises(ValueError, match="two_stage"):
        quantize(x, "sdq32:16", allowed=jnp.full((4, 8), 15, jnp.uint8))
    with pytest.raises(ValueError, match=r"allowed: expected uint8\[4, 8\]"):
        quantize(x, "sdq32:16", select="two_stage", allowed=jnp.ones((4, 7), jnp.uint8))
