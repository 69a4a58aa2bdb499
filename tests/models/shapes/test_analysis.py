import json

import pytest

from models.shapes.config import CONFIG
from models.wan.sites import VIDEO_SITES
from sdq import cli


def analyze(out, *options):
    return cli.main(["analyze", "--steps", "2", "--guidance", "1", "--out", str(out), *options])


def test_it_writes_numbers_a_plan_and_a_picture(tmp_path, capsys):
    assert analyze(tmp_path, "--captions", "1", "--probes", "1", "--budget", "0.05", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "analysis.json").read_text())
    assert (tmp_path / "analysis.png").read_bytes()[:4] == b"\x89PNG"
    assert list(printed["sqnr_db"]) == list(VIDEO_SITES)
    for steps in printed["sqnr_db"].values():
        assert len(steps) == 2 and {len(step) for step in steps} == {CONFIG.dit.layers}
        assert min(map(min, steps)) > 10  # one input alone never ruins the velocity
    plan = printed["plan"]
    assert 0.03 < plan["extra_work"] <= plan["budget"] == 0.05
    assert plan["layers"] and plan["input_noise_after_db"] < plan["input_noise_before_db"] - 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--recipe", "plain"], "no budget for decomposition"),
        (["--recipe", "w4a16", "--budget", "0.1"], "quantises no inputs"),
        (["--probes", "0"], "probes: expected a number from 1 up, got 0"),
        (["--budget", "-1"], "extra_work: expected a share from 0 up"),
        (["--model", "wan"], "unknown model"),
    ],
)
def test_wrong_options_are_one_clear_line(tmp_path, capsys, options, message):
    assert analyze(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
