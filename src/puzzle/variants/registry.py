"""Every kind of variant; from a name or a configuration entry back to a variant."""

import ast
import builtins
import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from puzzle.errors import PuzzleError
from puzzle.modeling import MODULES
from puzzle.variants.base import Subblock, Variant

V = TypeVar("V", bound=Variant)
REGISTRY: dict[Subblock, dict[str, type[Variant]]] = {"attention": {}, "ffn": {}}
_CARRIED = {"torch", "nn", "Tensor", "Any"}
"""Names that a module's class may use: those that `modeling_puzzle.py` imports in every checkpoint."""


def register(variant: type[V]) -> type[V]:
    """Add a kind of variant; a decorator. The same kind from an earlier import of its module is replaced.

    Raises:
        PuzzleError: another class has its kind, or its module's class cannot be copied into checkpoints.
    """
    known = REGISTRY[variant.subblock].get(variant.kind)
    if known is not None and known.__qualname__ != variant.__qualname__:
        raise PuzzleError(f"register: {variant.subblock} kind {variant.kind!r} is taken; name yours differently")
    if variant.module is not None:
        _check_module(variant.module)
        MODULES[variant.subblock, variant.kind] = variant.module
    REGISTRY[variant.subblock][variant.kind] = variant
    return variant


def parse_variant(subblock: Subblock, name: str) -> Variant:
    """`kv2` or `w512`, or a kind without sizes: `linear`, `none`; a `PuzzleError` for anything else."""
    for kind in REGISTRY[subblock].values():
        if (variant := kind.parse(name)) is not None:
            return variant
    forms = ", ".join(re.sub(r"\{\w+\}", "<number>", kind.grammar) for kind in REGISTRY[subblock].values())
    raise PuzzleError(f"{subblock} variant {name!r} is unknown; use {forms}")


def variant_from_entry(subblock: Subblock, entry: Mapping[str, Any]) -> Variant:
    """The variant that an entry of `PuzzleConfig.blocks` has for this subblock."""
    kind = REGISTRY[subblock].get(entry["kind"])
    if kind is None:
        known = ", ".join(REGISTRY[subblock])
        raise PuzzleError(
            f"blocks: {subblock} kind {entry['kind']!r} is unknown; use {known}, or import the module that registers it"
        )
    return kind(**{name: size for name, size in entry.items() if name != "kind"})


def _check_module(module: type[nn.Module]) -> None:
    """A `PuzzleError` unless the class can stand in another file that imports `_CARRIED` alone."""
    try:
        tree = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(module))))
    except (OSError, TypeError):
        raise PuzzleError(
            f"register: the source of {module.__name__} is not to be found, which checkpoints carry; write it to a file"
        ) from None
    used, known = set(), _CARRIED | set(dir(builtins))
    for node in tree:
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                known.add(name)
    if foreign := sorted(used - known):
        raise PuzzleError(
            f"register: {module.__name__} uses {', '.join(foreign)}, but a checkpoint carries the class alone; "
            f"use {', '.join(sorted(_CARRIED))} only"
        )
    if "Attention" in module.__name__:
        raise PuzzleError(
            f"register: {module.__name__} says Attention in its name, by which transformers takes the whole model for "
            "one whose attention implementation cannot be set; name it differently"
        )
