"""Law 5: the child realised from the library equals the parent with those blocks swapped in memory."""

import random
from pathlib import Path

import torch

from puzzle.child import assemble, realise, swapped_logits
from puzzle.child.realise import streamed_logits
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.runs import Run
from puzzle.variants import Architecture, BlockVariant, Space


def random_architecture(space: Space, seed: int) -> Architecture:
    chosen = random.Random(seed)
    return Architecture(tuple(chosen.choice(layer.blocks()) for layer in space.layers))


def test_assembled_child_equals_the_parent_with_blocks_swapped(
    pico_parent: Parent, pico_library: Library, pico_space: Space
) -> None:
    model = pico_parent.load()
    tokens_BT = torch.arange(40).remainder(pico_parent.config.vocab_size).view(2, 20)
    for seed in range(8):
        architecture = random_architecture(pico_space, seed)
        child = assemble(pico_parent, pico_library, architecture)
        expected = swapped_logits(model, pico_library, architecture, tokens_BT)
        torch.testing.assert_close(child(tokens_BT).logits, expected, rtol=0, atol=0)


def test_the_parents_own_blocks_give_the_parent(pico_parent: Parent, pico_library: Library) -> None:
    tokens_BT = torch.arange(20).view(1, 20)
    child = assemble(pico_parent, pico_library, pico_parent.architecture)
    torch.testing.assert_close(child(tokens_BT).logits, pico_parent.load()(tokens_BT).logits, rtol=0, atol=0)


def test_saved_child_computes_the_same(
    pico_run: Run, pico_parent: Parent, pico_library: Library, pico_space: Space
) -> None:
    architecture = random_architecture(pico_space, 99)
    child = realise(pico_run, pico_parent, pico_library, tuple(block.name for block in architecture.blocks))
    tokens_BT = torch.arange(20).view(1, 20)
    expected = assemble(pico_parent, pico_library, architecture)(tokens_BT).logits
    torch.testing.assert_close(child.load()(tokens_BT).logits, expected, rtol=0, atol=0)
    assert child.architecture == architecture == Architecture.of(child.load().config)
    assert (child.path.parent / "architecture.json").read_text() == architecture.to_json()


def test_a_child_larger_than_memory_is_checked_layer_by_layer(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_library: Library
) -> None:
    blocks = ("none+w32", "kv1+linear", "none+none", "kv4+w64")
    expected = realise(pico_run, pico_parent, pico_library, blocks)
    small = pico_run.recipe.execution.model_copy(update={"memory": 1})
    run = Run(tmp_path, pico_run.recipe.model_copy(update={"execution": small}))
    child = realise(run, pico_parent, pico_library, blocks)
    tokens_BT = torch.arange(20).view(1, 20)
    found = streamed_logits(run, child, tokens_BT)
    torch.testing.assert_close(found, expected.load()(tokens_BT).logits, rtol=0, atol=0)
    assert (child.path / "model.safetensors").read_bytes() == (expected.path / "model.safetensors").read_bytes()
    assert sorted(file.name for file in child.path.parent.iterdir()) == [
        "architecture.json",
        "checkpoint",
        "clock.json",
        "manifest.json",
        "stage.json",
    ]


def test_a_wrong_library_file_is_noticed(pico_parent: Parent, pico_library: Library) -> None:
    blocks = list(pico_parent.architecture.blocks)
    blocks[1] = BlockVariant.parse("none+none")
    other = assemble(pico_parent, pico_library, Architecture(tuple(blocks)))
    tokens_BT = torch.arange(20).view(1, 20)
    assert not torch.equal(other(tokens_BT).logits, pico_parent.load()(tokens_BT).logits)
