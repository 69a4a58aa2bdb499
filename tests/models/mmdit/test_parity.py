"""Our MMDiT equals diffusers' through the converter, in every key layout (committed goldens)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.mmdit.modeling import MMDiT
from models.mmdit.params import load
from scripts._mmdit_goldens import MMDIT, MMDIT_TOLERANCE, mmdit_inputs, mmdit_weight
from scripts.make_goldens import GOLDENS
from sdq.tensor_files import save_tensors

CASES = [(name, layout) for name, case in MMDIT.items() for layout in case.layouts]


def golden(name):
    with np.load(GOLDENS / f"mmdit-{name}.npz") as file:
        return dict(file)


def checkpoint(case, layout, golden, path):
    """A file in a key layout, with the random weights of the case."""
    tensors = {
        name: mmdit_weight(name, tuple(shape))
        for name, shape in json.loads(str(golden["shapes"])).items()
    }
    if layout != "diffusers":
        names = json.loads(str(golden["original"]))
        tensors = {name: in_rows(parts, tensors) for name, parts in names.items()}
    if case.config.cond_channels is not None:
        tensors |= with_condition(tensors, case.config)
    if layout == "open-sora":
        tensors = as_released(tensors, case.config)
    save_tensors(tensors, path)
    return path


def in_rows(parts, tensors):
    """An original tensor of what diffusers made of its rows."""
    found = [tensors[name.removeprefix("-")] for name in parts]
    if parts[0].startswith("-"):
        found = np.split(found[0], 2)[::-1]
    return np.concatenate(found)


def with_condition(tensors, config):
    """Linear of a concatenation = sum of two linears."""
    weight, bias = tensors["img_in.weight"], tensors["img_in.bias"]
    of_video = config.in_channels * np.prod(config.patch)
    return {
        "img_in.weight": weight[:, :of_video],
        "cond_in.weight": weight[:, of_video:],
        "img_in.bias": bias - 0.5,
        "cond_in.bias": np.full_like(bias, 0.5),
    }


def as_released(tensors, config):
    """FLUX's names and interleaved pairs -> projections apart, pairs (i, i + n / 2)."""
    width, found = config.width, {}

    def half_split(rows):
        heads = rows.reshape(-1, config.head_width, *rows.shape[1:])
        return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(rows.shape)

    for name, tensor in tensors.items():
        where, _, kind = name.rpartition(".")
        if where.endswith((".qkv", ".linear1")):
            q, k, *rest = np.split(tensor, [width, 2 * width])
            block, _, fused = where.rpartition(".")
            found[f"{block}.q_proj.{kind}"], found[f"{block}.k_proj.{kind}"] = map(
                half_split, (q, k)
            )
            found[f"{block}.{'v_proj' if fused == 'qkv' else 'v_mlp'}.{kind}"] = rest[0]
        else:
            found[name] = half_split(tensor) if kind == "scale" else tensor
    return found


def our_output(case, params):
    with jax.default_matmul_precision("highest"):
        inputs = {name: jnp.asarray(value) for name, value in mmdit_inputs(case).items()}
        model = MMDiT(case.config, dtype=jnp.float32)
        return np.asarray(jax.jit(model.apply)({"params": params}, **inputs))


@pytest.mark.parametrize("name, layout", CASES)
def test_equals_the_golden(name, layout, tmp_path):
    case, expected = MMDIT[name], golden(name)
    params = load(checkpoint(case, layout, expected, tmp_path / "x.safetensors"), case.config)
    assert np.abs(expected["output"]).max() > 0.5
    np.testing.assert_allclose(our_output(case, params), expected["output"], atol=MMDIT_TOLERANCE)
