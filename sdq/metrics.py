"""How far two arrays are apart."""

import jax
import jax.numpy as jnp


def sqnr_db(x: jax.Array, y: jax.Array) -> jax.Array:
    """Signal to quantisation noise, 10 log10(sum x^2 / sum (x - y)^2), float32 scalar in dB.

    x is the signal, y its approximation, shapes equal. +inf where y equals x, -inf for a zero
    signal with noise, NaN where either holds a NaN or an Inf.
    """
    if x.shape != y.shape:
        raise ValueError(f"sqnr_db: shapes differ, {x.shape} and {y.shape}")
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    # Scaled by the largest magnitude, so that squares stay inside float32.
    largest = jnp.max(jnp.maximum(jnp.abs(x), jnp.abs(y)), initial=0.0)
    unit = jnp.where(largest > 0, largest, 1.0)
    signal = jnp.sum(jnp.square(x / unit))
    noise = jnp.sum(jnp.square(x / unit - y / unit))
    decibels = 10.0 * (jnp.log10(signal) - jnp.log10(noise))
    decibels = jnp.where(noise == 0, jnp.inf, decibels)
    finite = jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(y))
    return jnp.where(finite, decibels, jnp.nan)
