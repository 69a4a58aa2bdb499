"""save and load: whole trees, shardings, every kind of damage, a process killed midway."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from sdq import Rule, checkpoint, format_table
from sdq.manifest import digest_of, read_manifest
from sdq.rules import is_qtensor


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def params(rng):
    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    tree = {
        "blocks": {"kernel": normal(2, 64, 32), "bias": normal(32).astype(jnp.bfloat16)},
        "embed": {"kernel": normal(48, 16)},
        "step": jnp.int32(7),
        "empty": jnp.zeros((0, 4)),
    }
    rules = [
        Rule("blocks/kernel", "sdq32:16"),
        Rule("embed/kernel", "nvfp4"),
        Rule(".*", None),
    ]
    reports = []
    q = sdq.quantize_params(tree, sdq.resolve(rules, tree), on_leaf=reports.append)
    return q, reports


@pytest.fixture
def saved(params, tmp_path):
    q, reports = params
    sdq.save(tmp_path / "model", q, reports=reports, metadata={"model": "test"})
    return tmp_path / "model"


def test_round_trip(params, saved):
    loaded = sdq.load(saved)
    assert_same_tree(loaded, params[0])
    assert loaded["blocks"]["kernel"].format == sdq.format("sdq32:16")
    assert loaded["blocks"]["bias"].dtype == jnp.bfloat16


def test_round_trip_of_every_format(tmp_path, rng):
    x = jnp.asarray(rng.standard_normal((5, 50)), jnp.bfloat16)
    q = {name: sdq.quantize(x, name, axis=i % 2) for i, name in enumerate(format_table.FORMATS)}
    sdq.save(tmp_path / "all", q)
    assert_same_tree(sdq.load(tmp_path / "all"), q)


def test_a_lone_qtensor_and_lists(tmp_path):
    q = sdq.quantize(jnp.ones((4, 32)), "sdq32:16")
    sdq.save(tmp_path / "one", q)
    assert_same_tree(sdq.load(tmp_path / "one"), q)
    tree = {"layers": [q, {"a.b": jnp.ones(3), "a": {"b": jnp.zeros(2)}}]}
    sdq.save(tmp_path / "list", tree)
    assert_same_tree(sdq.load(tmp_path / "list", like=tree), tree)
    assert set(sdq.load(tmp_path / "list")["layers"]) == {"0", "1"}


def test_manifest_says_what_is_stored(params, saved):
    manifest = read_manifest(saved)
    q, reports = params
    leaf = {entry.path: entry for entry in manifest.leaves}["blocks/kernel"]
    assert (leaf.format, leaf.shape, leaf.axis) == ("sdq32:16", (2, 64, 32), -2)
    assert leaf.nbytes == q["blocks"]["kernel"].nbytes
    assert leaf.sqnr_db == next(r.sqnr_db for r in reports if r.path == leaf.path)
    assert manifest.metadata == {"model": "test"}
    assert manifest.written_by["sdq"] == sdq.__version__
    on_disk = {p.relative_to(saved / manifest.data).as_posix(): p.stat().st_size
               for p in (saved / manifest.data).rglob("*") if p.is_file()}  # fmt: skip
    assert {name: facts[0] for name, facts in manifest.files.items()} == on_disk


def test_errors_that_json_has_no_number_for(tmp_path):
    """An exact leaf has infinite SQNR, a leaf with a NaN has none."""
    tree = {"exact": jnp.ones((2, 32)), "bad": jnp.full((2, 32), jnp.nan)}
    plan = sdq.resolve([Rule(".*", "sdq32:16")], tree)
    reports = []
    sdq.save(
        tmp_path / "m", sdq.quantize_params(tree, plan, on_leaf=reports.append), reports=reports
    )
    bad, exact = read_manifest(tmp_path / "m").leaves
    assert exact.sqnr_db == np.inf and np.isnan(bad.sqnr_db)
    json.loads((tmp_path / "m" / "manifest.json").read_text(), parse_constant=pytest.fail)


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(ValueError, match=r"save: metadata: .*not JSON serializable"):
        sdq.save(tmp_path / "m", {"w": jnp.ones(2)}, metadata={"x": jnp.ones(2)})
    assert not (tmp_path / "m").exists()


def test_load_onto_shardings(params, saved):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "d"))
    like = checkpoint.abstract(saved)
    q = like["blocks"]["kernel"]
    like["blocks"]["kernel"] = jax.tree.map(
        lambda part, s: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=s),
        q,
        sdq.shardings(q, sharding),
    )
    loaded = sdq.load(saved, like)
    assert_same_tree(loaded, params[0])
    assert loaded["blocks"]["kernel"].codes.sharding.spec == jax.sharding.PartitionSpec(
        None, "d", None
    )
    assert len(loaded["blocks"]["kernel"].codes.sharding.device_set) == 4


def test_sharded_arrays_are_saved_whole(tmp_path, rng):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d", None))
    q = sdq.quantize(jnp.asarray(rng.standard_normal((8, 64)), jnp.float32), "sdq32:16")
    sdq.save(tmp_path / "s", {"w": jax.device_put(q, sdq.shardings(q, rows))})
    assert_same_tree(sdq.load(tmp_path / "s"), {"w": q})


def test_like_must_be_the_stored_tree(params, saved):
    like = checkpoint.abstract(saved)
    like["other"] = like.pop("step")
    like["embed"]["kernel"] = jax.ShapeDtypeStruct((48, 16), jnp.float32)
    with pytest.raises(ValueError) as error:
        sdq.load(saved, like)
    for line in (
        "+ step: in the checkpoint, not wanted",
        "- other: wanted, not in the checkpoint",
        "! embed/kernel: wanted float32[48, 16], stored QTensor(nvfp4",
    ):
        assert line in str(error.value)


def test_a_save_replaces_the_last_one_and_leaves_no_rubbish(params, saved):
    sdq.save(saved, {"w": jnp.ones(3)})
    assert_same_tree(sdq.load(saved), {"w": jnp.ones(3)})
    assert sorted(p.name for p in saved.iterdir()) == ["data-2", "manifest.json"]


# --- damage
# ------------------------------------------------------------------------------------------------

CODES = "blocks.kernel.codes/c/0/0/0"


def data_file(saved, name=CODES):
    return saved / read_manifest(saved).data / name


def flip(file, at=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "flipped byte": (flip, "contents changed"),
    "missing file": (lambda f: f.unlink(), "missing"),
    "truncated file": (lambda f: os.truncate(f, f.stat().st_size // 2), "bytes instead of"),
    "grown file": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "bytes instead of"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_names_file_leaf_and_remedy(damage, saved):
    spoil, complaint = DAMAGE[damage]
    spoil(data_file(saved))
    with pytest.raises(sdq.CheckpointError) as error:
        sdq.load(saved)
    message = str(error.value)
    assert str(data_file(saved)) in message and complaint in message
    assert "leaf 'blocks/kernel'" in message and "copy the checkpoint again" in message


def test_a_flip_in_any_file_is_found(saved):
    manifest = read_manifest(saved)
    for name in manifest.files:
        flip(data_file(saved, name))
        with pytest.raises(sdq.CheckpointError, match="contents changed"):
            sdq.load(saved)
        flip(data_file(saved, name))
    sdq.load(saved)


def test_a_flip_anywhere_in_the_manifest_is_found(saved):
    file = saved / "manifest.json"
    whole = file.read_bytes()
    for at in range(0, len(whole), 97):
        flip(file, at)
        with pytest.raises(sdq.CheckpointError, match=r"manifest\.json"):
            sdq.load(saved)
        file.write_bytes(whole)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(sdq.CheckpointError, match="damaged"):
        sdq.load(saved)


def test_unverified_damage_is_still_an_error_of_ours(saved):
    """In a process of its own: what Orbax leaves behind complains when it is collected."""
    data_file(saved).unlink()
    data_file(saved, "blocks.kernel.codes/zarr.json").write_text("{")
    code = f"import sdq; sdq.load({str(saved)!r}, verify=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "CheckpointError" in done.stderr and "load with verify=True" in done.stderr


def rewrite_manifest(saved, change):
    """Change a manifest as another version would have written it, checksum included."""
    document = json.loads((saved / "manifest.json").read_text())
    change(document)
    document["sha256"] = digest_of(document["body"])
    (saved / "manifest.json").write_text(json.dumps(document))


def test_newer_version(saved):
    rewrite_manifest(saved, lambda d: d.update(version=99))
    with pytest.raises(
        sdq.CheckpointError, match=r"manifest.json: checkpoint version 99.*install a newer sdq"
    ):
        sdq.load(saved)


def test_unknown_format(saved):
    def change(document):
        [leaf] = [x for x in document["body"]["leaves"] if x["path"] == "embed/kernel"]
        leaf["format"] = "sdq64:16"

    rewrite_manifest(saved, change)
    with pytest.raises(
        sdq.CheckpointError,
        match=r"manifest.json: leaf 'embed/kernel': unknown format 'sdq64:16'.*install the sdq",
    ):
        sdq.load(saved)


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_no_checkpoint_there(where, tmp_path):
    with pytest.raises(sdq.CheckpointError, match=r"no such file, so .* is no sdq checkpoint"):
        sdq.load(tmp_path / where)


def test_save_refuses_foreign_folders_files_and_leaves(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other things \(notes.txt"):
        sdq.save(tmp_path, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="is a file; give a folder"):
        sdq.save(tmp_path / "notes.txt", {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="leaf 'name' is no array but str"):
        sdq.save(tmp_path / "new", {"name": "wan"})
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / "new").exists()


# --- a save that is killed
# ---------------------------------------------------------------------------------

WRITER = """
import sys, jax.numpy as jnp, sdq
for number in range(1, 10_000):
    value = float(number)
    sdq.save(sys.argv[1], {"a": jnp.full((64, 512), value), "b": jnp.full(9, value)})
    print(number, flush=True)
"""


def numbers(tree):
    return {float(v) for leaf in jax.tree.leaves(tree) for v in np.unique(leaf)}


def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(tmp_path):
    path = tmp_path / "model"
    dice = random.Random(0)
    for _ in range(4):
        command = [sys.executable, "-c", WRITER, path]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as writer:
            line = writer.stdout.readline() and writer.stdout.readline()
            assert line.strip().isdigit(), line + writer.stdout.read()
            last = float(line)
            time.sleep(dice.random() * 0.3)
            writer.send_signal(signal.SIGKILL)
            last = max([last, *map(float, writer.stdout.read().split())])
        assert numbers(sdq.load(path)) in ({last}, {last + 1})
    sdq.save(path, {"w": jnp.zeros(1)})  # what the dead left behind goes
    assert len(list(path.iterdir())) == 2


def test_a_manifest_that_was_never_finished_goes(tmp_path):
    path = tmp_path / "model"
    sdq.save(path, {"w": jnp.zeros(1)})
    (path / ".manifest.json.798c4ea626ad4ec5910407ea827e0800.tmp").write_text("{")
    assert numbers(sdq.load(path)) == {0.0}
    sdq.save(path, {"w": jnp.ones(1)})
    assert numbers(sdq.load(path)) == {1.0} and len(list(path.iterdir())) == 2


@pytest.mark.parametrize("step", ["write_arrays", "write_manifest", "replace"])
def test_a_failure_at_any_step_leaves_the_old_checkpoint(step, saved, params, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os if step == "replace" else checkpoint, step, fail)
    with pytest.raises(OSError, match="disk full"):
        sdq.save(saved, {"w": jnp.ones(3)})
    monkeypatch.undo()
    assert_same_tree(sdq.load(saved), params[0])
    sdq.save(saved, {"w": jnp.ones(3)})
    assert len(list(saved.iterdir())) == 2


def test_qtensors_are_leaves_of_the_abstract_tree(saved):
    tree = checkpoint.abstract(saved)
    assert is_qtensor(tree["blocks"]["kernel"]) and isinstance(tree["step"], jax.ShapeDtypeStruct)
