import dataclasses
import math

import jax.numpy as jnp
import pytest

import sdq
from sdq import format_table, formats


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("sdq32:16", 4.5),
        ("sdq32:32", 4.25),
        ("dialectfp4:16", 4.5),
        ("e2m1:32", 4.25),
        ("nvfp4", 4.5),
        ("nvfp4:one_level", 4.5),
        ("mxfp4", 4.25),
        ("mxfp4:even", 4.25),
        ("int4:32", 4.5),
        ("int4", 4.0),
        ("int8", 8.0),
        ("nf4:64", 4.25),
    ],
)
def test_bits_are_what_is_stored(name, bits):
    fmt = sdq.format(name)
    assert fmt.bits_per_element == bits
    rows, length = 4, 1 << 16  # long rows: outer scales and row-wise scales vanish
    q = sdq.quantize(jnp.ones((rows, length)), fmt)
    outer = {"row": rows * 8, "matrix": 32, None: 0}[fmt.outer]
    per_row = 0 if fmt.block else rows * fmt.scale_bits
    assert 8 * q.nbytes == bits * q.size + outer + per_row


@pytest.mark.parametrize("name", format_table.FORMATS)
def test_name_and_format_are_one(name):
    fmt = sdq.format(name)
    assert fmt.name == name and sdq.format(fmt) is fmt and sdq.format(fmt.name) == fmt
    assert hash(fmt) == hash(dataclasses.replace(fmt))


def test_floor_is_the_default_scale_rule():
    assert sdq.format("mxfp4:floor") == sdq.format("mxfp4")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("mxfp5", "unknown format 'mxfp5'"),
        ("", "unknown format ''"),
        ("SDQ32:16", "unknown format 'SDQ32:16'"),
        ("sdq32", "expected an even block size"),
        ("sdq32:", "nothing follows the colon"),
        ("sdq32:12", "block must be one of"),
        ("sdq32:+16", "expected an even block size"),
        ("sdq32:016", "expected an even block size"),
        ("int4:7", "expected an even block size"),
        ("int4:0", "expected an even block size"),
        ("nf4", "expected an even block size"),
        ("nvfp4:two", "only option"),
        ("mxfp4:ceil", "scale rule must be one of"),
        (16, "expected a name"),
        (None, "expected a name"),
    ],
)
def test_bad_names_say_what_is_possible(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        sdq.format(name)


def test_syntax_lists_every_family():
    heads = {entry.partition(":")[0].partition("[")[0] for entry in formats.SYNTAX}
    assert heads == {name.partition(":")[0] for name in format_table.FORMATS}


def test_empty_array_has_no_bits_per_element():
    assert math.isnan(sdq.quantize(jnp.zeros((0, 32)), "sdq32:16").bits_per_element)
