"""The seeded synthetic data on which formats are fitted, compared and tested.

Five kinds of rows that a video DiT holds: weights (Gaussian), activations with heavier tails
(Laplace, Student-t), outputs of a GELU, and channels of very unequal size. numpy's RandomState,
whose streams are frozen for good, so that numbers can be reproduced anywhere.
"""

import zlib
from collections.abc import Callable

import numpy as np

SHAPE = (256, 2048)  # rows, channels


def gaussian(rng: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    """N(0, 1)."""
    return rng.standard_normal(shape)


def laplace(rng: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    """Double exponential, scale 1."""
    return rng.laplace(size=shape)


def student_t4(rng: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    """Student's t with 4 degrees of freedom."""
    return rng.standard_t(4, size=shape)


def gelu_output(rng: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    """GELU (tanh form) of N(channel mean, 1.5^2), channel means N(0, 0.5^2)."""
    z = 1.5 * rng.standard_normal(shape) + 0.5 * rng.standard_normal(shape[1])
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def channel_scaled(rng: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    """N(0, 1) times a log-normal factor a channel, sigma 0.65."""
    return rng.standard_normal(shape) * np.exp(0.65 * rng.standard_normal(shape[1]))


Sampler = Callable[[np.random.RandomState, tuple[int, int]], np.ndarray]

DISTRIBUTIONS: dict[str, Sampler] = {
    "Gaussian": gaussian,
    "Laplace": laplace,
    "Student-t4": student_t4,
    "GELU output": gelu_output,
    "channel-scaled": channel_scaled,
}


def sample(name: str, seed: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """float32 `shape` of one of DISTRIBUTIONS; equal arguments give equal numbers."""
    rng = np.random.RandomState([seed, zlib.crc32(name.encode())])
    return DISTRIBUTIONS[name](rng, shape).astype(np.float32)
