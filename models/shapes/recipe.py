"""Recipes carried out on the shapes model."""

import dataclasses
from collections.abc import Callable
from typing import Any

from models.common import kernels, recipes
from models.common.layers import Ops
from models.common.progress import step_bar
from models.common.recipes import Recipe
from models.common.scan import linear_work
from models.common.semantic import SemanticDialect, extra_work
from models.shapes import scan
from models.shapes.config import CONFIG
from models.shapes.generate import Settings
from models.shapes.world import VIDEO
from models.wan.sites import SITES, VIDEO_SITES, video_inputs
from models.wan.smooth import smooth
from sdq import LeafReport, progress_bar, quantize_params

LOOKS = 6  # steps of the trajectory at which the plan for decomposition looks


def apply(
    params: Any,
    recipe: Recipe,
    settings: Settings,
    on_leaf: Callable[[LeafReport], None] | None = None,
) -> tuple[Any, Settings]:
    """Quantised weights, and settings whose ops quantise the rest; with progress bars.

    Args:
      params: of the model, arrays.
      recipe: what to do.
      settings: how the model is sampled, also while it is scanned.
      on_leaf: called with a LeafReport after each leaf.
    Raises:
      ValueError: the recipe does not fit, before any work is done.
    """
    recipes.plan(params, recipe, SITES)
    decomposition = statistics = layers = None
    if recipe.needs_scan:
        steps = settings.sampler.steps
        with step_bar(
            "scan", steps + (min(LOOKS, steps) if recipe.needs_noise else 0)
        ) as step_done:
            seen = scan.watch(params, settings, on_step=step_done)
            params = smoothed(params, seen, recipe.smooth, settings.dtype)
            if recipe.needs_noise:
                options = {"dtype": settings.dtype, "on_step": step_done}
                noise = scan.noise(params, seen.thinned(LOOKS), recipe.inputs, **options)
                if recipe.extra_work:
                    proposal = scan.plan(params, noise, recipe.extra_work, recipe.salient)
                    decomposition = proposal.decomposition
                if recipe.sharing is not None:
                    layers = scan.sharing_layers(noise, decomposition, recipe.sharing.noise)
            if recipe.feedback:
                statistics = scan.statistics(params, seen, settings.dtype)
    params = _with_blocks(params, kernels.rotate(_blocks(params), SITES, recipe.inputs))
    plan = recipes.plan(params, recipe, SITES)
    with progress_bar(plan, on_leaf) as advance:
        quantised = quantize_params(params, plan, on_leaf=advance)
    if statistics is not None:
        better = kernels.feed_back(
            _blocks(quantised), _blocks(params), statistics, SITES, recipe.inputs
        )
        quantised = _with_blocks(quantised, better)
    quantizer = recipes.quantizer(
        recipe,
        grid=CONFIG.dit.grid(VIDEO[:3]),
        sites=video_inputs(CONFIG.dit),
        decomposition=decomposition,
        sharing_layers=layers,
    )
    ops = Ops(quantizer=quantizer)
    if recipe.attention is not None:
        ops = dataclasses.replace(ops, attention=recipe.attention)
    return quantised, dataclasses.replace(settings, ops=ops)


def smoothed(params: Any, seen: scan.Seen, alpha: float | None, dtype: Any) -> Any:
    """The same function, part of its inputs' range moved into the weights; None moves nothing."""
    if alpha is None:
        return params
    found = scan.statistics(params, seen, dtype)
    largest = {site: of.largest for site, of in found.items()}
    return params | {"dit": smooth(params["dit"], largest, alpha)}


def added_work(params: Any, settings: Settings) -> float:
    """Matrix products that the settings' decomposition adds, as a share of the blocks' own."""
    quantizer = settings.ops.quantizer
    if not isinstance(quantizer, SemanticDialect) or quantizer.decomposition is None:
        return 0.0
    work = linear_work(_blocks(params), VIDEO_SITES)
    return extra_work(quantizer.decomposition, work, scan.TOKENS, CONFIG.dit.layers)


def _blocks(params: Any) -> Any:
    return params["dit"]["blocks"]


def _with_blocks(params: Any, blocks: Any) -> Any:
    return params | {"dit": params["dit"] | {"blocks": blocks}}
