"""Quantised checkpoints back in the names, shapes and dtypes of what they were made of."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest

import sdq
from models import checkpoints
from models.common import recipes
from models.common.dequantize_files import dequantize_files, groups_of
from models.common.source_table import table_of
from models.families import family_of
from models.mmdit.config import SIZES as MMDIT_SIZES
from models.wan.config import SIZES as WAN_SIZES
from scripts._mmdit_goldens import MMDIT
from scripts.make_goldens import WAN
from sdq.cli import main
from sdq.rules import flatten
from sdq.tensor_files import open_tensors, save_tensors
from tests.models.mmdit import test_parity as mmdit
from tests.models.wan import test_parity as wan

KEEP = recipes.Recipe(name=recipes.KEEP)
SOURCES = [
    ("wan", "i2v-norms-1", "original"),
    ("wan", "i2v-norms-1", "diffusers"),
    ("mmdit", "flux", "flux"),  # fused projections
    ("mmdit", "flux", "diffusers"),  # halves swapped
    ("mmdit", "open-sora", "open-sora"),  # halves of heads in rotary embedding
    ("mmdit", "hunyuanvideo", "hunyuan"),  # a refiner, patches as a convolution
    ("mmdit", "hunyuanvideo", "diffusers"),
]
QUICK = [
    pytest.param(*source, id="-".join(source), marks=() if n == 1 else pytest.mark.slow)
    for n, source in enumerate(SOURCES)
]
TINY_WAN = ("wan", "i2v-norms-1", "diffusers")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Writes a tiny model of bf16 and float32 tensors, whose config is one of the published."""

    def made(family, case, layout):
        parity, cases = (wan, WAN) if family == "wan" else (mmdit, MMDIT)
        sizes = WAN_SIZES if family == "wan" else MMDIT_SIZES
        monkeypatch.setitem(sizes, "tiny", cases[case].config)
        path = tmp_path / "published.safetensors"
        parity.checkpoint(cases[case], layout, parity.golden(case), path)
        tensors = {
            name: x.astype(ml_dtypes.bfloat16) if x.ndim > 1 else x
            for name, x in open_tensors(path).items()
        }
        save_tensors(tensors, path)
        return path

    return made


def assert_same_tensors(path, expected):
    got, expected = open_tensors(path), open_tensors(expected)
    assert set(got) == set(expected)
    for name in expected:
        assert got.dtype(name) == expected.dtype(name), name
        assert got.shape(name) == expected.shape(name), name
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def in_memory(path, rules):
    """The model, its quantised parameters, and how its tensors are written."""
    family, tensors = family_of("tiny"), open_tensors(path)
    config = family.sizes["tiny"]
    params = family.params.load(path, config)
    params = sdq.quantize_params(params, sdq.resolve(rules, params))
    sources = family.params.sources(config, family.params.layout_of(tensors))
    leaves = flatten(params)
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    depths = {name: shape[0] for name, shape in shapes.items() if shape}
    groups = groups_of(shapes, sources, table_of(tensors, sources, depths))

    def write(out):
        dequantize_files(leaves.__getitem__, groups, sources, out, metadata={}, stem="x")
        return out

    return params, write


@pytest.mark.parametrize("source", SOURCES, ids="-".join)
def test_layouts_are_undone_bit_for_bit(source, published, tmp_path):
    path = published(*source)
    _, write = in_memory(path, [sdq.Rule(".*", None)])
    assert_same_tensors(write(tmp_path / "out.safetensors"), path)


@pytest.mark.parametrize("source", SOURCES, ids="-".join)
def test_what_is_written_loads_dequantised(source, published, tmp_path):
    path = published(*source)
    rules = [sdq.Rule(r".*blocks/.*/kernel", "int4", axis=-2), sdq.Rule(".*", None)]
    params, write = in_memory(path, rules)
    file = write(tmp_path / "out.safetensors")
    family = family_of("tiny")
    loaded = family.params.load(file, family.sizes["tiny"])
    expected = sdq.dequantize_params(params)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    before, after = open_tensors(path), open_tensors(file)
    assert {name: after.dtype(name) for name in after} == {n: before.dtype(n) for n in before}
    assert any((after[name] != before[name]).any() for name in before)


def whole_way(path, recipe, folder):
    checkpoints.quantize(path, "tiny", recipe, folder / "q")
    (file,) = checkpoints.dequantize(folder / "q", folder / "out")
    assert file == folder / "out" / "published.safetensors"
    return file


@pytest.mark.parametrize("family, case, layout", QUICK)
def test_what_was_converted_comes_back_bit_for_bit(family, case, layout, published, tmp_path):
    path = published(family, case, layout)
    assert_same_tensors(whole_way(path, KEEP, tmp_path), path)


@pytest.mark.parametrize("family, case, layout", QUICK)
@pytest.mark.parametrize("recipe", ["plain", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_what_was_quantised_comes_back_dequantised(
    family, case, layout, recipe, published, tmp_path
):
    file = whole_way(published(family, case, layout), recipes.named(recipe), tmp_path)
    model = family_of("tiny")
    loaded = model.params.load(file, model.sizes["tiny"])
    expected = sdq.dequantize_params(sdq.load(tmp_path / "q"))
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    metadata = open_tensors(file).metadata
    assert metadata["format"] == "pt" and metadata["recipe"] == recipe


def test_blocks_that_differ_in_dtype_and_tensors_that_are_not_read(published, tmp_path):
    path = published(*TINY_WAN)
    tensors = dict(open_tensors(path))
    name = "blocks.1.attn1.norm_q.weight"
    tensors[name] = tensors[name].astype(np.float16)
    ignored = {"blocks.0.attn2.norm_added_q.weight": np.ones(3, np.float32)}
    save_tensors(tensors | ignored, path)
    checkpoints.quantize(path, "tiny", KEEP, tmp_path / "kept")
    table = sdq.checkpoint.read_manifest(tmp_path / "kept").metadata["tensors"]
    assert table["blocks.{}.ffn.net.2.weight"] == ["bfloat16", [48, 64]]
    assert [name for name in table if re.search(r"blocks\.\d", name)] == [
        "blocks.0.attn1.norm_q.weight",
        name,
    ]
    (file,) = checkpoints.dequantize(tmp_path / "kept", tmp_path / "out.safetensors")
    save_tensors(tensors, path)
    assert_same_tensors(file, path)


def test_command_line(published, tmp_path, capsys):
    path, folder = published(*TINY_WAN), str(tmp_path / "q")
    assert main(["quantize", str(path), "--model", "tiny", "--out", folder]) == 0
    capsys.readouterr()
    out = tmp_path / "theirs"
    shards = ["--dequantize", "--shard-size", "3e-5"]
    assert main(["export", folder, "--out", str(out), *shards]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(
        rf"{re.escape(str(out))}/published\.safetensors\.index\.json: \S+ KiB in \d+ files\n", said
    )
    assert set(open_tensors(out)) == set(open_tensors(path))
    file = str(tmp_path / "ours.safetensors")
    assert main(["export", folder, "--out", file]) == 0
    assert re.fullmatch(rf"{re.escape(file)}: \S+ KiB in 1 file\n", capsys.readouterr().out)
    jax.tree.map(np.testing.assert_array_equal, sdq.load_export(file), sdq.load(folder))
    assert main(["inspect", file, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert main(["inspect", folder, "--json"]) == 0
    assert shown == json.loads(capsys.readouterr().out)
    assert main(["inspect", file]) == 0


def test_mistakes_are_one_line(published, tmp_path, capsys):
    path = published(*TINY_WAN)
    sdq.save(tmp_path / "tree", {"a": np.zeros(3, np.float32)})
    for command, message in [
        (["export", str(tmp_path), "--out", str(tmp_path / "x")], "no sdq checkpoint"),
        (["export", str(tmp_path / "tree"), "--out", str(path)], "exists; give another name"),
        (
            ["export", str(tmp_path / "tree"), "--dequantize", "--out", str(tmp_path / "x")],
            "its metadata does not tell of its source .*make it with `sdq quantize`",
        ),
        (["inspect", str(path)], "not an exported checkpoint"),
    ]:
        assert main(command) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.match(f"sdq {command[0]}: .*{message}", line), line
    assert not (tmp_path / "x").exists()


def test_interrupted_it_leaves_nothing(tmp_path, capsys, monkeypatch):
    sdq.save(tmp_path / "tree", {"a": np.zeros(3, np.float32)})

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sdq.checkpoint.verify_files", interrupted)
    assert main(["export", str(tmp_path / "tree"), "--out", str(tmp_path / "out")]) == 130
    assert "sdq export: interrupted; nothing is left" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
