"""The public functions: any shape, dtype, axis, magnitude; every error; JAX's transformations."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import sdq
from sdq import format_table
from sdq.quantize import INPUT_DTYPES

FORMATS = [*format_table.FORMATS, "sdq32:8", "sdq32:128", "int8:64"]
FAMILIES = ["sdq32:16", "dialectfp4:32", "nvfp4", "mxfp4:rceil", "int4:32", "int8", "nf4:64"]
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
SHAPES = [(1,), (37,), (0,), (5, 64), (3, 1), (4, 0), (0, 48), (2, 3, 50), (2, 2, 2, 33)]


def relative_error_bound(fmt):
    """The largest |x - dequantize(quantize(x))| as a share of its block's maximum.

    dialects: half the widest gap of a dialect, or the distance from the maximum to the top, in [8,
      16)
    E2M1: 1/6 between 4 and 6, 1/4 where floor saturates 8 to 6, and E4M3 scales off by 1/16
    integers: half a step and the rounding of the bfloat16 scale; NF4: half its widest gap
    """
    return {"dialect": 0.5, "mxfp4": 0.25, "nvfp4": 0.25, "nf4": 0.16}.get(
        fmt.family, 0.5 / 127 + 2**-8 if fmt.element_bits == 8 else 0.5 / 7 + 2**-8
    )


@st.composite
def arrays(draw):
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from(INPUT_DTYPES))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    rng = np.random.RandomState(draw(st.integers(0, 2**31)))
    x = rng.standard_normal(shape).clip(-3.3, 3.3) * 10.0 ** draw(st.integers(-38, 38))
    if draw(st.booleans()):
        x = x * (rng.random_sample(shape) < 0.2)
    with np.errstate(over="ignore"):
        return jnp.asarray(x.astype(np.float32)).astype(dtype), axis


@given(data=arrays(), name=st.sampled_from(FORMATS))
def test_any_array_comes_back_close(data, name):
    x, axis = data
    fmt = sdq.format(name)
    q = sdq.quantize(x, fmt, axis=axis)
    sdq.validate(q)
    y = sdq.dequantize(q)
    assert q.shape == y.shape == x.shape and q.dtype == y.dtype == x.dtype
    moved = np.moveaxis(np.asarray(x).astype(np.float64), axis, -1)
    error = np.abs(moved - np.moveaxis(np.asarray(y).astype(np.float64), axis, -1))
    bad = ~np.isfinite(moved).all(axis=-1, keepdims=True)
    assert np.isnan(error[np.broadcast_to(bad, error.shape)]).all()
    if x.size == 0 or name == "nvfp4:one_level":  # one level covers 2^-9..2688 only
        return
    block = fmt.block or moved.shape[-1]
    padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % block)])
    blocks = np.abs(padded).reshape(*moved.shape[:-1], -1, block).max(axis=-1)
    amax = blocks.repeat(block, axis=-1)[..., : moved.shape[-1]]
    # A dialect block is never finer than 7 exponents below its row, or 2^-125; an E4M3 scale never
    # finer than 2^-9 of the matrix scale, itself at least 2^-117.
    finite = np.where(bad, 0, blocks)
    coarsest = {
        "row": finite.max(axis=-1, keepdims=True) * 2.0**-8,
        "matrix": finite.max() * 2.0**-9,
    }
    floor = np.maximum(
        coarsest.get(fmt.outer, 0.0), {"matrix": 2.0**-117}.get(fmt.outer, 2.0**-124)
    )
    resolution = float(jnp.finfo(x.dtype).eps) * amax + float(jnp.finfo(x.dtype).tiny)
    bound = relative_error_bound(fmt) * np.maximum(amax, floor) + resolution
    assert (error <= bound)[np.broadcast_to(~bad, error.shape)].all()


@given(
    data=arrays(),
    name=st.sampled_from(FORMATS),
    place=st.integers(0, 10**6),
    bad=st.sampled_from([np.nan, np.inf]),
)
def test_nan_and_inf_poison_their_row_only(data, name, place, bad):
    x, axis = data
    if x.size == 0:
        return
    at = np.unravel_index(place % x.size, x.shape)
    y = np.moveaxis(
        np.asarray(sdq.dequantize(sdq.quantize(x.at[at].set(bad), name, axis=axis))), axis, -1
    )
    clean = np.array(np.moveaxis(np.asarray(jnp.isfinite(x)), axis, -1).all(axis=-1))
    row = list(at)
    row.pop(axis)
    clean[tuple(row)] = False
    assert np.isnan(y.astype(np.float32)[~clean]).all()
    assert np.isfinite(y.astype(np.float32)[clean]).all()


@EVERY_FAMILY
def test_axis_means_the_same_as_moving_it(name, rng):
    x = jnp.asarray(rng.standard_normal((6, 50, 4)), jnp.float32)
    moved = sdq.quantize(jnp.moveaxis(x, 1, -1), name)
    for axis in (1, -2):
        q = sdq.quantize(x, name, axis=axis)
        assert q.axis == -2 and q.shape == x.shape
        for part in q.parts:
            np.testing.assert_array_equal(q.parts[part], moved.parts[part])
        np.testing.assert_array_equal(sdq.dequantize(q), jnp.moveaxis(sdq.dequantize(moved), -1, 1))


@pytest.mark.parametrize("name", [name for name in FAMILIES if sdq.format(name).block])
def test_padding_changes_nothing(name, rng):
    fmt = sdq.format(name)
    x = jnp.asarray(rng.standard_normal((4, fmt.block + 3)), jnp.float32)
    padded = jnp.pad(x, ((0, 0), (0, fmt.block - 3)))
    q, p = sdq.quantize(x, fmt), sdq.quantize(padded, fmt)
    np.testing.assert_array_equal(sdq.dequantize(q), sdq.dequantize(p)[:, : fmt.block + 3])
    assert q.length == fmt.block + 3 and q.nbytes == p.nbytes


@EVERY_FAMILY
def test_bfloat16_input_means_the_same_as_its_float32(name, rng):
    x = jnp.asarray(rng.standard_normal((8, 64)), jnp.bfloat16)
    q, p = sdq.quantize(x, name), sdq.quantize(x.astype(jnp.float32), name)
    for part in q.parts:
        np.testing.assert_array_equal(q.parts[part], p.parts[part])
    assert sdq.dequantize(q).dtype == jnp.bfloat16
    assert sdq.dequantize(q, jnp.float32).dtype == jnp.float32


def test_dequantize_saturates_where_the_dtype_ends():
    x = jnp.full((1, 32), 65504.0, jnp.float16)  # 7 steps of a scale rounded up would overflow
    for name in FAMILIES:
        y = sdq.dequantize(sdq.quantize(x, name))
        assert bool(jnp.isfinite(y).all()), name
    top = jnp.full((1, 64), jnp.finfo(jnp.float32).max)
    for name in FAMILIES:
        assert bool(jnp.isfinite(sdq.dequantize(sdq.quantize(top, name))).all()), name


def test_numpy_arrays_are_welcome():
    assert sdq.quantize(np.ones((2, 32), np.float32), "sdq32:16").shape == (2, 32)


def test_importance_helps_the_important(rng):
    x = jnp.asarray(rng.standard_normal((64, 256)), jnp.float32)
    weight = jnp.where(jnp.arange(256) % 4 == 0, 100.0, 1.0)

    def error(q):
        return float(jnp.sum(jnp.square(x - sdq.dequantize(q))[:, ::4]))

    plain = sdq.quantize(x, "sdq32:16")
    for importance in (weight, jnp.broadcast_to(weight, x.shape)):
        assert error(sdq.quantize(x, "sdq32:16", importance=importance)) < 0.95 * error(plain)
    flipped = sdq.quantize(x.T, "sdq32:16", axis=0, importance=weight)
    np.testing.assert_array_equal(
        sdq.dequantize(flipped).T, sdq.dequantize(sdq.quantize(x, "sdq32:16", importance=weight))
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (dict(x=jnp.ones((2, 32), jnp.int32)), r"x: expected an array of float32.*got dtype int32"),
        (dict(x=[1.0, 2.0]), "x: expected an array.*got list"),
        (dict(x=jnp.float32(1)), "x: expected rank >= 1, got a scalar"),
        (dict(axis=2), r"axis: expected in \[-2, 1\] for rank 2, got 2"),
        (dict(fmt="fp4"), "unknown format 'fp4'; known: sdq32"),
        (
            dict(select="best"),
            "select: expected one of exhaustive, lut, two_stage, blockdialect, got 'best'",
        ),
        (dict(fmt="mxfp4", select="lut"), "select: mxfp4 has nothing to choose"),
        (dict(fmt="e2m1:32", select="lut"), "select: e2m1:32 has nothing to choose"),
        (dict(select="blockdialect"), "select: 'blockdialect' is for dialectfp4"),
        (dict(importance=jnp.ones(31)), r"importance: expected \[32\] or broadcastable"),
        (dict(fmt="int4:32", importance=jnp.ones(32)), "importance: int4:32 has no choice"),
        (dict(importance=-jnp.ones(32)), "importance: expected finite weights >= 0"),
        (dict(importance=jnp.full(32, jnp.nan)), "importance: expected finite weights >= 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_name_the_argument(arguments, complaint):
    given = {"x": jnp.ones((2, 32)), "fmt": "sdq32:16", **arguments}
    with pytest.raises(ValueError, match=complaint):
        sdq.quantize(given.pop("x"), given.pop("fmt"), **given)


@pytest.mark.parametrize("function", [sdq.dequantize, sdq.to_fp8])
def test_a_plain_array_is_no_qtensor(function):
    with pytest.raises(ValueError, match="q: expected a QTensor, got ArrayImpl"):
        function(jnp.ones(3))


# --- JAX's transformations
# ---------------------------------------------------------------------------------


@EVERY_FAMILY
def test_jit_vmap_and_eval_shape_agree_with_plain_calls(name, rng):
    x = jnp.asarray(rng.standard_normal((3, 8, 64)), jnp.float32)
    plain = sdq.quantize(x, name)
    for q in (
        jax.jit(functools.partial(sdq.quantize, fmt=name))(x),
        jax.vmap(lambda v: sdq.quantize(v, name))(x),
        jax.vmap(lambda v: sdq.quantize(v, name), in_axes=1, out_axes=0)(jnp.swapaxes(x, 0, 1)),
    ):
        assert q.shape == plain.shape and q.format == plain.format
        jax.tree.map(np.testing.assert_array_equal, q, plain)
    shapes = jax.eval_shape(lambda v: sdq.quantize(v, name), x)
    assert shapes.shape == x.shape and shapes.nbytes == plain.nbytes
    sdq.validate(shapes)


@EVERY_FAMILY
def test_scan_over_stacked_layers(name, rng):
    """Stacked weights [L, K, N], quantised at once, are read layer by layer."""
    w = jnp.asarray(rng.standard_normal((4, 48, 8)), jnp.float32)
    q = sdq.quantize(w, name, axis=-2)

    def layer(total, q_layer):
        assert q_layer.shape == (48, 8)
        return total + jnp.sum(sdq.dequantize(q_layer)), sdq.dequantize(q_layer)

    _, layers = jax.lax.scan(layer, jnp.float32(0), q)
    np.testing.assert_array_equal(layers, sdq.dequantize(q))


def test_fake_quantize_has_the_values_and_a_straight_through_derivative(rng):
    x = jnp.asarray(rng.standard_normal((4, 64)), jnp.float32)
    np.testing.assert_array_equal(
        sdq.fake_quantize(x, "sdq32:16", select="lut"),
        sdq.dequantize(sdq.quantize(x, "sdq32:16", select="lut")),
    )

    def loss(x):
        return jnp.sum(jnp.square(sdq.fake_quantize(x, "sdq32:16")))

    expected = 2 * sdq.dequantize(sdq.quantize(x, "sdq32:16"))
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), expected, rtol=1e-6)
    _, tangent = jax.jvp(lambda x: sdq.fake_quantize(x, "sdq32:16"), (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(tangent, jnp.ones_like(x))


def test_gradient_flows_past_quantised_weights(rng):
    x = jnp.asarray(rng.standard_normal((4, 64)), jnp.float32)
    w = sdq.quantize(jnp.asarray(rng.standard_normal((64, 8)), jnp.float32), "sdq32:16", axis=0)
    gradient = jax.grad(lambda x: jnp.sum(x @ sdq.dequantize(w)))(x)
    np.testing.assert_allclose(gradient, jnp.ones((4, 8)) @ sdq.dequantize(w).T, rtol=1e-5)


def test_gradient_reaches_float_scales(rng):
    """Formats with real-valued scales can be tuned: d dequantize / d scale is the code."""
    q = sdq.quantize(jnp.asarray(rng.standard_normal((4, 64)), jnp.float32), "int8:64")

    def total(scales):
        return jnp.sum(
            sdq.dequantize(
                sdq.QTensor(
                    codes=q.codes,
                    scales=scales,
                    outer=None,
                    format=q.format,
                    length=64,
                    axis=-1,
                    dtype=q.dtype,
                )
            )
        )

    gradient = jax.grad(total)(q.scales)
    expected = q.codes.astype(jnp.float32).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected, rtol=2**-7, atol=1)


@EVERY_FAMILY
def test_rows_sharded_over_devices_need_no_communication(name, rng):
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows", None))
    x = jnp.asarray(rng.standard_normal((16, 64)), jnp.float32)
    function = jax.jit(lambda v: sdq.quantize(v, name))
    sharded = jax.device_put(x, rows)
    q = function(sharded)
    jax.tree.map(np.testing.assert_array_equal, q, sdq.quantize(x, name))
    assert q.codes.sharding.is_equivalent_to(rows, 2)
    hlo = function.lower(sharded).compile().as_text()
    collectives = [
        word for word in ("all-gather", "all-to-all", "collective-permute") if word in hlo
    ]
    assert not collectives
    if sdq.format(name).outer != "matrix":  # a matrix scale is a maximum over all rows
        assert "all-reduce" not in hlo


@pytest.mark.parametrize("name", format_table.FORMATS)
@pytest.mark.parametrize("axis", [-1, 0])
def test_peak_memory_is_at_most_three_leaves(name, axis):
    leaf = jax.ShapeDtypeStruct((512, 2048), jnp.float32)
    rule = "exhaustive" if sdq.format(name).has_choice else None
    compiled = (
        jax.jit(lambda x: sdq.quantize(x, name, axis=axis, select=rule)).lower(leaf).compile()
    )
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert peak <= 3 * leaf.size * 4


def test_the_choice_compiles_once(rng):
    x = jnp.asarray(rng.standard_normal((4, 64)), jnp.float32)
    function = jax.jit(lambda v: sdq.dequantize(sdq.quantize(v, "sdq32:16", select="two_stage")))
    for scale in (1.0, 2.0, 3.0):
        function(x * scale)
    assert function._cache_size() == 1
