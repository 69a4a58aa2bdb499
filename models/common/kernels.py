"""What a recipe does to the kernels that read a site: rotation, error feedback.

Blocks are a parameter tree with the blocks stacked along axis 0; sites are those of the model, each
with the paths of the linears that read it ("blocks/self_attn/qkv": ("self_attn/q", ...)).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from models.common.quantizer import SiteRule, first_match
from models.common.scan import InputStatistics
from sdq import QTensor
from sdq.feedback import refine
from sdq.rotate import hadamard, largest_group
from sdq.rules import is_qtensor, path_of

Sites = Mapping[str, Sequence[str]]


def rotate(blocks: Any, sites: Sites, rules: Sequence[SiteRule]) -> Any:
    """The same function for inputs that `rules` rotate."""

    def turned(kernel: jax.Array, site: str) -> jax.Array:
        rule = first_match(rules, site)
        if rule is None or not rule.rotate:
            return kernel
        return hadamard(kernel, largest_group(kernel.shape[-2]), axis=-2)

    return _with_site(turned, blocks, sites)


def feed_back(
    quantised: Any,
    blocks: Any,
    statistics: Mapping[str, InputStatistics],
    sites: Sites,
    rules: Sequence[SiteRule],
) -> Any:
    """The 4-bit kernels of `quantised`, their codes chosen for the error of the product.

    Args:
      quantised: blocks with QTensor leaves; others stay as they are.
      blocks: what they were, rotated where they are.
      statistics: of every site's inputs, as the model makes them.
      sites: of the model.
      rules: which inputs are rotated.
    """

    def refined(q: Any, site: str, kernel: jax.Array) -> Any:
        if not isinstance(q, QTensor) or q.format.element_bits != 4:
            return q
        rule, moment = first_match(rules, site), statistics[site].second_moment
        if rule is not None and rule.rotate:
            group = largest_group(moment.shape[-1])
            moment = hadamard(hadamard(moment, group), group, axis=-2)
        return refine(q, kernel, moment)

    return _with_site(refined, quantised, sites, blocks)


def _with_site(change: Callable[..., Any], blocks: Any, sites: Sites, *others: Any) -> Any:
    """Each kernel that reads a site replaced by `change(kernel, site, *others)`."""
    reads = {f"{linear}/kernel": site for site, linears in sites.items() for linear in linears}

    def one(keys: tuple, leaf: Any, *others: Any) -> Any:
        site = reads.get(path_of(keys))
        return leaf if site is None else change(leaf, site, *others)

    return jax.tree_util.tree_map_with_path(one, blocks, *others, is_leaf=is_qtensor)
