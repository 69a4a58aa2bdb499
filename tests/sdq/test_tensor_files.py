import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sdq.tensor_files import open_tensors, save_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2], ml_dtypes.bfloat16),
}


def save_shards(folder, weight_map=None):
    """Each tensor in a file of its own, and their index."""
    for name, tensor in TENSORS.items():
        save_tensors({name: tensor}, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": weight_map or {name: f"{name}.safetensors" for name in TENSORS}})
    )
    return index


def test_a_file_comes_back_as_it_was(tmp_path):
    path = tmp_path / "new folder" / "x.safetensors"
    save_tensors(TENSORS, path, {"made by": "a test"})
    tensors = open_tensors(path)
    assert set(tensors) == set(TENSORS) and tensors.metadata == {"made by": "a test"}
    for name, tensor in TENSORS.items():
        assert tensors.shape(name) == tensor.shape and tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(tensors[name], tensor)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_transposed_array_is_stored_in_its_own_order(tmp_path):
    save_tensors({"a": TENSORS["a"].T}, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(open_tensors(tmp_path / "x.safetensors")["a"], TENSORS["a"].T)


def test_shards_open_by_index_or_folder(tmp_path):
    for path in (save_shards(tmp_path), tmp_path):
        tensors = open_tensors(path)
        assert len(tensors) == 2
        np.testing.assert_array_equal(tensors["a"], TENSORS["a"])


def test_a_folder_with_one_file_opens(tmp_path):
    save_tensors(TENSORS, tmp_path / "x.safetensors")
    assert set(open_tensors(tmp_path)) == set(TENSORS)


def test_an_unclear_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file"):
        open_tensors(tmp_path)
    for name in "xy":
        save_tensors(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"several candidates \(x.safetensors, y.safetensors\)"):
        open_tensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    index = save_shards(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shards are missing: .*b\.safetensors"):
        open_tensors(index)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    index = save_shards(tmp_path, {"a": "a.safetensors", "c": "b.safetensors"})
    with pytest.raises(ValueError) as error:
        open_tensors(index)
    assert "- c: listed, not in the shard" in str(error.value)
    assert "+ b: in the shard, not listed" in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    index = save_shards(tmp_path)
    index.write_text(text)
    with pytest.raises(ValueError, match="not an index of safetensors shards"):
        open_tensors(index)


@pytest.mark.parametrize("keep", [0, 5, -3])
def test_a_damaged_file_is_named(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_tensors(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x\.safetensors: damaged or no safetensors file"):
        open_tensors(path)


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(TENSORS, path)

    def full(tensors, file, metadata):
        file.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*x\.safetensors: .*No space left on device"):
        save_tensors({"other": TENSORS["a"]}, path)
    assert set(open_tensors(path)) == set(TENSORS)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
