import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from models.mmdit.config import SIZES
from models.mmdit.key_names import LAYOUTS
from models.mmdit.params import abstract_params, load, sources
from scripts._mmdit_goldens import MMDIT, mmdit_weight
from sdq.rules import flatten
from sdq.tensor_files import open_tensors, save_tensors
from tests.models.mmdit.test_parity import checkpoint, golden

TENSORS = {
    ("open-sora-2.0", "open-sora"): 1082,
    ("open-sora-2.0", "flux"): 778,
    ("hunyuanvideo", "hunyuan"): 856,
    ("hunyuanvideo", "diffusers"): 1264,
}
RELEASED = (  # Open-Sora 2.0's file, blocks 0
    [f"{name}.{kind}" for name in ("img_in", "txt_in", "cond_in") for kind in ("weight", "bias")]
    + [
        f"{name}.{layer}.{kind}"
        for name in ("time_in", "vector_in")
        for layer in ("in_layer", "out_layer")
        for kind in ("weight", "bias")
    ]
    + [
        f"double_blocks.0.{stream}_{layer}.{kind}"
        for stream in ("img", "txt")
        for layer in (
            *("mod.lin", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj"),
            *("mlp.0", "mlp.2"),
        )
        for kind in ("weight", "bias")
    ]
    + [
        f"double_blocks.0.{stream}_attn.norm.{which}_norm.scale"
        for stream in ("img", "txt")
        for which in ("query", "key")
    ]
    + [
        f"single_blocks.0.{layer}.{kind}"
        for layer in ("q_proj", "k_proj", "v_mlp", "linear2", "modulation.lin")
        for kind in ("weight", "bias")
    ]
    + [f"single_blocks.0.norm.{which}_norm.scale" for which in ("query", "key")]
    + [
        f"final_layer.{layer}.{kind}"
        for layer in ("linear", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    ]
)


def names(config, layout):
    depth = {path: leaf.shape[0] for path, leaf in flatten(abstract_params(config)).items()}
    found = sources(config, layout)
    assert found.keys() == depth.keys()
    return {name for path, source in found.items() for name in source.names(depth[path])}


@pytest.mark.parametrize("size, layout", TENSORS)
def test_published_sizes_have_their_tensors(size, layout):
    assert len(names(SIZES[size], layout)) == TENSORS[size, layout]


def test_names_of_the_release_of_open_sora():
    config = dataclasses.replace(SIZES["open-sora-2.0"], double_blocks=1, single_blocks=1)
    assert names(config, "open-sora") == set(RELEASED)


@pytest.fixture
def stored(tmp_path):
    """Tensors of a layout of a case, and a function that loads other tensors as that."""

    def of(name, layout):
        path = tmp_path / "x.safetensors"
        tensors = open_tensors(checkpoint(MMDIT[name], layout, golden(name), path))
        return {name: tensors[name] for name in tensors}

    return of


def loaded(case, tensors, folder, **options):
    save_tensors(tensors, folder / "y.safetensors")
    return load(folder / "y.safetensors", MMDIT[case].config, **options)


@pytest.mark.parametrize(
    "case, layout", [("open-sora", "open-sora"), ("flux", "flux"), ("hunyuanvideo", "hunyuan")]
)
def test_every_difference_is_in_one_error(stored, tmp_path, case, layout):
    tensors = stored(case, layout)
    out = "double_blocks.{}.img_mlp.fc2" if layout == "hunyuan" else "double_blocks.{}.img_mlp.2"
    del tensors[out.format(1) + ".bias"]
    fused = "v_mlp" if layout == "open-sora" else "linear1"
    tall = tensors[f"single_blocks.2.{fused}.bias"]
    tensors[f"single_blocks.2.{fused}.bias"] = np.concatenate([tall, tall[:7]])
    tensors["single_blocks.1.norm_added_q.weight"] = np.zeros(3, np.float32)
    tensors["final_layer.linear.weight"] = np.zeros((48, 5), np.float32)
    with pytest.raises(ValueError) as error:
        loaded(case, tensors, tmp_path)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "! final_layer.linear.weight: expected [48, 16], got [5, 48]",
        f"! single_blocks.{{}}.{fused}.bias: expected [192], got [199] (blocks 2)",
        "+ single_blocks.{}.norm_added_q.weight: not a weight of this model (blocks 1)",
        f"- {out}.bias: missing (blocks 1)",
    ]


def test_blocks_of_the_refiner_are_folded_too(stored, tmp_path):
    tensors = stored("hunyuanvideo", "hunyuan")
    block = "txt_in.individual_token_refiner.blocks.{}.norm1.weight"
    for n in range(2):
        del tensors[block.format(n)]
    with pytest.raises(ValueError, match="missing") as error:
        loaded("hunyuanvideo", tensors, tmp_path)
    assert str(error.value).splitlines()[1:] == [f"  - {block}: missing (blocks 0-1)"]


def test_pairs_of_rotary_embedding_can_be_told(stored, tmp_path):
    """The release's are half-split; a checkpoint with its names need not be."""
    tensors = stored("open-sora", "open-sora")
    released, told, otherwise = (
        loaded("open-sora", tensors, tmp_path, **options)
        for options in ({}, {"half_split": True}, {"half_split": False})
    )
    jax.tree.map(np.testing.assert_array_equal, released, told)
    released, otherwise = flatten(released), flatten(otherwise)
    for path in released:
        turned = path.split("/")[-2] in ("q", "k", "norm_q", "norm_k")
        assert (released[path] != otherwise[path]).any() == turned, path
    stored_scale = tensors["single_blocks.0.norm.key_norm.scale"]
    np.testing.assert_array_equal(otherwise["single_blocks/norm_k/scale"][0], stored_scale)
    scale = released["single_blocks/norm_k/scale"][0]
    np.testing.assert_array_equal(scale[0::2], stored_scale[:8])
    np.testing.assert_array_equal(scale[1::2], stored_scale[8:])


def test_the_last_layer_is_swapped_for_diffusers_alone(stored, tmp_path):
    found = [
        loaded("flux", stored("flux", layout), tmp_path)["head_modulation"]["bias"]
        for layout in ("flux", "diffusers")
    ]
    np.testing.assert_array_equal(*found)
    theirs = mmdit_weight("norm_out.linear.bias", (96,))  # scale, shift
    np.testing.assert_array_equal(found[0], np.concatenate([theirs[48:], theirs[:48]]))


def test_leaves_pass_through_a_function(stored, tmp_path):
    seen = {}

    def leaf(path, array):
        seen[path] = array.shape
        return array

    loaded("hunyuanvideo", stored("hunyuanvideo", "hunyuan"), tmp_path, leaf=leaf)
    abstract = flatten(abstract_params(MMDIT["hunyuanvideo"].config))
    assert seen == {path: shape.shape for path, shape in abstract.items()}
    shapes = json.loads(str(golden("hunyuanvideo")["shapes"]))
    assert sum(map(math.prod, seen.values())) == sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_without_such_models_is_refused(layout):
    for size, there in (("open-sora-2.0", "flux open-sora"), ("hunyuanvideo", "hunyuan diffusers")):
        if layout not in there.split():
            with pytest.raises(ValueError, match=f"no checkpoint of the {layout} layout has"):
                sources(SIZES[size], layout)


def test_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no MMDiT: holds none of double_blocks.*, but a, \.\.\."):
        loaded("flux", {"a": np.zeros(3, np.float32)}, tmp_path)
