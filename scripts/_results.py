"""Results files: what was measured, where, when and how, as a page and as JSON beside it."""

import argparse
import datetime
import json
import pathlib
import platform
import shlex
import sys
from typing import Any

import jax

import sdq

# Of pages whose rows `kept` may have found.
OF_EARLIER_RUNS = (
    "The command is the last one: rows that it did not measure are of earlier ones, with the same "
    "device and versions."
)


def environment(script: str, **more: str) -> dict[str, str]:
    """Where and when numbers were made, and with which command line.

    Args:
      script: the module's name.
      more: further lines.
    """
    return {
        "command": shlex.join(["python", "-m", f"scripts.{script}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": f"sdq {sdq.__version__}, jax {jax.__version__}, "
        f"Python {platform.python_version()}",
        **more,
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of a script that prints what it measures, and writes it to a folder if asked to."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=pathlib.Path, help="folder (default: print only)")
    return made


def page(title: str, where: dict[str, str], *body: str) -> str:
    """A Markdown page: title, environment, lines."""
    lines = [
        f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in where.items()
    ]
    return "\n".join([f"# {title}", "", *lines, "", *body]) + "\n"


def kept(folder: pathlib.Path | None, stem: str, where: dict[str, str]) -> dict[str, Any]:
    """The document that a folder holds, if of the same device and versions; else empty."""
    file = folder / f"{stem}.json" if folder else None
    document = json.loads(file.read_text()) if file and file.exists() else {}
    same = document and all(
        document["environment"][key] == where[key] for key in ("device", "versions")
    )
    return document if same else {}


def write(folder: pathlib.Path, stem: str, text: str, document: Any) -> None:
    """Write `<stem>.md` and `<stem>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.md").write_text(text)
    (folder / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
