"""What bench_power makes of what nvidia-smi says, without a GPU."""

import os
import time

import jax.numpy as jnp
import pytest

from scripts import bench_power

LINES = """#!/bin/sh
echo "345, 70.5, 700.0, 1980"
while true; do echo "1320, 698.5, 700.0, 1980"; sleep 0.01; done
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(LINES)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return program


def test_a_load_is_what_is_seen_in_its_second_half(smi):
    x = jnp.ones((8, 8))
    found = bench_power.load("fast", lambda: x + 1, bench_power.LINEAR, seconds=0.5)
    assert (found.megahertz, found.watts) == (1320, 698.5)
    assert 0 < found.milliseconds < 500 and found.busy > 0
    page = bench_power.to_markdown([found], {"command": "a"})
    assert "| 1320 | 698 |" in page  # to even


def test_looking_ends_with_the_program(smi):
    with bench_power.looking() as seen:
        while len(seen) < 3:
            time.sleep(0.01)
    count = len(seen)
    time.sleep(0.05)
    assert len(seen) == count
    assert bench_power.limits() == "700 W, 1980 MHz"


@pytest.mark.parametrize(
    "says, message",
    [("exit 9", "said nothing"), ('echo "1980, [N/A], 700, 1980"', r"gave no number.*\[N/A\]")],
)
def test_what_nvidia_smi_does_not_know_is_an_error(smi, says, message):
    smi.write_text(f"#!/bin/sh\n{says}\n")
    with pytest.raises(RuntimeError, match=message):
        bench_power.limits(seconds=0.3)
