"""Our MMDiT equals diffusers' Flux and HunyuanVideo, computed now. Needs the parity extra."""

import json
import math

import jax
import numpy as np
import pytest

from models.mmdit.config import SIZES
from models.mmdit.params import abstract_params, load
from scripts._mmdit_goldens import MMDIT, MMDIT_TOLERANCE, mmdit_golden
from tests.models.mmdit.test_params import names
from tests.models.mmdit.test_parity import checkpoint, golden, our_output

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra")
diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")


@pytest.fixture(scope="module", params=MMDIT)
def live(request):
    return request.param, mmdit_golden(MMDIT[request.param])


def test_equals_diffusers_in_every_layout(live, tmp_path):
    name, expected = live
    case = MMDIT[name]
    for layout in case.layouts:
        params = load(checkpoint(case, layout, expected, tmp_path / "x.safetensors"), case.config)
        found = our_output(case, params)
        np.testing.assert_allclose(found, expected["output"], atol=MMDIT_TOLERANCE)


def test_the_committed_golden_is_what_diffusers_computes(live):
    name, expected = live
    committed = golden(name)
    # torch's sums are in another order on another processor.
    np.testing.assert_allclose(committed["output"], expected["output"], atol=MMDIT_TOLERANCE)
    for key in ("shapes", "original"):
        assert json.loads(str(committed[key])) == json.loads(expected[key])


def test_the_converter_of_diffusers_reads_the_same_names(live):
    """All of diffusers' tensors, each once."""
    _, expected = live
    parts = [name for found in json.loads(expected["original"]).values() for name in found]
    assert sorted(name.removeprefix("-") for name in parts) == sorted(
        json.loads(expected["shapes"])
    )


def test_the_published_size_has_the_tensors_of_diffusers():
    with torch.device("meta"):
        theirs = diffusers.HunyuanVideoTransformer3DModel().state_dict()
    config = SIZES["hunyuanvideo"]
    assert names(config, "diffusers") == set(theirs)
    sizes = (math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))
    assert sum(sizes) == sum(tensor.numel() for tensor in theirs.values())
