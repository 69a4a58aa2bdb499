import json

import jax.numpy as jnp
import pytest

import sdq
from sdq import Rule, cli


@pytest.fixture
def saved(tmp_path, rng):
    params = {
        "blocks": {"kernel": jnp.asarray(rng.standard_normal((2, 64, 32)), jnp.float32)},
        "head": jnp.zeros((32, 3), jnp.bfloat16),
        "step": jnp.int32(7),
    }
    plan = sdq.resolve([Rule(".*/kernel", "sdq32:16"), Rule(".*", None)], params)
    reports = []
    q = sdq.quantize_params(params, plan, on_leaf=reports.append)
    sdq.save(tmp_path / "model", q, reports=reports, metadata={"model": "tiny"})
    return tmp_path / "model"


def test_inspect_shows_every_leaf(saved, capsys):
    assert cli.main(["inspect", str(saved)]) == 0
    shown = capsys.readouterr().out
    for text in ("blocks/kernel", "sdq32:16", "bfloat16", "2 x 64 x 32", "scalar", "3 leaves"):
        assert text in shown


def test_inspect_as_json(saved, capsys):
    assert cli.main(["inspect", str(saved), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    leaf = document["leaves"][0]
    assert (
        leaf["path"] == "blocks/kernel"
        and leaf["sqnr_db"] > 18
        and 4.5 < leaf["bits_per_element"] < 5
    )
    assert document["nbytes"] == sum(x["bytes_after"] for x in document["leaves"])
    assert document["metadata"] == {"model": "tiny"}


def test_inspect_of_nothing_is_one_line_and_status_2(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sdq inspect:") and len(error.strip().splitlines()) == 1


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2 and "usage: sdq" in capsys.readouterr().err
