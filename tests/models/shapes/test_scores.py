import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.recipes import named
from models.shapes import recipe as recipes
from models.shapes.compare import Model
from models.shapes.config import CONFIG
from models.shapes.generate import SAMPLER, Settings, start
from models.shapes.modeling import Shapes
from models.shapes.params import load
from models.shapes.scores import Task, _batches, reordered, score
from models.shapes.vocabulary import EXAMPLE, tokenize
from models.shapes.world import is_held_out

QUICK = Settings(sampler=dataclasses.replace(SAMPLER, steps=2), guidance=1.0)


@pytest.fixture(scope="module")
def params():
    return load()


def test_reordering_changes_no_function(params):
    model = Shapes(CONFIG, dtype=jnp.float32)
    x, tokens = start(jax.random.key(0), np.array([0])), jnp.asarray(tokenize(EXAMPLE))[None]
    run = jax.jit(lambda params: model.apply({"params": params}, x, jnp.array([0.7]), tokens))
    other = reordered(params)
    assert not np.array_equal(
        other["dit"]["blocks"]["ffn"]["up"]["bias"], params["dit"]["blocks"]["ffn"]["up"]["bias"]
    )
    np.testing.assert_allclose(run(other), run(params), atol=1e-4)


def test_captions_are_a_prompt_s_own_whatever_the_batch():
    def prompts(batch):
        parts = [
            one.wanted((one.numbers, one.scenes))
            for one in _batches(Task(prompts=5, seed=3, batch=batch, seeds=2))
        ]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    jax.tree.map(np.testing.assert_array_equal, prompts(2), prompts(5))
    numbers, scenes = prompts(5)
    assert jax.vmap(is_held_out)(scenes).all() and list(numbers) == 2 * list(range(5))
    assert (scenes.place[:5] != scenes.place[5:]).any()  # another seed, other scenes


@pytest.mark.slow
def test_scores_rank_models_by_their_error(params, capfd):
    models = {"floor": Model(reordered(params), QUICK)}
    models["plain"] = Model(*recipes.apply(params, named("plain"), QUICK))
    task = Task(prompts=3, batch=2, consistency=True)
    scores = score(Model(params, QUICK), models, task)
    assert list(scores) == ["reference", "floor", "plain"]
    for one in scores.values():
        assert one.one_thing.shape == one.psnr_db.shape == (3,)
        assert all(right.shape == (3,) for right in one.right.values())
    assert np.isinf(scores["reference"].psnr_db).all()
    for metric in ("psnr_db", "ssim", "step_sqnr_db"):
        floor, plain = (getattr(scores[name], metric).mean(axis=-1) for name in ("floor", "plain"))
        assert np.all(floor > plain), metric
    assert scores["plain"].step_sqnr_db.shape == (2, 3)
    assert scores["floor"].differences is None
    assert scores["plain"].differences.shape == (3, 8, 2)
    different, numbers = scores["plain"].differences.sum(axis=(0, 1))
    assert 0.03**2 < different / numbers < 0.3**2
    assert "evaluate" in capfd.readouterr().err


def test_another_sampler_is_refused(params):
    other = dataclasses.replace(QUICK, sampler=dataclasses.replace(SAMPLER, steps=3))
    with pytest.raises(ValueError, match="sampled as the reference"):
        score(Model(params, QUICK), {"other": Model(params, other)}, Task(prompts=1))


@pytest.mark.parametrize("name", ["prompts", "batch", "seeds"])
def test_nothing_to_do_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected a number from 1 up, got 0"):
        Task(**{"prompts": 4, name: 0})
