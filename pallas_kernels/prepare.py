"""prepare_heads: what comes before attention in bf16, by a kernel or in plain jnp."""

import jax

from pallas_kernels import device
from pallas_kernels.projected import Projected, each_head_normed, prepared

IMPLEMENTATIONS = ("mosaic_gpu", "reference")  # the first that fits is taken


def prepare_heads(x: jax.Array | Projected, *, implementation: str | None = None) -> jax.Array:
    """As `prepared`, in one pass over memory where a kernel fits.

    Args:
      x: `[B, S, H, D]`.
      implementation: one of IMPLEMENTATIONS; None takes the first that fits. "mosaic_gpu" rounds
        once, "reference" after the norm and after the rotary embedding.
    Returns:
      `[B, S, H, D]` in x's dtype.
    Raises:
      ValueError: the implementation asked for does not fit.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation: expected one of {known}, got {implementation!r}")
    x = each_head_normed(x)
    reason = misfit(x)
    if implementation == "mosaic_gpu" and reason:
        raise ValueError(f"prepare_heads: mosaic_gpu cannot do this: {reason}")
    if implementation == "reference" or reason:
        return prepared(x)
    from pallas_kernels.mosaic_gpu import heads

    assert isinstance(x, Projected)
    return heads.prepared(x, num_sms=device.current().cores)


def misfit(x: jax.Array | Projected) -> str | None:
    """Why no kernel prepares x here; None if one does."""
    if not isinstance(x, Projected) or (x.gain is None and x.rope is None):
        return "nothing is to be done"
    if reason := device.without_mosaic_gpu():
        return reason
    from pallas_kernels.mosaic_gpu import heads  # takes a second to import

    return heads.misfit(x)
