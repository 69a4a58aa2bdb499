import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from pallas_kernels import Onto, quantized_matmul, supports, which
from pallas_kernels.mosaic_gpu.operands import tile_weight
from pallas_kernels.rows import Fp8Rows, deinterleave, fp8_rows, interleave

M, N, K = 6, 40, 96


@pytest.fixture
def operands(rng):
    x = jnp.asarray(rng.randn(2, M, K) * np.exp2(rng.randint(-9, 9, (2, M, 1))), jnp.float32)
    w = jnp.asarray(rng.randn(N, K), jnp.float32)
    return sdq.quantize(x, "sdq32:16"), sdq.quantize(w, "sdq32:16"), jnp.asarray(rng.randn(N))


def exact(x, w, bias=0.0):
    x, w = (np.asarray(sdq.dequantize(q), np.float64) for q in (x, w))
    return x @ w.T + np.asarray(bias, np.float64)


def relative(y, expected):
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("implementation", ["reference", "xla_fp8"])
@pytest.mark.parametrize("interleaved", [None, False, True])
def test_the_product_of_the_numbers(operands, implementation, interleaved):
    x, w, bias = operands
    rows = x
    if interleaved is not None:
        rows = fp8_rows(x)
        if interleaved:
            rows = Fp8Rows(
                values=interleave(rows.values),
                exponents=rows.exponents,
                dtype=rows.dtype,
                interleaved=True,
            )
    y = quantized_matmul(rows, w, bias=bias, implementation=implementation)
    assert y.shape == (2, M, N) and y.dtype == jnp.float32
    # float32 sums of K exact products
    assert relative(y, exact(x, w, bias)) < K**0.5 * 2**-24


def test_a_kernel_of_a_model_is_stored_alike(operands):
    x, w, _ = operands
    kernel = sdq.quantize(sdq.dequantize(w).T, "sdq32:16", axis=0)
    y = quantized_matmul(x, kernel, implementation="reference")
    np.testing.assert_array_equal(y, quantized_matmul(x, w, implementation="reference"))


@pytest.mark.parametrize("implementation", ["reference", "xla_fp8"])
def test_activation_and_rounding(operands, implementation):
    x, w, bias = operands
    y = quantized_matmul(
        x, w, bias=bias, activation="gelu", out_dtype="bfloat16", implementation=implementation
    )
    expected = jax.nn.gelu(jnp.asarray(exact(x, w, bias), jnp.float32), approximate=True)
    assert y.dtype == jnp.bfloat16
    assert relative(y, np.asarray(expected, np.float64)) < 2**-8


@pytest.mark.parametrize("implementation", ["reference", "xla_fp8"])
@pytest.mark.parametrize("gates", [None, (1, 1, N), (2, 1, N), (2, M, N)])
def test_a_result_is_added_to_something(rng, operands, implementation, gates):
    x, w, bias = operands
    there = jnp.asarray(rng.randn(2, M, N), jnp.float32)
    gate = None if gates is None else jnp.asarray(rng.randn(*gates), jnp.float32)
    onto = Onto(x=there, gate=gate)
    y = quantized_matmul(x, w, bias=bias, onto=onto, implementation=implementation)
    expected = exact(x, w, bias) * (1 if gate is None else np.asarray(gate)) + np.asarray(there)
    assert relative(y, expected) < K**0.5 * 2**-24
    there = there.astype(jnp.bfloat16)
    rounded = quantized_matmul(x, w, onto=Onto(x=there), implementation=implementation)
    assert rounded.dtype == jnp.bfloat16  # once: float32 until then
    once = exact(x, w) + np.asarray(there, np.float64)
    in_float32 = K**0.5 * 2**-24 * abs(exact(x, w)).max()
    assert (abs(np.asarray(rounded, np.float64) - once) <= 2**-8 * abs(once) + in_float32).all()


@pytest.mark.parametrize("implementation", ["reference", "xla_fp8"])
def test_a_bad_row_is_bad_alone(operands, implementation):
    x, w, _ = operands
    numbers = sdq.dequantize(x).at[1, 2, 3].set(jnp.inf)
    kernel = sdq.dequantize(w).at[7, 0].set(jnp.nan)
    y = quantized_matmul(
        sdq.quantize(numbers, "sdq32:16"),
        sdq.quantize(kernel, "sdq32:16"),
        implementation=implementation,
    )
    bad = np.zeros(y.shape, bool)
    bad[1, 2] = bad[..., 7] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(y)), bad)


def test_unquantised_rows(operands, rng):
    _, w, _ = operands
    x = jnp.asarray(rng.randn(M, K), jnp.bfloat16)
    y = quantized_matmul(x, w)
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64) @ np.asarray(sdq.dequantize(w), np.float64).T
    assert relative(y, expected) < 2**-8


def test_interleaving_is_undone(rng):
    x = rng.randn(3, 64).astype(np.float32)
    np.testing.assert_array_equal(deinterleave(interleave(x)), x)
    order = interleave(np.arange(32)).reshape(8, 4)[:, 0] // 4
    assert order.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_the_choice_is_explained(operands):
    x, w, _ = operands
    found = which(x, w)
    assert found.implementation == "reference"
    assert set(found.refused) == {"mosaic_gpu", "xla_fp8"}
    assert "Hopper" in found.refused["mosaic_gpu"] or "jax 0.11" in found.refused["mosaic_gpu"]


def test_what_was_asked_for_is_done_or_refused(operands):
    x, w, _ = operands
    with pytest.raises(ValueError, match="mosaic_gpu cannot do this: needs"):
        quantized_matmul(x, w, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="xla_fp8 cannot do this: x: expected quantised rows"):
        quantized_matmul(jnp.ones((M, K)), w, implementation="xla_fp8")
    assert "nvfp4" in (supports("xla_fp8", x, sdq.quantize(jnp.ones((N, K)), "nvfp4")) or "")
    assert "TiledWeight" in (supports("reference", x, tile_weight(w)) or "")
    with pytest.raises(ValueError, match="no implementation fits"):
        which(x, tile_weight(w))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.ones((M, K + 1))}, r"x: expected \[..., 96\], got \[6, 97\]"),
        ({"w": jnp.ones((N, K))}, "w: expected a QTensor or a TiledWeight"),
        ({"bias": jnp.ones(N + 1)}, r"bias: expected \[40\], got \[41\]"),
        ({"activation": "relu"}, "activation: expected one of None, 'gelu', got 'relu'"),
        ({"implementation": "cuda"}, "implementation: expected one of mosaic_gpu"),
        ({"mode": "slow"}, "mode: expected one of fast, accurate, got 'slow'"),
        ({"onto": Onto(x=jnp.ones((2, M, N + 1)))}, r"onto: expected x float32\[2, 6, 40\], got"),
        ({"onto": Onto(x=jnp.ones((2, M, N))), "out_dtype": "bfloat16"}, "expected x bfloat16"),
        (
            {"onto": Onto(x=jnp.ones((2, M, N)), gate=jnp.ones((3, 1, N)))},
            r"onto: expected a gate that broadcasts to \[2, 6, 40\], got \[3, 1, 40\]",
        ),
    ],
)
def test_bad_arguments(operands, change, message):
    x, w, _ = operands
    with pytest.raises(ValueError, match=message):
        quantized_matmul(**{"x": x, "w": w} | change)
