import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import sdq
from sdq import Rule
from sdq.leaf_table import size_text
from sdq.rules import is_qtensor
from sdq.tree import totals

RULES = [Rule(r".*/kernel", "sdq32:16"), Rule(r".*", None)]


@pytest.fixture
def params(rng):
    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {"a": {"kernel": normal(64, 32), "bias": normal(32)}, "b": {"kernel": normal(2, 32, 8)}}


@pytest.fixture
def plan(params):
    return sdq.resolve(RULES, params)


def test_only_planned_leaves_change(params, plan):
    q = sdq.quantize_params(params, plan)
    assert is_qtensor(q["a"]["kernel"]) and q["a"]["kernel"].axis == -2
    assert q["a"]["bias"] is params["a"]["bias"]
    expected = sdq.quantize(params["b"]["kernel"], "sdq32:16", axis=1)
    jax.tree.map(np.testing.assert_array_equal, q["b"]["kernel"], expected)


def test_dequantize_params_is_the_way_back(params, plan):
    back = sdq.dequantize_params(sdq.quantize_params(params, plan))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert x.shape == y.shape and float(sdq.sqnr_db(x, y)) > 18


def test_reports_are_in_order_and_true(params, plan):
    reports = []
    q = sdq.quantize_params(params, plan, on_leaf=reports.append)
    assert [r.path for r in reports] == list(plan.leaves)
    kernel = reports[1]
    assert kernel.format == sdq.format("sdq32:16") and kernel.shape == (64, 32)
    assert kernel.bytes_before == 64 * 32 * 4 and kernel.bytes_after == q["a"]["kernel"].nbytes
    expected = sdq.sqnr_db(params["a"]["kernel"], sdq.dequantize(q["a"]["kernel"]))
    assert kernel.sqnr_db == pytest.approx(float(expected), abs=1e-4)
    assert reports[0].sqnr_db is None and reports[0].bytes_before == reports[0].bytes_after == 128
    assert totals(reports) == (
        4 * (64 * 32 + 32 + 2 * 32 * 8),
        128 + sum(q[name]["kernel"].nbytes for name in "ab"),
    )


def test_donate_frees_what_was_quantised_and_nothing_else(params, plan):
    q = sdq.quantize_params(params, plan, donate=True)
    assert params["a"]["kernel"].is_deleted() and params["b"]["kernel"].is_deleted()
    assert not params["a"]["bias"].is_deleted()
    assert bool(jnp.isfinite(sdq.dequantize(q["a"]["kernel"])).all())


def test_caller_keeps_his_arrays_unless_he_donates(params, plan):
    sdq.quantize_params(params, plan)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_works_under_jit_and_eval_shape(params, plan):
    eager = sdq.quantize_params(params, plan)
    jitted = jax.jit(lambda p: sdq.quantize_params(p, plan))(params)
    jax.tree.map(np.testing.assert_array_equal, jitted, eager)
    shapes = jax.eval_shape(lambda p: sdq.quantize_params(p, plan), params)
    assert shapes["a"]["kernel"].nbytes == eager["a"]["kernel"].nbytes


def test_numpy_leaves_are_welcome(params, plan):
    q = sdq.quantize_params(jax.tree.map(np.asarray, params), plan, donate=True)
    assert is_qtensor(q["a"]["kernel"])


def test_another_tree_is_refused_with_every_difference(params, plan):
    params["a"]["kernel"] = params["a"]["kernel"][:32]
    params["c"] = params.pop("b")
    with pytest.raises(ValueError) as error:
        sdq.quantize_params(params, plan)
    for line in (
        "! a/kernel: planned float32[64, 32], is float32[32, 32]",
        "+ c/kernel: in the tree, not planned",
        "- b/kernel: planned, not in the tree",
    ):
        assert line in str(error.value)


def test_progress_bar_draws_and_passes_reports_on(params, plan, capfd):
    reports = []
    with sdq.progress_bar(plan, reports.append) as on_leaf:
        sdq.quantize_params(params, plan, on_leaf=on_leaf)
    assert len(reports) == 3
    assert "quantise" in capfd.readouterr().err


def test_leaf_table_shows_formats_sizes_errors_and_totals(params, plan):
    reports = []
    sdq.quantize_params(params, plan, on_leaf=reports.append)
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(sdq.leaf_table(reports, caption="tiny"))
    shown = console.export_text()
    before, after = totals(reports)
    for text in ("a/kernel", "sdq32:16", "float32", "64 x 32", "8 KiB", "3 leaves", "tiny"):
        assert text in shown
    assert f"{before / after:.2f}x smaller" in shown and f"{reports[1].sqnr_db:.2f}" in shown


def test_leaf_table_of_nothing():
    assert sdq.leaf_table([]).row_count == 0


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3 GiB"), (2**50, "1024 TiB")],
)
def test_size_text(nbytes, text):
    assert size_text(nbytes) == text
