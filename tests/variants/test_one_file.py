"""A kind of variant is one file: nothing else in the source names its classes or asks for its kind."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import puzzle
from puzzle.variants import REGISTRY

SOURCE = Path(puzzle.__file__).parent
KINDS = [kind for kinds in REGISTRY.values() for kind in kinds.values()]
CLASSES = {kind.__name__ for kind in KINDS} | {kind.module.__name__ for kind in KINDS if kind.module is not None}
WORDS = {kind.kind for kind in KINDS}
COMMON = {"linear", "none"}
"""Words of other things as well, of rotary embeddings, of names in a recipe: only no kind must be compared to them."""
FAMILY = SOURCE / "modeling"
"""Holds the family's own attention and FFN, of which `gqa` and `gated` are sizes."""


def names_of_kinds(file: Path) -> Iterator[str]:
    """Where a file names a kind's class, has a kind's word, or asks something for its kind."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) if name in CLASSES:
                yield f"line {node.lineno}: {name}"
            case ast.Constant(value=str(word)) if word in WORDS - COMMON:
                yield f"line {node.lineno}: {word!r}"
            case ast.Compare() | ast.Match() if "kind" in (text := ast.unparse(node)) and any(
                f"'{word}'" in text for word in WORDS
            ):
                yield f"line {node.lineno}: {text.partition(chr(10))[0]}"


def test_every_built_in_kind_has_a_file_in_kinds() -> None:
    files = {Path(inspect.getfile(kind)) for kind in KINDS}
    assert files == {file for file in (SOURCE / "variants" / "kinds").glob("*.py") if file.name != "__init__.py"}


def test_no_other_file_names_a_kind() -> None:
    variants = SOURCE / "variants"
    others = [file for file in SOURCE.rglob("*.py") if not {variants, FAMILY}.intersection(file.parents)]
    found = {str(file.relative_to(SOURCE)): list(names_of_kinds(file)) for file in [*others, variants / "__init__.py"]}
    assert {file: names for file, names in found.items() if names} == {}
