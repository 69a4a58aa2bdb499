"""Our Wan equals diffusers' through the converter, in both key layouts (committed goldens)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.wan.modeling import Wan
from models.wan.params import LAYOUTS, load
from scripts.make_goldens import GOLDENS, WAN, WAN_TOLERANCE, wan_inputs, wan_weight
from sdq.tensor_files import save_tensors


def golden(name):
    with np.load(GOLDENS / f"wan-{name}.npz") as file:
        return dict(file)


def checkpoint(case, layout, golden, path):
    """A file in a key layout, with the random weights of the case."""
    tensors = {
        name: wan_weight(case, name, tuple(shape))
        for name, shape in json.loads(str(golden["shapes"])).items()
    }
    if layout == "original":
        names = json.loads(str(golden["original"]))
        tensors = {name: tensors[theirs] for name, theirs in names.items()}
    save_tensors(tensors, path)
    return path


def our_output(case, params):
    with jax.default_matmul_precision("highest"):
        inputs = {name: jnp.asarray(value) for name, value in wan_inputs(case).items()}
        model = Wan(case.config, dtype=jnp.float32)
        return np.asarray(jax.jit(model.apply)({"params": params}, **inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WAN)
def test_equals_the_golden(name, layout, tmp_path):
    case, expected = WAN[name], golden(name)
    params = load(checkpoint(case, layout, expected, tmp_path / "wan.safetensors"), case.config)
    assert np.abs(expected["output"]).max() > 0.5
    np.testing.assert_allclose(our_output(case, params), expected["output"], atol=WAN_TOLERANCE)


def test_the_goldens_see_positions_times_and_text():
    """A golden that does not depend on an input could not show a mistake in it."""
    case = WAN["i2v-norms-1"]
    inputs = wan_inputs(case)
    expected = golden("i2v-norms-1")["output"]
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    assert len({value.shape for value in inputs.values()}) == 4
