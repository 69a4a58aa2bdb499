import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.wan.modeling import Wan
from models.wan.sites import SITES
from models.wan.smooth import smooth
from sdq.rules import flatten
from tests.models.wan.test_modeling import TINY, inputs, random_params


def watched(params):
    """The output, and every site's inputs `[blocks, B, S, K]`."""
    x, t, text, _ = inputs()
    model = Wan(TINY, dtype=jnp.float32)
    out, seen = jax.jit(
        lambda params: model.apply({"params": params}, x, t, text, mutable=["intermediates"])
    )(params)
    blocks = flatten(seen["intermediates"]["blocks"])
    return out, {site: blocks[site.removeprefix("blocks/") + "_input"] for site in SITES}


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_function_stays_and_the_inputs_become_even(alpha):
    params = random_params()
    before, inputs_before = watched(params)
    largest = {site: jnp.abs(x).max(axis=(1, 2)) for site, x in inputs_before.items()}
    after, inputs_after = watched(smooth(params, largest, alpha))
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4)
    site = "blocks/self_attn/o"  # each block has its own scales
    peaks = jnp.abs(inputs_after[site]).max(axis=(1, 2))
    if alpha == 1:
        np.testing.assert_allclose(peaks, 1.0, rtol=1e-3)
    else:
        rows = jnp.abs(params["blocks"]["self_attn"]["o"]["kernel"]).max(axis=-1)
        np.testing.assert_allclose(peaks, jnp.sqrt(largest[site] * rows), rtol=1e-3)
    down = "blocks/ffn/down"  # behind the GELU
    np.testing.assert_allclose(inputs_after[down], inputs_before[down], rtol=1e-2, atol=1e-4)


def test_a_dead_channel_stays_as_it_is():
    params = random_params()
    _, seen = watched(params)
    largest = {site: jnp.abs(x).max(axis=(1, 2)).at[:, 0].set(0) for site, x in seen.items()}
    after, _ = watched(smooth(params, largest))
    assert np.isfinite(after).all()
