"""Rules say which leaf of a parameter tree gets which format; a plan says it for every leaf.

    rules = [Rule(r".*/kernel", "sdq32:16", axis=-2), Rule(r".*", None)]
    plan = resolve(rules, params)      # strict: nothing unmatched, nothing uncovered
    print(plan)

Nothing is quantised here (`tree.py`).
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sdq import formats
from sdq.formats import Format
from sdq.qtensor import QTensor
from sdq.quantize import INPUT_DTYPES, checked_rule

PLAN_VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """What happens to leaves whose whole path matches.

    Attributes:
      pattern: regular expression for the full path, parts joined by "/" ("blocks/attn/kernel").
      format: a format name, or None to keep the leaf as it is.
      axis: the contraction axis; -2 suits Flax kernels `[in, out]`, stacked or not.
      select: how blocks choose their dialect (see `quantize`).
    """

    pattern: str
    format: str | None
    axis: int = -2
    select: str | None = None

    def __post_init__(self):
        check_pattern(self.pattern)
        if self.format is not None:
            checked_rule(self.select, formats.parse(self.format))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LeafPlan:
    """What happens to one leaf; `rule` is the number of the rule that decided it."""

    format: Format | None
    axis: int
    select: str | None
    shape: tuple[int, ...]
    dtype: str
    rule: int

    @property
    def bytes_before(self) -> int:
        """Bytes of the leaf as it is."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def bits_per_element(self) -> float:
        """Nominal bits an element after the plan, outer scales left out."""
        if self.format is None:
            return 8.0 * np.dtype(self.dtype).itemsize
        return self.format.bits_per_element


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Explicit: one LeafPlan for every path, in tree order. Compares by value."""

    leaves: dict[str, LeafPlan]

    def __str__(self) -> str:
        width = max(map(len, self.leaves), default=4)
        lines = [
            f"{path:<{width}}  {leaf.format or 'keep'!s:<14} "
            f"{leaf.dtype}{list(leaf.shape)}"
            + (f" axis {leaf.axis}" if leaf.format else "")
            + (f" select {leaf.select}" if leaf.select else "")
            for path, leaf in self.leaves.items()
        ]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Text that `from_json` reads back to an equal plan."""
        leaves = {
            path: {**dataclasses.asdict(leaf), "format": leaf.format and str(leaf.format)}
            for path, leaf in self.leaves.items()
        }
        return json.dumps({"version": PLAN_VERSION, "leaves": leaves}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises ValueError for text that is no plan of this version, naming the leaf if one is."""
        try:
            data = json.loads(text)
            version, leaves = data["version"], data["leaves"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"not a plan: {error!r}") from None
        if version != PLAN_VERSION:
            raise ValueError(f"plan version {version}, this sdq reads version {PLAN_VERSION}")
        return cls({path: _leaf_plan(path, leaf) for path, leaf in leaves.items()})


def resolve(rules: Sequence[Rule], params: Any) -> Plan:
    """Decide every leaf of a parameter tree; the first rule that matches wins.

    Args:
      rules: in order of precedence.
      params: a tree of arrays or ShapeDtypeStructs.
    Returns:
      A Plan that covers every leaf.
    Raises:
      ValueError: one message that lists every leaf without a rule, every rule that decided nothing
        and every leaf that cannot take its format.
    """
    leaves = flatten(params)
    decided: dict[str, LeafPlan] = {}
    used: set[int] = set()
    problems = []
    for path, leaf in leaves.items():
        if isinstance(leaf, QTensor):
            problems.append(f"leaf {path!r} is quantised already ({leaf!r})")
            continue
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            problems.append(f"leaf {path!r} is no array but {type(leaf).__name__}")
            continue
        number = _first_match(rules, path)
        if number is None:
            problems.append(
                f"leaf {path!r} {list(leaf.shape)}: no rule covers it; "
                'end with Rule(".*", None) to keep what is left'
            )
            continue
        used.add(number)
        if problem := _misfit(rules[number], leaf):
            problems.append(f"leaf {path!r} (rule {number}): {problem}")
            continue
        rule = rules[number]
        decided[path] = LeafPlan(
            format=None if rule.format is None else formats.parse(rule.format),
            axis=rule.axis,
            select=rule.select,
            shape=tuple(leaf.shape),
            dtype=np.dtype(leaf.dtype).name,
            rule=number,
        )
    problems += [_why_unused(rules, n, leaves) for n in range(len(rules)) if n not in used]
    if problems:
        raise ValueError("rules do not fit the tree:\n  " + "\n  ".join(problems))
    return Plan(decided)


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, parts joined by "/"; a QTensor is one leaf.

    Raises:
      ValueError: two leaves would share a path (a key holds a "/").
    """
    found: dict[str, Any] = {}
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_qtensor)
    for keys, leaf in pairs:
        path = path_of(keys)
        if path in found:
            raise ValueError(f"two leaves have the path {path!r}")
        found[path] = leaf
    return found


def check_pattern(pattern: str) -> None:
    """Raises ValueError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None


def path_of(keys: tuple) -> str:
    """The path that rules see: "blocks/0/attn/kernel"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def is_qtensor(leaf: Any) -> bool:
    """For `is_leaf=` of tree functions: a QTensor is one leaf of a parameter tree."""
    return isinstance(leaf, QTensor)


def _first_match(rules: Sequence[Rule], path: str) -> int | None:
    matches = (n for n, r in enumerate(rules) if re.fullmatch(r.pattern, path))
    return next(matches, None)


def _misfit(rule: Rule, leaf: Any) -> str | None:
    """Why a leaf cannot take the rule's format."""
    if rule.format is None:
        return None
    dtype = np.dtype(leaf.dtype).name
    if dtype not in INPUT_DTYPES:
        return f"{dtype} cannot be quantised to {rule.format}"
    ndim = len(leaf.shape)
    if not -ndim <= rule.axis < ndim:
        return f"axis {rule.axis} is out of range for shape {list(leaf.shape)}"
    return None


def _why_unused(rules: Sequence[Rule], number: int, leaves: dict[str, Any]) -> str:
    pattern = rules[number].pattern
    taken = [path for path in leaves if re.fullmatch(pattern, path)]
    if taken:
        return (
            f"rule {number} {pattern!r} decides nothing: earlier rules took "
            f"all {len(taken)} leaves that it matches"
        )
    return f"rule {number} {pattern!r} matches no leaf"


def _leaf_plan(path: str, leaf: dict) -> LeafPlan:
    try:
        fmt = leaf["format"]
        return LeafPlan(
            **{
                **leaf,
                "format": None if fmt is None else formats.parse(fmt),
                "shape": tuple(leaf["shape"]),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"plan, leaf {path!r}: {error}") from None
