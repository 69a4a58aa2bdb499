"""Published models at full size with random weights: quantising, memory, a step, a whole sampling.

    python -m scripts.bench_full_size --out docs/results

From bf16 tensors in the host's memory, in a published key layout, by the code that `sdq quantize`
and `sdq sample` run. Steps: one video, no guidance. Models that the folder's page holds of the same
device and versions are kept, but with --again. On 80 GB of memory:
XLA_PYTHON_CLIENT_PREALLOCATE=false and XLA_PYTHON_CLIENT_MEM_FRACTION=.95.
"""

import contextlib
import dataclasses
import functools
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sdq
from models import embeddings, generate
from models.common import recipes
from models.common.full_path import FullPath
from models.common.kernel_ops import on_kernels, tile_kernels
from models.common.layers import Ops
from models.common.quantize_files import quantize_files
from models.common.quantizer import InputQuantizer
from models.common.weights import params_from_tensors
from models.families import family_of
from models.jobs import Job
from models.published import Size, latent_size, published
from pallas_kernels import device
from scripts import _results as results
from scripts._random_checkpoint import RandomTensors
from scripts._timing import compiled, median_seconds, peak_bytes

STEM = "full_size"
RECIPE = recipes.with_embedders(recipes.named("plain_full_path"), "int8")
STEPS = 6  # of the sampling
ENOUGH = 10.0  # seconds of a way's steps, after which no more are timed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is measured of a model.

    Attributes:
      layout: of its checkpoint.
      size: of the video, (width, height, frames).
      text: tokens of it.
    """

    layout: str
    size: Size
    text: int


CASES = {
    "wan2.1-t2v-14b": Case(layout="original", size=(832, 480, 81), text=512),
    "open-sora-2.0": Case(layout="open-sora", size=(1024, 576, 129), text=512),
    "hunyuanvideo": Case(layout="hunyuan", size=(960, 544, 129), text=256),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of one model; bytes and seconds.

    Attributes:
      parameters: how many.
      bf16_bytes: of its weights.
      bytes: after quantising, everything counted.
      quantise: seconds from the host's memory to a checkpoint on disk.
      quantise_peak: bytes of the device's memory while it did.
      load: seconds from there to kernels' order in the device's memory.
      steps: seconds of a step, by way.
      peaks: bytes of its program, weights included, by way.
      sampling: seconds of all of `sdq sample`, STEPS steps of the model's own guidance.
    """

    parameters: int
    bf16_bytes: int
    bytes: int
    quantise: float
    quantise_peak: int
    load: float
    steps: dict[str, float]
    peaks: dict[str, int]
    sampling: float


def measure(model: str, folder: pathlib.Path) -> Result:
    """One model; its checkpoint goes into a folder."""
    case, family = CASES[model], family_of(model)
    config = family.sizes[model]
    tensors = RandomTensors(model, case.layout)
    sources = family.params.sources(config, case.layout)
    abstract = family.params.abstract_params(config)
    facts = {"model": model, "recipe": "plain_full_path"}
    with stopwatch("quantise") as quantise:
        quantize_files(
            tensors, sources, abstract, RECIPE, folder, sites=family.sites, metadata=facts
        )
    quantise_peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    with stopwatch("load") as load:
        fewer = jax.block_until_ready(tile_kernels(sdq.load(folder)))
    with stopwatch("bf16 weights to the device"):
        params = jax.block_until_ready(params_from_tensors(tensors, sources, abstract))
    steps, peaks = timed_steps(model, case, params, fewer)
    counts = [np.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)]
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(fewer))
    del params, fewer
    with stopwatch("sample") as sampling:
        sample(model, case, folder)
    return Result(
        parameters=int(sum(counts)),
        bf16_bytes=2 * int(sum(counts)),
        bytes=nbytes,
        quantise=quantise(),
        quantise_peak=quantise_peak,
        load=load(),
        steps=steps,
        peaks=peaks,
        sampling=sampling(),
    )


def timed_steps(
    model: str, case: Case, params: Any, fewer: Any
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and peaks of a step by way."""
    quantised = Ops(quantizer=InputQuantizer(RECIPE.inputs))
    both = dataclasses.replace(quantised, attention=FullPath())
    ways = {
        "bf16": (Ops(), params),
        "plain, fast": (on_kernels(quantised, "fast"), fewer),
        "plain, accurate": (on_kernels(quantised), fewer),
        "plain_full_path, fast": (on_kernels(both, "fast"), fewer),
        "plain_full_path, accurate": (on_kernels(both), fewer),
    }
    config, network = family_of(model).sizes[model], family_of(model).model
    texts = random_texts(model, case)
    inputs = {name: jnp.asarray(x) for name, x in texts.arrays.items() if name != "text_lengths"}
    size = latent_size(model, case.size)
    if getattr(config, "guidance", False):
        inputs["guidance"] = jnp.full(1, 6.0)
    if (channels := getattr(config, "cond_channels", None)) is not None:
        inputs["cond"] = jnp.zeros((1, *size, channels))
    x = jax.random.normal(jax.random.key(1), (1, *size, config.in_channels))

    def step(ops: Ops, weights: Any, x: jax.Array, t: jax.Array, inputs: Any) -> jax.Array:
        return jnp.asarray(network(config, ops).apply({"params": weights}, x, t, **inputs))

    calls = [
        (functools.partial(step, ops), (weights, x, jnp.full((1,), 500.0), inputs))
        for ops, weights in ways.values()
    ]
    with stopwatch("compile"):
        programs = compiled(calls)
    peaks = {name: peak_bytes(one) for name, one in zip(ways, programs, strict=True)}
    steps = {}
    for name, program, (_, arguments) in zip(ways, programs, calls, strict=True):
        call = functools.partial(program, *arguments)
        steps[name] = median_seconds(call, runs=3, enough=ENOUGH)
        print(f"{name}: {steps[name]:.3f} s, {peaks[name] / 1e9:.2f} GB", flush=True)
    return steps, peaks


def random_texts(model: str, case: Case) -> embeddings.Embeddings:
    """Of one prompt whose tokens all count."""
    config, known = family_of(model).sizes[model], published(model)
    random = np.random.default_rng(0)
    arrays = {"text": random.standard_normal((1, case.text, config.text_width), np.float32)}
    if (width := getattr(config, "pooled_width", None)) is not None:
        arrays["pooled"] = random.standard_normal((1, width), np.float32)
    if known.text == "hunyuanvideo":
        arrays["text_lengths"] = np.full(1, case.text, np.int32)
    guided = known.guidance != 1 and not getattr(config, "guidance", False)
    return embeddings.Embeddings(
        prompts=("random",), arrays=arrays, negative=arrays if guided else {}, text=known.text
    )


def sample(model: str, case: Case, folder: pathlib.Path) -> None:
    """What `sdq sample` does with the checkpoint."""
    with tempfile.TemporaryDirectory() as out:
        texts = pathlib.Path(out) / "texts.safetensors"
        embeddings.save(random_texts(model, case), texts)
        job = Job(
            model=model,
            checkpoint=folder,
            embeddings=texts,
            size=case.size,
            out=pathlib.Path(out) / "latents",
            steps=STEPS,
        )
        generate.run(job, on_note=print)


@contextlib.contextmanager
def stopwatch(name: str) -> Iterator[Any]:
    """Prints, and afterwards gives, the seconds of what is inside."""
    start = time.perf_counter()
    seconds: list[float] = []
    yield lambda: seconds[0]
    seconds.append(time.perf_counter() - start)
    print(f"{name}: {seconds[0]:.1f} s", flush=True)


def to_markdown(found: dict[str, Result], where: dict[str, str]) -> str:
    """The page that goes into docs/results."""
    lines = [
        "",
        "| | parameters | bf16 GB | 4-bit GB | share | quantise s | its peak GB | load s | "
        f"sample, {STEPS} steps, s |",
        "|" + "---|" * 9,
    ]
    for model, r in found.items():
        size = "x".join(map(str, CASES[model].size))
        lines.append(
            f"| {model}, {size} | {r.parameters / 1e9:.2f}e9 | {r.bf16_bytes / 1e9:.2f} | "
            f"{r.bytes / 1e9:.2f} | {r.bytes / r.bf16_bytes:.3f} | {r.quantise:.0f} | "
            f"{r.quantise_peak / 1e9:.1f} | {r.load:.0f} | {r.sampling:.0f} |"
        )
    for model, r in found.items():
        lines += ["", f"## A step of {model}", "", "| | s | against bf16 | peak GB | less |"]
        lines.append("|" + "---|" * 5)
        for name, seconds in r.steps.items():
            lines.append(
                f"| {name} | {seconds:.3f} | {r.steps['bf16'] / seconds:.2f}x | "
                f"{r.peaks[name] / 1e9:.2f} | {r.peaks['bf16'] / r.peaks[name]:.2f}x |"
            )
    return results.page(
        "Published models at full size",
        where,
        f"Random weights. Quantise: recipe `{RECIPE.name}`, from bf16 tensors in the host's memory "
        "to a checkpoint on disk. Load: from there to the device, in the kernels' order. Step: one "
        "video, no guidance; peak: of the compiled step, weights included. Sample: all of `sdq "
        "sample`, loading and compiling included, with the model's guidance. "
        + results.OF_EARLIER_RUNS,
        *lines,
    )


def main() -> None:
    """Measure what is missing and write JSON and Markdown."""
    parser = results.parser(__doc__)
    parser.add_argument("--models", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--again", action="store_true", help="measure what the page holds, too")
    args = parser.parse_args()
    if len(args.models) > 1:  # each in a process of its own, whose memory is only for that
        options = [] if args.out is None else ["--out", args.out]
        options += ["--again"] * args.again
        for model in args.models:
            command = [sys.executable, "-m", "scripts.bench_full_size", *options, "--models", model]
            if failed := subprocess.run(command).returncode:
                sys.exit(failed)
        return
    if reason := device.without_mosaic_gpu():
        parser.error(reason)
    where = results.environment("bench_full_size")
    before = results.kept(args.out, STEM, where)
    found = {name: Result(**row) for name, row in before.get("results", {}).items()}
    for model in args.models:
        if model in found and not args.again:
            print(f"== {model}: kept, measured before", flush=True)
            continue
        print(f"== {model}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found[model] = measure(model, pathlib.Path(folder) / "checkpoint")
        found = {name: found[name] for name in CASES if name in found}
        if args.out:
            document = {
                "environment": where,
                "results": {name: dataclasses.asdict(row) for name, row in found.items()},
            }
            results.write(args.out, STEM, to_markdown(found, where), document)
    print(to_markdown(found, where))


if __name__ == "__main__":
    main()
