import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from models.common.layers import Ops, matmul
from models.common.quantizer import Keep
from models.wan.config import SIZES, WanConfig
from models.wan.modeling import Wan
from pallas_kernels import computed, prepared

TINY = WanConfig(
    width=48, heads=4, layers=3, ffn_width=64, in_channels=4, out_channels=4, text_width=16
)
PUBLISHED = {  # parameters of diffusers' WanTransformer3DModel of these sizes
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "wan2.1-i2v-14b": 16_394_878_784,
    "wan2.2-t2v-a14b": 14_288_491_584,
    "wan2.2-i2v-a14b": 14_288_901_184,
    "wan2.2-ti2v-5b": 4_999_787_712,
}


def inputs(config=TINY, batch=2):
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (batch, 2, 4, 6, config.in_channels))
    text = jax.random.normal(keys[1], (batch, 7, config.text_width))
    image = config.image_width and jax.random.normal(keys[2], (batch, 5, config.image_width))
    return x, jnp.linspace(100, 900, batch), text, image


@functools.cache
def random_params(config=TINY):
    """All N(0, 0.1): gates that start at zero would hide mistakes."""
    shapes = jax.eval_shape(Wan(config).init, jax.random.key(0), *inputs(config))["params"]
    random = np.random.RandomState(2)
    with jax.ensure_compile_time_eval():  # arrays, also when first asked for inside of jit
        return jax.tree.map(lambda leaf: jnp.float32(0.1 * random.randn(*leaf.shape)), shapes)


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_their_parameter_counts(name):
    shapes = jax.eval_shape(Wan(SIZES[name]).init, jax.random.key(0), *inputs(SIZES[name]))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]


def test_per_token_timesteps_equal_one_for_all():
    params, (x, t, text, _) = random_params(), inputs()
    model = Wan(TINY, dtype=jnp.float32)
    tokens = 2 * 2 * 3
    one = model.apply({"params": params}, x, t, text)
    each = model.apply({"params": params}, x, jnp.repeat(t[:, None], tokens, 1), text)
    np.testing.assert_allclose(one, each, atol=1e-5)


def test_intermediates_come_on_request_for_every_block():
    params, (x, t, text, _) = random_params(), inputs()
    _, extra = Wan(TINY).apply({"params": params}, x, t, text, mutable=["intermediates"])
    found = {path: leaf.shape for path, leaf in sdq.rules.flatten(extra["intermediates"]).items()}
    video, words = (3, 2, 12, 48), (3, 2, 7, 48)
    assert found == {
        "blocks/self_attn/qkv_input": video,
        "blocks/self_attn/o_input": video,
        "blocks/cross_attn/q_input": video,
        "blocks/cross_attn/kv_input": words,
        "blocks/cross_attn/o_input": video,
        "blocks/ffn/up_input": video,
        "blocks/ffn/down_input": (3, 2, 12, 64),
        "blocks/output": video,
    }


def test_every_linear_goes_through_the_ops():
    counts = {"matmul": 0, "attention": 0}
    sites = []

    def counted_matmul(x, kernel, **options):
        counts["matmul"] += 1
        return matmul(x, kernel, **options)

    def counted_attention(q, k, v):
        counts["attention"] += 1
        q, k = prepared(q), prepared(k)
        return q + jnp.mean(k, 1, keepdims=True) + jnp.mean(v, 1, keepdims=True)

    class Noting(Keep):
        def quantize(self, x, site, state):
            sites.append(site)
            return computed(x)

    ops = Ops(matmul=counted_matmul, attention=counted_attention, quantizer=Noting())
    params, (x, t, text, _) = random_params(), inputs()
    jax.eval_shape(lambda: Wan(TINY, ops).apply({"params": params}, x, t, text))
    traces = sites.count("blocks/self_attn/qkv")  # the scanned block is traced once or more
    assert counts["matmul"] == 7 + 10 * traces and counts["attention"] == 2 * traces
    assert len(sites) == 7 + 7 * traces


def products(config):
    """Matrix products in the traced program."""
    params, (x, t, text, _) = random_params(config), inputs(config)
    program = jax.make_jaxpr(lambda p: Wan(config).apply({"params": p}, x, t, text))(params)
    return str(program).count("dot_general")


def test_blocks_compile_as_one():
    assert products(TINY) == products(WanConfig(**{**as_dict(TINY), "layers": 9}))


def as_dict(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_quantised_tree_runs_in_the_same_model():
    params, (x, t, text, _) = random_params(), inputs()
    rules = [sdq.Rule(r"blocks/.*/kernel", "sdq32:16"), sdq.Rule(r".*", None)]
    quantised = sdq.quantize_params(params, sdq.resolve(rules, params))
    run = jax.jit(lambda p: Wan(TINY, dtype=jnp.float32).apply({"params": p}, x, t, text))
    expected = run(sdq.dequantize_params(quantised))
    np.testing.assert_allclose(run(quantised), expected, atol=2e-6)  # another order of sums
    assert 10 < sdq.sqnr_db(run(params), run(quantised)) < 40


def test_image_embeddings_are_asked_for():
    x, t, text, _ = inputs()
    with pytest.raises(ValueError, match="takes no image embeddings"):
        Wan(TINY).apply({"params": random_params()}, x, t, text, text)
    config = WanConfig(**{**as_dict(TINY), "image_width": 24})
    with pytest.raises(ValueError, match="needs image embeddings"):
        Wan(config).apply({"params": random_params(config)}, x, t, text)


def test_width_must_fit_the_heads():
    with pytest.raises(ValueError, match="width 50 must be a multiple of twice the 4 heads"):
        WanConfig(width=50, heads=4, layers=1, ffn_width=8)
