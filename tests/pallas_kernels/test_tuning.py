import dataclasses
import json

import pytest

from pallas_kernels import tuning
from pallas_kernels.device import Device
from pallas_kernels.mosaic_gpu.config import (
    BF16,
    MODES,
    SHARED_MEMORY,
    Config,
    FewConfig,
    heuristic,
)
from pallas_kernels.workloads import LINEARS

GPU = Device(platform="gpu", kind="a GPU", cores=114)


@pytest.fixture
def measured(monkeypatch):
    """A table with three rows."""
    rows = [
        tuning.as_entry("fast", 4096, 1024, 512, Config(tile_m=128)),
        tuning.as_entry("fast", 32768, 1024, 512, Config(tile_m=192, stages=5, width=4)),
        tuning.as_entry("fast", 48, 1024, 512, FewConfig(rows=48, warpgroups=2, stages=6)),
    ]
    monkeypatch.setattr(tuning, "table", lambda device: json.loads(json.dumps(rows)))


def test_the_nearest_that_was_measured(measured):
    assert tuning.choose("fast", 32768, 1024, 512, GPU) == Config(tile_m=192, stages=5, width=4)


def test_of_the_nearest_only_the_order_of_tiles(measured):
    for m, width in ((5000, 8), (30000, 4)):
        expected = dataclasses.replace(heuristic("fast", m, 512, cores=GPU.cores), width=width)
        assert tuning.choose("fast", m, 1024, 512, GPU) == expected


@pytest.mark.parametrize("m, rows", [(49, 56), (30, 32)])
def test_few_rows_are_as_many_as_there_are(measured, m, rows):
    expected = FewConfig(rows=rows, warpgroups=2, stages=6)
    for mode in MODES:  # the same kernel
        assert tuning.choose(mode, m, 1024, 512, GPU) == expected
    assert tuning.choose(BF16, m, 1024, 512, GPU).x_bytes == 2


@pytest.mark.parametrize(
    "mode, m, k, n", [("accurate", 4096, 1024, 512), ("fast", 80, 1024, 512), ("fast", 4096, 8, 8)]
)
def test_nothing_like_it_was_measured(measured, mode, m, k, n):
    assert tuning.choose(mode, m, k, n, GPU) == heuristic(mode, m, n, cores=GPU.cores)


def test_wide_results_still_fit(measured):
    config = tuning.choose("fast", 32768, 1024, 512, GPU, out_bytes=4)
    assert config.tile_m == 192 and config.shared_memory(4) <= SHARED_MEMORY


def test_a_device_without_a_table():
    assert tuning.table("a GPU that nobody has") == []
    assert tuning.file_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"


def test_workloads_have_names_of_their_own():
    assert len({str(linear) for linear in LINEARS}) == len(LINEARS)
    assert all(linear.operations == 2 * linear.m * linear.k * linear.n for linear in LINEARS)
