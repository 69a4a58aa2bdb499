"""Do an accelerator and the CPU quantise to the same bits? Every format, way to choose and axis.

    python -m scripts.check_backends --out docs/results     # on a machine with a GPU or TPU

Compares codes, scales, outer scales and dequantised values of the default device with the CPU's, on
the seeded distributions and on rows of wild magnitudes, zeros, ties, NaN and Inf. Exit status 1
where any byte differs.
"""

import argparse
import collections
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import sdq
from scripts import _results as results
from sdq import distributions, format_table

SHAPE = (128, 1024)


def samples() -> dict[str, np.ndarray]:
    """Arrays by name, float32."""
    data = {name: distributions.sample(name, 7, SHAPE) for name in distributions.DISTRIBUTIONS}
    rng = np.random.RandomState(7)
    wild = rng.standard_normal(SHAPE) * np.exp2(rng.randint(-120, 120, (SHAPE[0], 1)))
    wild[1] = 0
    wild[2] = np.resize(np.arange(-8, 8.25, 0.25), SHAPE[1])
    wild[3, 5], wild[4, 6], wild[5, 7] = np.nan, np.inf, -np.inf
    wild[6] = 2.0**-130
    data["wild rows"] = wild.astype(np.float32)
    return data


def differing_bytes(x: np.ndarray, name: str, rule: str | None, axis: int) -> int:
    """Bytes in which the default device and the CPU differ."""

    def on(device: jax.Device) -> list[np.ndarray]:
        array = jax.device_put(jnp.asarray(x), device)
        q = sdq.quantize(array, name, select=rule, axis=axis)
        return [np.asarray(part) for part in (*q.parts.values(), sdq.dequantize(q))]

    pairs = zip(on(jax.devices("cpu")[0]), on(jax.devices()[0]), strict=True)
    return sum(int((bits(a) != bits(b)).sum()) for a, b in pairs)


def bits(a: np.ndarray) -> np.ndarray:
    """The bytes of an array, all NaNs made alike."""
    return np.where(np.isnan(a), a.dtype.type(0), a).view(np.uint8)


def main() -> None:
    """Compare everything, print and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    args = parser.parse_args()
    if jax.default_backend() == "cpu":
        raise SystemExit(
            "check_backends: JAX sees no accelerator here; there is nothing to compare"
        )

    data = samples()
    differing: dict[str, int] = collections.Counter()
    cases = 0
    for name in format_table.FORMATS:
        for rule in format_table.select_rules(sdq.format(name)):
            for kind, x in data.items():
                for axis in (-1, 0):
                    cases += 1
                    if count := differing_bytes(x, name, rule, axis):
                        differing[f"{name} {rule or ''} axis {axis} on {kind}"] = count
    where = results.environment(
        "check_backends",
        device=f"{jax.devices()[0].device_kind} against the CPU",
        cases=f"{cases} (formats x ways to choose x {len(data)} kinds of data x 2 axes)",
        differing=f"{len(differing)} cases",
    )
    rows = [f"| {case} | {count} |" for case, count in differing.items()]
    table = ["| case | bytes that differ |", "|---|---|", *rows] if differing else []
    page = results.page("The same bits on every backend", where, *table)
    print(page)
    if args.out:
        document = {"environment": where, "differing": differing}
        results.write(args.out, f"backends_{jax.default_backend()}", page, document)
    raise SystemExit(1 if differing else 0)


if __name__ == "__main__":
    main()
