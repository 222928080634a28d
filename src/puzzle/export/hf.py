"""The child as a Hugging Face checkpoint that loads without this package, with its card."""

import shutil
from pathlib import Path

from puzzle.child import Child
from puzzle.runs import Run, write_text
from puzzle.stages import EXPORT


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
