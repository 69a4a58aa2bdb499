"""Flax video diffusion transformers whose matmul is an argument. Knows sdq and pallas_kernels."""

SAMPLED = ("shapes",)  # models that come with weights


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is a model that can be sampled."""
    if name not in SAMPLED:
        raise ValueError(f"unknown model {name!r}; there is {', '.join(SAMPLED)}")
