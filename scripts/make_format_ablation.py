"""What each choice in the design of `sdq32` costs or gains, in dB: behind docs/decisions.md.

    python -m scripts.make_format_ablation --out docs/results

Plain numpy in float64, from the definition of the format, on the seeded distributions. Two books
are fitted anew on the way, a minute each.
"""

import argparse
import pathlib

import numpy as np

from scripts._results import environment, page, write
from scripts.fit_formatbook import fitted_dialects
from sdq import distributions
from sdq.formatbook import COARSE_LIMIT, EXPONENT_WINDOW, FIRST_TOP, SDQ32, SHAPES_PER_TOP

ROWS = 96
SEED = 0
BOOK = np.array(SDQ32.dialects, np.float64)


def block_exponents(blocks: np.ndarray, low: float = 8.0) -> np.ndarray:
    """Exponents that put every block maximum into [low, 2 low) half-units."""
    return np.floor(np.log2(np.abs(blocks).max(axis=-1) / low))


def nearest(u: np.ndarray, dialect: np.ndarray) -> np.ndarray:
    """The dialect's magnitude nearest to each u, ties up."""
    return dialect[np.searchsorted((dialect[1:] + dialect[:-1]) / 2, u, side="right")]


def errors(u: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Squared error of every dialect on every block, `[dialects, blocks]`."""
    return np.stack([np.square(u - nearest(u, dialect)).sum(axis=-1) for dialect in book])


def table_errors(u: np.ndarray, bits: int, unit: float = 0.0, limit: float = np.inf) -> np.ndarray:
    """The same out of tables of 2^bits bins; rounded to `unit` relative to shape 0 and clipped."""
    bins = 2**bits
    centres = (np.arange(bins) + 0.5) * 16 / bins
    table = np.stack([np.square(centres - nearest(centres, dialect)) for dialect in BOOK])
    if unit:
        first = table[::SHAPES_PER_TOP].repeat(SHAPES_PER_TOP, axis=0)
        table = np.clip(np.rint((table - first) / unit), -limit, limit)
    place = np.clip(np.rint(u * bins / 16 - 0.5), 0, bins - 1).astype(int)
    return np.stack([entries[place].sum(axis=-1) for entries in table])


def ablation(x: np.ndarray, block: int, books: dict[str, np.ndarray]) -> dict[str, float]:
    """SQNR in dB of each variant on one array; `books` are fitted otherwise than the frozen one."""
    blocks = x.astype(np.float64).reshape(-1, block)
    signal = np.square(blocks).sum()

    def score(error: np.ndarray, exponent: np.ndarray) -> float:
        return float(10 * np.log10(signal / (error * 4.0**exponent).sum()))

    def at(exponent: np.ndarray) -> np.ndarray:
        return np.abs(blocks) / 2.0 ** exponent[:, None]

    def two_stage(chooser: np.ndarray, true: np.ndarray, u: np.ndarray) -> np.ndarray:
        top = np.clip(np.rint(u.max(axis=-1)), FIRST_TOP, 15).astype(int) - FIRST_TOP
        shapes = top * SHAPES_PER_TOP + np.arange(SHAPES_PER_TOP)[:, None]
        best = np.take_along_axis(chooser, shapes, axis=0).argmin(axis=0)
        return np.take_along_axis(true, top[None] * SHAPES_PER_TOP + best, axis=0)[0]

    exponent = block_exponents(blocks)
    u = at(exponent)
    true = errors(u, BOOK)
    scores = {"exhaustive, exact errors": score(true.min(axis=0), exponent)}
    for bits in (5, 6, 7, 11):
        chosen = table_errors(u, bits).argmin(axis=0)
        picked = np.take_along_axis(true, chosen[None], axis=0)[0]
        scores[f"all dialects, {bits}-bit table"] = score(picked, exponent)
    scores["two-stage, exact errors"] = score(two_stage(true, true, u), exponent)
    for name, unit, limit in (
        ("6-bit table", 0, np.inf),
        ("6-bit table in quarters, +-31 (frozen)", 1 / 4, COARSE_LIMIT),
        ("6-bit table in eighths, +-31", 1 / 8, COARSE_LIMIT),
    ):
        chooser = table_errors(u, 6, unit, limit)
        scores[f"two-stage, {name}"] = score(two_stage(chooser, true, u), exponent)
    for name, book in books.items():
        other_errors = errors(u, book)
        scores[f"{name}: exhaustive"] = score(other_errors.min(axis=0), exponent)
        chosen = two_stage(other_errors, other_errors, u)
        scores[f"{name}: two-stage, exact errors"] = score(chosen, exponent)

    for low in (7.75, 8.25):
        other = block_exponents(blocks, low)
        v = at(other)
        table = errors(v, BOOK)
        scores[f"maximum in [{low}, {2 * low})"] = score(table.min(axis=0), other)
    beside = [errors(at(exponent + step), BOOK) * 4.0**step for step in (-1, 1)]
    scores["neighbouring exponents too (3x the work)"] = score(
        np.minimum(true, np.minimum(*beside)).min(axis=0), exponent
    )

    rows = exponent.reshape(len(x), -1)
    window = np.maximum(rows, rows.max(axis=1, keepdims=True) - EXPONENT_WINDOW).ravel()
    scores["exponents at most 7 below the row's"] = score(
        errors(at(window), BOOK).min(axis=0), window
    )
    return scores


def to_markdown(results: dict[str, dict[str, float]], where: dict[str, str]) -> str:
    """A column for each kind of data, the difference to the first row behind it."""
    columns = list(results)
    variants = list(results[columns[0]])
    lines = [
        "SQNR in dB; below the first row the difference to it.",
        "",
        "| variant | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    base = {column: results[column][variants[0]] for column in columns}
    lines.append(f"| {variants[0]} | " + " | ".join(f"{base[c]:.2f}" for c in columns) + " |")
    for variant in variants[1:]:
        cells = (f"{results[c][variant] - base[c]:+.2f}" for c in columns)
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return page("What each choice in the design of sdq32 costs or gains", where, *lines)


def main() -> None:
    """Measure all variants and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    args = parser.parse_args()
    books = {
        "book fitted for exhaustive alone": np.array(fitted_dialects(two_stage_say=0), np.float64),
        "book fitted with GELU counted once": np.array(fitted_dialects(say={}), np.float64),
    }
    results = {
        f"{name}, {block}": ablation(distributions.sample(name, SEED)[:ROWS], block, books)
        for name in distributions.DISTRIBUTIONS
        for block in (16, 32)
    }
    where = environment(
        "make_format_ablation",
        data=f"{ROWS} rows of 2048 of each kind, seed {SEED}; columns: kind, block",
    )
    text = to_markdown(results, where)
    print(text)
    if args.out:
        write(args.out, "format_ablation", text, {"environment": where, "results": results})


if __name__ == "__main__":
    main()
