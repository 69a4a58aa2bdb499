import dataclasses
import json

import jax
import pytest

from models.common.quantizer import InputQuantizer, SiteRule
from models.common.recipes import RECIPES, Recipe, named, plan, quantizer, rounding
from models.common.semantic import Decomposition, SemanticDialect
from models.wan.sites import SITES, video_inputs
from sdq import Rule, cli
from tests.models.wan.test_modeling import TINY, random_params

SHAPES = jax.eval_shape(random_params)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=str)
def test_every_recipe_fits_a_wan(recipe):
    decided = plan(SHAPES, recipe, SITES)
    kernels = {path for path, leaf in decided.leaves.items() if leaf.format is not None}
    assert kernels == {
        path for path in decided.leaves if path.startswith("blocks") and "kernel" in path
    }
    assert recipe.summary


def test_one_s_own_rules_go_in_front():
    mine = dataclasses.replace(
        RECIPES["plain"],
        weights=(Rule(r"blocks/ffn/down/kernel", "int8"), *RECIPES["plain"].weights),
        inputs=(SiteRule("blocks/ffn/down", None), *RECIPES["plain"].inputs),
    )
    assert mine.weight_formats == "int8, sdq32:16" and mine.input_formats == "bf16, sdq32:16"
    leaves = plan(SHAPES, mine, SITES).leaves
    assert str(leaves["blocks/ffn/down/kernel"].format) == "int8"
    assert str(leaves["blocks/ffn/up/kernel"].format) == "sdq32:16"


def test_rules_that_match_nothing_are_all_named():
    wrong = Recipe(
        name="wrong",
        weights=(Rule(r"layers/.*", "int8"),),
        inputs=(SiteRule(r"layers/.*", "int8"), SiteRule(r"blocks/.*", "int8")),
    )
    with pytest.raises(ValueError, match="recipe 'wrong' does not fit") as error:
        plan(SHAPES, wrong, SITES)
    assert "rule 0 'layers/.*' matches no leaf" in str(error.value)
    assert "input rule 0 'layers/.*' decides about none of blocks/self_attn/qkv" in str(error.value)


def test_what_is_learned_online_decides_the_quantizer():
    where = {"grid": (2, 2, 3), "sites": video_inputs(TINY)}
    plain = quantizer(RECIPES["plain"], **where, decomposition=None)
    assert plain == InputQuantizer(RECIPES["plain"].inputs)
    budget = rounding("sdq32:16", "sdq32:16", extra_work=0.1)
    planned = Decomposition(tokens=2, layers=(("blocks/ffn/down", (0,)),))
    online = quantizer(budget, **where, decomposition=planned)
    assert isinstance(online, SemanticDialect) and online.decomposition == planned


@pytest.mark.parametrize(
    "options, words",
    [
        ({"smooth": 1.5}, "smooth: expected"),
        ({"extra_work": -0.1}, "extra_work: expected"),
        ({"extra_work": float("nan")}, "extra_work: expected"),
    ],
)
def test_impossible_recipes_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Recipe(name="mine", **options)


def test_unknown_names_get_a_hint():
    with pytest.raises(ValueError, match="did you mean semanticdialect"):
        named("semanticdialekt")


def test_the_command_lists_them(capsys):
    assert cli.main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in RECIPES)
    assert cli.main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [recipe["name"] for recipe in listed] == list(RECIPES)
    assert listed[2]["sharing"]["alike"] == "text"
