"""A model that is streamed gives what a resident one gives; activations on disk go on after a kill."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import random_tokens
from torch import Tensor

from puzzle.errors import PuzzleError
from puzzle.parents import Parent
from puzzle.recipe import ExecutionSettings
from puzzle.runs import Run
from puzzle.streams import Stream, packed, read_ahead
from puzzle.variants import SUBBLOCKS

Open = Callable[..., Stream]


def text() -> Iterator[Tensor]:
    """Three batches, the last of another size."""
    for seed, batch in enumerate((3, 3, 2)):
        yield random_tokens(batch, 10, seed)


@pytest.fixture
def opened(pico_run: Run, pico_parent: Parent, tmp_path: Path) -> Open:
    """A stream of the pico parent with activations in `folder`, under these settings of `execution`."""

    def make(folder: str = "folder", reserved_bytes: int = 0, parent: Parent = pico_parent, **execution: Any) -> Stream:
        recipe = pico_run.recipe.model_copy(update={"execution": ExecutionSettings(**execution)})
        return Stream(replace(pico_run, recipe=recipe), parent, tmp_path / folder, reserved_bytes)

    return make


def held_layers(stream: Stream) -> list[int]:
    layers = enumerate(stream.model.model.layers)
    return [i for i, layer in layers if not any(parameter.is_meta for parameter in layer.parameters())]


@pytest.mark.parametrize("layers", [range(1), range(1, 3), range(3, 4), range(4)], ids=str)
def test_streamed_layers_are_resident_ones(opened: Open, tmp_path: Path, layers: range) -> None:
    resident, streamed = opened("resident"), opened("streamed", memory="1B")
    assert (resident.resident, streamed.resident) == (True, False)
    for stream in (resident, streamed):
        stream.prepare(layers.start, {"text": text})
    passes = [stream.passes(layers, "text", text()) for stream in (resident, streamed)]
    for tokens_BT, *both in zip(text(), *passes, strict=True):
        with torch.no_grad():
            states_BTD = resident.model(tokens_BT, output_hidden_states=True).hidden_states
        for expected, found in zip(*both, strict=True):
            assert found.index == expected.index
            for which in SUBBLOCKS:
                assert torch.equal(found.inputs_BTD[which], expected.inputs_BTD[which])
                assert torch.equal(found.added_BTD[which], expected.added_BTD[which])
            assert torch.equal(found.output_BTD, expected.output_BTD)
            torch.testing.assert_close(found.inputs_BTD["attention"], states_BTD[found.index])
        assert held_layers(streamed) == list(layers)
    for stream in (resident, streamed):
        stream.close()
    assert not list(tmp_path.iterdir())


def test_the_end_of_a_streamed_model_is_that_of_a_resident_one(opened: Open, tmp_path: Path) -> None:
    resident, streamed = opened("resident"), opened("streamed", memory="1B")
    finals = [stream.finals("text", text) for stream in (resident, streamed)]
    for tokens_BT, expected, found in zip(text(), *finals, strict=True):
        assert torch.equal(found, expected)
        torch.testing.assert_close(resident.model.logits(found), resident.model(tokens_BT).logits)
    assert not (tmp_path / "resident").exists()


def test_only_held_layers_take_memory(opened: Open) -> None:
    stream = opened(memory="1B")
    for layers in ([1, 2], [2, 3], [0], []):
        gone = [
            weakref.ref(parameter)
            for index in set(held_layers(stream)) - set(layers)
            for parameter in stream.model.model.layers[index].parameters()
        ]
        stream.hold(layers)
        assert held_layers(stream) == layers
        assert all(reference() is None for reference in gone)
        held_bytes = sum(p.nbytes for p in stream.model.parameters() if not p.is_meta)
        assert held_bytes == stream.outer_bytes + sum(stream.layer_bytes[index] for index in layers)
    assert stream.outer_bytes == 4 * (257 * 32 + 32)


def test_walking_holds_each_layer_in_its_turn_and_none_afterwards(opened: Open) -> None:
    """Four layers would be resident where two could be held while two are read."""
    stream = opened(memory="1B")
    assert [held_layers(stream) for _ in stream.walk(range(4))] == [[0], [1], [2], [3]]
    assert held_layers(stream) == []
    assert list(opened().walk(range(1, 4))) == [range(1, 4)]


class CutError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("cut", range(1, 18, 2))
def test_preparing_goes_on_after_the_last_batch(opened: Open, tmp_path: Path, cut: int) -> None:
    asked = 0

    def cut_off() -> Iterator[Tensor]:
        nonlocal asked
        for tokens_BT in text():
            asked += 1
            if asked == cut + 12:  # what is there, and the size, of both texts was looked at before
                raise CutError
            yield tokens_BT

    resident, texts = opened("resident"), {"one": text, "two": text}
    resident.prepare(3, texts)
    with pytest.raises(CutError):
        opened("cut", memory="1B").prepare(3, {"one": cut_off, "two": cut_off})
    again = opened("cut", memory="1B")
    again.prepare(3, texts)
    left = sorted(file.relative_to(tmp_path / "cut").as_posix() for file in (tmp_path / "cut").rglob("*.safetensors"))
    assert left == [f"{name}/{index:06d}.safetensors" for name in texts for index in range(3)]
    for name in texts:
        for index, tokens_BT in enumerate(text()):
            found, expected = (each.inputs(3, name, (index, tokens_BT)) for each in (again, resident))
            assert torch.equal(found, expected)


def test_each_text_goes_on_from_its_own_layer_or_back_to_an_earlier_one(opened: Open, tmp_path: Path) -> None:
    streamed, resident = opened(memory="1B"), opened("resident")  # a layer at a time, and all at once

    def check(layer: int, *names: str) -> None:
        streamed.prepare(layer, dict.fromkeys(names, text))
        for index, tokens_BT in enumerate(text()):
            expected_BTD = resident.forward(range(layer), resident.embed(tokens_BT))
            for name in names:
                assert torch.equal(streamed.inputs(layer, name, (index, tokens_BT)), expected_BTD)

    check(1, "one")
    check(2, "two")
    check(3, "one", "two")
    check(1, "one")
    check(0, "one", "two")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_layers_weights_are_read_once_for_all_texts(opened: Open, pico_parent: Parent) -> None:
    read: list[int] = []

    class Watched(Parent):
        def layer_state(self, layer: int, *where: Any) -> dict[str, Tensor]:
            read.append(layer)
            return super().layer_state(layer, *where)

    watched = Watched(**{field.name: getattr(pico_parent, field.name) for field in fields(pico_parent)})
    for _ in range(2):
        opened(parent=watched, memory="1B").prepare(3, {"one": text, "two": text})
        assert read == [0, 1, 2]


def test_groups_are_as_long_as_memory_allows(opened: Open) -> None:
    layer_bytes, outer_bytes = opened().layer_bytes, opened().outer_bytes
    whole = sum(layer_bytes) + outer_bytes
    assert not opened(memory=f"{whole - 1}B").resident
    assert not opened(memory=f"{whole}B", reserved_bytes=1).resident
    resident = opened(memory=f"{whole + 25}B")
    assert resident.room(()) == 25
    assert list(resident.groups(range(4), lambda _: 10)) == [range(2), range(2, 4)]
    assert list(resident.groups([0, 2, 3], lambda _: 10)) == [range(3), range(3, 4)]
    assert list(resident.groups(range(4), lambda _: 10, begun=[2, 3])) == [range(2, 4), range(2)]
    streamed = opened(memory=f"{outer_bytes + 3 * layer_bytes[0]}B")
    assert streamed.room([1, 2]) == layer_bytes[0]
    assert list(streamed.groups(range(4), lambda _: 0)) == [range(3), range(3, 4)]
    assert list(streamed.groups([0, 2, 3], lambda _: 0)) == [range(1), range(2, 4)]
    assert list(streamed.groups(range(4), lambda _: 10**9)) == [range(i, i + 1) for i in range(4)]


def test_activations_have_a_budget(opened: Open, tmp_path: Path) -> None:
    one_layer = 8 * 10 * 32 * 4
    opened("fits", disk=f"{one_layer}B").prepare(1, {"text": text})
    line = r"execution.disk: the activations of 80 tokens \(text\) take 10.2 kB, allowed are 10.2 kB; raise execution.d"
    with pytest.raises(PuzzleError, match=line):
        opened("no", disk=f"{one_layer - 1}B").prepare(1, {"text": text})
    two = {"text": text, "other": text}
    with pytest.raises(PuzzleError, match=r"160 tokens \(text, other\) take 20.5 kB"):
        opened("no", disk=f"{2 * one_layer - 1}B").prepare(1, two)
    assert not (tmp_path / "no").exists()
    with pytest.raises(PuzzleError, match=r"80 tokens \(other\) take 2\d.\d kB"):  # beside the text that is there
        opened("fits", disk=f"{2 * one_layer - 1}B").prepare(1, {"other": text})


def test_as_many_items_as_fit_go_together() -> None:
    assert list(packed([3, 3, 2, 9, 1], lambda item: item, 8)) == [[3, 3, 2], [9], [1]]
    assert list(packed([1, 1], lambda item: item, -1)) == [[1], [1]]


def test_what_reading_ahead_raises_is_raised_where_it_is_used() -> None:
    def read(item: int) -> int:
        if item == 2:
            raise CutError
        return 10 * item

    items = read_ahead(range(4), read)
    assert [next(items), next(items)] == [(0, 0), (1, 10)]
    with pytest.raises(CutError):
        next(items)
