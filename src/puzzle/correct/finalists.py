"""Successive halving: what is best before GKD need not be so after it, which a little of it tells."""

from collections.abc import Sequence
from dataclasses import replace

from puzzle.artefacts import Finalist
from puzzle.child import realise
from puzzle.correct.whole import Blocks
from puzzle.data import TokenData
from puzzle.distill import distil, distillation_curve
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.runs import Run


def halve(run: Run, parent: Parent, data: TokenData, library: Library, entrants: Sequence[Blocks]) -> list[Finalist]:
    """Distil the entrants, keep the better half, double the tokens, until one is left: the last of the list.

    Every training starts from the library and runs its whole schedule; validation text tells which is better.
    """
    tokens, left = run.recipe.correct.finalist_tokens, list(entrants)
    finished: list[Finalist] = []
    while len(left) > 1:
        trained = [_trained(run, parent, data, library, blocks, tokens) for blocks in left]
        trained.sort(key=lambda finalist: finalist.validation_kl, reverse=True)
        finished += trained
        left = [finalist.blocks for finalist in trained[-(len(trained) // 2) :]]
        tokens *= 2
    return finished


def _trained(run: Run, parent: Parent, data: TokenData, library: Library, blocks: Blocks, tokens: int) -> Finalist:
    distillation = run.recipe.distil.model_copy(update={"tokens": tokens})
    short = replace(run, recipe=run.recipe.model_copy(update={"distil": distillation}))
    child = distil(short, parent, realise(short, parent, library, blocks), data, label=f"finalist, {tokens:,} tokens")
    best = min(point["validation_kl"] for point in distillation_curve(child))
    return Finalist(blocks=blocks, tokens=tokens, validation_kl=best)
