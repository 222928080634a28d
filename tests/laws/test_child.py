"""Law 5: the child realised from the library equals the parent with those blocks swapped in memory."""

import random
from pathlib import Path

import pytest
import torch

from puzzle.child import realise
from puzzle.library import Library, final_states
from puzzle.parents import Parent
from puzzle.runs import Run
from puzzle.variants import Architecture, Space

TOKENS_BT = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("seed", range(4))
def test_a_saved_child_equals_the_parent_with_blocks_swapped(
    seed: int, pico_run: Run, pico_parent: Parent, pico_library: Library, pico_space: Space
) -> None:
    chosen = random.Random(seed)
    architecture = Architecture(tuple(chosen.choice(layer.blocks()) for layer in pico_space.layers))
    child = realise(pico_run, pico_parent, pico_library, architecture.names)
    model = pico_parent.load(layers=())
    ((final_BTD,),) = final_states(pico_library, model, [architecture.names], [TOKENS_BT])
    expected = model.logits(final_BTD)
    assert torch.equal(child.load()(TOKENS_BT).logits, expected)
    assert not torch.equal(expected, pico_parent.load()(TOKENS_BT).logits)
    assert child.architecture == architecture == Architecture.of(child.load().config)
    assert (child.path.parent / "architecture.json").read_text() == architecture.to_json()


def test_the_parents_own_blocks_give_the_parent(pico_run: Run, pico_parent: Parent, pico_library: Library) -> None:
    child = realise(pico_run, pico_parent, pico_library, pico_parent.architecture.names)
    assert torch.equal(child.load()(TOKENS_BT).logits, pico_parent.load()(TOKENS_BT).logits)


def test_a_child_larger_than_memory_is_the_same(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_library: Library
) -> None:
    """Put together and checked layer by layer."""
    blocks = ("none+w32", "kv1+linear", "none+none", "kv4+w64")
    expected = realise(pico_run, pico_parent, pico_library, blocks)
    small = pico_run.recipe.execution.model_copy(update={"memory": 1})
    run = Run(tmp_path, pico_run.recipe.model_copy(update={"execution": small}))
    child = realise(run, pico_parent, pico_library, blocks)
    assert (child.path / "model.safetensors").read_bytes() == (expected.path / "model.safetensors").read_bytes()
    left = {file.name for file in child.path.parent.iterdir()}
    assert left == {"architecture.json", "checkpoint", "clock.json", "manifest.json", "stage.json"}
