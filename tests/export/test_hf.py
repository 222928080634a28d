"""The child of a run folder is that of the last command."""

import json
from pathlib import Path

import torch
from tests.conftest import pico_puzzle, random_tokens
from transformers import AutoModelForCausalLM

from puzzle.child import Child
from puzzle.export import export_hf
from puzzle.modeling import save_checkpoint
from puzzle.parents import open_parent
from puzzle.runs import Run
from puzzle.variants import Architecture

TOKENS = random_tokens(2, 9)


def test_the_former_command_brings_the_formers_child_back(tmp_path: Path, pico_run: Run) -> None:
    run, children = Run(tmp_path, pico_run.recipe), {}
    for name in ("kv4+w48", "kv2+w16"):
        save_checkpoint(pico_puzzle(name), tmp_path / name, extra_files_from=None)
        children[name] = Child(tmp_path / name, name, Architecture.parse([name]))
    for name in ("kv4+w48", "kv2+w16", "kv4+w48"):
        exported = export_hf(run, children[name], "a card", torch.float32)
        assert exported == tmp_path / "child"
        written = (exported / "model.safetensors").read_bytes()
        assert written == (tmp_path / name / "model.safetensors").read_bytes()


def test_a_childs_dtype_and_files_are_those_that_were_asked_for(tmp_path: Path, pico_run: Run) -> None:
    """Whatever happened to them; what else lies there, and a card that somebody has edited, stays."""
    model = pico_puzzle("kv2+w16", "none+w8")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    save_checkpoint(model, tmp_path / "checkpoint", extra_files_from=None)
    child = Child(tmp_path / "checkpoint", "address", Architecture.parse(["kv2+w16", "none+w8"]))
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        folder = export_hf(Run(tmp_path, pico_run.recipe), child, "a card", dtype)
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype
        assert torch.equal(open_parent(str(folder)).load()(TOKENS).logits, model(TOKENS).logits)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "mine.txt").write_text("mine")
    (folder / "README.md").write_text("edited")
    assert export_hf(Run(tmp_path, pico_run.recipe), child, "a card", torch.bfloat16) == folder
    assert (folder / "mine.txt").exists()
    assert (folder / "README.md").read_text() == "edited"
    for name in ("model.safetensors", "config.json", "modeling_puzzle.py"):
        data = bytearray(whole[name])
        data[len(data) // 2] ^= 1
        for damaged in (data, data[:10]):
            (folder / name).write_bytes(damaged)
            export_hf(Run(tmp_path, pico_run.recipe), child, "a card", torch.bfloat16)
            assert (folder / name).read_bytes() == whole[name]
