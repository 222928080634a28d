"""A parent that is streamed gives what a resident one gives."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import random_tokens
from torch import Tensor

from puzzle.errors import PuzzleError
from puzzle.parents import Parent, ParentPasses
from puzzle.recipe import ExecutionSettings
from puzzle.runs import Run


def text() -> Iterator[Tensor]:
    """Three batches, the last of another size."""
    for seed, batch in enumerate((3, 3, 2)):
        yield random_tokens(batch, 10, seed)


def passes(run: Run, parent: Parent, folder: Path, **execution: Any) -> ParentPasses:
    recipe = run.recipe.model_copy(update={"execution": ExecutionSettings(**execution)})
    return ParentPasses(replace(run, recipe=recipe), parent, folder)


def held_layers(each: ParentPasses) -> list[int]:
    layers = enumerate(each.model.model.layers)
    return [i for i, layer in layers if not any(parameter.is_meta for parameter in layer.parameters())]


@pytest.mark.parametrize("layers", [range(1), range(1, 3), range(3, 4), range(4)], ids=str)
def test_streamed_layers_are_resident_ones(pico_run: Run, pico_parent: Parent, tmp_path: Path, layers: range) -> None:
    resident = passes(pico_run, pico_parent, tmp_path / "resident")
    streamed = passes(pico_run, pico_parent, tmp_path / "streamed", memory="1B")
    assert (resident.resident, streamed.resident) == (True, False)
    for each in (resident, streamed):
        each.prepare(layers.start, {"text": text})
        each.hold(layers)
    assert held_layers(streamed) == list(layers)
    with torch.no_grad():
        expected_states = [resident.model(tokens_BT, output_hidden_states=True).hidden_states for tokens_BT in text()]
    for index, tokens_BT in enumerate(text()):
        pairs = zip(
            resident.through(layers, "text", index, tokens_BT),
            streamed.through(layers, "text", index, tokens_BT),
            strict=True,
        )
        for expected, found in pairs:
            assert found.index == expected.index
            for name in ("entered_BTD", "attention_BTD", "middle_BTD", "ffn_BTD", "left_BTD"):
                assert torch.equal(getattr(found, name), getattr(expected, name)), name
            torch.testing.assert_close(found.entered_BTD, expected_states[index][found.index])
    for each in (resident, streamed):
        each.close()
    assert not list(tmp_path.iterdir())


def test_preparing_goes_on_where_it_was_cut_off(pico_run: Run, pico_parent: Parent, tmp_path: Path) -> None:
    class CutError(Exception):
        pass

    def cut() -> Iterator[Tensor]:
        yield from list(text())[:2]
        raise CutError

    whole = passes(pico_run, pico_parent, tmp_path / "whole", memory="1B")
    whole.prepare(3, {"text": text})
    broken = passes(pico_run, pico_parent, tmp_path / "broken", memory="1B")
    broken.prepare(1, {"text": text})
    with pytest.raises(CutError):
        broken.prepare(3, {"text": cut})
    again = passes(pico_run, pico_parent, tmp_path / "broken", memory="1B")
    again.prepare(3, {"text": text})
    for index, tokens_BT in enumerate(text()):
        assert torch.equal(again.entering(3, "text", index, tokens_BT), whole.entering(3, "text", index, tokens_BT))
    files = {
        folder: sorted(file.name for file in (tmp_path / folder).rglob("*.safetensors"))
        for folder in ("whole", "broken")
    }
    assert files["whole"] == files["broken"] == [f"{index:06d}.safetensors" for index in range(3)]


def test_groups_are_as_long_as_memory_allows(pico_run: Run, pico_parent: Parent, tmp_path: Path) -> None:
    layer_bytes = passes(pico_run, pico_parent, tmp_path).layer_bytes
    assert sum(layer_bytes) == sum(
        4 * value.numel() for layer in range(4) for value in pico_parent.layer_state(layer).values()
    )
    resident = passes(pico_run, pico_parent, tmp_path, memory=f"{sum(layer_bytes) + 25}B")
    assert list(resident.groups(range(4), lambda _: 10)) == [range(2), range(2, 4)]
    assert list(resident.groups([0, 2, 3], lambda _: 10)) == [range(3), range(3, 4)]
    streamed = passes(pico_run, pico_parent, tmp_path, memory=f"{3 * layer_bytes[0]}B")
    assert list(streamed.groups(range(4), lambda _: 0)) == [range(3), range(3, 4)]
    assert list(streamed.groups([0, 2, 3], lambda _: 0)) == [range(1), range(2, 4)]
    assert list(streamed.groups(range(4), lambda _: 10**9)) == [range(i, i + 1) for i in range(4)]


def test_activations_have_a_budget(pico_run: Run, pico_parent: Parent, tmp_path: Path) -> None:
    needed = 2 * 8 * 10 * 32 * 4
    passes(pico_run, pico_parent, tmp_path / "fits", disk=f"{needed}B").prepare(1, {"text": text})
    line = "execution.disk: the activations of 80 text tokens take 20.5 kB, allowed are 20.5 kB; raise execution.disk"
    with pytest.raises(PuzzleError, match=line):
        passes(pico_run, pico_parent, tmp_path / "does not", disk=f"{needed - 1}B").prepare(1, {"text": text})
