"""Leaf by leaf: like a whole save; killed anywhere, it goes on; another's job is refused."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from sdq.checkpoint_stream import save_leaves
from sdq.manifest import JOURNAL, MANIFEST, CheckpointError, read_manifest

JOB = {"source": "here", "recipe": "plain"}


@pytest.fixture
def tree(rng):
    w = jnp.asarray(rng.randn(2, 64, 32), jnp.bfloat16)
    return {
        "blocks": {"kernel": sdq.quantize(w, "sdq32:16", axis=-2), "bias": jnp.ones((2, 32))},
        "blocks.kernel": jnp.zeros(3),  # a name that another's folder might have had
        "empty": jnp.zeros((0, 4)),
        "last": jnp.int32(7),
    }


def makers(tree, made):
    """What makes the leaves, noting which were made."""
    leaves = {
        "blocks/kernel": (tree["blocks"]["kernel"], 21.5),
        "blocks/bias": (tree["blocks"]["bias"], None),
        "blocks.kernel": (tree["blocks.kernel"], None),
        "empty": (tree["empty"], None),
        "last": (tree["last"], None),
    }

    def maker(path):
        def make():
            made.append(path)
            return leaves[path]

        return make

    return {path: maker(path) for path in leaves}


def assert_is(tree, path):
    loaded = sdq.load(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)


def test_like_a_whole_save(tree, tmp_path):
    seen = []
    save_leaves(
        tmp_path / "m",
        makers(tree, []),
        job=JOB,
        metadata={"model": "tiny"},
        on_leaf=lambda report, was_there: seen.append((report.path, report.sqnr_db, was_there)),
    )
    assert_is(tree, tmp_path / "m")
    assert seen[0] == ("blocks/kernel", 21.5, False) and len(seen) == 5
    manifest = read_manifest(tmp_path / "m")
    assert manifest.metadata == {"model": "tiny"}
    assert [leaf.path for leaf in manifest.leaves][:2] == ["blocks/kernel", "blocks/bias"]
    assert sorted(item.name for item in (tmp_path / "m").iterdir()) == ["data-1", MANIFEST]


@pytest.mark.parametrize("stops_at", [0, 1, 2, 4])
def test_goes_on_where_it_stopped(tree, tmp_path, stops_at):
    made = []
    leaves = makers(tree, made)
    name = list(leaves)[stops_at]

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_leaves(tmp_path, leaves | {name: stop}, job=JOB)
    assert len(made) == stops_at
    with pytest.raises(CheckpointError, match="no such file"):
        sdq.load(tmp_path)
    seen = []
    save_leaves(tmp_path, leaves, job=JOB, on_leaf=lambda report, old: seen.append(old))
    assert sorted(made) == sorted(leaves)  # each once
    assert seen == [True] * stops_at + [False] * (5 - stops_at)
    assert_is(tree, tmp_path)


def interrupted(tree, path):
    """With three leaves done."""
    leaves = makers(tree, [])
    with pytest.raises(ZeroDivisionError):
        save_leaves(path, leaves | {"empty": lambda: 1 / 0}, job=JOB)
    return path / "data-1"


def test_a_torn_line_and_half_a_leaf_are_made_again(tree, tmp_path):
    data = interrupted(tree, tmp_path)
    (data / "0003.empty.orbax-checkpoint-tmp").mkdir()
    with open(tmp_path / JOURNAL, "a") as journal:
        journal.write('{"entry": {"path": "em')
    made = []
    save_leaves(tmp_path, makers(tree, made), job=JOB)
    assert made == ["empty", "last"]
    assert_is(tree, tmp_path)
    assert not list(data.glob("*tmp*"))


def test_a_leaf_whose_files_are_gone_is_made_again(tree, tmp_path):
    data = interrupted(tree, tmp_path)
    next((data / "0001.blocks.bias").rglob("c/0/0")).unlink()
    made = []
    save_leaves(tmp_path, makers(tree, made), job=JOB)
    assert made == ["blocks/bias", "empty", "last"]
    assert_is(tree, tmp_path)


def test_another_job_is_refused(tree, tmp_path):
    interrupted(tree, tmp_path)
    with pytest.raises(ValueError, match=r"unfinished job.*plain.*remove this one"):
        save_leaves(tmp_path, makers(tree, []), job=JOB | {"recipe": "int4"})
    with pytest.raises(ValueError, match="job"):
        save_leaves(tmp_path / "new", {}, job=object())


def test_the_old_checkpoint_stays_until_the_end(tree, tmp_path):
    sdq.save(tmp_path, {"old": jnp.ones(2)})
    leaves = makers(tree, [])
    with pytest.raises(ZeroDivisionError):
        save_leaves(tmp_path, leaves | {"last": lambda: 1 / 0}, job=JOB)
    assert_is({"old": jnp.ones(2)}, tmp_path)
    save_leaves(tmp_path, leaves, job=JOB)
    assert_is(tree, tmp_path)
    assert [folder.name for folder in tmp_path.glob("data-*")] == ["data-2"]


def test_damage_names_the_leaf(tree, tmp_path):
    save_leaves(tmp_path, makers(tree, []), job=JOB)
    file = next((tmp_path / "data-1" / "0001.blocks.bias").rglob("c/0/0"))
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(CheckpointError, match=r"leaf 'blocks/bias'.*contents changed"):
        sdq.load(tmp_path)


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from sdq.checkpoint_stream import save_leaves

def make(n):
    if n == 3 and sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return jnp.full((4, 4), n), None

leaves = {f"leaf{n}": (lambda n=n: make(n)) for n in range(6)}
save_leaves(sys.argv[1], leaves, job="killed", on_leaf=lambda report, old: print(report.path, old))
"""


def test_a_killed_process(tmp_path):
    def run(how):
        command = [sys.executable, "-c", KILLED, str(tmp_path), how]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert run("die").returncode == -signal.SIGKILL
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 4  # the job, and three leaves
    assert json.loads((tmp_path / JOURNAL).read_text().splitlines()[0])["job"] == "killed"
    lines = run("live").stdout.split("\n")
    assert lines[:6] == [f"leaf{n} {n < 3}" for n in range(6)]
    assert float(sdq.load(tmp_path)["leaf5"][0, 0]) == 5
