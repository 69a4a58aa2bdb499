"""quantize_params and dequantize_params: a plan carried out on a parameter tree, leaf by leaf."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdq import metrics, rules
from sdq.formats import Format
from sdq.progress import bytes_bar
from sdq.qtensor import QTensor
from sdq.quantize import dequantize, quantize
from sdq.rules import LeafPlan, Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LeafReport:
    """What quantising did to one leaf; `sqnr_db` is None for a leaf that was kept."""

    path: str
    format: Format | None
    shape: tuple[int, ...]
    dtype: str
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None


def quantize_params(
    params: Any,
    plan: Plan,
    *,
    on_leaf: Callable[[LeafReport], None] | None = None,
    donate: bool = False,
) -> Any:
    """The same tree with QTensor leaves where the plan says so.

    Goes leaf by leaf, so that at most one leaf is held twice. Works under jit and `jax.eval_shape`
    too (without `on_leaf` and `donate`).

    Args:
      params: a tree of arrays, the one that the plan was resolved for.
      plan: from `resolve`.
      on_leaf: called with a LeafReport after each leaf, for `progress_bar` and `leaf_table`;
        measuring the error costs one dequantisation a leaf. `list.append` collects them.
      donate: free each array's buffer once it is quantised. The caller's arrays are deleted: peak
        memory is then the tree plus a few leaves, not the tree twice.
    Raises:
      ValueError: the tree is not the plan's; every difference is listed.
    """
    _check_same_tree(rules.flatten(params), plan)

    def one(keys, leaf):
        path = rules.path_of(keys)
        result = _quantize_leaf(leaf, plan.leaves[path])
        if on_leaf is not None:
            on_leaf(_report(path, leaf, result))
        if donate and isinstance(result, QTensor) and isinstance(leaf, jax.Array):
            jax.block_until_ready(result)
            leaf.delete()
        return result

    return jax.tree_util.tree_map_with_path(one, params)


def dequantize_params(params: Any) -> Any:
    """The same tree with every QTensor replaced by the array that it stands for."""
    return jax.tree.map(
        lambda leaf: dequantize(leaf) if rules.is_qtensor(leaf) else leaf,
        params,
        is_leaf=rules.is_qtensor,
    )


@contextlib.contextmanager
def progress_bar(
    plan: Plan, on_leaf: Callable[[LeafReport], None] | None = None
) -> Iterator[Callable[[LeafReport], None]]:
    """An `on_leaf` that draws a progress bar on stderr and passes each report on.

    with progress_bar(plan, reports.append) as on_leaf:
        quantised = quantize_params(params, plan, on_leaf=on_leaf)
    """
    total = sum(leaf.bytes_before for leaf in plan.leaves.values())
    with bytes_bar("quantise", total) as more:

        def advance(report: LeafReport) -> None:
            more(report.path, report.bytes_before)
            if on_leaf is not None:
                on_leaf(report)

        yield advance


def totals(reports: Iterable[LeafReport]) -> tuple[int, int]:
    """Bytes before and after, summed."""
    pairs = [(r.bytes_before, r.bytes_after) for r in reports]
    return sum(p[0] for p in pairs), sum(p[1] for p in pairs)


def _quantize_leaf(leaf: Any, planned: LeafPlan) -> Any:
    if planned.format is None:
        return leaf
    return quantize(leaf, planned.format, axis=planned.axis, select=planned.select)


def _report(path: str, leaf: Any, result: Any) -> LeafReport:
    quantised = isinstance(result, QTensor)
    nbytes = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    return LeafReport(
        path=path,
        format=result.format if quantised else None,
        shape=tuple(leaf.shape),
        dtype=np.dtype(leaf.dtype).name,
        bytes_before=nbytes,
        bytes_after=result.nbytes if quantised else nbytes,
        sqnr_db=float(_leaf_sqnr_db(leaf, result)) if quantised else None,
    )


@jax.jit
def _leaf_sqnr_db(leaf: jax.Array, q: QTensor) -> jax.Array:
    return metrics.sqnr_db(leaf, dequantize(q, jnp.float32))


def _check_same_tree(leaves: dict[str, Any], plan: Plan) -> None:
    problems = [f"- {path}: planned, not in the tree" for path in plan.leaves.keys() - leaves]
    for path, leaf in leaves.items():
        planned = plan.leaves.get(path)
        if planned is None:
            problems.append(f"+ {path}: in the tree, not planned")
        elif (tuple(leaf.shape), np.dtype(leaf.dtype).name) != (
            planned.shape,
            planned.dtype,
        ):
            problems.append(
                f"! {path}: planned {planned.dtype}{list(planned.shape)}, "
                f"is {np.dtype(leaf.dtype).name}{list(leaf.shape)}"
            )
    if problems:
        raise ValueError("the tree is not the plan's:\n  " + "\n  ".join(sorted(problems)))
