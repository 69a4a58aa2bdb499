"""Published checkpoints to quantised ones: block by block, resumable, and strict."""

import json
import os
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import sdq
from models import checkpoints
from models.common import recipes
from models.wan.config import SIZES
from models.wan.params import load
from models.wan.sites import SITES
from scripts.make_goldens import WAN
from sdq.cli import main
from sdq.manifest import JOURNAL, read_manifest
from sdq.rules import is_qtensor
from sdq.tensor_files import TensorFiles, open_tensors, save_tensors
from tests.models.wan.test_parity import checkpoint, golden

CASE = "t2v-norms-0"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A tiny Wan in bf16, in diffusers' layout; its config is one of the published."""
    monkeypatch.setitem(SIZES, "tiny", WAN[CASE].config)
    path = checkpoint(WAN[CASE], "diffusers", golden(CASE), tmp_path / "wan.safetensors")
    narrow = {name: x.astype(ml_dtypes.bfloat16) for name, x in open_tensors(path).items()}
    save_tensors(narrow, path)
    return path


def quantised_whole(source, recipe):
    """Read at once, and the reports."""
    params = load(source, WAN[CASE].config)
    reports = []
    plan = recipes.plan(params, recipes.with_embedders(recipe, "int8"), SITES)
    return sdq.quantize_params(params, plan, on_leaf=reports.append), reports


@pytest.mark.parametrize("name", ["plain", "mxfp4", "nvfp4", "int4", "blockdialect"])
def test_the_same_as_in_memory(source, tmp_path, name):
    recipe, seen = recipes.named(name), []
    checkpoints.quantize(source, "tiny", recipe, tmp_path / "q", on_leaf=seen.append)
    expected, reports = quantised_whole(source, recipe)
    loaded = sdq.load(tmp_path / "q")
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    for got, want in zip(seen, reports, strict=True):
        assert (got.path, got.format, got.bytes_after) == (want.path, want.format, want.bytes_after)
        if want.sqnr_db is not None:
            assert got.sqnr_db == pytest.approx(want.sqnr_db, abs=1e-3)
    metadata = read_manifest(tmp_path / "q").metadata
    assert metadata["model"] == "tiny" and metadata["recipe"] == name


def test_interrupted_it_goes_on(source, tmp_path, monkeypatch):
    recipe, out = recipes.named("plain"), tmp_path / "q"
    seen = []

    def stop(report):
        seen.append(report.path)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.quantize(source, "tiny", recipe, out, on_leaf=stop)
    assert (out / JOURNAL).exists()
    read = []
    getitem = TensorFiles.__getitem__
    monkeypatch.setattr(
        TensorFiles, "__getitem__", lambda self, name: read.append(name) or getitem(self, name)
    )
    checkpoints.quantize(source, "tiny", recipe, out)
    again = set(read)
    assert 0 < len(again) < len(open_tensors(source))
    expected, _ = quantised_whole(source, recipe)
    jax.tree.map(np.testing.assert_array_equal, sdq.load(out), expected)
    assert not (out / JOURNAL).exists()


@pytest.mark.parametrize("embedders", ["bf16", "sdq32:16"])
def test_embedders_in_other_formats(source, tmp_path, embedders):
    checkpoints.quantize(source, "tiny", recipes.named("plain"), tmp_path / "q", embedders)
    loaded = sdq.load(tmp_path / "q")
    for name in ("time_projection", "text_in"):
        kernel = loaded[name]["kernel"]
        assert (str(kernel.format) if is_qtensor(kernel) else kernel.dtype) == {
            "bf16": jnp.bfloat16
        }.get(embedders, embedders)
    assert not is_qtensor(loaded["head"]["kernel"])


def test_another_checkpoint_does_not_go_on(source, tmp_path):
    recipe, out = recipes.named("plain"), tmp_path / "q"

    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.quantize(source, "tiny", recipe, out, on_leaf=stop)
    os.utime(source, ns=(1, 1))
    with pytest.raises(ValueError, match="holds an unfinished job"):
        checkpoints.quantize(source, "tiny", recipe, out)


def test_an_interrupt_says_how_to_go_on(source, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    command = ["quantize", str(source), "--model", "tiny", "--out", str(tmp_path / "q")]
    with monkeypatch.context() as during:
        during.setattr("models.common.quantize_files._powers", interrupted)
        assert main(command) == 130
    assert "sdq quantize: interrupted; the same command goes on" in capsys.readouterr().err
    assert main(command) == 0


def test_command_line(source, tmp_path, capsys):
    out = str(tmp_path / "q")
    command = ["quantize", str(source), "--model", "tiny", "--recipe", "plain", "--out", out]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    kernels = [leaf for leaf in document["leaves"] if leaf["format"] == "sdq32:16"]
    assert len(kernels) == 10 and all(leaf["sqnr_db"] > 15 for leaf in kernels)
    assert main(["convert", str(source), "--model", "tiny", "--out", str(tmp_path / "c")]) == 0
    params = load(source, WAN[CASE].config)
    jax.tree.map(np.testing.assert_array_equal, sdq.load(tmp_path / "c"), params)
    assert main(["inspect", out]) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (["--model", "tinny"], "unknown model 'tinny'.*did you mean tiny"),
        (["--model", "wan2.1-t2v-1.3b"], "not a checkpoint of this model"),
        (["--recipe", "semanticdialect"], "prepares weights by what the model does"),
        (["--recipe", "hadamard"], "prepares weights by what the model does"),
        (["--recipe", "plane"], "did you mean plain"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(source, tmp_path, capsys, change, message):
    command = ["quantize", str(source), "--model", "tiny", "--out", str(tmp_path / "q")]
    assert main([*command, *change]) == 2
    error = capsys.readouterr().err.splitlines()
    line = next(line for line in error if line.startswith("sdq quantize:"))
    assert re.search(message, line)
    assert not (tmp_path / "q").exists()


def test_nan_is_refused_and_named(source, tmp_path):
    tensors = {name: x.copy() for name, x in open_tensors(source).items()}
    tensors["blocks.1.ffn.net.2.weight"][0, 0] = np.nan
    tensors["proj_out.bias"][1] = np.inf
    save_tensors(tensors, source)
    every = r"NaN or Inf in blocks\.1\.ffn\.net\.2\.weight, proj_out\.bias"
    with pytest.raises(ValueError, match=every):
        checkpoints.quantize(source, "tiny", recipes.named("plain"), tmp_path / "q")
