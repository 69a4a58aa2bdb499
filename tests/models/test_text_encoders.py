"""What is done to prompts around the encoders, and what is said of encoders that are not there."""

import sys

import pytest

from models.text_encoders import ENCODERS, _said, encode
from sdq.cli import main


def told(model, prompt):
    return _said(model, [prompt], [prompt, "blurry"])


def test_open_sora_is_told_how_fast_and_how_much():
    assert told("open-sora", " A fox runs ") == [
        "A fox runs. 24 FPS. 4 motion score.",
        "blurry",
    ]
    assert told("open-sora", "A fox. 16 FPS.")[0] == "A fox. 16 FPS. 4 motion score."
    assert told("wan", "A fox") == ["A fox", "blurry"]


def test_hunyuan_s_prompt_stands_in_the_template():
    llama, _ = ENCODERS["hunyuanvideo"]
    assert llama.prepare("A {} fox").endswith("user<|end_header_id|>\n\nA {} fox<|eot_id|>")


def command(folder, model="wan2.1-t2v-1.3b"):
    out = str(folder / "texts.safetensors")
    options = ["--model", model, "--encoders", str(folder), "--prompt", "a fox", "--out", out]
    return ["encode", *options]


def place(folder, name, kind):
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(f'{{"model_type": "{kind}"}}')


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    place(tmp_path, "text_encoder", "umt5")
    (tmp_path / "tokenizer").mkdir()
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert main(command(tmp_path)) == 2
    assert 'sdq encode needs pip install "sdq[encode]"' in capsys.readouterr().err


def test_missing_parts_are_named(tmp_path, capsys):
    assert main(command(tmp_path)) == 2
    assert "no UMT5 encoder in any of text_encoder, text_encoder_2" in capsys.readouterr().err
    place(tmp_path, "text_encoder", "t5")
    assert main(command(tmp_path)) == 2
    assert "; text_encoder is t5" in capsys.readouterr().err
    place(tmp_path, "text_encoder_2", "umt5")
    assert main(command(tmp_path)) == 2
    assert "tokenizer_2: no tokenizer of" in capsys.readouterr().err


def test_models_that_read_more_than_text(tmp_path, capsys):
    assert main(command(tmp_path, "wan2.1-i2v-14b")) == 2
    assert "makes videos of an image" in capsys.readouterr().err
    with pytest.raises(ValueError, match="prompt: none given"):
        encode("hunyuanvideo", [], tmp_path)
    with pytest.raises(ValueError, match="negative: hunyuanvideo reads none"):
        encode("hunyuanvideo", ["a fox"], tmp_path, negative="blurry")
