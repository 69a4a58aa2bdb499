import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.wan.modeling import Wan
from models.wan.rescale import SITES, rescale
from sdq.rules import flatten
from tests.models.wan.test_modeling import TINY, inputs, random_params


@pytest.fixture
def scales(rng):
    """Powers of two, others for each block where blocks have their own."""
    shapes = {site: (TINY.layers, 48) if own else (48,) for site, own in SITES.items()}
    return {
        site: jnp.asarray(2.0 ** rng.randint(-3, 4, shape), jnp.float32)
        for site, shape in shapes.items()
    }


def test_the_function_stays_and_every_input_is_scaled(scales):
    params, (x, t, text, _) = random_params(), inputs()

    @jax.jit
    def run(params):
        model = Wan(TINY, dtype=jnp.float32)
        return model.apply({"params": params}, x, t, text, mutable=["intermediates"])

    (before, seen), (after, scaled) = run(params), run(rescale(params, scales))
    np.testing.assert_allclose(after, before, atol=2e-4)
    seen, scaled = (flatten(found["intermediates"]) for found in (seen, scaled))
    for site, s in scales.items():
        s = jnp.broadcast_to(s, (TINY.layers, 48))[:, None, None]
        expected = seen[f"{site}_input"] * s
        np.testing.assert_allclose(scaled[f"{site}_input"], expected, rtol=2e-3, atol=2e-3)


def test_every_site_needs_its_scales(scales):
    scales.pop("blocks/ffn/up")
    with pytest.raises(ValueError, match="scales: expected"):
        rescale(random_params(), scales)
