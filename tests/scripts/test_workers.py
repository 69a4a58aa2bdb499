import os

import pytest

from scripts._workers import workers


def test_each_process_has_a_gpu_of_its_own():
    with workers(2) as each:
        seen = set(each(os.getenv, ["CUDA_VISIBLE_DEVICES"] * 8))
    assert seen and seen <= {"0", "1"}


def test_one_worker_is_this_process():
    with workers(1) as each:
        assert next(iter(each(id, [workers]))) == id(workers)


def test_an_error_comes_back():
    with workers(2) as each, pytest.raises(ValueError, match="invalid literal"):
        list(each(int, ["1", "one"]))
