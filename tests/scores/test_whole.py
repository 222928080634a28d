"""True scores: those of the child itself, however many are scored at once, and each only once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puzzle.artefacts import WholeScore
from puzzle.child import realise
from puzzle.data import TokenData
from puzzle.library import Library, Names
from puzzle.metrics import compare
from puzzle.parents import Parent
from puzzle.runs import Run
from puzzle.scores import true_scores
from puzzle.streams import Stream
from puzzle.variants import State, Variant

OWN = ("kv4+w64",) * 4
SOME = [
    OWN,
    ("kv1+w32", "none+none", "linear+w64", "kv4+none"),
    ("kv1+w32", "none+none", "linear+w64", "kv2+linear"),
    ("none+linear", "kv4+w64", "kv4+w64", "kv4+w64"),
]
Scores = Callable[..., list[WholeScore]]


@pytest.fixture
def scores(tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_library: Library) -> Scores:
    """Of architectures, on the last four sequences of the scoring text, or as many as fit `tokens`."""

    def scored(
        architectures: Sequence[Names], tokens: int = 4 * 32, library: Library = pico_library, memory: int | None = None
    ) -> list[WholeScore]:
        recipe = pico_run.recipe
        correct = recipe.correct.model_copy(update={"tokens": tokens})
        execution = recipe.execution.model_copy(update={"memory": memory})
        run = Run(tmp_path, recipe.model_copy(update={"correct": correct, "execution": execution}))
        return true_scores(run, pico_parent, pico_data, library, architectures)

    return scored


class Known(Library):
    """Without weights: whoever asks for some fails."""

    def state(self, layer: int, variant: Variant) -> State:
        raise AssertionError("known already")


class Poisoned(Library):
    def state(self, layer: int, variant: Variant) -> State:
        state = super().state(layer, variant)
        return {name: value * torch.nan for name, value in state.items()} if variant.name == "w32" else state


def test_it_is_what_the_child_itself_gives(
    scores: Scores, pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_library: Library
) -> None:
    """By forwards of whole models, on the end of the scoring range."""
    count = pico_data.num_sequences("scoring")
    sequences = pico_data.sequences("scoring", slice(count - 4, count))
    streams, states = [], []
    for blocks in SOME:
        child = realise(pico_run, pico_parent, pico_library, blocks).source()
        streams.append(Stream(pico_run, child, pico_run.path / "unused"))
        states += streams[-1].finals("text", lambda: [sequences[:, :-1]])
    for found, stream, state_BTD in zip(scores(SOME), streams, states, strict=True):
        models, hiddens = (streams[0].model, stream.model), (states[0].flatten(0, 1), state_BTD.flatten(0, 1)[None])
        metrics = compare(*models, *hiddens, sequences[:, 1:].flatten())
        for name in ("kl", "lm_loss", "top1_agreement", "cosine"):
            assert getattr(found, name) == pytest.approx(float(getattr(metrics, name).mean()), rel=1e-4, abs=1e-6)
        per_sequence = metrics.kl[0].unflatten(0, (4, -1)).mean(1)
        assert found.kl_se == pytest.approx(float(per_sequence.std()) / 2, rel=1e-3, abs=1e-6)


def test_together_and_one_at_a_time_are_the_same(scores: Scores, tmp_path: Path) -> None:
    together = scores(SOME)
    for file in tmp_path.rglob("whole/*"):
        file.unlink()
    for one, other in zip(together, scores(SOME, memory=1), strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-4, abs=1e-7)
    assert together[0].kl == pytest.approx(0, abs=1e-7)
    assert together[0].top1_agreement == 1


def test_what_is_known_is_not_computed_again(scores: Scores, pico_library: Library, tmp_path: Path) -> None:
    """Also by another process after a kill, but on other text it is."""
    first = scores(SOME[:2], memory=1)
    known = Known(**vars(pico_library))
    assert scores([*SOME[:2], *SOME[:2]], library=known) == first + first
    with pytest.raises(AssertionError, match="known already"):
        scores(SOME, library=known)
    assert scores(SOME)[:2] == first
    assert scores(SOME[:2], tokens=32)[1] != first[1]
    assert len(list(tmp_path.glob("whole/*.json"))) == 2


def test_a_child_that_is_not_finite_is_the_worst(scores: Scores, pico_library: Library) -> None:
    bad, good = scores([SOME[1], SOME[3]], library=Poisoned(**vars(pico_library)))
    assert good.kl < bad.kl == float("inf")


def test_the_searchs_score_is_what_counts(scores: Scores) -> None:
    (whole,) = scores(SOME[1:2])
    assert replace(whole, kl=9.0).value("kl") == 9.0
    assert whole.value("lm_loss") == whole.lm_loss
    assert whole.value("cosine") == whole.cosine
