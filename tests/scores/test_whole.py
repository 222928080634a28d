"""True scores: those of the child itself, however many are scored at once, and each only once."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from puzzle.child import realise
from puzzle.data import TokenData
from puzzle.library import LayerBlocks, Library
from puzzle.metrics import compare
from puzzle.parents import Parent
from puzzle.runs import Run
from puzzle.scores import TrueScore
from puzzle.streams import Stream
from puzzle.variants import State, Variant

OWN = ("kv4+w64",) * 4
SOME = [
    OWN,
    ("kv1+w32", "none+none", "linear+w64", "kv4+none"),
    ("kv1+w32", "none+none", "linear+w64", "kv2+linear"),
    ("none+linear", "kv4+w64", "kv4+w64", "kv4+w64"),
]
Opened = Callable[..., TrueScore]


@pytest.fixture
def true(tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_library: Library) -> Opened:
    """On the last four sequences of the scoring text, or as many as fit `tokens`."""

    def opened(tokens: int = 4 * 32, library: Library = pico_library, memory: int | None = None) -> TrueScore:
        recipe = pico_run.recipe
        correct = recipe.correct.model_copy(update={"tokens": tokens})
        execution = recipe.execution.model_copy(update={"memory": memory})
        run = Run(tmp_path, recipe.model_copy(update={"correct": correct, "execution": execution}))
        return TrueScore(run, pico_parent, pico_data, library)

    return opened


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Layer and number of blocks of every batch that goes through blocks of the library."""
    outputs, seen = LayerBlocks.outputs, []

    def counted(self: LayerBlocks, blocks: Any, hidden_BTD: Any) -> Any:
        seen.append((self.layer, len(blocks)))
        return outputs(self, blocks, hidden_BTD)

    monkeypatch.setattr(LayerBlocks, "outputs", counted)
    return seen


def test_it_is_what_the_child_itself_gives(
    true: Opened, pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_library: Library
) -> None:
    """By forwards of whole models, on the end of the scoring range."""
    count = pico_data.num_sequences("scoring")
    sequences = pico_data.sequences("scoring", slice(count - 4, count))
    streams, states = [], []
    for blocks in SOME:
        child = realise(pico_run, pico_parent, pico_library, blocks).source()
        streams.append(Stream(pico_run, child, pico_run.path / "unused"))
        states += streams[-1].finals("text", lambda: [sequences[:, :-1]])
    for found, stream, state_BTD in zip(true().scores(SOME), streams, states, strict=True):
        models, hiddens = (streams[0].model, stream.model), (states[0].flatten(0, 1), state_BTD.flatten(0, 1)[None])
        metrics = compare(*models, *hiddens, sequences[:, 1:].flatten())
        for name in ("kl", "lm_loss", "top1_agreement", "cosine"):
            assert getattr(found, name) == pytest.approx(float(getattr(metrics, name).mean()), rel=1e-4, abs=1e-6)
        per_sequence = metrics.kl[0].unflatten(0, (4, -1)).mean(1)
        assert found.kl_se == pytest.approx(float(per_sequence.std()) / 2, rel=1e-3, abs=1e-6)


def test_together_and_one_at_a_time_are_the_same(true: Opened, tmp_path: Path) -> None:
    together = true().scores(SOME)
    for file in tmp_path.rglob("whole/*"):
        file.unlink()
    for one, other in zip(together, true(memory=1).scores(SOME), strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-4, abs=1e-7)
    assert together[0].kl == pytest.approx(0, abs=1e-7)
    assert together[0].top1_agreement == 1


def test_prefixes_are_gone_through_once(true: Opened, passed: list[tuple[int, int]]) -> None:
    true(tokens=32).scores(SOME[1:3])
    assert passed[:4] == [(0, 1), (1, 1), (2, 1), (3, 2)]
    assert passed[4:] == [(0, 1), (1, 1), (2, 1), (3, 1)], "the parent, once"


def test_what_is_known_is_not_computed_again(true: Opened, passed: list[tuple[int, int]], tmp_path: Path) -> None:
    """Also by another process after a kill, but on other text it is."""
    first = true(memory=1).scores(SOME[:2])
    passed.clear()
    assert true().scores([*SOME[:2], *SOME[:2]]) == first + first
    assert not passed
    assert true().scores(SOME)[:2] == first
    assert true(tokens=32).scores(SOME[:2])[1] != first[1]
    assert len(list(tmp_path.glob("whole/*.json"))) == 2


def test_a_child_that_is_not_finite_is_the_worst(true: Opened, pico_library: Library) -> None:
    class Poisoned(Library):
        def state(self, layer: int, variant: Variant) -> State:
            state = super().state(layer, variant)
            return {name: value * torch.nan for name, value in state.items()} if variant.name == "w32" else state

    poisoned = Poisoned(pico_library.root, pico_library.address, pico_library.parent, pico_library.index)
    bad, good = true(library=poisoned).scores([SOME[1], SOME[3]])
    assert good.kl < bad.kl == float("inf")


def test_the_searchs_score_is_what_counts(true: Opened) -> None:
    (whole,) = true().scores(SOME[1:2])
    assert replace(whole, kl=9.0).value("kl") == 9.0
    assert whole.value("lm_loss") == whole.lm_loss
    assert whole.value("cosine") == whole.cosine
