"""Rooms are entered by their public faces: `from puzzle.library import Library`, never `puzzle.library.bld`."""

import ast
from pathlib import Path

import puzzle

ROOT = Path(puzzle.__path__[0])
# What the command line asks of processes must not load what trains in them.
OPEN = {"distributed", "engines"}
ROOMS = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} - OPEN


def test_no_room_imports_the_internals_of_another() -> None:
    assert {"library", "runs", "search"} <= ROOMS
    trespasses = []
    # The package's own face names functions in their modules, of whose names some are the function's.
    for file in set(ROOT.rglob("*.py")) - {ROOT / "__init__.py"}:
        own = file.relative_to(ROOT).parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                package, *rest = name.split(".")
                if package == "puzzle" and len(rest) > 1 and rest[0] in ROOMS - {own}:
                    trespasses.append(f"{file.relative_to(ROOT)} imports {name}")
    assert trespasses == []
