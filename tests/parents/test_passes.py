"""A parent that is streamed gives what a resident one gives."""

import weakref
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import random_tokens
from torch import Tensor

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleForCausalLM
from puzzle.parents import Parent, ParentPasses
from puzzle.recipe import ExecutionSettings
from puzzle.runs import Run, write_tensors


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


def test_only_held_layers_take_memory(pico_run: Run, pico_parent: Parent, tmp_path: Path) -> None:
    each = passes(pico_run, pico_parent, tmp_path, memory="1B")
    for layers in ([1, 2], [2, 3], [0], []):
        gone = [
            weakref.ref(parameter)
            for index in set(held_layers(each)) - set(layers)
            for parameter in each.model.model.layers[index].parameters()
        ]
        each.hold(layers)
        assert held_layers(each) == layers
        assert all(reference() is None for reference in gone)
        held_bytes = sum(p.nbytes for p in each.model.parameters() if not p.is_meta)
        assert held_bytes == each.outer_bytes + sum(each.layer_bytes[index] for index in layers)
    assert each.outer_bytes == 4 * (257 * 32 + 32)


class CutError(Exception):
    """Stands for a kill."""


def cut_after(written: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Cut off when this many files of activations are written; gives their list, as it grows."""
    files: list[Path] = []

    def write(path: Path, tensors: Any) -> None:
        if len(files) == written:
            raise CutError
        write_tensors(path, tensors)
        files.append(path)

    monkeypatch.setattr("puzzle.parents.passes.write_tensors", write)
    return files


@pytest.mark.parametrize("written", range(1, 18, 2))
def test_preparing_goes_on_after_the_last_file(
    pico_run: Run, pico_parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    texts = {"one": text, "two": text}
    resident = passes(pico_run, pico_parent, tmp_path / "resident")
    resident.prepare(3, texts)
    first = cut_after(written, monkeypatch)
    with pytest.raises(CutError):
        passes(pico_run, pico_parent, tmp_path / "cut", memory="1B").prepare(3, texts)
    second = cut_after(-1, monkeypatch)
    again = passes(pico_run, pico_parent, tmp_path / "cut", memory="1B")
    again.prepare(3, texts)
    assert len(first) + len(second) == 3 * 3 * 2
    assert not set(first) & set(second)
    left = sorted(file.relative_to(tmp_path / "cut").as_posix() for file in (tmp_path / "cut").rglob("*.safetensors"))
    assert left == [f"{name}/003/{index:06d}.safetensors" for name in texts for index in range(3)]
    for name in texts:
        for index, tokens_BT in enumerate(text()):
            found, expected = (each.entering(3, name, index, tokens_BT) for each in (again, resident))
            assert torch.equal(found, expected)


def test_each_text_goes_on_from_its_own_layer(pico_run: Run, pico_parent: Parent, tmp_path: Path) -> None:
    streamed = passes(pico_run, pico_parent, tmp_path / "folder", memory="1B")
    streamed.prepare(1, {"one": text})
    streamed.prepare(2, {"two": text})
    resident = passes(pico_run, pico_parent, tmp_path / "folder")  # all layers at once
    resident.prepare(3, {"one": text, "two": text})
    for index, tokens_BT in enumerate(text()):
        *_, last = resident.through(range(3), "one", index, tokens_BT)
        for name in ("one", "two"):
            assert torch.equal(resident.entering(3, name, index, tokens_BT), last.left_BTD)


def test_preparing_goes_back_for_an_earlier_layer(pico_run: Run, pico_parent: Parent, tmp_path: Path) -> None:
    each = passes(pico_run, pico_parent, tmp_path, memory="1B")
    each.prepare(3, {"text": text})
    each.prepare(1, {"text": text})
    assert {file.parent.name for file in tmp_path.rglob("*.safetensors")} == {"001"}
    tokens_BT = next(text())
    each.hold([0])
    (seen,) = each.through(range(1), "text", 0, tokens_BT)
    assert torch.equal(each.entering(1, "text", 0, tokens_BT), seen.left_BTD)
    each.prepare(0, {"text": text})
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_layers_weights_are_read_once_for_all_texts(
    pico_run: Run, pico_parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[int]] = []
    hold = Parent.hold

    def watched(self: Parent, model: PuzzleForCausalLM, layers: Collection[int]) -> None:
        held.append(list(layers))
        hold(self, model, layers)

    monkeypatch.setattr(Parent, "hold", watched)
    passes(pico_run, pico_parent, tmp_path, memory="1B").prepare(3, {"one": text, "two": text})
    assert held == [[0], [1], [2]]
    passes(pico_run, pico_parent, tmp_path, memory="1B").prepare(3, {"one": text, "two": text})
    assert len(held) == 3


def test_groups_are_as_long_as_memory_allows(pico_run: Run, pico_parent: Parent, tmp_path: Path) -> None:
    unlimited = passes(pico_run, pico_parent, tmp_path)
    layer_bytes, outer_bytes = unlimited.layer_bytes, unlimited.outer_bytes
    assert sum(layer_bytes) == sum(
        4 * value.numel() for layer in range(4) for value in pico_parent.layer_state(layer).values()
    )
    whole = sum(layer_bytes) + outer_bytes
    assert not passes(pico_run, pico_parent, tmp_path, memory=f"{whole - 1}B").resident
    resident = passes(pico_run, pico_parent, tmp_path, memory=f"{whole + 25}B")
    assert list(resident.groups(range(4), lambda _: 10)) == [range(2), range(2, 4)]
    assert list(resident.groups([0, 2, 3], lambda _: 10)) == [range(3), range(3, 4)]
    streamed = passes(pico_run, pico_parent, tmp_path, memory=f"{outer_bytes + 3 * layer_bytes[0]}B")
    assert list(streamed.groups(range(4), lambda _: 0)) == [range(3), range(3, 4)]
    assert list(streamed.groups([0, 2, 3], lambda _: 0)) == [range(1), range(2, 4)]
    assert list(streamed.groups(range(4), lambda _: 10**9)) == [range(i, i + 1) for i in range(4)]


def test_what_is_reserved_is_not_for_layers(pico_run: Run, pico_parent: Parent, tmp_path: Path) -> None:
    unlimited = passes(pico_run, pico_parent, tmp_path)
    layer_bytes = unlimited.layer_bytes[0]
    execution = ExecutionSettings(memory=f"{unlimited.outer_bytes + 4 * layer_bytes}B")
    run = replace(pico_run, recipe=pico_run.recipe.model_copy(update={"execution": execution}))
    assert ParentPasses(run, pico_parent, tmp_path).resident
    streamed = ParentPasses(run, pico_parent, tmp_path, reserved_bytes=layer_bytes)
    assert list(streamed.groups(range(4), lambda _: 0)) == [range(3), range(3, 4)]


def test_free_memory_is_asked_for_before_weights_take_it(
    pico_run: Run, pico_parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [10**9]
    monkeypatch.setattr(Run, "memory_bytes", property(lambda _: free.pop()))
    each = ParentPasses(pico_run, pico_parent, tmp_path)
    assert list(each.groups(range(4), lambda _: 10**8)) == [range(4)]


def test_activations_have_a_budget(pico_run: Run, pico_parent: Parent, tmp_path: Path) -> None:
    one_layer = 8 * 10 * 32 * 4
    passes(pico_run, pico_parent, tmp_path / "fits", disk=f"{2 * one_layer}B").prepare(1, {"text": text})
    line = r"execution.disk: the activations of 80 tokens \(text\) take 20.5 kB, allowed are 20.5 kB; raise execution.d"
    with pytest.raises(PuzzleError, match=line):
        passes(pico_run, pico_parent, tmp_path / "no", disk=f"{2 * one_layer - 1}B").prepare(1, {"text": text})
    two = {"text": text, "other": text}
    with pytest.raises(PuzzleError, match=r"160 tokens \(text, other\) take 30.7 kB"):
        passes(pico_run, pico_parent, tmp_path / "no", disk=f"{3 * one_layer - 1}B").prepare(1, two)
    assert not (tmp_path / "no").exists()
    with pytest.raises(PuzzleError, match=r"80 tokens \(other\) take 31.0 kB"):  # beside the text that is there
        passes(pico_run, pico_parent, tmp_path / "fits", disk=f"{3 * one_layer - 1}B").prepare(1, {"other": text})


def test_activations_on_disk_do_not_count_against_what_is_free(
    pico_run: Run, pico_parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * 8 * 10 * 32 * 4
    monkeypatch.setattr(Run, "disk_bytes", property(lambda _: needed))
    passes(pico_run, pico_parent, tmp_path).prepare(1, {"text": text})
    monkeypatch.setattr(Run, "disk_bytes", property(lambda _: needed // 2))
    passes(pico_run, pico_parent, tmp_path).prepare(2, {"text": text})
