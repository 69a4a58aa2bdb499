import jax.numpy as jnp
import numpy as np
import pytest

from scripts import check_backends
from sdq import format_table


def test_bits_tell_everything_but_nans_apart():
    zero = np.array([0.0, np.nan], np.float32)
    assert (check_backends.bits(zero) == check_backends.bits(-zero)).mean() == 7 / 8
    assert check_backends.bits(np.asarray(jnp.ones(2, jnp.bfloat16))).shape == (4,)


@pytest.mark.parametrize("name", format_table.FORMATS)
def test_the_cpu_equals_itself(name):
    x = check_backends.samples()["wild rows"]
    assert check_backends.differing_bytes(x, name, None, -1) == 0


def test_without_an_accelerator_it_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["check_backends"])
    with pytest.raises(SystemExit, match="no accelerator"):
        check_backends.main()
