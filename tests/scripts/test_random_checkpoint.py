"""Random checkpoints are what the models' own converters take."""

import pytest

from models.common.weights import check
from models.families import family_of
from scripts._random_checkpoint import RandomTensors


@pytest.mark.parametrize(
    "model, layout, count",
    [
        ("wan2.1-t2v-14b", "original", 1095),
        ("wan2.1-i2v-14b", "diffusers", 1303),
        ("open-sora-2.0", "open-sora", 1082),
        ("hunyuanvideo", "hunyuan", 856),
        ("hunyuanvideo", "diffusers", 1264),
    ],
)
def test_every_tensor_is_there(model, layout, count, monkeypatch):
    monkeypatch.setattr("scripts._random_checkpoint.POOL", 1024)
    params, config = family_of(model).params, family_of(model).sizes[model]
    tensors = RandomTensors(model, layout)
    assert len(tensors) == count and params.layout_of(tensors) == layout
    check(tensors, params.sources(config, layout), params.abstract_params(config))
    name = next(name for name in tensors if name.endswith("bias"))
    assert tensors[name].shape == tensors.shape(name)
    assert tensors[name].dtype == tensors.dtype(name)
