"""Tensors that come one by one: all of them, as announced, or no file."""

import errno
import hashlib
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest

from sdq.tensor_files import DTYPES, open_tensors
from sdq.tensor_writer import write_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2], ml_dtypes.bfloat16),
    "c": np.arange(5, dtype=np.uint8),
}


def structs(tensors):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()}


def write(out, tensors=TENSORS, announced=TENSORS, **options):
    options = {"metadata": {"made by": "a test"}, **options}
    return write_tensors(out, structs(announced), iter(tensors.items()), **options)


def assert_holds(path, expected):
    tensors = open_tensors(path)
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert tensors.dtype(name) == tensor.dtype and tensors.shape(name) == tensor.shape
        np.testing.assert_array_equal(tensors[name], tensor)


def test_in_any_order_and_transposed(tmp_path):
    tensors = {name: TENSORS[name] for name in "cab"}
    tensors["a"] = np.asfortranarray(tensors["a"])
    assert write(tmp_path / "new" / "x.safetensors", tensors) == [tmp_path / "new/x.safetensors"]
    assert_holds(tmp_path / "new", TENSORS)
    assert open_tensors(tmp_path / "new").metadata == {"made by": "a test"}


@pytest.mark.parametrize("size, files", [(33, ["abc"]), (28, ["ab", "c"]), (1, ["a", "b", "c"])])
def test_shards_are_cut_by_size(tmp_path, size, files):
    written = write(tmp_path, shard_size=size, stem="wan")
    assert_holds(tmp_path, TENSORS)
    if len(files) == 1:
        assert [file.name for file in written] == ["wan.safetensors"]
        return
    index, *shards = written
    assert index.name == "wan.safetensors.index.json"
    count = len(files)
    assert [s.name for s in shards] == [
        f"wan-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)
    ]
    assert json.loads(index.read_text()) == {
        "metadata": {"total_size": 33},
        "weight_map": {n: s.name for names, s in zip(files, shards, strict=True) for n in names},
    }


def test_every_dtype(tmp_path):
    tensors = {name: np.array([[0, 1]]).astype(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": np.array(3.0), "none": np.zeros((0, 3))}
    write(tmp_path, tensors, tensors)
    assert_holds(tmp_path, tensors)


def test_digests_in_metadata(tmp_path):
    write(tmp_path, metadata=dict)
    digests = {n: hashlib.sha256(x.tobytes()).hexdigest() for n, x in TENSORS.items()}
    assert open_tensors(tmp_path).metadata == digests


@pytest.mark.parametrize(
    "tensors, options, message",
    [
        ({"a": TENSORS["a"]}, {}, "tensors that did not come: b, c"),
        ({"d": TENSORS["a"]}, {}, "d: no such tensor is to come"),
        ({"a": TENSORS["b"]}, {}, r"a: expected float32\[2, 3\], got bfloat16\[2\]"),
        (TENSORS, {"metadata": lambda d: {"x": d["a"].strip("0")}}, "as many bytes"),
    ],
)
def test_what_was_not_announced_leaves_no_file(tmp_path, tensors, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, tensors, **options)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_and_leaves_no_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*safetensors: no space; free some"):
        write(tmp_path, shard_size=1)
    assert not list(tmp_path.iterdir())
