"""What times calls."""

import time

from scripts._timing import side_by_side_seconds


def test_work_that_goes_first_is_not_counted():
    calls = {"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.05)}
    found = side_by_side_seconds(calls, behind=lambda: time.sleep(0.2))
    assert 0 < found["short"] < found["long"] < 0.1  # counted, two calls would share 0.2
