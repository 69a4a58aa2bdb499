import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.shapes.config import CONFIG
from models.shapes.modeling import Shapes
from models.shapes.params import WEIGHTS, load
from models.shapes.vocabulary import EXAMPLE, tokenize
from models.shapes.world import VIDEO
from sdq.rules import flatten
from sdq.tensor_files import open_tensors, save_tensors


@pytest.fixture(scope="module")
def params():
    return load(stressed=False)


def test_shipped_weights_are_small_bfloat16(params):
    leaves = flatten(params).values()
    assert 8e6 < sum(leaf.size for leaf in leaves) < 12e6
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert WEIGHTS.stat().st_size < 24e6


def test_stressors_leave_the_function_unchanged(params):
    stressed = load()
    x = jax.random.normal(jax.random.key(0), (1, *VIDEO))
    tokens = jnp.asarray(tokenize(EXAMPLE))[None]
    model = Shapes(CONFIG, dtype=jnp.float32)

    @jax.jit
    def run(params, sigma):
        out, seen = model.apply({"params": params}, x, sigma, tokens, mutable=["intermediates"])
        return out, seen["intermediates"]["dit"]["blocks"]

    for sigma in (0.95, 0.3):
        plain, plain_seen = run(params, jnp.array([sigma]))
        other, other_seen = run(stressed, jnp.array([sigma]))
        assert np.abs(plain).max() > 0.5
        np.testing.assert_allclose(other, plain, atol=1e-4)
        before, after = (
            [spikiness(flatten(seen)[name]) for name in STRESSED]
            for seen in (plain_seen, other_seen)
        )
        print(before, after)
        assert np.mean(after) > 1.5 * np.mean(before)


STRESSED = (
    "self_attn/qkv_input",
    "self_attn/o_input",
    "cross_attn/q_input",
    "cross_attn/kv_input",
    "cross_attn/o_input",
    "ffn/up_input",
)


def spikiness(x):
    """Largest channel over the median one."""
    largest = np.abs(np.asarray(x)).max(axis=(0, 1, 2))
    return largest.max() / np.median(largest)


def test_another_checkpoint_is_refused_with_every_difference(tmp_path):
    tensors = dict(open_tensors(WEIGHTS))
    del tensors["dit/head/bias"]
    tensors["dit/extra"] = np.zeros(3, np.float32)
    tensors["dit/head/kernel"] = tensors["dit/head/kernel"][:, :5]
    save_tensors(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "other.safetensors")
    for line in (
        "- dit/head/bias: missing",
        "+ dit/extra: not a weight of this model",
        "! dit/head/kernel: expected [256, 384], got [256, 5]",
    ):
        assert line in str(error.value)


def test_a_weight_that_is_nan_is_named(tmp_path):
    tensors = dict(open_tensors(WEIGHTS))
    tensors["dit/text_in/bias"] = np.full_like(tensors["dit/text_in/bias"], np.nan)
    save_tensors(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="NaN or Inf in dit/text_in/bias"):
        load(tmp_path / "nan.safetensors")


def test_a_truncated_file_is_refused(tmp_path):
    file = tmp_path / "short.safetensors"
    file.write_bytes(WEIGHTS.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: no such file"):
        load(tmp_path / "nowhere.safetensors")
