"""What is done to latents around the VAE, and what is said of VAEs that do not fit."""

import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from models import latents
from models.pixels import _as_encoded
from sdq.cli import main
from sdq.tensor_files import save_tensors


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "latents.safetensors"
    latents.save(jnp.ones((1, 2, 2, 4, 16)), {"model": "wan2.1-t2v-1.3b"}, file)
    return file


def vae(folder, name="AutoencoderKLWan"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"_class_name": "{name}"}}')


def test_latents_are_unnormalised():
    values = np.ones((1, 1, 1, 1, 2), np.float32)
    wan = types.SimpleNamespace(latents_mean=[0.5, -1.0], latents_std=[2.0, 4.0])
    np.testing.assert_array_equal(_as_encoded(values, wan)[0, 0, 0, 0], [2.5, 3.0])
    hunyuan = types.SimpleNamespace(scaling_factor=0.5)
    np.testing.assert_array_equal(_as_encoded(values, hunyuan)[0, 0, 0, 0], [2.0, 2.0])
    with pytest.raises(ValueError, match="vae: of 2 channels, the latents have 1"):
        _as_encoded(values[..., :1], wan)


def test_a_missing_extra_is_named(source, tmp_path, capsys, monkeypatch):
    vae(tmp_path / "pipeline" / "vae")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    command = ["decode", str(source), "--vae", str(tmp_path / "pipeline")]
    assert main([*command, "--out", str(tmp_path / "x.webp")]) == 2
    assert 'sdq decode needs pip install "sdq[pixels]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--vae": "nowhere"}, "holds no config.json of a VAE"),
        ({"--vae": "hunyuan"}, "holds a AutoencoderKLHunyuanVideo, this model's is a Autoencoder"),
        ({"--out": "x.avi"}, "expected a name that ends in .webp, .gif, .mp4"),
        ({"latents": "nowhere"}, "nowhere: no such file"),
        ({"latents": "texts.safetensors"}, "no latents that `sdq sample` wrote"),
    ],
)
def test_mistakes_are_one_line(source, tmp_path, capsys, monkeypatch, change, message):
    vae(tmp_path / "wan")
    vae(tmp_path / "hunyuan", "AutoencoderKLHunyuanVideo")
    save_tensors({"text": np.zeros(1)}, tmp_path / "texts.safetensors")
    monkeypatch.chdir(tmp_path)
    asked = {"latents": str(source), "--vae": "wan", "--out": "x.webp"} | change
    file = asked.pop("latents")
    assert main(["decode", file, *(word for option in asked.items() for word in option)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
