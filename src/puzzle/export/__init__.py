"""Export: one file per format. Which engine runs what is in `puzzle.engines.capability`."""

from pathlib import Path

from puzzle.errors import PuzzleError
from puzzle.export.deci import export_deci
from puzzle.export.gguf import DTYPES, GGUFType, export_gguf, write_random
from puzzle.export.hf import export_hf
from puzzle.export.stock import export_stock

FORMATS = ("hf", "deci", "gguf", "llama")


def check_format(to: str, dtype: str = "f16") -> None:
    """A `PuzzleError` unless there is such a format, and such a type of GGUF files."""
    if to not in FORMATS:
        raise PuzzleError(f"export: format {to!r} is unknown; use one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise PuzzleError(f"export: dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")


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
        case "deci":
            return export_deci(child, target or child.with_name(f"{child.name}-deci"))
        case _:
            return child


__all__ = [
    "FORMATS",
    "GGUFType",
    "check_format",
    "convert",
    "export_deci",
    "export_gguf",
    "export_hf",
    "export_stock",
    "write_random",
]
