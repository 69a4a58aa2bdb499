import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from models.common.full_path import FullPath
from models.common.kernel_ops import on_kernels
from models.common.layers import Ops, matmul
from models.common.quantizer import InputQuantizer, Keep, SiteRule
from models.common.semantic import SemanticDialect, Sharing
from models.mmdit.config import SIZES, MMDiTConfig
from models.mmdit.modeling import MMDiT
from models.mmdit.params import abstract_params
from models.mmdit.sites import DOUBLE_SITES, SINGLE_SITES, SITES, TEXT_SITES, video_inputs
from pallas_kernels import computed, prepared
from sdq.rules import flatten

OPEN_SORA = MMDiTConfig(
    width=48,
    heads=3,
    double_blocks=2,
    single_blocks=3,
    mlp_width=64,
    in_channels=4,
    out_channels=4,
    cond_channels=5,
    text_width=16,
    pooled_width=12,
    rope_widths=(4, 6, 6),
)
HUNYUAN = dataclasses.replace(
    OPEN_SORA,
    cond_channels=None,
    refiner_blocks=2,
    guidance=True,
    text_first=False,
    rope_theta=256.0,
)
MODELS = {"open-sora": OPEN_SORA, "hunyuan": HUNYUAN}
PUBLISHED = {  # parameters of diffusers' classes; Open-Sora's with `cond_in`
    "open-sora-2.0": 11_891_390_528,
    "hunyuanvideo": 12_821_012_544,
}
TOKENS, WORDS = 2 * 2 * 3, 7
BLOCKS = r"(double|single)_blocks/.*"


def inputs(config, batch=2):
    keys = jax.random.split(jax.random.key(1), 4)
    found = {
        "x": jax.random.normal(keys[0], (batch, 2, 4, 6, config.in_channels)),
        "t": jnp.linspace(100, 900, batch),
        "text": jax.random.normal(keys[1], (batch, WORDS, config.text_width)),
        "pooled": jax.random.normal(keys[2], (batch, config.pooled_width)),
    }
    if config.cond_channels is not None:
        found["cond"] = jax.random.normal(keys[3], (batch, 2, 4, 6, config.cond_channels))
    if config.guidance:
        found["guidance"] = jnp.linspace(1, 6, batch)
    if not config.text_first:
        found["text_lengths"] = jnp.arange(batch, dtype=jnp.int32) + WORDS - batch + 1
    return found


@functools.cache
def random_params(config):
    """All N(0, 0.1): gates that start at zero would hide mistakes. Norms of q and k around 1."""
    random = np.random.RandomState(2)

    def leaf(path, shape):
        centre = 1.0 if path[-2].key in ("norm_q", "norm_k") else 0.0
        return jnp.float32(centre + 0.1 * random.randn(*shape.shape))

    with jax.ensure_compile_time_eval():  # arrays, also when first asked for inside of jit
        return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def output(config, ops=None, params=None, **changed):
    params = random_params(config) if params is None else params
    model = MMDiT(config, ops or Ops(), dtype=jnp.float32)
    run = jax.jit(lambda params, given: model.apply({"params": params}, **given))
    return run(params, inputs(config) | changed)


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_their_parameter_counts(name):
    shapes = abstract_params(SIZES[name])
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_input_matters(config):
    given, before = inputs(config), output(config)
    assert before.shape == given["x"].shape and before.dtype == jnp.float32
    for name, value in given.items():
        changed = value - 1 if name == "text_lengths" else value + 0.5
        after = output(config, **{name: changed})
        assert (np.abs(after - before).max(axis=(1, 2, 3, 4)) > 1e-3).all(), name


def test_padding_does_not_matter():
    given = inputs(HUNYUAN)
    lengths = given["text_lengths"]
    padded = jnp.arange(WORDS)[None, :, None] >= lengths[:, None, None]
    assert padded.any()
    other = output(HUNYUAN, text=jnp.where(padded, 3.0, given["text"]))
    np.testing.assert_allclose(other, output(HUNYUAN), atol=1e-5)
    alone = int(lengths[0])
    short = {
        name: value[:1, :alone] if name == "text" else value[:1] for name, value in given.items()
    }
    np.testing.assert_allclose(output(HUNYUAN, **short), output(HUNYUAN)[:1], atol=1e-5)


def test_no_lengths_count_all():
    everything = jnp.full((2,), WORDS, jnp.int32)
    np.testing.assert_allclose(
        output(HUNYUAN, text_lengths=None), output(HUNYUAN, text_lengths=everything), atol=1e-5
    )


def test_the_order_of_text_and_video_is_only_one_of_the_keys():
    last = dataclasses.replace(OPEN_SORA, text_first=False)
    np.testing.assert_allclose(output(last, text_lengths=None), output(OPEN_SORA), atol=1e-5)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_intermediates_come_on_request_for_every_block(config):
    _, extra = MMDiT(config).apply(
        {"params": random_params(config)}, **inputs(config), mutable=["intermediates"]
    )
    found = {path: leaf.shape for path, leaf in flatten(extra["intermediates"]).items()}
    video, words, both = (2, 2, TOKENS, 48), (2, 2, WORDS, 48), (3, 2, TOKENS + WORDS, 48)
    for site in SITES:
        shape = {"d": (2, 2), "s": (3, 2)}[site[0]]
        if site.endswith("modulation"):
            expected = (*shape, 1, 48)
        elif site == "single_blocks/out":
            expected = (*both[:3], 48 + 64)
        elif site in SINGLE_SITES:
            expected = both
        else:
            width = 64 if site.endswith("down") else 48
            expected = (*(words if site in TEXT_SITES else video)[:3], width)
        assert found[f"{site}_input"] == expected, site
    assert found["double_blocks/img_output"] == video
    assert found["double_blocks/txt_output"] == words
    assert found["single_blocks/output"] == both


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_linear_goes_through_the_ops(config):
    counts = {"matmul": 0, "attention": 0}
    sites = []

    def counted_matmul(x, kernel, **options):
        counts["matmul"] += 1
        return matmul(x, kernel, **options)

    def counted_attention(q, k, v, *, lengths):
        counts["attention"] += 1
        assert (lengths is None) == config.text_first
        return prepared(q) + jnp.mean(prepared(k), 1, keepdims=True) + v

    class Noting(Keep):
        def quantize(self, x, site, state):
            sites.append(site)
            return computed(x)

    ops = Ops(matmul=counted_matmul, attention=counted_attention, quantizer=Noting())
    model = MMDiT(config, ops)
    given = inputs(config)
    jax.eval_shape(lambda: model.apply({"params": random_params(config)}, **given))
    traces = {site: sites.count(site) for site in sites}  # a scanned block: once or more
    linears = {site: len(read) for site, read in SITES.items()} | {"refiner/layers/qkv": 3}
    assert counts["matmul"] == sum(n * linears.get(site, 1) for site, n in traces.items())
    attending = ("double_blocks/img_attn/o", "single_blocks/qkv_up", "refiner/layers/qkv")
    assert counts["attention"] == sum(traces.get(site, 0) for site in attending)
    assert SITES.keys() <= traces.keys()


def test_sites_name_every_kernel_of_the_blocks_once():
    for sites, blocks in ((DOUBLE_SITES, "double_blocks"), (SINGLE_SITES, "single_blocks")):
        kernels = [path for path in flatten(random_params(OPEN_SORA)[blocks]) if "kernel" in path]
        read = [f"{linear}/kernel" for linears in sites.values() for linear in linears]
        assert sorted(read) == sorted(kernels)
        assert all(site.startswith(blocks) for site in sites)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_blocks_compile_as_one(config):
    def products(config):
        model, given = MMDiT(config), inputs(config)
        program = jax.make_jaxpr(lambda p: model.apply({"params": p}, **given))
        return str(program(random_params(config))).count("dot_general")

    deeper = dataclasses.replace(config, double_blocks=5, single_blocks=6)
    assert products(config) == products(deeper)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_quantised_tree_runs_in_the_same_model(config):
    params = random_params(config)
    rules = [sdq.Rule(BLOCKS + "/kernel", "sdq32:16"), sdq.Rule(r".*", None)]
    quantised = sdq.quantize_params(params, sdq.resolve(rules, params))
    found, expected = (
        output(config, params=tree) for tree in (quantised, sdq.dequantize_params(quantised))
    )
    np.testing.assert_allclose(found, expected, atol=5e-6)  # another order of sums
    assert 8 < sdq.sqnr_db(output(config), found) < 40


def test_quantised_inputs_and_attention_run_in_the_same_model():
    ops = Ops(quantizer=InputQuantizer((SiteRule(BLOCKS, "sdq32:16"),)), attention=FullPath())
    found = output(HUNYUAN, ops)
    assert 5 < sdq.sqnr_db(output(HUNYUAN), found) < 40


def test_kernels_compute_the_same():
    plain = Ops(quantizer=InputQuantizer((SiteRule(BLOCKS, "sdq32:16"),)))
    params = random_params(OPEN_SORA)
    rules = [sdq.Rule(BLOCKS + "/kernel", "sdq32:16"), sdq.Rule(r".*", None)]
    quantised = sdq.quantize_params(params, sdq.resolve(rules, params))
    expected = output(OPEN_SORA, plain, quantised)
    found = output(OPEN_SORA, on_kernels(plain), quantised)
    assert sdq.sqnr_db(expected, found) > 30  # sums in another order; a rounding may flip


def test_gradients_are_the_same_when_blocks_are_computed_again():
    def gradient(remat):
        model = MMDiT(HUNYUAN, dtype=jnp.float32, remat=remat)

        def loss(params):
            return jnp.sum(jnp.square(model.apply({"params": params}, **inputs(HUNYUAN))))

        return jax.jit(jax.grad(loss))(random_params(HUNYUAN))

    again, kept = flatten(gradient(True)), flatten(gradient(False))
    for path, leaf in kept.items():
        largest = float(jnp.abs(leaf).max())
        assert largest > 0 or path.endswith("k/bias"), path
        np.testing.assert_allclose(again[path], leaf, atol=1e-4 * max(largest, 1.0), err_msg=path)


def test_the_double_blocks_learn_about_the_videos_tokens():
    quantizer = SemanticDialect(
        rules=(SiteRule(BLOCKS, "sdq32:16"),),
        grid=OPEN_SORA.grid((2, 4, 6)),
        sites=video_inputs(OPEN_SORA),
        sharing=Sharing(candidates=TOKENS, least=0.0),
    )
    model = MMDiT(OPEN_SORA, Ops(quantizer=quantizer), dtype=jnp.float32)

    @jax.jit
    def run(step, state):
        state = quantizer.at_step(state, step)
        return model.apply({"params": random_params(OPEN_SORA)}, **inputs(OPEN_SORA), state=state)

    state = first = quantizer.initial_state(OPEN_SORA.double_blocks, 2)
    for step in range(3):
        out, state = run(jnp.int32(step), state)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, first)
    assert (state.group != first.group).any()
    for site, books in state.books.items():
        assert (books != first.books[site]).any(), site
    assert 5 < sdq.sqnr_db(output(OPEN_SORA), out) < 40


@pytest.mark.parametrize(
    "config, changed, message",
    [
        (OPEN_SORA, {"cond": None}, "cond: this config needs it"),
        (OPEN_SORA, {"guidance": jnp.ones(2)}, "guidance: this config takes none"),
        (OPEN_SORA, {"text_lengths": jnp.ones(2, jnp.int32)}, "padding in the middle"),
        (HUNYUAN, {"guidance": None}, "guidance: this config needs it"),
    ],
)
def test_inputs_must_fit_the_config(config, changed, message):
    with pytest.raises(ValueError, match=message):
        output(config, **changed)


def test_sizes_must_fit():
    with pytest.raises(ValueError, match="must be a multiple of the 5 heads"):
        dataclasses.replace(OPEN_SORA, heads=5)
    with pytest.raises(ValueError, match="expected a sum of 16, a head's width, got"):
        dataclasses.replace(OPEN_SORA, rope_widths=(4, 4, 4))
