import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.layers import Ops
from models.common.quantizer import InputQuantizer, SiteRule
from models.common.semantic import Decomposition, SemanticDialect, Sharing, extra_work
from models.wan.modeling import Wan
from models.wan.sites import SITES, VIDEO_SITES, video_inputs
from pallas_kernels import prepared
from sdq import saliency, sqnr_db
from tests.models.wan.test_modeling import TINY, inputs, random_params

GRID = (2, 2, 3)  # of TINY's inputs
RULES = (SiteRule(r"blocks/.*", "sdq32:16"),)
DOWN = "blocks/ffn/down"


def quantizer(**options):
    return SemanticDialect(rules=RULES, grid=GRID, sites=video_inputs(TINY), **options)


@functools.cache  # compiling takes longer than everything else
def run(quantizer, steps=1):
    """Outputs and states of several steps on the same input."""
    params, (x, t, text, _) = random_params(), inputs()
    model = Wan(TINY, Ops(quantizer=quantizer), jnp.float32)

    @jax.jit
    def one(state, step):
        state = quantizer.at_step(state, step)
        return model.apply({"params": params}, x, t, text, state=state)

    state = quantizer.initial_state(TINY.layers, len(x))
    outs, states = [], []
    for step in range(steps):
        out, state = one(state, jnp.int32(step))
        outs.append(out)
        states.append(state)
    return outs, states


def exact():
    params, (x, t, text, _) = random_params(), inputs()
    return jax.jit(Wan(TINY, dtype=jnp.float32).apply)({"params": params}, x, t, text)


def test_without_its_parts_it_is_the_plain_quantizer():
    params, (x, t, text, _) = random_params(), inputs()
    plain = Wan(TINY, Ops(quantizer=InputQuantizer(RULES)), jnp.float32)
    expected = jax.jit(lambda: plain.apply({"params": params}, x, t, text))()
    np.testing.assert_allclose(run(quantizer())[0][0], expected, rtol=1e-5, atol=1e-5)


def test_decomposing_everything_everywhere_gives_eight_bits():
    everywhere = tuple((site, tuple(range(TINY.layers))) for site in VIDEO_SITES)
    all_tokens = Decomposition(tokens=12, layers=everywhere)
    got = run(quantizer(decomposition=all_tokens))[0][0]
    plain = run(quantizer())[0][0]
    assert float(sqnr_db(exact(), got)) > float(sqnr_db(exact(), plain)) + 3


def test_only_the_planned_blocks_decompose():
    nowhere = Decomposition(tokens=12, layers=((DOWN, ()),))
    first = Decomposition(tokens=12, layers=((DOWN, (0,)),))
    plain = run(quantizer())[0][0]
    np.testing.assert_allclose(run(quantizer(decomposition=nowhere))[0][0], plain, atol=1e-5)
    assert not np.allclose(run(quantizer(decomposition=first))[0][0], plain, atol=1e-4)


def shares(anchors=2, **options):
    """Everybody belongs to somebody."""
    return Sharing(anchors=anchors, candidates=6, least=-2.0, **options)


@pytest.mark.parametrize(
    "sharing", [shares(), shares(by_block=False), shares(alike="attention", window=(2, 2, 3))]
)
def test_sharing_looks_then_learns_then_acts(sharing):
    outs, states = run(quantizer(sharing=sharing, refresh_every=3), steps=6)
    plain = run(quantizer())[0][0]
    learns = [1, 3]  # and looks before
    for step in range(6):
        assert bool(states[step].look.all()) == (step in (0, 2, 5))
        assert bool(states[step].learn.all()) == (step in learns)
        close = np.allclose(outs[step], plain, rtol=1e-5, atol=1e-5)
        assert close == (step < 2 or step in learns), step
    assert (np.asarray(states[0].group) == 2).all() and (np.asarray(states[1].group) < 2).all()
    for site, width in video_inputs(TINY):
        book = states[5].books[site]
        np.testing.assert_array_equal(book, states[3].books[site])
        blocks = width // 16 if sharing.by_block else 1
        assert book.shape == (TINY.layers, 2, 3, blocks, 8)
        ones = np.vectorize(lambda mask: mask.bit_count())(np.asarray(book, int))
        assert (ones[:, :, :2] == 1).all() and (ones[:, :, 2] == 4).all()


@pytest.mark.parametrize("fmt", [None, "mxfp4"])
def test_a_site_without_a_choice_has_nothing_to_share(fmt):
    mixed = SemanticDialect(
        rules=(SiteRule(DOWN, fmt), *RULES),
        grid=GRID,
        sites=video_inputs(TINY),
        sharing=shares(),
        decomposition=Decomposition(tokens=2, layers=((DOWN, (0,)),)),
    )
    outs, states = run(mixed, steps=2)
    assert set(states[-1].books) == set(VIDEO_SITES) - {DOWN}
    assert all(np.isfinite(out).all() for out in outs)


def test_a_program_that_does_not_watch_computes_the_same():
    everywhere = tuple((site, tuple(range(TINY.layers))) for site in VIDEO_SITES)
    part = Decomposition(tokens=3, layers=everywhere)
    watching = quantizer(sharing=shares(), decomposition=part, refresh_every=0)
    outs, states = run(watching, steps=3)
    quiet = dataclasses.replace(watching, watches=False)
    params, (x, t, text, _) = random_params(), inputs()
    model = Wan(TINY, Ops(quantizer=quiet), jnp.float32)

    def step(state):
        state = quiet.at_step(state, jnp.int32(2))
        return model.apply({"params": params}, x, t, text, state=state)

    assert "cond[" not in str(jax.make_jaxpr(step)(states[1]))
    out, state = jax.jit(step)(states[1])
    np.testing.assert_allclose(out, outs[2], rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state, states[2])


def test_refreshing_never_means_once():
    once = quantizer(sharing=shares(), refresh_every=0)
    _, states = run(once, steps=4)
    assert [bool(state.look.all()) for state in states] == [True, False, False, False]
    assert [bool(state.learn.all()) for state in states] == [False, True, False, False]


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_salient_tokens_come_from_the_attention_of_their_block(kind):
    class Watched(SemanticDialect):
        """Also hands out the queries and keys, among the constants of its state."""

        def saw_attention(self, q, k, site, state):
            after = super().saw_attention(q, k, site, state)
            if not site.endswith(f"{kind}_attn"):
                return after
            return dataclasses.replace(
                after, active={DOWN: after.active[DOWN], "q": prepared(q), "k": prepared(k)}
            )

    options = {
        "rules": RULES,
        "grid": GRID,
        "sites": video_inputs(TINY),
        "decomposition": Decomposition(tokens=4, layers=((DOWN, (0,)),)),
        "saliency": kind,
        "stride": 2,
    }
    _, states = run(Watched(**options))
    seen = states[0].active["q"][0], states[0].active["k"][0]  # of the first block
    score = {
        "self": lambda q, k: saliency.attention_received(q, k, stride=2),
        "cross": saliency.distinct_attention,
    }[kind](*seen)
    np.testing.assert_array_equal(states[0].salient[0], saliency.most_salient(score, 4))


def test_the_state_keeps_its_structure():
    """So that the sampler can scan over it."""
    full = quantizer(
        sharing=shares(3), decomposition=Decomposition(tokens=5, layers=((DOWN, (1,)),))
    )
    start = full.initial_state(TINY.layers, 2)
    _, (after,) = run(full)
    assert jax.tree.structure(start) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_step_compiles_once_for_all_steps():
    full = quantizer(sharing=shares(3), refresh_every=2)
    params, (x, t, text, _) = random_params(), inputs()
    model = Wan(TINY, Ops(quantizer=full), jnp.float32)
    traces = []

    @jax.jit
    def one(state, step):
        traces.append(1)
        return model.apply({"params": params}, x, t, text, state=full.at_step(state, step))[1]

    state = full.initial_state(TINY.layers, len(x))
    for step in range(4):
        state = one(state, jnp.int32(step))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"saliency": "text"}, "saliency"),
        ({"sharing": Sharing(candidates=13)}, "candidates: expected in"),
        ({"sharing": shares(), "refresh_every": 1}, "refresh_every"),
        ({"decomposition": Decomposition(tokens=0, layers=())}, "tokens: expected in"),
        ({"decomposition": Decomposition(tokens=1, layers=(("ffn", (0,)),))}, "no such site: ffn"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        quantizer(**options)


def test_sharing_without_any_choice_is_refused():
    with pytest.raises(ValueError, match="nothing to share"):
        dataclasses.replace(quantizer(sharing=shares()), rules=(SiteRule(r"blocks/.*", "mxfp4"),))


@pytest.mark.parametrize("options", [{"anchors": 0}, {"anchors": 65}, {"alike": "colour"}])
def test_impossible_sharing_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sharing(**options)


def test_extra_work_is_the_share_of_products():
    work = dict.fromkeys(SITES, 1) | {DOWN: 4}
    half = Decomposition(tokens=5, layers=((DOWN, (0, 1)),))
    total = (6 + 4) * 4 * 10  # sites, blocks, tokens
    assert extra_work(half, work, 10, 4) == pytest.approx(2 * 4 * 5 / total)


def test_equal_quantizers_are_equal_and_hashable():
    a, b = (quantizer(sharing=shares()) for _ in range(2))
    assert a == b and hash(a) == hash(b)
    assert a != dataclasses.replace(a, refresh_every=9)
