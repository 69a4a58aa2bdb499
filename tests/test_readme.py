"""What the documents promise: blocks of READMEs run, commands and scripts answer --help."""

import pathlib
import re
import subprocess
import sys

import pytest

from scripts import make_speed_table
from sdq import cli

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = {
    f"{path.relative_to(ROOT)}-{n}": block
    for path in [ROOT / "README.md", *sorted((ROOT / "models").rglob("README.md"))]
    for n, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
}


def test_readmes_have_examples():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_readme_block_runs(block, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def subcommands():
    actions = cli.parser()._subparsers._group_actions
    return [name for action in actions for name in action.choices]


@pytest.mark.parametrize("command", [[], *([name] for name in subcommands())], ids=" ".join)
def test_command_answers_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: sdq" in capsys.readouterr().out


def test_console_command_is_installed():
    done = subprocess.run(
        [pathlib.Path(sys.executable).parent / "sdq", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("sdq ")


@pytest.mark.parametrize("script", sorted(p.stem for p in (ROOT / "scripts").glob("[!_]*.py")))
def test_script_answers_help(script):
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.{script}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


@pytest.mark.parametrize("folder", ["sdq", "pallas_kernels"])
def test_layout_in_readme_is_complete(folder):
    (part,) = re.findall(rf"^{folder}/.*\n((?:  .*\n)+)", README, re.MULTILINE)
    named = set(re.findall(r"^  ([a-z0-9_]+)\.py ", part, re.MULTILINE))
    assert named == {p.stem for p in (ROOT / folder).glob("[!_]*.py")}


def test_the_table_of_speed_is_what_was_measured():
    (written,) = re.findall(
        r"<!-- scripts.make_speed_table -->\n(.*?)\n<!-- end -->", README, re.DOTALL
    )
    assert written == make_speed_table.table()
