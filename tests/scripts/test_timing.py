"""What times calls."""

import time

import pytest

from scripts._timing import side_by_side_seconds


def test_work_that_goes_first_is_not_counted():
    calls = {"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.03)}
    found = side_by_side_seconds(calls, behind=lambda: time.sleep(0.1))
    assert found["short"] == pytest.approx(0.01, abs=0.005)
    assert found["long"] == pytest.approx(0.03, abs=0.005)
