"""Finished variants on disk: found again by all that they follow from, and only when they are whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from puzzle.library.store import Trained, VariantStore
from puzzle.runs import Run, read_tensors
from puzzle.variants import State

STATES: dict[str, State] = {"w32": {"down": torch.ones(2, 3)}, "none": {}}
LOSSES = {"w32": (0.5, 0.25), "none": (1.0, 1.0)}


@pytest.fixture
def run(pico_run: Run, tmp_path: Path) -> Run:
    return replace(pico_run, path=tmp_path)


def test_what_was_written_is_found(run: Run) -> None:
    store = VariantStore(run, {"settings": 1})
    assert store.finished(3, "ffn", ("w32", "none")) is None
    store.write(3, "ffn", STATES, LOSSES, tokens=7)
    wide, none = store.finished(3, "ffn", ("w32", "none")) or []
    assert none == Trained(variant="none", file="", initial_loss=1.0, loss=1.0, tokens=7)
    assert wide == Trained(variant="w32", file=wide.file, initial_loss=0.5, loss=0.25, tokens=7)
    assert torch.equal(read_tensors(run.path / wide.file)["down"], torch.ones(2, 3))
    assert store.finished(3, "ffn", ("none", "w32")) == [wide, none]  # their order does not matter


@pytest.mark.parametrize(
    ("identity", "starts", "layer", "subblock", "variants"),
    [
        ({"settings": 2}, "a", 3, "ffn", ("w32", "none")),
        ({"settings": 1}, "b", 3, "ffn", ("w32", "none")),
        ({"settings": 1}, "a", 2, "ffn", ("w32", "none")),
        ({"settings": 1}, "a", 3, "attention", ("w32", "none")),
        ({"settings": 1}, "a", 3, "ffn", ("w32",)),
    ],
    ids=["settings", "start", "layer", "subblock", "variants"],
)
def test_what_follows_from_something_else_is_not(
    run: Run, identity: dict[str, Any], starts: str, layer: int, subblock: str, variants: tuple[str, ...]
) -> None:
    key = (3, ("w32", "none"))
    VariantStore(run, {"settings": 1}, {key: "a"}).write(3, "ffn", STATES, LOSSES, tokens=7)
    assert VariantStore(run, {"settings": 1}, {key: "a"}).finished(3, "ffn", ("w32", "none"))
    assert VariantStore(run, identity, {key: starts}).finished(layer, subblock, variants) is None


def test_half_written_is_not_finished(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    store = VariantStore(run, {})
    with monkeypatch.context() as patch:
        patch.setattr("puzzle.library.store.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.write(3, "ffn", STATES, LOSSES, tokens=7)
    assert list(run.path.rglob("*.safetensors"))
    assert store.finished(3, "ffn", ("w32", "none")) is None
