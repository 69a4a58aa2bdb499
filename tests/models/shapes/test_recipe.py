import dataclasses

import jax
import numpy as np
import pytest

from models.common.quantizer import SiteRule
from models.common.recipes import RECIPES, Recipe
from models.common.semantic import SemanticDialect
from models.shapes import recipe as recipes
from models.shapes.generate import SAMPLER, Settings, generate, initial_state, start
from models.shapes.params import load
from models.shapes.vocabulary import EXAMPLE, tokenize
from sdq import QTensor
from sdq.rules import is_qtensor

QUICK = Settings(sampler=dataclasses.replace(SAMPLER, steps=2), guidance=1.0)


@pytest.fixture(scope="module")
def params():
    return load()


@pytest.fixture(scope="module")
def full(params):
    """Without error feedback, which takes most of the time and has its own tests."""
    recipe = dataclasses.replace(RECIPES["semanticdialect"], feedback=False)
    return recipes.apply(params, recipe, QUICK)


def test_the_full_recipe_plans_within_its_budget(params, full):
    quantised, settings = full
    online = settings.ops.quantizer
    assert isinstance(online, SemanticDialect) and online.decomposition.layers
    assert 0.06 < recipes.added_work(params, settings) <= 0.12
    shared = sum(len(blocks) for _, blocks in online.sharing_layers)
    assert 10 < shared < 48  # of 6 sites in 8 blocks
    assert recipes.added_work(params, QUICK) == 0
    leaves = jax.tree.leaves(quantised, is_leaf=is_qtensor)
    assert sum(isinstance(leaf, QTensor) for leaf in leaves) == 10  # kinds of kernels in a block


def test_it_samples_in_one_program(full):
    quantised, settings = full
    tokens = np.asarray(tokenize(EXAMPLE))[None]
    before = generate._cache_size()
    for number in range(2):
        x = start(jax.random.key(0), np.array([number]))
        video = generate(quantised, tokens, x, settings=settings)
    assert np.isfinite(video).all()
    assert generate._cache_size() == before + 1
    assert initial_state(settings, 1).books


def test_a_recipe_that_does_not_fit_is_refused_before_any_work(params, capfd):
    wrong = Recipe(name="wrong", inputs=(SiteRule("layers/.*", "int8"),), feedback=True)
    with pytest.raises(ValueError, match=r"input rule 0 'layers/.\*' decides about none"):
        recipes.apply(params, wrong, QUICK)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["semanticdialect", "smoothquant", "hadamard", "w4a16"])
def test_every_kind_of_recipe_makes_a_video(params, name):
    quantised, settings = recipes.apply(params, RECIPES[name], QUICK)
    tokens = np.asarray(tokenize(EXAMPLE))[None]
    x = start(jax.random.key(0), np.array([0]))
    assert np.isfinite(generate(quantised, tokens, x, settings=settings)).all()
