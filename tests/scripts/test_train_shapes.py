import csv
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from scripts import train_shapes
from scripts.train_shapes import TrainConfig
from sdq.tensor_files import open_tensors

ROOT = pathlib.Path(__file__).parent.parent.parent
# The script with a model small enough for a test.
TINY = """
import dataclasses, jax
jax.config.update("jax_platforms", "cpu")
from scripts import train_shapes
small = dict(width=16, heads=2, layers=1, ffn_width=16, text_width=8)
dit = dataclasses.replace(train_shapes.CONFIG.dit, **small)
train_shapes.CONFIG = dataclasses.replace(train_shapes.CONFIG, dit=dit)
train_shapes.CALL_STEPS = 2
train_shapes.main()
"""


def command(out):
    options = ["--steps", "40", "--warmup", "2", "--batch", "2", "--checkpoint-every", "0"]
    return [sys.executable, "-c", TINY, "--out", str(out), *options]


def curve(out):
    """(step, loss) of every row, as text."""
    with (out / "loss.csv").open() as stream:
        return [tuple(row[:2]) for row in csv.reader(stream)]


@pytest.mark.slow
def test_a_killed_training_goes_on_with_the_same_curve(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), cwd=ROOT, check=True, capture_output=True)
    run = subprocess.Popen(command(killed), cwd=ROOT, stderr=subprocess.DEVNULL)
    while run.poll() is None and len(list((killed / "checkpoints").glob("[0-9]*"))) < 2:
        time.sleep(0.05)
    assert run.poll() is None, "it ended before it could be killed"
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (killed / "shapes.safetensors").exists()
    again = subprocess.run(command(killed), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "going on from step" in again.stderr
    assert curve(killed) == curve(whole) and len(curve(whole)) == 21
    assert (killed / "loss.png").stat().st_size > 1000
    ours, theirs = (open_tensors(out / "shapes.safetensors") for out in (killed, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_folder_of_another_run_is_refused(tmp_path):
    train_shapes._check_config(TrainConfig(), tmp_path)
    train_shapes._check_config(TrainConfig(), tmp_path)
    with pytest.raises(ValueError, match="holds a run with another configuration"):
        train_shapes._check_config(TrainConfig(steps=3), tmp_path)


def test_the_curve_is_read_as_it_was_written(tmp_path):
    assert train_shapes.read_losses(tmp_path) == []
    rows = [(0, 1.25, 3.0), (20, 0.5, 6.1)]
    train_shapes.write_losses(tmp_path, rows)
    assert train_shapes.read_losses(tmp_path) == rows
