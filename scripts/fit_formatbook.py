"""Fit the book `sdq32`: 8 tops x 4 shapes, chosen out of all dialects that are possible.

    python -m scripts.fit_formatbook    # prints the table and compares it with the frozen one

One book serves blocks of 16 and 32. What is minimised, summed over blocks of every kind of data in
`sdq.distributions`: the error of the exhaustive choice over the whole book, plus twice the error of
the two-stage choice (top from the block maximum), because activations use that one. Each kind of
data counts by its error relative to E2M1's, so that a decibel weighs the same everywhere.

Greedy, then swaps of one dialect at a time until nothing improves. Every sum is a sum of integers
below 2^53, so the result does not depend on the machine, on the BLAS or on numpy's order of
summation.
"""

import argparse
import itertools
import time

import numpy as np

from sdq import distributions, formatbook
from sdq.formatbook import E2M1, FIRST_TOP, SDQ32, SHAPES_PER_TOP

STEPS = 16  # steps in a half-unit for histograms of magnitudes
BLOCKS_EACH = 2048  # blocks sampled of each (distribution, block size)
BLOCK_SIZES = (16, 32)
FIT_SEED = 1000  # the format table and the tests use other seeds
TWO_STAGE_SAY = 2  # how much the two-stage error counts beside the exhaustive one
SAY = {"GELU output": 2}  # a one-sided kind: alone among five it would be outvoted
E2M1_COST = 2.0**33  # of each (distribution, block size): weights near 2^10, all sums below 2^53
TOPS = range(FIRST_TOP, 16)


def candidates() -> np.ndarray:
    """int `[6434, 8]`: every dialect, 0 first, then 6 ascending magnitudes, then a top of 8..15."""
    return np.array(
        [(0, *middle, top) for top in TOPS for middle in itertools.combinations(range(1, top), 6)]
    )


def histograms(x: np.ndarray, block: int, rng: np.random.RandomState):
    """Of sampled blocks: counts float32 `[blocks, 256]`, exponents, nearest tops."""
    blocks = np.abs(x.astype(np.float64).reshape(-1, block))
    blocks = blocks[rng.permutation(len(blocks))[:BLOCKS_EACH]]
    exponent = np.frexp(blocks.max(axis=1))[1] - 4  # floor(log2 amax) - 3
    u = np.ldexp(blocks, -exponent[:, None])
    step = np.minimum((u * STEPS).astype(np.int64), 16 * STEPS - 1)
    counts = np.zeros((len(blocks), 16 * STEPS), np.float32)
    np.add.at(counts, (np.arange(len(blocks))[:, None], step), 1)
    tops = np.clip(np.rint(u.max(axis=1)), FIRST_TOP, 15).astype(np.int64)
    return counts, exponent, tops


def training_set(dialects: np.ndarray, say: dict[str, int]):
    """Errors float32 `[candidates, blocks]`, integer weights and nearest tops `[blocks]`."""
    centre = 2 * np.arange(16 * STEPS) + 1  # in 1/(2 STEPS) of a half-unit
    distance = np.abs(centre[:, None, None] - 2 * STEPS * dialects[None])
    squared = np.square(distance.min(axis=-1)).astype(np.float32)  # [256, candidates]
    e2m1 = dialects.tolist().index(list(E2M1.dialects[0]))
    rng = np.random.RandomState(FIT_SEED)
    errors, weights, tops = [], [], []
    for name in distributions.DISTRIBUTIONS:
        x = distributions.sample(name, FIT_SEED)
        for block in BLOCK_SIZES:
            counts, exponent, nearest = histograms(x, block, rng)
            # Integers below 2^24: exact in float32 whatever the order of the product's sums.
            error = counts @ squared
            power = np.ldexp(1.0, 2 * (exponent - exponent.max()))
            share = power / (power @ error[:, e2m1].astype(np.float64))
            errors.append(error.T)
            weights.append(np.rint(share * E2M1_COST * say.get(name, 1)))
            tops.append(nearest)
    return np.concatenate(errors, axis=1), np.concatenate(weights), np.concatenate(tops)


def fit(dialects, errors, weights, tops, two_stage_say: int, log=print) -> list[list[int]]:
    """Candidate numbers of the 4 shapes of each top."""
    own = {top: np.flatnonzero(dialects[:, -1] == top) for top in TOPS}
    of_top = {top: np.flatnonzero(tops == top) for top in TOPS}
    stage_two = {top: np.ascontiguousarray(errors[own[top]][:, of_top[top]]) for top in TOPS}
    book: dict[int, list[int]] = {top: [] for top in TOPS}
    none = np.float32(2**23)
    assert weights.sum() * none * (1 + two_stage_say) < 2**53, "a sum would round"

    def best_of(chosen: list[int], columns=slice(None)) -> np.ndarray:
        held = np.full(len(weights), none)[columns]
        for candidate in chosen:
            held = np.minimum(held, errors[candidate, columns])
        return held

    def costs(top: int, others: list[int], rest: list[int]) -> np.ndarray:
        """Cost of each candidate of `top` beside `others` of that top and `rest` of the book."""
        whole, stage = best_of(rest), best_of(others, of_top[top])
        exhaustive = [np.minimum(whole, errors[c]) @ weights for c in own[top]]
        two_stage = [np.minimum(stage, e) @ weights[of_top[top]] for e in stage_two[top]]
        return np.array(exhaustive) + two_stage_say * np.array(two_stage)

    def whole_book(without: int | None = None) -> list[int]:
        return [c for chosen in book.values() for c in chosen if c != without]

    for _ in range(SHAPES_PER_TOP):
        for top in TOPS:
            best = costs(top, book[top], whole_book()).argmin()
            book[top].append(int(own[top][best]))

    swaps = None
    while swaps != 0:
        swaps = 0
        for top, place in itertools.product(TOPS, range(SHAPES_PER_TOP)):
            held = book[top][place]
            others = [c for c in book[top] if c != held]
            cost = costs(top, others, whole_book(without=held))
            if cost.min() < cost[own[top].tolist().index(held)]:
                book[top][place] = int(own[top][cost.argmin()])
                swaps += 1
        log(f"a sweep over the book: {swaps} swaps")
    return [book[top] for top in TOPS]


def fitted_dialects(
    two_stage_say: int = TWO_STAGE_SAY, say: dict[str, int] = SAY, log=print
) -> tuple[tuple[int, ...], ...]:
    """The book: 32 dialects, by top, then in ascending order."""
    dialects = candidates()
    errors, weights, tops = training_set(dialects, say)
    chosen = fit(dialects, errors, weights, tops, two_stage_say, log=log)
    return tuple(
        tuple(dialect) for shapes in chosen for dialect in sorted(dialects[shapes].tolist())
    )


def main() -> None:
    """Fit, print, and compare with the frozen table (exit status 1 where they differ)."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    start = time.perf_counter()
    dialects = fitted_dialects()
    for dialect in dialects:
        print(f"        {dialect},")
    same = dialects == SDQ32.dialects
    print(f"{'equals' if same else 'DIFFERS FROM'} sdq.formatbook.SDQ32 as frozen")
    print(f"{len(formatbook.BOOKS)} books, {time.perf_counter() - start:.0f} s")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
