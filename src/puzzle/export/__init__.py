"""Export: a child in the formats of other programs. Which engine runs what is in `puzzle.engines.capability`."""

import shutil
from pathlib import Path

import torch

from puzzle.child import Child
from puzzle.export.checkpoint import export_deci as export_deci
from puzzle.export.checkpoint import export_stock as export_stock
from puzzle.export.checkpoint import replaced, write_weights
from puzzle.export.gguf import GGUFType as GGUFType
from puzzle.export.gguf import export_gguf as export_gguf
from puzzle.export.gguf import write_random as write_random
from puzzle.runs import Run, file_digest, read_json, remembered, write_json, write_text
from puzzle.stages import EXPORT

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def convert(child: Path, to: str, dtype: GGUFType | None = None) -> Path:
    """Write a child's folder as `deci`, `gguf` or `stock` beside it, in its own dtype if none is given (`gguf`: f16).

    Returns the new folder or file. A `PuzzleError` if the format cannot hold the child.
    """
    if to == "gguf":
        return export_gguf(child, child.with_name(f"{child.name}-{dtype or 'f16'}.gguf"), dtype=dtype or "f16")
    writer = {"deci": export_deci, "stock": export_stock}[to]
    return writer(child, child.with_name(f"{child.name}-{to}"), None if dtype is None else DTYPES[dtype])


def export_hf(run: Run, child: Child, card: str, dtype: torch.dtype) -> Path:
    """Write the child to `DIR/child`, with `architecture.json` and the model card; returns that folder.

    `AutoModelForCausalLM.from_pretrained(DIR / "child", trust_remote_code=True)` loads it anywhere; after
    `import puzzle` the flag is not needed.
    """
    stage = run.open(EXPORT, child=child, card=card, dtype=str(dtype))
    target = run.path / "child"

    def names(folder: Path) -> dict[str, str]:
        """The files that are written here, with their digests: whose child it is, and whether it is whole."""
        paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
        with remembered(run.path / "digests.json") as known:
            return {path.relative_to(folder).as_posix(): file_digest(path, known) for path in paths}

    if not (stage.done and stage.facts["files"].items() <= names(target).items()):
        source = child.source()
        with replaced(target) as folder:
            shutil.copytree(child.path, folder, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
            config = read_json(folder / "config.json") | {"dtype": str(dtype).removeprefix("torch.")}
            write_json(folder / "config.json", config)
            write_weights(source, folder, dtype)
            write_text(folder / "architecture.json", child.architecture.to_json())
            write_text(folder / "README.md", card)
        stage.commit(files=names(target))
    return target
