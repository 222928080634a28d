"""Export: one file per format."""

from pathlib import Path
from typing import get_args

from puzzle.errors import PuzzleError
from puzzle.export.capability import Finding, check, deployable, require, supported, table
from puzzle.export.deci import export_deci
from puzzle.export.gguf import GGUFType, export_gguf, write_random
from puzzle.export.hf import export_hf
from puzzle.export.stock import export_stock, is_stock
from puzzle.export.targets import TARGETS, Target

FORMATS = ("deci", "tensorrt-llm", "mlx-lm", "gguf", "llama")
"""What a finished child is converted to; `hf` is what it is."""


def check_format(to: str, dtype: str = "f16") -> None:
    """That there is such a format; a PuzzleError if not."""
    if to not in ("hf", *FORMATS):
        raise PuzzleError(f"export: format {to!r} is unknown; use one of hf, {', '.join(FORMATS)}")
    if dtype not in get_args(GGUFType):
        raise PuzzleError(f"export: dtype {dtype!r} is unknown; use one of {', '.join(get_args(GGUFType))}")


def convert(child: Path, to: str, target: Path | None = None, *, dtype: GGUFType = "f16") -> Path:
    """Write the child's folder in another format, by default beside it; returns the new folder or file.

    Args:
        dtype: of a GGUF file.

    Raises:
        PuzzleError: an unknown format, or one that cannot hold the child.
    """
    check_format(to, dtype)
    match to:
        case "gguf":
            return export_gguf(child, target or child.with_name(f"{child.name}-{dtype}.gguf"), dtype=dtype)
        case "llama":
            return export_stock(child, target or child.with_name(f"{child.name}-llama"))
        case "deci" | "tensorrt-llm" | "mlx-lm":
            return export_deci(child, target or child.with_name(f"{child.name}-{to}"), reader=to)
        case _:
            return child


__all__ = [
    "FORMATS",
    "TARGETS",
    "Finding",
    "GGUFType",
    "Target",
    "check",
    "check_format",
    "convert",
    "deployable",
    "export_deci",
    "export_gguf",
    "export_hf",
    "export_stock",
    "is_stock",
    "require",
    "supported",
    "table",
    "write_random",
]
