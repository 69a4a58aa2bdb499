import dataclasses
import hashlib
import json
import pathlib

import numpy as np
import pytest

from models.common.recipes import KEEP, RECIPES
from models.common.sampler import Sampler
from models.shapes import evaluation
from models.shapes.evaluation import FLOOR, Measured
from models.shapes.params import WEIGHTS
from scripts import make_shapes_table
from scripts._shapes_tables import ABLATION, FORMATS, TABLES
from tests.models.shapes.test_evaluation import REFERENCE, made

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def measured(monkeypatch):
    """Measuring takes no time; says which recipes were asked for."""
    asked = []

    def measure(chosen, settings, task):
        assert isinstance(settings.sampler, Sampler) and task.prompts == 4
        sums = np.ones((4, 8, 2)) if task.consistency else None
        scores = {KEEP: REFERENCE}
        for one in chosen:
            is_floor = one == FLOOR
            asked.extend([] if is_floor else [one.name])
            right = [1, 1, 1, 0] if is_floor else [1, 0, 1, 0]
            scores[str(one)] = made(right, differences=None if is_floor else sums)
        return Measured(scores, {str(one): 0.0 for one in chosen})

    monkeypatch.setattr(make_shapes_table, "measure", measure)
    return asked


def run(folder, table="formats"):
    make_shapes_table.main([table, "--prompts", "4", "--out", str(folder)])
    stem = folder / f"shapes_{table}"
    assert stem.with_suffix(".png").stat().st_size > 1000
    return json.loads(stem.with_suffix(".json").read_text()), stem.with_suffix(".md").read_text()


@pytest.mark.parametrize("name, table", TABLES.items())
def test_every_recipe_has_a_row(measured, tmp_path, name, table):
    document, page = run(tmp_path, name)
    assert list(document["results"]) == [KEEP, FLOOR, *table.recipes]
    assert sorted(measured) == sorted(table.recipes)
    assert table.against is None or measured[0] == table.against.name
    for heading, recipes in table.groups.items():
        part = page.split(f"## {heading}\n")[1] if heading else page
        rows = [line for line in part.split("## ")[0].splitlines() if line.startswith("| ")]
        for recipe in recipes:
            first = recipe.name if "recipe" in table.columns else f"`{recipe.weight_formats}`"
            assert any(row.startswith(f"| {first}") for row in rows) or recipe.weights == ()
        assert {row.count("|") for row in rows} >= {len(table.columns) + 1}


def test_cells_are_means_with_errors(measured, tmp_path):
    _, page = run(tmp_path)
    row = next(
        line for line in page.splitlines() if line.startswith("| `mxfp4` 4.25 bit | `mxfp4`")
    )
    assert row.split(" | ")[2:5] == ["50.0 ± 28.9", "25.0 ± 25.0", "23.00 ± 1.29"]


def test_the_full_recipe_and_all_the_others_are_measured():
    assert set(RECIPES) <= {name for table in TABLES.values() for name in table.recipes}
    assert RECIPES["semanticdialect"] in ABLATION.groups["All but one"]
    assert TABLES["recipes"].seeds == ABLATION.seeds == 3


def test_an_interrupted_run_goes_on(measured, tmp_path):
    document, page = run(tmp_path)
    lost = list(FORMATS.recipes)[3:5]
    for name in lost:
        del document["results"][name]
    (tmp_path / "shapes_formats.json").write_text(json.dumps(document))
    measured.clear()
    again, same = run(tmp_path)
    assert measured == lost and list(again["results"]) == list(run(tmp_path)[0]["results"])
    assert same == page


def test_a_recipe_that_changed_is_measured_again(measured, tmp_path, monkeypatch):
    table = TABLES["recipes"]
    run(tmp_path, "recipes")
    measured.clear()
    changed = [dataclasses.replace(one, smooth=0.25) for one in table.recipes.values()][:1]
    groups = {"": (*changed, *list(table.recipes.values())[1:])}
    monkeypatch.setitem(TABLES, "recipes", dataclasses.replace(table, groups=groups))
    run(tmp_path, "recipes")
    assert measured == [table.against.name, changed[0].name]  # what it is compared with first
    measured.clear()
    other = dataclasses.replace(TABLES["recipes"], against=RECIPES["mxfp4"])
    monkeypatch.setitem(TABLES, "recipes", other)
    run(tmp_path, "recipes")
    assert set(measured) == set(table.recipes)


def test_results_under_other_conditions_are_not_mixed(measured, tmp_path, monkeypatch):
    run(tmp_path)
    measured.clear()
    monkeypatch.setattr(evaluation.jax, "__version__", "0.0.0")
    run(tmp_path)
    assert len(measured) == len(FORMATS.recipes)


def test_committed_results_are_of_the_bundled_weights_and_good_enough():
    document = json.loads((ROOT / "docs/results/shapes_formats.json").read_text())
    made = document["conditions"]
    weights = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert made["checkpoint"] == weights, "measure again: python -m scripts.make_shapes_table"
    assert made["prompts"] >= 512
    results = document["results"]
    assert set(results) == {KEEP, FLOOR, *FORMATS.recipes}
    right = {name: value["mean"] for name, value in results[KEEP]["accuracy"].items()}
    floors = {"colour": 0.99, "background": 0.99, "shape": 0.96, "size": 0.96, "motion": 0.96}
    assert {name: floor for name, floor in floors.items() if right[name] < floor} == {}
    assert right["one_thing"] >= 0.9
    # A world in which 4 bits were easy would prove nothing.
    coarse, fine = (results[f"weights {name}, activations {name}"] for name in ("mxfp4", "int8"))
    lost = fine["accuracy"]["all"]["mean"] - coarse["accuracy"]["all"]["mean"]
    assert lost >= 0.04 or fine["psnr_db"]["mean"] - coarse["psnr_db"]["mean"] >= 6


def committed(name):
    """Results of a table, complete, on the bundled weights, seeds of at least 512 captions."""
    document = json.loads((ROOT / f"docs/results/shapes_{name}.json").read_text())
    made = document["conditions"]
    assert made["checkpoint"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert made["prompts"] >= 512 and made["seeds"] == TABLES[name].seeds >= 3
    results = document["results"]
    now = {recipe: repr(one) for recipe, one in TABLES[name].recipes.items()}
    assert {recipe: row["recipe"] for recipe, row in results.items() if "recipe" in row} == now
    return results


def test_committed_recipes_keep_what_the_format_promises():
    """Decibels of SQNR and PSNR gained, prompt by prompt; each claim beyond two standard errors."""
    results = committed("recipes")

    def gained(name, over, measure="sqnr_db"):
        """Against nvfp4 both are known prompt by prompt; their errors add up at worst."""
        one, other = (results[recipe]["against"][measure] for recipe in (name, over))
        return one["mean"] - other["mean"] - 2 * (one["error"] + other["error"])

    assert gained("plain", "nvfp4") >= 1.0
    assert gained("plain", "mxfp4") >= 2.5
    assert gained("plain", "blockdialect") >= 0.8
    assert results["semanticdialect"]["extra_work"] <= 0.12
    assert gained("semanticdialect", "nvfp4") >= 2.5
    assert gained("semanticdialect", "nvfp4", "psnr_db") >= 2.0
    assert results["semanticdialect"]["change"]["all"]["mean"] >= -0.01


def test_committed_parts_say_that_sharing_is_almost_free():
    results = committed("sharing")
    alone, shared = results["without SeDA"], results["semanticdialect"]
    assert shared["inconsistency"]["mean"] <= 0.8 * alone["inconsistency"]["mean"]
    assert shared["against"]["sqnr_db"]["mean"] >= -0.1
    of_motion = shared["against"]["psnr_db, high motion"]
    assert of_motion["mean"] >= -0.1 and of_motion["error"] <= 0.05


def test_committed_parts_say_that_each_other_part_is_needed():
    results = committed("ablation")
    for part in ("smoothing", "feedback", "decomposition"):
        gained = results[f"without {part}"]["against"]["sqnr_db"]
        assert gained["mean"] + 2 * gained["error"] < -1, part
    lost = results["full_path"]["against"]["psnr_db"]
    assert lost["mean"] - 2 * lost["error"] >= -1


def test_an_unknown_table_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "colours")
    assert "no such table: colours; there is formats" in capsys.readouterr().err
