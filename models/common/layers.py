"""Layers that all models share. Their heavy work is done by functions that are passed in (`Ops`).

A kernel is an array or a QTensor `[in, out]`; an input is an array, a QTensor or a Decomposed
`[..., in]`.
Nothing is intercepted or patched: a quantised model is the same model with other leaves and Ops.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.common.attention import attention
from models.common.quantizer import KEEP, Input, Quantizer
from pallas_kernels import ACTIVATIONS, Activated, Deferred, Normed, Onto, Projected, computed
from sdq import QTensor, dequantize
from sdq.decompose import Decomposed, multiply


def matmul(
    x: jax.Array | QTensor,
    kernel: jax.Array | QTensor,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    onto: Onto | None = None,
) -> jax.Array:
    """x `[..., in]` times kernel `[in, out]` plus bias, in x's dtype; products summed in float32.

    Then the activation, one of `pallas_kernels.ACTIVATIONS`, and what it is added to. A QTensor
    stands for its dequantised values in its own dtype.
    """
    x, kernel = _dense(x), _dense(kernel)
    # A float32 result would be a float32 cotangent too, and the backward pass three times slower.
    y = jax.lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
    y = ACTIVATIONS[activation](y if bias is None else _plus(y, bias))
    return y if onto is None else onto.plus(y)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """The functions that a model calls for its heavy work.

    Attributes:
      matmul: `(x, kernel, *, bias, activation, onto) -> y`, for every linear; each operand an array
        or a QTensor, or whatever else the quantizer and the parameters hold.
      attention: `(q, k, v) -> out`, all `[B, S, heads, width]`; q and k may be Projected, whose
        norm and rotary embedding it does itself (`pallas_kernels.prepared`). Models whose text is
        padded also pass `lengths` (`models.common.attention`).
      quantizer: of the inputs of linears, also where several linears read one.
    """

    matmul: Callable[..., jax.Array] = matmul
    attention: Callable[..., jax.Array] = attention
    quantizer: Quantizer = KEEP


class Linear(nn.Module):
    """activation(x kernel + bias), through `ops.matmul`; the kernel is an array or a QTensor.

    The result, times a gate, may be added to something at once.

    With `defer` the activation of a decomposed input, which no product can do, is left to who
    quantises it next.
    """

    features: int
    ops: Ops
    activation: str | None = None
    defer: bool = False

    @nn.compact
    def __call__(self, x: Input, onto: Onto | None = None) -> Any:
        """`[..., in]` -> `[..., features]`; with `defer` maybe Activated."""
        kernel = quantizable(
            self, "kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features)
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if not isinstance(x, Decomposed):
            return self.ops.matmul(x, kernel, bias=bias, activation=self.activation, onto=onto)
        product = functools.partial(self.ops.matmul, kernel=kernel)
        # What all tokens get is in the first product, so that nobody passes over them once more.
        of_base = functools.partial(product, bias=bias)
        if onto is not None and onto.is_shared and self.activation is None:

            def of_residual(rows: Any) -> jax.Array:
                return onto.gated(product(rows)).astype(onto.x.dtype)

            return multiply(x, of_residual, functools.partial(of_base, onto=onto))
        later = Activated(x=multiply(x, product, of_base), activation=self.activation)
        if onto is not None:
            return onto.plus(computed(later))
        return later if self.defer else computed(later)


def quantizable(
    module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...]
) -> Input:
    """A parameter that may have become a QTensor.

    Raises:
      ValueError: the leaf has another (logical) shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    leaf: jax.Array | QTensor = module.get_variable("params", name)
    if tuple(leaf.shape) != shape:
        where = "/".join((*module.path, name))
        raise ValueError(f"{where}: expected shape {list(shape)}, got {list(leaf.shape)}")
    return leaf


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear; `site` is its name ("blocks/ffn")."""

    width: int
    ops: Ops
    site: str

    @nn.compact
    def __call__(self, x: jax.Array | Deferred, state: Any, onto: Onto) -> tuple[jax.Array, Any]:
        """`[B, S, D]` -> `[B, S, D]`, added to what is there; state."""
        quantizer = self.ops.quantizer
        up = Linear(self.width, self.ops, activation="gelu", defer=True, name="up")
        down = Linear(x.shape[-1], self.ops, name="down")
        h = up(read_at(self, x, f"{self.site}/up", state))
        state = quantizer.saw_input(x, f"{self.site}/up", state)
        y = down(read_at(self, h, f"{self.site}/down", state), onto)
        return y, quantizer.saw_input(h, f"{self.site}/down", state)


def read_at(module: Any, x: jax.Array | Deferred, site: str, state: Any) -> Input:
    """The input of a block's linears, quantised if the module's Ops say so; sown as it was."""
    module.sow("intermediates", site.rpartition("/")[2] + "_input", computed(x), reduce_fn=latest)
    return module.ops.quantizer.quantize(x, site, state)


def latest(_: Any, x: jax.Array) -> jax.Array:
    """What `sow` keeps of one value after the other."""
    return x


class Heads(nn.Module):
    """Queries or keys of a linear's result, after a root mean square norm.

    Over all heads of a token, or, with `alone`, over each.
    """

    count: int
    eps: float
    alone: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array] | None = None) -> Projected:
        """`[B, S, count * width]`, and angles to turn them by: for `ops.attention`."""
        width = x.shape[-1] // self.count if self.alone else x.shape[-1]
        gain = self.param("scale", nn.initializers.ones, (width,))
        return Projected(x=x, gain=gain, rope=rope, heads=self.count, eps=self.eps)


class AffineLayerNorm(nn.Module):
    """Layer norm over the last axis with weight and bias; float32 inside."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> Normed:
        """Same shape and dtype as x."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        gain, shift = (part.astype(jnp.float32)[None, None] for part in (scale, bias))
        return Normed(x=x, gain=gain, shift=shift, eps=self.eps)


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float) -> Normed:
    """LN(x) (1 + scale) + shift, float32 inside; shift and scale `[B, 1 or S, D]`."""
    return Normed(x=x, gain=1 + scale, shift=shift, eps=eps)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """`[B, S, D]` -> `[B, S, heads, D / heads]`."""
    return x.reshape(*x.shape[:2], heads, -1)


def stack(
    block: type[nn.Module], length: int, *, shared: int, remat: bool = False
) -> Callable[..., Any]:
    """Equal blocks as one module: parameters stacked along axis 0, run and compiled as one scan.

    Args:
      block: maps (carry, `shared` things that all blocks see, its own state) to (carry, state).
      length: how many.
      shared: see above.
      remat: the backward pass keeps the results of matrix products only and computes the rest of a
        block again.
    """
    if remat:
        keep = jax.checkpoint_policies.dots_saveable
        block = nn.remat(block, policy=keep, prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=((nn.broadcast,) * shared) + (0,),
        length=length,
        check_constancy_invariants=False,  # nothing is broadcast: blocks need no second trace
    )


def sinusoid(t: jax.Array, width: int) -> jax.Array:
    """Timesteps `[...]` -> float32 `[..., width]`: cosines first, then sines; base 10,000."""
    half = width // 2
    frequency = jnp.exp(-jnp.log(1e4) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t.astype(jnp.float32)[..., None] * _broadcast(frequency, t[..., None])
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def patchify(x: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """`[B, T, H, W, C]` -> tokens `[B, S, pt * ph * pw * C]`, t slowest.

    Raises:
      ValueError: the patch does not divide the size.
    """
    batch, *size, channels = x.shape
    if any(n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(f"a patch of {list(patch)} does not divide {size} (T, H, W)")
    t, h, w = (n // p for n, p in zip(size, patch, strict=True))
    pt, ph, pw = patch
    x = x.reshape(batch, t, pt, h, ph, w, pw, channels).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch, t * h * w, pt * ph * pw * channels)


def unpatchify(x: jax.Array, size: tuple[int, int, int], patch: tuple[int, int, int]) -> jax.Array:
    """The inverse of patchify; `size` is the video's (T, H, W)."""
    t, h, w = (n // p for n, p in zip(size, patch, strict=True))
    pt, ph, pw = patch
    x = x.reshape(len(x), t, h, w, pt, ph, pw, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(len(x), *size, -1)


def _plus(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def _dense(x: jax.Array | QTensor) -> jax.Array:
    return dequantize(x) if isinstance(x, QTensor) else x


def _broadcast(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector along the last axis of `like`, in float32, with its rank."""
    return vector.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + vector.shape)
