"""True scores: those of the assembled child, however many are scored at once, and each only once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import puzzle.scores.whole
from puzzle.artefacts import WholeScore
from puzzle.child import assemble
from puzzle.data import TokenData
from puzzle.library import LayerBlocks, Library
from puzzle.metrics import compare
from puzzle.modeling import PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.runs import Run
from puzzle.scores import TrueScore
from puzzle.variants import Architecture, BlockVariant

OWN = ("kv4+w64",) * 4
SOME = [
    OWN,
    ("kv1+w32", "none+none", "linear+w64", "kv4+none"),
    ("kv1+w32", "none+none", "linear+w64", "kv2+linear"),
    ("none+linear", "kv4+w64", "kv4+w64", "kv4+w64"),
]
TOKENS = 4 * 32


@pytest.fixture
def true(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_library: Library
) -> Callable[..., TrueScore]:
    def opened(**settings: Any) -> TrueScore:
        changed = pico_run.recipe.correct.model_copy(update={"tokens": TOKENS} | settings)
        run = Run(tmp_path, pico_run.recipe.model_copy(update={"correct": changed}))
        return TrueScore(run, pico_parent, pico_data, pico_library)

    return opened


def test_it_is_what_the_assembled_child_gives(
    true: Callable[..., TrueScore], pico_parent: Parent, pico_data: TokenData, pico_library: Library
) -> None:
    """A law: by whole forwards of whole models, on the end of the scoring range."""
    count = pico_data.num_sequences("scoring")
    sequences = pico_data.sequences("scoring", slice(count - 4, count))
    parent = pico_parent.load()
    for blocks, found in zip(SOME, true().scores(SOME), strict=True):
        child = assemble(pico_parent, pico_library, Architecture(tuple(map(BlockVariant.parse, blocks))))
        states = [_final(model, sequences[:, :-1]) for model in (parent, child)]
        metrics = compare(parent, child, states[0], states[1].unsqueeze(0), sequences[:, 1:].flatten())
        for name in ("kl", "lm_loss", "top1_agreement", "cosine"):
            assert getattr(found, name) == pytest.approx(float(getattr(metrics, name).mean()), rel=1e-4, abs=1e-6)
        per_sequence = metrics.kl[0].unflatten(0, (4, -1)).mean(1)
        assert found.kl_se == pytest.approx(float(per_sequence.std()) / 2, rel=1e-3, abs=1e-6)


@torch.no_grad()
def _final(model: PuzzleForCausalLM, tokens_BT: Tensor) -> Tensor:
    hidden_BTD = model.model.embed_tokens(tokens_BT)
    context = model.model.context(hidden_BTD)
    for layer in model.model.layers:
        hidden_BTD = layer(hidden_BTD, **context)
    return hidden_BTD.flatten(0, 1)


def test_together_and_alone_are_the_same(
    true: Callable[..., TrueScore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together = true().scores(SOME)
    for file in tmp_path.rglob("whole/*"):
        file.unlink()
    monkeypatch.setattr(puzzle.scores.whole, "_AT_ONCE", 1)
    monkeypatch.setattr(puzzle.scores.whole, "tokens_at_once", lambda _: 32)
    alone = true().scores(SOME)
    for one, other in zip(together, alone, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-4, abs=1e-7)
    assert together[0].kl == pytest.approx(0, abs=1e-7)
    assert together[0].top1_agreement == 1


def test_prefixes_are_gone_through_once(true: Callable[..., TrueScore], monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, passed = LayerBlocks.outputs, []

    def counted(self: Any, blocks: Sequence[BlockVariant], entered_BTD: Tensor) -> Tensor:
        passed.append((self.layer, len(blocks)))
        return outputs(self, blocks, entered_BTD)

    monkeypatch.setattr(LayerBlocks, "outputs", counted)
    scorer = true(tokens=32)
    scorer.scores(SOME[1:3])
    assert passed[:4] == [(0, 1), (1, 1), (2, 1), (3, 2)]
    assert passed[4:] == [(0, 1), (1, 1), (2, 1), (3, 1)], "the parent, once"


def test_what_is_known_is_not_computed_again(true: Callable[..., TrueScore], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a kill between two writes, and for another process."""
    measured = TrueScore._measured
    seen: list[tuple[str, ...]] = []

    def cut_off(self: TrueScore, architectures: Sequence[tuple[str, ...]]) -> list[WholeScore]:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.extend(architectures)
        return measured(self, architectures)

    monkeypatch.setattr(puzzle.scores.whole, "_AT_ONCE", 1)
    monkeypatch.setattr(TrueScore, "_measured", cut_off)
    with pytest.raises(KeyboardInterrupt):
        true().scores(SOME)
    monkeypatch.setattr(TrueScore, "_measured", lambda self, some: (seen.extend(some), measured(self, some))[1])
    values = true().scores([*SOME, *SOME])
    assert sorted(seen) == sorted(SOME), "each once"
    assert values[:4] == values[4:]
    assert true().scores(SOME) == values[:4]
    assert len(seen) == 4


def test_other_text_is_another_file(true: Callable[..., TrueScore]) -> None:
    (short,), (long,) = true(tokens=32).scores(SOME[1:2]), true().scores(SOME[1:2])
    assert short != long


def test_a_child_that_is_not_finite_is_the_worst(
    true: Callable[..., TrueScore], monkeypatch: pytest.MonkeyPatch, pico_library: Library
) -> None:
    state = Library.state
    monkeypatch.setattr(
        Library,
        "state",
        lambda self, layer, variant: {
            name: value * (float("nan") if variant.name == "w32" else 1)
            for name, value in state(self, layer, variant).items()
        },
    )
    bad, good = (found.kl for found in true().scores(SOME[1:2] + SOME[3:]))
    assert bad == float("inf")
    assert good < bad


def test_the_searchs_score_is_what_counts(true: Callable[..., TrueScore], pico_run: Run) -> None:
    (whole,) = true().scores(SOME[1:2])
    assert replace(whole, kl=9.0).value("kl") == 9.0
    assert whole.value("lm_loss") == whole.lm_loss
    assert whole.value("cosine") == whole.cosine
