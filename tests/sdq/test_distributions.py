import hashlib

import numpy as np
import pytest

from sdq import distributions


@pytest.mark.parametrize("name", distributions.DISTRIBUTIONS)
def test_samples_are_repeatable_and_differ_by_seed(name):
    x = distributions.sample(name, 0, (64, 64))
    assert x.dtype == np.float32 and x.shape == (64, 64)
    np.testing.assert_array_equal(x, distributions.sample(name, 0, (64, 64)))
    assert (x != distributions.sample(name, 1, (64, 64))).any()


def test_streams_are_frozen():
    """numpy promises RandomState's streams for good; the fitted book depends on them."""
    x = distributions.sample("Gaussian", 1000, (16, 16))
    assert hashlib.sha256(x.tobytes()).hexdigest()[:16] == "69104a5d6f7d4e30"


def test_kinds_are_what_they_say():
    def kurtosis(name):
        x = distributions.sample(name, 0).astype(float)
        return np.mean((x - x.mean()) ** 4) / np.var(x) ** 2

    assert kurtosis("Gaussian") == pytest.approx(3, abs=0.1)
    assert kurtosis("Laplace") == pytest.approx(6, abs=0.3)
    assert kurtosis("Student-t4") > 8
    gelu = distributions.sample("GELU output", 0)
    assert gelu.min() >= -0.171 and gelu.max() > 4
    channels = distributions.sample("channel-scaled", 0).std(axis=0)
    assert np.log(channels).std() == pytest.approx(0.65, abs=0.05)
