import json

import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from sdq import Rule
from sdq.rules import Plan, flatten


@pytest.fixture
def params():
    return {
        "blocks": {
            "attn": {"kernel": jnp.ones((3, 64, 32)), "bias": jnp.zeros((3, 32))},
            "mlp": {"kernel": jnp.ones((3, 64, 128), jnp.bfloat16)},
        },
        "head": [jnp.ones((32, 16)), jnp.zeros(16)],
        "step": jnp.int32(3),
    }


RULES = [
    Rule(r"blocks/attn/kernel", "sdq32:16", select="lut"),
    Rule(r".*/kernel", "mxfp4"),
    Rule(r".*", None),
]


def test_paths_join_keys_and_numbers(params):
    assert list(flatten(params)) == [
        "blocks/attn/bias",
        "blocks/attn/kernel",
        "blocks/mlp/kernel",
        "head/0",
        "head/1",
        "step",
    ]


def test_first_matching_rule_wins(params):
    plan = sdq.resolve(RULES, params)
    assert {path: str(leaf.format) for path, leaf in plan.leaves.items() if leaf.format} == {
        "blocks/attn/kernel": "sdq32:16",
        "blocks/mlp/kernel": "mxfp4",
    }
    assert [leaf.rule for leaf in plan.leaves.values()] == [2, 0, 1, 2, 2, 2]
    attn = plan.leaves["blocks/attn/kernel"]
    assert (attn.axis, attn.select, attn.shape, attn.dtype) == (-2, "lut", (3, 64, 32), "float32")
    assert attn.bytes_before == 3 * 64 * 32 * 4 and attn.bits_per_element == 4.5
    assert plan.leaves["blocks/mlp/kernel"].bytes_before == 3 * 64 * 128 * 2


def test_matching_is_of_the_whole_path(params):
    with pytest.raises(ValueError, match=r"rule 0 'kernel' matches no leaf"):
        sdq.resolve([Rule("kernel", "sdq32:16"), Rule(".*", None)], params)


def test_every_problem_is_listed_at_once(params):
    rules = [
        Rule(r"blocks/.*kernel", "sdq32:16"),
        Rule(r".*attn/kernel", "mxfp4"),
        Rule(r"nothing", None),
        Rule(r"step", "sdq32:16"),
        Rule(r"head/1", "int4:32"),
    ]
    with pytest.raises(ValueError) as error:
        sdq.resolve(rules, params)
    message = str(error.value)
    for expected in (
        "leaf 'blocks/attn/bias' [3, 32]: no rule covers it",
        "leaf 'head/0' [32, 16]: no rule covers it",
        "leaf 'step' (rule 3): int32 cannot be quantised to sdq32:16",
        "leaf 'head/1' (rule 4): axis -2 is out of range for shape [16]",
        "rule 1 '.*attn/kernel' decides nothing: earlier rules took all 1 leaves",
        "rule 2 'nothing' matches no leaf",
    ):
        assert expected in message
    assert "rule 0" not in message


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Rule("(", None), "is no regular expression"),
        (lambda: Rule(".*", "fp5"), "unknown format 'fp5'"),
        (lambda: Rule(".*", "mxfp4", select="lut"), "nothing to choose"),
        (lambda: Rule(".*", "sdq32:16", select="best"), "select: expected one of"),
    ],
)
def test_bad_rules_are_refused_when_made(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


def test_leaves_that_are_no_arrays_or_quantised_already(params):
    params["name"] = "wan"
    params["done"] = sdq.quantize(jnp.ones((16, 16)), "sdq32:16")
    with pytest.raises(
        ValueError, match=r"(?s)leaf 'done' is quantised already.*leaf 'name' is no array but str"
    ):
        sdq.resolve(RULES, params)


def test_ambiguous_paths_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        flatten({"a": {"b": np.ones(1)}, "a/b": np.ones(1)})


def test_plan_prints_a_line_for_each_leaf(params):
    lines = str(sdq.resolve(RULES, params)).splitlines()
    assert len(lines) == 6
    assert lines[1].split() == [
        "blocks/attn/kernel", "sdq32:16", "float32[3,", "64,", "32]", "axis", "-2", "select", "lut",
    ]  # fmt: skip
    assert lines[0].split()[1] == "keep"


def test_plan_survives_json(params):
    plan = sdq.resolve(RULES, params)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda d: d.update(version=99), "plan version 99, this sdq reads version 1"),
        (lambda d: d.pop("leaves"), "not a plan"),
        (lambda d: d["leaves"]["step"].pop("shape"), "plan, leaf 'step'"),
        (
            lambda d: d["leaves"]["step"].update(format="fp5"),
            "plan, leaf 'step': unknown format 'fp5'",
        ),
        (lambda d: d["leaves"]["step"].update(colour="red"), "plan, leaf 'step'"),
    ],
)
def test_a_spoilt_plan_says_what_is_wrong(spoil, complaint, params):
    document = json.loads(sdq.resolve(RULES, params).to_json())
    spoil(document)
    with pytest.raises(ValueError, match=complaint):
        Plan.from_json(json.dumps(document))
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json("{")
