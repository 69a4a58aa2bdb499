"""mxfp4 and nvfp4 equal torchao's, in every packed byte and every scale. Needs the parity extra."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import sdq

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch and torchao warn about themselves while they load
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    pytest.importorskip("torchao", reason="needs the parity extra")
    from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor

pytestmark = pytest.mark.parity
SMALLEST_NORMAL_E4M3 = 2.0**-6


@pytest.fixture(params=["normal", "ties", "wild", "bfloat16"])
def data(request, rng):
    x = rng.standard_normal((64, 256)).astype(np.float32)
    if request.param == "ties":
        x = np.resize(np.arange(-6, 6.25, 0.25), (64, 256)).astype(np.float32)
    if request.param == "wild":
        x *= np.exp2(rng.randint(-6, 6, (64, 1))).astype(np.float32)
        x[3], x[4, :64], x[5] = 0, 0, -0.0
    if request.param == "bfloat16":
        x = np.array(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32))
    return x


@pytest.mark.parametrize("rule", ["floor", "rceil", "even"])
def test_mxfp4(rule, data):
    mode = mx_tensor.ScaleCalculationMode(rule)
    scale, codes = mx_tensor.to_mx(torch.from_numpy(data), torch.float4_e2m1fn_x2, 32, mode)
    q = sdq.quantize(jnp.asarray(data), f"mxfp4:{rule}")
    np.testing.assert_array_equal(q.scales, scale.view(torch.uint8).numpy())
    np.testing.assert_array_equal(q.codes, codes.view(torch.uint8).numpy())


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4:one_level"])
def test_nvfp4(name, data):
    x = torch.from_numpy(data)
    q = sdq.quantize(jnp.asarray(data), name)
    unit = None
    if name == "nvfp4":
        unit = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().max())
        assert float(unit) == float(q.outer[0, 0])
    scale, codes = nvfp4_tensor.nvfp4_quantize(x, 16, unit)
    theirs = scale.view(torch.uint8).numpy().reshape(q.scales.shape)
    ours = np.asarray(q.scales)
    # torchao lifts scales below the smallest normal number; we keep E4M3's subnormals.
    lifted = ours < 8
    np.testing.assert_array_equal(theirs[~lifted], ours[~lifted])
    assert (scale.float().numpy().reshape(ours.shape)[lifted] == SMALLEST_NORMAL_E4M3).all()
    same = np.repeat(~lifted, 8, axis=-1)
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy()[same], np.asarray(q.codes)[same])
    assert same.mean() > 0.5
