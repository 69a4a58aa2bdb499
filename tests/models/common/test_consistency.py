import jax.numpy as jnp
import numpy as np
import pytest

from models.common.consistency import Observed, Pairs, differences
from models.common.semantic import SemanticDialect
from models.wan.sites import video_inputs
from sdq import packing, quantize
from sdq.formatbook import SDQ32, magnitudes
from tests.models.common.test_semantic import GRID, RULES, run, shares
from tests.models.wan.test_modeling import TINY

RULE = RULES[0]


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.randn(2, 12, 64), jnp.float32)


def pairs_of(kinds):
    """(0, 1), (1, 2), ... (11, 0), of the kinds in turn."""
    tokens = np.stack([np.arange(12), (np.arange(12) + 1) % 12], axis=-1)
    kind = np.arange(12) % kinds
    both = [jnp.asarray(np.stack([part, part]), jnp.int32) for part in (tokens, kind)]
    return Pairs(tokens=both[0], kind=both[1])


def nearest(u, dialect):
    """Each number as a dialect holds it; ties go up."""
    book = magnitudes(SDQ32)[dialect].astype(float)
    distance = np.abs(u[:, None] - book)
    return book[len(book) - 1 - distance[:, ::-1].argmin(axis=1)]


def test_it_is_what_the_partner_would_have_made_of_the_numbers(x):
    pairs = pairs_of(3)
    got = differences(x, RULE, None, pairs, 3)
    q = quantize(x, "sdq32:16", select="two_stage")
    below, ids = (np.asarray(part) for part in packing.unpack_metadata(q.scales))
    scale = 2.0 ** (np.asarray(q.outer, np.float64) - below)
    u = np.abs(np.asarray(x, np.float64)).reshape(2, 12, 4, 16) / scale[..., None]
    expected = np.zeros((2, 3, 2))
    for b in range(2):
        for (i, j), kind in zip(
            np.asarray(pairs.tokens[b]), np.asarray(pairs.kind[b]), strict=True
        ):
            for g in range(4):
                if ids[b, i, g] // 4 == ids[b, j, g] // 4:
                    mine = u[b, i, g]
                    apart = nearest(mine, ids[b, i, g]) - nearest(mine, ids[b, j, g])
                    expected[b, kind] += [np.sum(apart**2), np.sum(mine**2)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert (expected.sum(axis=(0, 1)) > 0).all()


def test_equal_tokens_and_one_shape_for_all_differ_in_nothing(x):
    pairs = pairs_of(1)
    same = jnp.broadcast_to(x[:, :1], x.shape)
    assert (differences(same, RULE, None, pairs, 1)[..., 0] == 0).all()
    one = jnp.full((2, 12, 1, 8), 2, jnp.uint8)
    assert (differences(x, RULE, one, pairs, 1)[..., 0] == 0).all()


def test_pairs_that_do_not_count_are_left_out(x):
    pairs = Pairs(tokens=pairs_of(1).tokens, kind=jnp.full((2, 12), 2, jnp.int32))
    assert (differences(x, RULE, None, pairs, 2) == 0).all()


def test_observing_changes_nothing_and_sees_what_sharing_does():
    options = {"rules": RULES, "grid": GRID, "sites": video_inputs(TINY)}
    sums = {}
    for name, sharing in (("free", None), ("shared", shares(anchors=1))):
        base = SemanticDialect(**options, sharing=sharing, refresh_every=0)

        class OfTheseTokens(Observed):
            """With pairs."""

            def initial_state(self, blocks, batch):
                return super().initial_state(blocks, batch, pairs_of(1))

        sites = tuple(site for site, _ in video_inputs(TINY))
        outs, states = run(OfTheseTokens(base=base, sites=sites, kinds=1), steps=4)
        np.testing.assert_allclose(outs[-1], run(base, steps=4)[0][-1], atol=1e-6)
        steps = [sum(float(of[..., 0].sum()) for of in state.sums.values()) for state in states]
        sums[name] = np.diff(steps)  # of steps 1, 2, 3
    assert (sums["free"] > 0).all()
    assert sums["shared"][0] > 0 and (sums["shared"][1:] == 0).all()  # one group, one shape
