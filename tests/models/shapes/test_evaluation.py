import io
import json

import numpy as np
import pytest
import rich.console

from models.common.recipes import RECIPES
from models.shapes import evaluation
from models.shapes.evaluation import ATTRIBUTES, summary, to_rich
from models.shapes.generate import Settings
from models.shapes.scores import Scores, Task
from sdq import cli


def made(right, **changes):
    """Scores of four prompts, the first two with one thing."""
    names = [name for name in ATTRIBUTES if name != "one_thing"]
    right = dict.fromkeys(names, np.array(right, bool))
    values = {
        "psnr_db": np.array([20.0, 22.0, 24.0, 26.0], np.float32),
        "ssim": np.full(4, 0.5, np.float32),
        "flicker": np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        "warping_error": np.full(4, 0.1, np.float32),
        "step_sqnr_db": np.array([[10.0] * 4, [20.0] * 4], np.float32),
    }
    one_thing = np.array([True, True, False, False])
    values["speed"] = np.array([0.0, 2.0, 0.5, 2.0])
    return Scores(right=right, one_thing=one_thing, **(values | changes))


REFERENCE = made([1, 1, 1, 0], psnr_db=np.full(4, np.inf), step_sqnr_db=np.zeros((0, 4)))


def test_means_and_errors():
    found = summary(made([1, 0, 1, 0]), REFERENCE)
    assert found["accuracy"]["all"]["mean"] == 0.5
    assert found["accuracy"]["one_thing"]["mean"] == 0.5
    assert found["change"]["all"] == {"mean": -0.25, "error": 0.25}
    assert found["change"]["one_thing"]["mean"] == -0.5
    assert found["psnr_db"]["mean"] == 23
    assert found["psnr_db"]["error"] == pytest.approx(np.std([20, 22, 24, 26], ddof=1) / 2)
    assert found["step_sqnr_db"] == [10, 20] and found["sqnr_db"]["mean"] == 15


def test_low_and_high_motion_are_told_apart():
    found = summary(made([1, 0, 1, 0]), REFERENCE)
    assert found["low_motion"]["prompts"] == found["high_motion"]["prompts"] == 2
    assert found["low_motion"]["psnr_db"]["mean"] == 22
    assert found["high_motion"]["accuracy"]["all"]["mean"] == 0
    assert found["high_motion"]["accuracy"]["one_thing"] == {"mean": 0, "error": None}


def test_inconsistency_is_a_share_by_distance():
    sums = np.array([[[4.0, 100.0], [0.0, 0.0]]] * 3 + [[[0.0, 0.0], [9.0, 100.0]]])
    found = summary(made([1] * 4, differences=sums), REFERENCE)
    assert found["inconsistency"]["mean"] == pytest.approx((3 * 0.2 + 0.3) / 4)
    assert [one["mean"] for one in found["by_distance"]] == pytest.approx([0.2, 0.3])
    assert "inconsistency" not in summary(made([1] * 4), REFERENCE)


def test_recipes_measured_apart_give_what_they_give_together(monkeypatch):
    def score(reference, models, task):
        found = {name: made([1, 0, 1, 0], ssim=np.full(4, len(name) / 100)) for name in models}
        return {"reference": REFERENCE, **found}

    monkeypatch.setattr(evaluation, "score", score)
    monkeypatch.setattr(evaluation, "load", lambda checkpoint: None)
    monkeypatch.setattr(evaluation, "reordered", lambda params: params)
    monkeypatch.setattr(evaluation.recipes, "apply", lambda params, recipe, s: (params, s))
    task, settings = Task(prompts=4), Settings()
    plain, nvfp4 = (RECIPES[name] for name in ("plain", "nvfp4"))
    together = evaluation.evaluate([plain, nvfp4], settings, task)
    assert list(together) == ["bf16", "floor", "plain", "nvfp4"]
    apart = evaluation.measure([plain], settings, task)
    assert evaluation.summaries(apart)["plain"] == together["plain"]
    compared = evaluation.summaries(apart, made([1, 1, 1, 1], psnr_db=np.full(4, 20.0)))
    assert list(compared) == ["bf16", "plain"] and "against" not in compared["bf16"]
    assert compared["plain"]["against"]["psnr_db"]["mean"] == 3


def test_a_clip_that_cannot_be_judged_in_the_reference_is_left_out_but_no_other():
    unknown = np.array([np.nan, 0.2, 0.3, 0.4])
    found = summary(made([1] * 4), made([1] * 4, flicker=unknown))
    assert found["flicker"]["mean"] == pytest.approx(0.3)
    broken = summary(made([1] * 4, flicker=unknown), REFERENCE)
    assert broken["flicker"] == {"mean": "nan", "error": None}


def test_everything_goes_into_json_and_the_table():
    results = {"bf16": summary(REFERENCE, REFERENCE), "int8": summary(made([1] * 4), REFERENCE)}
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    console = rich.console.Console(width=200, file=io.StringIO())
    console.print(to_rich(results, "four prompts"))
    text = console.file.getvalue()
    for cell in ("right motions, %", "100.0 ± 0.0", "23.00 ± 1.29", "inf", "20.0", "four prompts"):
        assert cell in text


def test_one_prompt_has_no_error():
    one = Scores(
        right={name: np.array([True]) for name in ATTRIBUTES},
        one_thing=np.array([False]),
        **{
            name: np.array([1.0])
            for name in ("psnr_db", "ssim", "flicker", "warping_error", "speed")
        },
        step_sqnr_db=np.array([[3.0]]),
    )
    found = summary(one, one)
    assert found["accuracy"]["one_thing"] == {"mean": None, "error": None}
    assert found["ssim"] == {"mean": 1.0, "error": None}
    rich.console.Console(quiet=True).print(to_rich({"bf16": found}, ""))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompts", "0"], "prompts: expected a number from 1 up, got 0"),
        (["--model", "wan"], "unknown model 'wan'; there is shapes"),
        (["--weights", "fp3"], "unknown format"),
        (["--recipe", "semantic"], "unknown recipe 'semantic'; there is plain"),
        (["--recipe", "plain", "--acts", "int8"], "not both"),
        (["--checkpoint", __file__], "damaged or no safetensors file"),
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--steps", "0"], "steps: expected a whole number from 1 up, got 0"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message, capsys):
    assert cli.main(["evaluate", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
