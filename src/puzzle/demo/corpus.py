"""The demo's text: the source of the Python standard library that is running it, one document a file."""

import json
import sysconfig
from pathlib import Path

from puzzle.runs import write_text

_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
"""Not the library, not always installed, or, as the tables of encodings, no text that anyone wrote."""


def write_corpus(path: Path) -> None:
    """Write the library's files as jsonl, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(file.relative_to(root).parts)]
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in files)
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()))


def read_corpus(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]
