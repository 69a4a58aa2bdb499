"""A tree as safetensors: bit for bit, hashed, whole or not at all, and readable by others."""

import hashlib
import json
import pathlib
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import sdq
from sdq import Rule
from sdq.exported import export, is_exported, load_export, read_manifest
from sdq.rules import flatten, is_qtensor
from sdq.tensor_files import open_tensors

DOCUMENTATION = pathlib.Path(__file__).parents[2] / "docs" / "safetensors.md"
FORMATS = [
    *("sdq32:16", "dialectfp4:32", "e2m1:16", "mxfp4", "nvfp4", "nvfp4:one_level"),
    *("int4:32", "int4", "int8", "nf4:64"),
]


def tree(rng):
    kernel = jnp.asarray(rng.standard_normal((2, 40, 33)), jnp.float32)
    return {
        **{name.replace(":", "_"): sdq.quantize(kernel, name, axis=-2) for name in FORMATS},
        "blocks": {"odd": sdq.quantize(kernel[0, :21].astype(jnp.bfloat16), "sdq32:16", axis=0)},
        "head": jnp.asarray(rng.standard_normal((32, 3)), jnp.bfloat16),
        "step": jnp.int32(7),
        "mask": jnp.array([True, False, True]),
        "none": jnp.zeros((0, 3)),
    }


@pytest.fixture(scope="module")
def params():
    return tree(np.random.RandomState(0))


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    """A checkpoint, its reports and metadata."""
    folder = tmp_path_factory.mktemp("exported") / "checkpoint"
    sdq.save(folder, params, metadata={"model": "tiny"})
    return folder


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("out", ["x.safetensors", "folder"])
def test_a_checkpoint_comes_back_bit_for_bit(saved, params, tmp_path, out):
    seen = []
    (file,) = export(saved, tmp_path / out, on_part=lambda name, nbytes: seen.append(nbytes))
    assert file.parent in (tmp_path, tmp_path / "folder")
    assert_same(load_export(tmp_path / out), params)
    manifest, of_saved = read_manifest(tmp_path / out), sdq.checkpoint.read_manifest(saved)
    assert manifest.metadata == {"model": "tiny"} and manifest.written_by == of_saved.written_by
    assert sum(seen) == sum(entry.nbytes for entry in of_saved.leaves)
    assert [e.path for e in manifest.leaves] == [e.path for e in of_saved.leaves]


def test_a_tree_in_shards_comes_back_bit_for_bit(params, tmp_path):
    index, *shards = export(params, tmp_path, shard_size=5000, metadata={"a": 1})
    assert index.name == "model.safetensors.index.json" and len(shards) > 3
    assert [s.name for s in shards] == [
        f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))
    ]
    assert sorted(tmp_path.iterdir()) == sorted([index, *shards])
    for path in (index, tmp_path):
        assert_same(load_export(path), params)
    assert read_manifest(tmp_path).metadata == {"a": 1}
    held = sum(sum(x.nbytes for x in safetensors.numpy.load_file(s).values()) for s in shards)
    assert json.loads(index.read_text())["metadata"]["total_size"] == held


def test_a_lone_leaf(tmp_path):
    x = jnp.arange(3.0)
    export(x, tmp_path / "x.safetensors")
    assert_same(load_export(tmp_path / "x.safetensors"), x)


def test_codes_lie_low_nibble_first(tmp_path):
    """What docs/safetensors.md computes by hand, read with nothing but the file's bytes."""
    x = jnp.array([1.0, -2.0, 3.0, 0.0], jnp.float32)
    export({"x": sdq.quantize(x, "int4:4")}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    first, last = header["x.codes"]["data_offsets"]
    codes = data[8 + length + first : 8 + length + last]
    assert header["x.codes"]["shape"] == [2] and header["x.scales"]["dtype"] == "BF16"
    # 1, -2, 3, 0 by 3 / 7: 2, -5, 7, 0 -> nibbles 2, 0xb; 7, 0 -> low nibble first
    assert codes == bytes([0xB2, 0x07])
    assert data[8 + length :] == bytes([0xDB, 0x3E, 0xB2, 0x07])
    document = json.loads(header["__metadata__"]["sdq"])["body"]
    assert document["files"]["x.codes"] == [2, hashlib.sha256(codes).hexdigest()]
    assert document["leaves"][0]["arrays"] == {"codes": "x.codes", "scales": "x.scales"}


def test_the_reader_in_the_documentation_reads_every_format(params, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    reader: dict = {}
    exec(code, reader)
    (file,) = export(params, tmp_path / "x.safetensors")
    leaves = reader["read"](file)
    for path, leaf in flatten(params).items():
        exact = sdq.dequantize(leaf, jnp.float32) if is_qtensor(leaf) else leaf
        np.testing.assert_array_equal(leaves[path], np.asarray(exact), err_msg=path)


def test_numbers_are_aligned(params, tmp_path):
    (file,) = export(params, tmp_path / "x.safetensors")
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    itemsize = {"F32": 4, "I32": 4, "BF16": 2}
    for name, place in header.items():
        assert (8 + length + place["data_offsets"][0]) % itemsize.get(place["dtype"], 1) == 0, name


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 16
    file.write_bytes(data)


def test_a_flip_anywhere_is_found(tmp_path, rng):
    q = sdq.quantize(jnp.asarray(rng.standard_normal((4, 32)), jnp.float32), "sdq32:16")
    (file,) = export({"kernel": q, "bias": jnp.zeros(3)}, tmp_path / "x.safetensors")
    size = file.stat().st_size
    for at in [*range(0, size, 41), *range(size - 84, size)]:
        flip(file, at)
        with pytest.raises(ValueError, match=r"x\.safetensors: "):
            load_export(file)
        flip(file, at)
    flip(file, size - 1)
    with pytest.raises(
        sdq.CheckpointError, match=r"\(leaf '.*'\): contents changed.*copy it again"
    ):
        load_export(file)
    load_export(file, verify=False)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load_export(file)


def test_foreign_and_partial_files_are_refused(params, tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3)}, foreign)
    with pytest.raises(sdq.CheckpointError, match=r"not an exported checkpoint.*no 'sdq'"):
        load_export(foreign)
    _, first, *_ = export(params, tmp_path / "shards", shard_size=5000)
    with pytest.raises(sdq.CheckpointError, match=r"open all shards.*\n  - .*: missing"):
        load_export(first)
    with pytest.raises(FileNotFoundError):
        load_export(tmp_path / "nothing")
    other = {**dict(open_tensors(first)), "more": np.zeros(2, np.float32)}
    safetensors.numpy.save_file(other, first, open_tensors(first).metadata)
    with pytest.raises(sdq.CheckpointError, match=r"\+ more: not in the manifest"):
        load_export(first)


def test_shards_of_two_exports_do_not_mix(tmp_path, rng):
    def made(folder):
        x = jnp.asarray(rng.standard_normal((4, 64)), jnp.float32)
        return export({"a": x, "b": x}, tmp_path / folder, shard_size=1000)

    (_, *one), (_, *two) = made("one"), made("two")
    one[0].write_bytes(two[0].read_bytes())
    with pytest.raises(sdq.CheckpointError, match="contents changed"):
        load_export(tmp_path / "one")


@pytest.mark.parametrize(
    "out, options, message",
    [
        ("there.safetensors", {}, "there.safetensors exists"),
        ("full", {}, "full is not empty"),
        ("x.safetensors", {"shard_size": 100}, "one file has no shards"),
        ("new", {"shard_size": 0}, "expected bytes, got 0"),
    ],
)
def test_refusals_write_nothing(saved, tmp_path, out, options, message):
    (tmp_path / "there.safetensors").write_bytes(b"something else")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        export(saved, tmp_path / out, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(ValueError, match="x: safetensors files hold no numbers of type float8"):
        export({"x": jnp.zeros(3, jnp.float8_e4m3fn)}, tmp_path / "x.safetensors")
    q = sdq.quantize(jnp.ones(16), "int4")
    with pytest.raises(ValueError, match=r"two arrays would be the tensor 'a\.codes'"):
        export({"a": q, "a.codes": q.codes}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_goes(saved, tmp_path):
    left = tmp_path / ".model.safetensors.0123.tmp"
    left.write_bytes(b"half")
    (file,) = export(saved, tmp_path)
    assert list(tmp_path.iterdir()) == [file]


def test_damage_of_the_checkpoint_is_found_and_nothing_written(params, tmp_path):
    sdq.save(tmp_path / "checkpoint", {"head": params["head"]})
    file = next(f for f in (tmp_path / "checkpoint").rglob("head/c/*/*"))
    flip(file, 3)
    with pytest.raises(sdq.CheckpointError, match=r"leaf 'head'.*contents changed"):
        export(tmp_path / "checkpoint", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_what_is_exported_is_told_from_checkpoints(saved, tmp_path):
    (file,) = export(saved, tmp_path / "out")
    assert is_exported(file) and is_exported(file.parent)
    assert not is_exported(saved) and not is_exported(tmp_path / "nothing")


def test_rules_and_reports_are_not_needed(tmp_path, rng):
    """A tree straight from quantize_params."""
    params = {"kernel": jnp.asarray(rng.standard_normal((32, 8)), jnp.float32)}
    q = sdq.quantize_params(params, sdq.resolve([Rule(".*", "mxfp4")], params))
    export(q, tmp_path / "x.safetensors")
    assert_same(load_export(tmp_path / "x.safetensors"), q)
