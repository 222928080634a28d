"""The child of a run folder is that of the last command."""

from pathlib import Path

from tests.conftest import pico_puzzle

from puzzle.child import Child
from puzzle.export import export_hf
from puzzle.modeling import save_checkpoint
from puzzle.runs import Run
from puzzle.variants import Architecture


def test_the_former_command_brings_the_formers_child_back(tmp_path: Path, pico_run: Run) -> None:
    run, children = Run(tmp_path, pico_run.recipe), {}
    for name in ("kv4+w48", "kv2+w16"):
        save_checkpoint(pico_puzzle(name), tmp_path / name, extra_files_from=None)
        children[name] = Child(tmp_path / name, name, Architecture.parse([name]))
    for name in ("kv4+w48", "kv2+w16", "kv4+w48"):
        exported = export_hf(run, children[name], "a card")
        assert exported == tmp_path / "child"
        written = (exported / "model.safetensors").read_bytes()
        assert written == (tmp_path / name / "model.safetensors").read_bytes()
