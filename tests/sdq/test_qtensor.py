import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from sdq import format_table, qtensor

EVERY_FORMAT = pytest.mark.parametrize("name", format_table.FORMATS)


@pytest.fixture
def q(rng):
    return sdq.quantize(jnp.asarray(rng.standard_normal((4, 40)), jnp.float32), "sdq32:16")


def test_properties(q):
    assert q.shape == (4, 40) and q.ndim == 2 and q.size == 160
    assert q.nbytes == 4 * (24 + 3 + 1)  # 48 codes, 3 metadata bytes and an exponent a row
    assert q.bits_per_element == 8 * q.nbytes / 160
    assert q.format == sdq.format("sdq32:16") and q.dtype == np.float32
    assert repr(q) == "QTensor(sdq32:16, shape=(4, 40), axis=-1, dtype=float32)"


def test_frozen(q):
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.length = 3


@EVERY_FORMAT
def test_parts_are_the_expected_ones(name, rng):
    q = sdq.quantize(jnp.asarray(rng.standard_normal((2, 3, 50)), jnp.float32), name)
    expected = qtensor.expected_parts(q.format, (2, 3), 50)
    assert {n: (p.shape, p.dtype) for n, p in q.parts.items()} == {
        n: (p.shape, p.dtype) for n, p in expected.items()
    }
    assert all(part.ndim == q.ndim for part in q.parts.values())


@EVERY_FORMAT
def test_pack_is_the_inverse_of_unpack(name, rng):
    q = sdq.quantize(jnp.asarray(rng.standard_normal((3, 50)), jnp.float32), name)
    again = qtensor.pack(qtensor.unpack(q), fmt=q.format, length=50, axis=-1, dtype=q.dtype)
    jax.tree.map(np.testing.assert_array_equal, q, again)


def test_is_a_pytree_that_keeps_its_static_part(q):
    leaves, tree = jax.tree.flatten(q)
    assert len(leaves) == 3
    assert jax.tree.unflatten(tree, leaves).format == q.format
    names = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert names == [".codes", ".scales", ".outer"]


def replaced(q, **parts):
    return dataclasses.replace(q, **parts)


BROKEN = {
    "axis: expected in": lambda q: replaced(q, axis=1),
    r"codes: expected uint8\[4, 24\]": lambda q: replaced(q, codes=q.codes[:, :-1]),
    r"scales: expected uint8\[4, 3\].*got uint8\[4, 2\]": lambda q: replaced(
        q, scales=q.scales[:, :-1]
    ),
    r"scales: .*got int32": lambda q: replaced(q, scales=q.scales.astype(jnp.int32)),
    r"outer: expected int8\[4, 1\].*got int8\[4\]": lambda q: replaced(q, outer=q.outer[:, 0]),
    "needs outer scales, got None": lambda q: replaced(q, outer=None),
    "has no outer scales, got an array": lambda q: replaced(
        sdq.quantize(jnp.ones((4, 32)), "mxfp4"), outer=jnp.ones((4, 1))
    ),
    "padding beyond element 40": lambda q: replaced(q, codes=q.codes.at[0, -1].set(0x77)),
    "row exponent lies below -125": lambda q: replaced(q, outer=q.outer.at[0].set(-126)),
    "block exponent lies below -125": lambda q: replaced(
        q, outer=q.outer * 0 - 125, scales=q.scales | 0xE0
    ),
    "a dialect id is not in book 'dialectfp4'": lambda q: replaced(
        s := sdq.quantize(jnp.ones((4, 16)), "dialectfp4:16"), scales=s.scales * 0 + 2
    ),
    "a code is -8": lambda q: replaced(
        s := sdq.quantize(jnp.ones((1, 32)), "int4:32"), codes=s.codes * 0 + 8
    ),
    "a code is -128": lambda q: replaced(
        s := sdq.quantize(jnp.ones((1, 32)), "int8"), codes=s.codes * 0 - 128
    ),
    "a scale is negative": lambda q: replaced(
        s := sdq.quantize(jnp.ones((1, 64)), "nf4:64"), scales=-s.scales
    ),
    "a block scale is negative": lambda q: replaced(
        s := sdq.quantize(jnp.ones((1, 16)), "nvfp4"), scales=s.scales | 0x80
    ),
    "a matrix scale is not a positive number": lambda q: replaced(
        s := sdq.quantize(jnp.ones((1, 16)), "nvfp4"), outer=-s.outer
    ),
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_validate_names_the_broken_invariant(complaint, q):
    sdq.validate(q)
    with pytest.raises(ValueError, match=complaint):
        sdq.validate(BROKEN[complaint](q))


def test_validate_accepts_a_bad_row(rng):
    x = rng.standard_normal((3, 64)).astype(np.float32)
    x[1, 1] = np.nan
    for name in format_table.FORMATS:
        sdq.validate(sdq.quantize(jnp.asarray(x), name))


def mesh():
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("spec", "codes", "outer"),
    [
        (("a", "b"), ("b", "a"), ("b", None)),
        ((None, ("a", "b")), (("a", "b"), None), (("a", "b"), None)),
        ((("a", "b"),), (None, ("a", "b")), (None, None)),
        ((), (None, None), (None, None)),
    ],
)
def test_shardings_follow_the_logical_array(spec, codes, outer, rng):
    w = jnp.asarray(rng.standard_normal((128, 8)), jnp.float32)
    q = sdq.quantize(w, "sdq32:16", axis=0)
    spec_of = jax.sharding.PartitionSpec
    shards = sdq.shardings(q, jax.sharding.NamedSharding(mesh(), spec_of(*spec)))
    assert shards.codes.spec == shards.scales.spec == spec_of(*codes)
    assert shards.outer.spec == spec_of(*outer)
    placed = jax.device_put(q, shards)
    np.testing.assert_array_equal(sdq.dequantize(placed), sdq.dequantize(q))


def test_shardings_of_abstract_and_two_level_tensors():
    rows = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec("a", None, "b"))
    for name in format_table.FORMATS:
        q = jax.eval_shape(
            lambda x, name=name: sdq.quantize(x, name, axis=-2), jnp.ones((2, 64, 4))
        )
        for sharding, part in zip(
            jax.tree.leaves(sdq.shardings(q, rows)), jax.tree.leaves(q), strict=True
        ):
            sharding.shard_shape(part.shape)  # raises where a part cannot be cut this way


def test_shardings_refuse_to_cut_a_block():
    q = sdq.quantize(jnp.ones((8, 48)), "sdq32:16")
    with pytest.raises(ValueError, match="3 blocks cannot be split over 2 devices"):
        sdq.shardings(q, jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec(None, "a")))
