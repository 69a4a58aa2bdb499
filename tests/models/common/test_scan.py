import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from models.common.layers import Ops
from models.common.quantizer import SiteRule
from models.common.scan import (
    SHARES,
    Probe,
    input_statistics,
    linear_work,
    noise_power,
    propose,
    quiet_layers,
    token_count,
)
from models.wan.modeling import Wan
from models.wan.sites import SITES, VIDEO_SITES
from tests.models.wan.test_modeling import TINY, inputs, random_params

TOKENS = 12
PROBE = Probe(rules=(SiteRule(r"blocks/.*", "sdq32:16"),), sites=tuple(VIDEO_SITES), tokens=TOKENS)


def run(probe, state):
    params, (x, t, text, _) = random_params(), inputs()
    model = Wan(TINY, Ops(quantizer=probe), jnp.float32)
    return model.apply({"params": params}, x, t, text, state=state)


@pytest.fixture(scope="module")
def ranked():
    """A state with the tokens' ranks."""
    ranking = dataclasses.replace(PROBE, ranking=True)
    return jax.jit(lambda state: run(ranking, state)[1])(PROBE.initial_state(TINY.layers, 2))


def test_statistics_are_over_all_tokens(rng):
    x, y = rng.randn(2, 2, 3, 4, 5).astype(np.float32)
    expected = np.einsum("lbsi,lbsj->lij", x, x) / 12
    found = input_statistics({"a": x})["a"]
    np.testing.assert_allclose(found.second_moment, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.largest, np.abs(x).max(axis=(1, 2)))
    both = found.plus(input_statistics({"a": y})["a"])
    np.testing.assert_array_equal(both.largest, np.abs([x, y]).max(axis=(0, 2, 3)))


def test_a_rotated_input_has_the_error_of_its_rotation(rng):
    """What the probe lets in is what the model would get from rotating, rounding, rotating back."""
    rule = SiteRule("down", "int4:32", rotate=True)
    probe = Probe(rules=(rule,), sites=("down",), tokens=3)
    x = jnp.asarray(rng.randn(2, 3, 64), jnp.float32)
    state = jax.tree.map(lambda leaf: leaf[0], probe.initial_state(1, 2))
    state = dataclasses.replace(state, share={"down": jnp.ones_like(state.share["down"])})
    expected = rule.turned(sdq.fake_quantize(rule.turned(x), "int4:32"))
    np.testing.assert_allclose(probe.quantize(x, "down", state), expected, atol=1e-5)


def test_every_token_has_a_bin_of_the_planned_size(ranked):
    edges = [token_count(share, TOKENS) for share in SHARES]
    expected = [sum(rank >= edge for edge in edges[:-1]) for rank in range(TOKENS)]
    assert ranked.bin.shape == (TINY.layers, 2, TOKENS)
    for bins in np.asarray(ranked.bin).reshape(-1, TOKENS):
        np.testing.assert_array_equal(np.sort(bins), expected)


def test_no_share_lets_no_error_in(ranked):
    params, (x, t, text, _) = random_params(), inputs()
    model = Wan(TINY, dtype=jnp.float32)
    exact = jax.jit(model.apply)({"params": params}, x, t, text)
    got = jax.jit(lambda state: run(PROBE, state)[0])(ranked)
    np.testing.assert_allclose(got, exact, atol=1e-5)


def test_noise_is_what_a_small_share_of_the_error_does(ranked):
    output = jax.jit(lambda state: run(PROBE, state)[0])
    probes = 400
    noise = jax.jit(
        lambda state: noise_power(lambda s: run(PROBE, s)[0], state, jax.random.key(0), probes)
    )(ranked)
    zero, small = output(ranked), 1e-2
    power = jnp.sum(jnp.square(zero).reshape(2, -1), axis=-1)
    cases = ("ffn/down", 0, 4), ("ffn/down", 2, 4), ("self_attn/qkv", 1, 3)
    for name, block, bin_ in cases:
        site = f"blocks/{name}"
        share = ranked.share | {site: ranked.share[site].at[block, :, bin_].set(small)}
        change = (output(dataclasses.replace(ranked, share=share)) - zero) / small
        exact = jnp.mean(jnp.sum(jnp.square(change).reshape(2, -1), axis=-1) / power)
        # Rank-one estimates: relative error sqrt(2 / probes / clips), three of them, and 2 % for
        # the finite difference.
        assert noise[site][block, bin_] == pytest.approx(float(exact), rel=3 * 0.05 + 0.02)


def make_noise():
    """Two sites, three blocks: "a" is noisy in its salient tokens, "b" everywhere alike."""
    a, b = np.zeros((3, len(SHARES))), np.zeros((3, len(SHARES)))
    a[:, 0], a[2, 0] = 1.0, 5.0
    b[:] = np.diff([0, *SHARES]) * 4
    return {"a": a, "b": b}


WORK = {"a": 10, "b": 10, "text": 5}


def test_the_plan_spends_where_it_gains_most():
    total = sum(WORK.values()) * 3
    # Room for one site of one block at the smallest share.
    plan = propose(make_noise(), WORK, 100, 1.01 * 10 * 0.05 / total)
    assert plan.decomposition.tokens == 5 and plan.decomposition.layers == (("a", (2,)),)
    assert plan.noise_before - plan.noise_after == pytest.approx(5.0)
    assert plan.extra_work == pytest.approx(10 * 0.05 / total)


def test_a_large_budget_takes_everything():
    plan = propose(make_noise(), WORK, 100, 1.0)
    assert plan.decomposition.tokens == 100
    assert plan.noise_after == pytest.approx(0.0)
    assert plan.decomposition.layers == (("a", (0, 1, 2)), ("b", (0, 1, 2)))


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.12, 0.5])
def test_no_plan_exceeds_its_budget(budget):
    plan = propose(make_noise(), WORK, 100, budget)
    assert 0 < plan.extra_work <= budget
    assert plan.noise_after < plan.noise_before


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="budget"):
        propose(make_noise(), WORK, 100, 0)


def test_work_is_counted_from_the_kernels():
    work = linear_work(random_params()["blocks"], SITES)
    assert work["blocks/self_attn/qkv"] == 3 * 48 * 48
    assert work["blocks/ffn/down"] == 64 * 48
    assert work.keys() == SITES.keys()


def test_quiet_layers_make_at_most_their_part_of_the_noise():
    noise = {"up": np.array([[1.0, 1.0], [6.0, 6.0]]), "down": np.array([[3.0, 0.0], [80.0, 2.0]])}
    # Sums: up 2 and 12, down 3 and 82; all of it 99.
    assert quiet_layers(noise, (), 0, 0.06) == (("up", (0,)), ("down", (0,)))
    assert quiet_layers(noise, (), 0, 0.02) == ()
    assert quiet_layers(noise, (), 0, 1.0) == (("up", (0, 1)), ("down", (0, 1)))
    # With the most salient bin of down 1 exact: up 2 and 12, down 3 and 2; all of it 19.
    decomposed = (("down", (1,)),)
    assert quiet_layers(noise, decomposed, 1, 0.25) == (("up", (0,)), ("down", (1,)))


def test_one_share_of_the_tokens_on_request():
    noise = {"up": np.ones((2, len(SHARES)))}
    found = propose(noise, {"up": 1}, 100, budget=1.0, shares=(0.2,))
    assert found.decomposition.tokens == 20
    assert found.noise_after == pytest.approx(2 * (len(SHARES) - 3))
