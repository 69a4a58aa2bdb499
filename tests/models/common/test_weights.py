import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from models.common.weights import (
    Source,
    as_stored,
    in_turn,
    params_from_tensors,
    patch_kernel,
    transposed,
    undo,
    without_batch,
)
from sdq.tensor_files import open_tensors, save_tensors

SOURCES = {
    "blocks/up/kernel": Source("blocks.{}.0.weight", transposed),
    "table": Source("table", without_batch),
}
ABSTRACT = {
    "blocks": {"up": {"kernel": jax.ShapeDtypeStruct((3, 4, 2), jnp.float32)}},
    "table": jax.ShapeDtypeStruct((5,), jnp.float32),
}


@pytest.fixture
def stored(rng):
    blocks = {f"blocks.{n}.0.weight": rng.randn(2, 4).astype(np.float32) for n in range(3)}
    return blocks | {"table": rng.randn(1, 5).astype(np.float32)}


def read(stored, folder, **options):
    path = folder / "x.safetensors"
    save_tensors(stored, path)
    return params_from_tensors(open_tensors(path), SOURCES, ABSTRACT, **options)


def test_blocks_are_stacked_and_layouts_applied(stored, tmp_path):
    params = read(stored, tmp_path)
    for n in range(3):
        kernel = params["blocks"]["up"]["kernel"][n]
        np.testing.assert_array_equal(kernel, stored[f"blocks.{n}.0.weight"].T)
    np.testing.assert_array_equal(params["table"], stored["table"][0])


def test_every_difference_is_in_one_error(stored, tmp_path):
    del stored["blocks.0.0.weight"], stored["blocks.1.0.weight"]
    stored["blocks.2.0.weight"] = np.zeros((4, 2), np.float32)
    stored["table"] = np.zeros((), np.float32)
    for n in (0, 1, 2, 7):
        stored[f"blocks.{n}.norm.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError) as error:
        read(stored, tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("x.safetensors: not a checkpoint of this model:")
    assert [line.strip() for line in lines[1:]] == [
        "! blocks.{}.0.weight: expected [4, 2], got [2, 4] (blocks 2)",
        "! table: expected [5], got []",
        "+ blocks.{}.norm.weight: not a weight of this model (blocks 0-2, 7)",
        "- blocks.{}.0.weight: missing (blocks 0-1)",
    ]


def test_ignored_names_may_be_there(stored, tmp_path):
    extra = stored | {"blocks.1.unused": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="unused: not a weight of this model"):
        read(extra, tmp_path)
    read(extra, tmp_path, ignored=["blocks.{}.unused"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_nan_or_inf_comes_through(stored, tmp_path, bad):
    stored["blocks.1.0.weight"][0, 0] = bad
    with pytest.raises(ValueError, match=r"NaN or Inf in blocks\.1\.0\.weight"):
        read(stored, tmp_path)


def test_leaves_are_quantised_while_they_are_read(stored, tmp_path):
    def leaf(path, array):
        return sdq.quantize(array, "int8", axis=-2) if path.endswith("kernel") else array

    params = read(stored, tmp_path, leaf=leaf)
    assert isinstance(params["blocks"]["up"]["kernel"], sdq.QTensor)
    assert params["table"].shape == (5,)


def test_a_patch_kernel_reads_patches_in_our_order(rng):
    from models.common.layers import patchify

    weight = rng.randn(6, 3, 1, 2, 2).astype(np.float32)
    x = rng.randn(1, 2, 4, 4, 3).astype(np.float32)
    tokens = patchify(jnp.asarray(x), (1, 2, 2)) @ jnp.asarray(patch_kernel(weight))
    windows = x.reshape(1, 2, 1, 2, 2, 2, 2, 3)  # b, t, pt, h, ph, w, pw, c
    expected = np.einsum("btqhywxc,ocqyx->bthwo", windows, weight)
    np.testing.assert_allclose(tokens, expected.reshape(1, 8, 6), atol=1e-5)


@pytest.mark.parametrize(
    "layout, shape",
    [
        (as_stored, ()),
        (as_stored, (0, 3)),
        (transposed, (4, 6)),
        (without_batch, (1, 5, 2)),
        (patch_kernel, (4, 3, 1, 2, 2)),
        (in_turn(lambda x: np.roll(x, 2, axis=0), transposed), (4, 6)),  # no view
    ],
)
def test_layouts_are_undone(layout, shape, rng):
    stored = rng.randn(*shape) if shape else np.float64(3)
    tensor = np.full(shape, np.nan)
    undo(layout, layout(np.asarray(stored)), tensor)
    np.testing.assert_array_equal(tensor, stored)


def test_parts_of_a_tensor_are_undone_one_by_one(rng):
    stored, tensor = rng.randn(6, 4), np.full((6, 4), np.nan)
    for first in (0, 2, 4):
        rows = in_turn(lambda x, first=first: x[first : first + 2], transposed)
        undo(rows, rows(stored), tensor)
    np.testing.assert_array_equal(tensor, stored)


def test_parts_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected \[4, 6\], got \[1, 6\]"):
        undo(transposed, np.zeros((1, 6)), np.zeros((6, 4)))
