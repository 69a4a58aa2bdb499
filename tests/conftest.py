"""Strict JAX for every test: no silent promotion, several CPU devices, repeatable hypothesis.

`JAX_PLATFORMS=cuda` runs them on a GPU, where some have more to do.

On a CPU programs are compiled with few optimisations, but with `--slow` as users compile them.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also for what tests start, before JAX is imported

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the tests' time is compilation, and a large part of that the MLIR pipeline of each fusion.
QUICKLY_COMPILED = (
    "--xla_backend_optimization_level=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)

hypothesis.settings.register_profile("sdq", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def compiles_quickly(config):
    return not config.getoption("--slow") and os.environ["JAX_PLATFORMS"] == "cpu"


def pytest_configure(config):
    if compiles_quickly(config):  # read when the first program is compiled
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY_COMPILED}"
    hypothesis.settings.load_profile("thorough" if config.getoption("--slow") else "sdq")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    reason = pytest.mark.skip(reason="takes minutes; `make slow` runs it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(reason)


@pytest.fixture(scope="module", autouse=True)
def optimisations(request):
    """Least where programs compile longer than they run: everywhere but in the shapes world."""
    quick = compiles_quickly(request.config) and "shapes" not in request.path.parts
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture
def rng():
    return np.random.RandomState(0)
