import os

import pytest

from scripts._workers import workers


def test_each_process_has_a_gpu_of_its_own():
    with workers(["0", "1"]) as each:
        seen = set(each(os.getenv, ["CUDA_VISIBLE_DEVICES"] * 8))
    assert seen and seen <= {"0", "1"}


def test_processes_that_share_a_gpu_do_not_take_its_memory():
    with workers(["0", "0"]) as each:
        assert set(each(os.getenv, ["XLA_PYTHON_CLIENT_PREALLOCATE"])) == {"false"}


def test_without_gpus_the_work_is_done_in_this_process():
    with workers() as each:
        assert next(iter(each(id, [workers]))) == id(workers)


def test_an_error_comes_back():
    with workers(["0", "1"]) as each, pytest.raises(ValueError, match="invalid literal"):
        list(each(int, ["1", "one"]))
