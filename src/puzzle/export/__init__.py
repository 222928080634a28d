"""Export: a child in the formats of other programs. Which engine runs what is in `puzzle.engines.capability`."""

import shutil
from pathlib import Path

from puzzle.child import Child
from puzzle.export.checkpoint import export_deci as export_deci
from puzzle.export.checkpoint import export_stock as export_stock
from puzzle.export.checkpoint import replaced
from puzzle.export.gguf import GGUFType as GGUFType
from puzzle.export.gguf import export_gguf as export_gguf
from puzzle.export.gguf import write_random as write_random
from puzzle.runs import Run, write_text
from puzzle.stages import EXPORT


def convert(child: Path, to: str, dtype: GGUFType) -> Path:
    """Write a child's folder as `deci`, `gguf` (whose matrices have this dtype) or `stock` beside it.

    Returns the new folder or file; for `hf` the child as it is. A `PuzzleError` if the format cannot hold the child.
    """
    if to == "gguf":
        return export_gguf(child, child.with_name(f"{child.name}-{dtype}.gguf"), dtype=dtype)
    writers = {"deci": export_deci, "stock": export_stock}
    return writers[to](child, child.with_name(f"{child.name}-{to}")) if to in writers else child


def export_hf(run: Run, child: Child, card: str) -> Path:
    """Copy the child to `DIR/child`, with `architecture.json` and the model card; returns that folder.

    `AutoModelForCausalLM.from_pretrained(DIR / "child", trust_remote_code=True)` loads it anywhere; after
    `import puzzle` the flag is not needed.
    """
    stage = run.open(EXPORT, child=child, card=card)
    target = run.path / "child"
    mark = target / ".stage"  # whose child it is: a command with another target may have left its own
    if not (stage.done and mark.exists() and mark.read_text() == stage.address):
        with replaced(target) as folder:
            shutil.copytree(child.path, folder, dirs_exist_ok=True)
            write_text(folder / "architecture.json", child.architecture.to_json())
            write_text(folder / "README.md", card)
            write_text(folder / ".stage", stage.address)
        stage.commit()
    return target
