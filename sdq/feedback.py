"""Rounding with error feedback: what one weight's rounding does wrong, the following ones make up.

Plain rounding makes each weight's error small. What counts is the error of the product x W, and
inputs are correlated: an error at one input can be cancelled at others. `refine` goes through the
inputs in order, rounds each, and moves the rest to where the sum of squares over all inputs is
least (the optimal-brain rule of GPTQ, Frantar et al. 2022). Scales and dialects stay as they are,
so the result is stored in as many bits and read by the same kernels.

What it needs is the second moment E[x x^T] of the inputs, which a model's own samples give: no
data set.
"""

import jax
import jax.numpy as jnp

from sdq import qtensor
from sdq.codecs import Encoded, codec
from sdq.qtensor import QTensor

DAMPING = 0.01  # of the mean second moment, added to its diagonal
TOGETHER = 32  # inputs rounded before the others hear of it


def refine(
    q: QTensor, w: jax.Array, second_moment: jax.Array, *, damping: float = DAMPING
) -> QTensor:
    """Choose the codes of a quantised kernel again, for the least error of x W.

    Args:
      q: `quantize(w, fmt, axis=-2)` of a 4-bit format.
      w: the kernel `[..., K, N]`.
      second_moment: float32 E[x x^T] of its inputs, `[..., K, K]`.
      damping: how much independent noise to expect in every input, as a share of the mean moment.
    Returns:
      A QTensor with q's scales.
    Raises:
      ValueError: shapes or format do not fit; the moment is not finite, or not positive
        definite with that damping (under an outer `jit`, which cannot raise, q's codes stay).
    """
    if q.format.element_bits != 4 or q.axis != -2:
        raise ValueError(f"q: expected 4-bit codes along axis -2, got {q!r}")
    if w.shape != q.shape:
        raise ValueError(f"w: expected shape {q.shape}, got {w.shape}")
    inputs = w.shape[-2]
    if second_moment.shape != (*w.shape[:-2], inputs, inputs):
        raise ValueError(
            f"second_moment: expected shape {(*w.shape[:-2], inputs, inputs)}, "
            f"got {second_moment.shape}"
        )
    refined, usable = _refine(q, w, second_moment, damping)
    if not isinstance(usable, jax.core.Tracer) and not bool(usable.all()):
        raise ValueError("second_moment: not finite, or not positive definite with this damping")
    return refined


@jax.jit
def _refine(
    q: QTensor, w: jax.Array, second_moment: jax.Array, damping: float
) -> tuple[QTensor, jax.Array]:
    """The refined kernel, and whether each matrix had a usable moment."""
    encoded = qtensor.unpack(q)
    codes = jnp.broadcast_to(jnp.arange(16, dtype=jnp.uint8), (*encoded.scales.shape, 16))
    values = codec(q.format).decode(encoded._replace(codes=codes), q.format)  # [..., N, G, 16]
    if q.format.family == "integer":
        values = values.at[..., 8].set(jnp.inf)  # -8, outside the symmetric range
    wanted = jnp.moveaxis(w.astype(jnp.float32), -2, -1)
    matrices = [x.reshape(-1, *x.shape[w.ndim - 2 :]) for x in (wanted, values, second_moment)]
    block = encoded.codes.shape[-1]

    def one(matrix):
        w, values, second_moment = matrix
        spread = _spread(second_moment, damping)
        return _rounded(w, values, spread, block), jnp.isfinite(spread).all()

    chosen, usable = jax.lax.map(one, tuple(matrices))
    chosen = chosen.reshape(encoded.codes.shape)
    # A bad row has no values to choose from; it stays what it is.
    keep = jnp.isnan(values[..., :1]) | ~usable.reshape(*w.shape[:-2], 1, 1, 1)
    chosen = jnp.where(keep, encoded.codes, chosen)
    again = Encoded(codes=chosen, scales=encoded.scales, outer=encoded.outer)
    refined = qtensor.pack(again, fmt=q.format, length=q.length, axis=q.axis, dtype=q.dtype)
    return refined, usable


def _rounded(w: jax.Array, values: jax.Array, spread: jax.Array, block: int) -> jax.Array:
    """Round weights `[N, K]` to the values of all codes `[N, G, 16]`; codes uint8 `[N, G * block]`.

    Args:
      w: what the weights should be.
      values: what each code of each block stands for.
      spread: of `_spread`, `[K, K]`.
      block: weights that share a block.
    """
    stored = values.shape[1] * block
    padded = -(-stored // TOGETHER) * TOGETHER
    missing = padded - w.shape[1]  # weights 0 that nothing else feels
    w = jnp.pad(w, [(0, 0), (0, missing)])
    alone = (jnp.arange(padded) >= padded - missing).astype(jnp.float32)
    spread = jnp.pad(spread, [(0, missing)] * 2) + jnp.diag(alone)
    block_of = jnp.minimum(jnp.arange(padded) // block, values.shape[1] - 1)

    def some(w: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jax.lax.dynamic_slice_in_dim(spread, first, TOGETHER, axis=0)
        here = jax.lax.dynamic_slice_in_dim(rows, first, TOGETHER, axis=1)
        now = jax.lax.dynamic_slice_in_dim(w, first, TOGETHER, axis=1)

        def one(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            now, codes, errors = state
            choices = values[:, block_of[first + i]]  # [N, 16]
            code = jnp.argmin(jnp.abs(now[:, i, None] - choices), axis=-1)
            value = jnp.take_along_axis(choices, code[:, None], axis=-1)[:, 0]
            error = (now[:, i] - value) / here[i, i]
            now = now - error[:, None] * here[i][None]
            return now, codes.at[:, i].set(code.astype(jnp.uint8)), errors.at[:, i].set(error)

        start = now, jnp.zeros(now.shape, jnp.uint8), jnp.zeros_like(now)
        _, codes, errors = jax.lax.fori_loop(0, TOGETHER, one, start)
        # A row of `spread` is zero before its own input, so what is done stays done.
        return w - jnp.matmul(errors, rows, precision="highest"), codes

    _, codes = jax.lax.scan(some, w, jnp.arange(0, padded, TOGETHER))
    return jnp.moveaxis(codes, 0, 1).reshape(len(w), padded)[:, :stored]


def _spread(second_moment: jax.Array, damping: float) -> jax.Array:
    """Upper triangular U `[K, K]` with U^T U the inverse of the damped second moment.

    An error e at input k is made up best by moving the inputs after it by -e U[k] / U[k, k].
    """
    size = len(second_moment)
    mean = jnp.trace(second_moment) / size
    mean = jnp.where(mean > 0, mean, 1.0)
    damped = second_moment / mean + damping * jnp.eye(size)
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    identity = jnp.eye(size)
    return jax.scipy.linalg.solve_triangular(upper, identity, lower=False)
