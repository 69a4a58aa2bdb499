"""What times calls."""

import itertools
import time

from scripts._timing import median_seconds, side_by_side_seconds


def test_work_that_goes_first_is_not_counted():
    calls = {"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.05)}
    found = side_by_side_seconds(calls, behind=lambda: time.sleep(0.2))
    assert 0 < found["short"] < found["long"] < 0.1  # counted, two calls would share 0.2


def test_every_call_gets_its_own_which_is_not_counted():
    numbers = itertools.count()
    seen = []

    def fresh():
        time.sleep(0.05)
        return next(numbers)

    found = side_by_side_seconds({"call": seen.append}, runs=2, at_least=0, fresh=fresh)
    assert found["call"] < 0.05
    assert len(seen) == len(set(seen)) > 5


def test_long_calls_are_few():
    called = []
    assert median_seconds(lambda: called.append(time.sleep(0.02)), runs=5, enough=0.05) >= 0.02
    assert 3 <= len(called) <= 4  # one to warm up, then until it is enough
    called.clear()
    median_seconds(lambda: called.append(None), runs=5, enough=10)
    assert len(called) == 6
