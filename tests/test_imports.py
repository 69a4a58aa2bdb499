"""Who may import whom, what the public names are, and what `import sdq` must not drag in."""

import ast
import pathlib
import subprocess
import sys

import pytest

import sdq

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [
    "sdq",
    "pallas_kernels",
    "models",
    "scripts",
]  # each may import itself and those before it
FORBIDDEN = {
    "sdq": {"flax", "optax", "chex", "torch"},
    "pallas_kernels": {"flax", "optax", "chex", "torch"},
    "models": {"chex", "torch"},
    "scripts": {"chex"},
}
EXCEPTIONS = {
    ("sdq/cli", "models"),  # the command may run a model
    ("models/text_encoders.py", "torch"),  # inside functions: optional extras
    ("models/pixels.py", "torch"),
}


def imported_packages(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_one_way(package):
    later = set(LAYERS[LAYERS.index(package) + 1 :]) | {"tests"}
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        (name.as_posix(), imported)
        for name in (file.relative_to(ROOT) for file in files)
        for imported in imported_packages(ROOT / name)
        if imported in later | FORBIDDEN[package]
        if not EXCEPTIONS & {(of.as_posix(), imported) for of in (name, name.parent)}
    ]
    assert not wrong


def test_sdq_has_no_relative_imports():
    for file in (ROOT / "sdq").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), file


def test_public_names():
    assert set(sdq.__all__) == {
        "CheckpointError",
        "Format",
        "LeafReport",
        "Plan",
        "QTensor",
        "Rule",
        "dequantize",
        "dequantize_params",
        "export",
        "fake_quantize",
        "format",
        "leaf_table",
        "load",
        "load_export",
        "progress_bar",
        "quantize",
        "quantize_params",
        "resolve",
        "save",
        "shardings",
        "sqnr_db",
        "to_fp8",
        "validate",
    }
    for name in sdq.__all__:
        assert getattr(sdq, name).__doc__, name


def test_import_is_light():
    heavy = "orbax matplotlib torch flax optax chex"
    code = f"import sys, sdq; print([m for m in '{heavy}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
