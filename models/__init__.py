"""Flax video diffusion transformers whose matmul is an argument. Knows sdq and pallas_kernels."""

from collections.abc import Sequence

SAMPLED = ("shapes",)  # models that come with weights


def check_name(name: str, others: Sequence[str] = ()) -> None:
    """Raises ValueError unless `name` is a model that comes with weights, or one of others."""
    if name not in (*SAMPLED, *others):
        raise ValueError(f"unknown model {name!r}; there is {', '.join((*SAMPLED, *others))}")
