"""Embeddings to latents with a published model, from a checkpoint of `sdq quantize` or `convert`.

A step is one jitted call, so that between steps progress is shown, numbers are checked and what was
done is saved: an interrupted sampling goes on where it was.
"""

import dataclasses
import functools
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import sdq
from models import embeddings, jobs, latents
from models.common import recipes
from models.common.kernel_ops import on_kernels, tile_kernels, without_kernels
from models.common.layers import Ops
from models.common.progress import step_bar
from models.common.sampler import Integration, Step, advance, begin, guided, noise
from models.families import family_of
from models.jobs import Job, Plan

UNFINISHED = "unfinished.safetensors"
SAVE_EVERY = 30.0  # seconds of work that a kill may cost, and a step


def run(job: Job, on_note: Callable[[str], None] = lambda note: None) -> list[pathlib.Path]:
    """Write the latents of each prompt, one after the other; returns the paths.

    What an earlier call of the same job has finished stays; with what it has begun this one goes
    on.

    Args:
      job: what to sample.
      on_note: called with what a user should know before the work begins.
    Raises:
      ValueError: something does not fit together (before any work is done), or a step gives
        numbers that are not finite.
    """
    plan, texts = jobs.plan(job), embeddings.load(job.embeddings)
    jobs.check_texts(texts, job.model, needs_negative=any(scale != 1 for scale in plan.scales))
    files = [job.out / f"{_stem(n, prompt)}.safetensors" for n, prompt in enumerate(texts.prompts)]
    facts = [
        {**plan.facts, "prompt": prompt, "number": n} for n, prompt in enumerate(texts.prompts)
    ]
    wanted = [n for n, file in enumerate(files) if not _is_finished(file, facts[n])]
    if not wanted:
        return files
    # Read before the weights, which may take minutes.
    begun = latents.load_unfinished(facts, job.out / UNFINISHED)
    ops, params, products = _loaded(plan)
    on_note(f"{job.model}, {plan.recipe}; products: {products}")
    model = family_of(job.model).model(plan.config, ops, job.dtype)

    for n in wanted:
        between, done = begun.get(n) or (begin(_noise(job, plan, n)), 0)
        condition = _inputs({name: x[n : n + 1] for name, x in texts.arrays.items()}, plan)
        negative = _inputs(texts.negative, plan) if texts.negative else None
        between = _sampled(
            functools.partial(_further, plan, params, model, condition, negative),
            between,
            done,
            len(plan.scales),
            functools.partial(latents.save_unfinished, facts=facts[n], path=job.out / UNFINISHED),
            name=f"sample {n + 1} of {len(files)}",
        )
        latents.save(between.x, facts[n], files[n])
        (job.out / UNFINISHED).unlink(missing_ok=True)
    return files


def _loaded(plan: Plan) -> tuple[Ops, dict[bool, Any], str]:
    """Ops, parameters by whether there is much noise, and what multiplies, in words."""
    # Recipes that look at the video's tokens are refused.
    ops = Ops(quantizer=recipes.quantizer(plan.recipe, grid=(1, 1, 1), sites=()))
    if plan.recipe.attention is not None:
        ops = dataclasses.replace(ops, attention=plan.recipe.attention)
    params = {number == 0: sdq.load(folder) for number, folder in enumerate(plan.folders)}
    if reason := without_kernels(ops, params):
        return ops, params, f"plain, since kernels: {reason}"
    return on_kernels(ops), {key: tile_kernels(tree) for key, tree in params.items()}, "kernels"


def _is_finished(file: pathlib.Path, facts: dict[str, Any]) -> bool:
    if not file.exists():
        return False
    if (was := latents.facts_of(file)) != facts:
        raise ValueError(f"{file}: {latents.difference(was, facts)}; give another folder")
    return True


def _noise(job: Job, plan: Plan, number: int) -> jax.Array:
    """The same prompt number gets the same noise anywhere."""
    key = jax.random.fold_in(jax.random.key(job.seed), number)
    return noise(key, (1, *plan.size, plan.config.out_channels))


def _inputs(arrays: Mapping[str, np.ndarray], plan: Plan) -> dict[str, jax.Array]:
    """What the network reads beside x and t, by its arguments' names; a batch of 1."""
    inputs = {name: jnp.asarray(array) for name, array in arrays.items()}
    if getattr(plan.config, "guidance", False):
        inputs["guidance"] = jnp.full(1, plan.guidance, jnp.float32)
    if (channels := getattr(plan.config, "cond_channels", None)) is not None:
        inputs["cond"] = jnp.zeros((1, *plan.size, channels), jnp.float32)  # no pixel is given
    if plan.recipe.attention is not None and "text_lengths" in inputs:
        # The kernels that round queries and keys take all tokens: leave out those of padding.
        inputs["text"] = inputs["text"][:, : int(inputs.pop("text_lengths")[0])]
    return inputs


@functools.partial(jax.jit, static_argnames="model")
def _advance(
    params: Any,
    between: Integration,
    step: Step,
    t: jax.Array,
    scale: jax.Array,
    condition: Mapping[str, jax.Array],
    negative: Mapping[str, jax.Array] | None,
    *,
    model: nn.Module,
) -> tuple[Integration, jax.Array]:
    """One step further, and whether all its numbers are finite; no guidance without `negative`."""

    def predict(x, sigma, step, state, inputs):
        del sigma, step
        v = model.apply({"params": params}, x, jnp.broadcast_to(t, len(x)), **inputs)
        return jnp.asarray(v), state

    velocity = guided(predict, condition, negative, 1.0 if negative is None else scale)
    after, v = advance(velocity, between, step)
    return after, jnp.isfinite(v).all() & jnp.isfinite(after.x).all()


def _sampled(
    further: Callable[[int, Integration], tuple[Integration, jax.Array]],
    between: Integration,
    done: int,
    steps: int,
    save: Callable[[Integration, int], None],
    *,
    name: str,
) -> Integration:
    """All steps from number `done` on, with a bar; saved now and then, and when interrupted.

    Raises:
      ValueError: a step gives numbers that are not finite.
    """
    saved = time.monotonic()
    with step_bar(name, steps, done) as step_done:
        try:
            for step in range(done, steps):
                after, is_finite = further(step, between)
                if not is_finite:
                    raise ValueError(
                        f"step {step + 1} of {steps}: the velocity holds NaN or Inf; "
                        "embeddings, guidance or the checkpoint's numbers are out of range"
                    )
                between, done = after, step + 1
                step_done(step)
                if time.monotonic() - saved > SAVE_EVERY and done < steps:
                    save(between, done)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if done:
                save(between, done)
            raise
    return between


def _further(
    plan: Plan,
    params: Mapping[bool, Any],
    model: nn.Module,
    condition: Mapping[str, jax.Array],
    negative: Mapping[str, jax.Array] | None,
    step: int,
    between: Integration,
) -> tuple[Integration, jax.Array]:
    """`_advance` at a step's number."""
    return _advance(
        params[plan.is_high[step]],
        between,
        jax.tree.map(lambda numbers: numbers[step], plan.steps),
        plan.timesteps[step],
        np.float32(plan.scales[step]),
        condition,
        None if plan.scales[step] == 1 else negative,
        model=model,
    )


def _stem(number: int, prompt: str) -> str:
    """Of a prompt's file: its number and first words."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join([str(number + 1), *words[:4]])
