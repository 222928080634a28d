"""Export: a child in the formats of other programs. Which engine runs what is in `puzzle.engines.capability`."""

import shutil
from pathlib import Path

from puzzle.child import Child
from puzzle.errors import PuzzleError
from puzzle.export.checkpoint import export_deci as export_deci
from puzzle.export.checkpoint import export_stock as export_stock
from puzzle.export.gguf import DTYPES
from puzzle.export.gguf import GGUFType as GGUFType
from puzzle.export.gguf import export_gguf as export_gguf
from puzzle.export.gguf import write_random as write_random
from puzzle.runs import Run, write_text
from puzzle.stages import EXPORT

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


def export_hf(run: Run, child: Child, card: str) -> Path:
    """Copy the child to `DIR/child`, with `architecture.json` and the model card; returns that folder.

    `AutoModelForCausalLM.from_pretrained(DIR / "child", trust_remote_code=True)` loads it anywhere; after
    `import puzzle` the flag is not needed.
    """
    stage = run.open(EXPORT, child=child, card=card)
    target = run.path / "child"
    if not (stage.done and target.exists()):
        partial = run.path / ".child.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(child.path, partial)
        write_text(partial / "architecture.json", child.architecture.to_json())
        write_text(partial / "README.md", card)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        stage.commit()
    return target
