"""GKD brings a damaged child closer to its parent, and leaves an undamaged one where it is."""

from dataclasses import replace

import pytest

from puzzle.child import realise
from puzzle.data import TokenData
from puzzle.distill import distil, distillation_curve
from puzzle.errors import PuzzleError
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.runs import Run

BLOCKS = ("kv1+w8", "kv4+w16", "none+w64", "kv2+linear")


def test_distillation_lowers_the_held_out_kl(
    pico_run: Run, pico_parent: Parent, pico_library: Library, pico_data: TokenData
) -> None:
    child = realise(pico_run, pico_parent, pico_library, BLOCKS)
    distilled = distil(pico_run, pico_parent, child, pico_data)
    curve = distillation_curve(distilled)
    assert curve[0]["step"] == 0
    assert curve[-1]["tokens"] >= pico_run.recipe.distil.tokens
    assert curve[-1]["validation_kl"] < 0.9 * curve[0]["validation_kl"]
    assert distilled.architecture == child.architecture
    assert distilled.address != child.address


def test_the_parent_itself_starts_without_a_loss(
    pico_run: Run, pico_parent: Parent, pico_library: Library, pico_data: TokenData
) -> None:
    own = tuple(block.name for block in pico_parent.architecture.blocks)
    distilled = distil(pico_run, pico_parent, realise(pico_run, pico_parent, pico_library, own), pico_data)
    start = distillation_curve(distilled)[0]
    assert start["validation_kl"] == pytest.approx(0.0, abs=1e-6)
    assert start["loss"] == pytest.approx(0.0, abs=1e-5)


def test_a_diverged_training_stops_with_a_line(
    pico_run: Run, pico_parent: Parent, pico_library: Library, pico_data: TokenData
) -> None:
    settings = pico_run.recipe.distil.model_copy(update={"learning_rate": 1e30})
    run = replace(pico_run, recipe=pico_run.recipe.model_copy(update={"distil": settings}))
    child = realise(pico_run, pico_parent, pico_library, BLOCKS)
    with pytest.raises(PuzzleError, match=r"lower distil\.learning_rate"):
        distil(run, pico_parent, child, pico_data)
