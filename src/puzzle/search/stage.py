"""The stages in a run folder: the search's solution, and the same among the best as whole architectures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from puzzle.artefacts import Correction, Serving, Solution, WholeScore
from puzzle.data import TokenData
from puzzle.library import Library
from puzzle.runs import Run, digest, read_parsed, write_text
from puzzle.search.solve import pool, solve
from puzzle.search.tables import Tables
from puzzle.stages import CORRECT, SEARCH

MIN_IMPROVEMENT = 0.03
"""Share by which another architecture must be better than the search's own to take its place: documents differ by more
than what is less, so that it is gone on other text (benchmarks/search_quality.md).
"""
_SUMMED = {"kl": "KL", "lm_loss": "rise in loss", "cosine": "cosine distance", "task": "fall in the task"}

Blocks = tuple[str, ...]
"""One block name a layer."""


def search(run: Run, tables: Tables) -> Solution:
    """The best architecture of the tables, kept as solution.json."""
    folder = run.open(SEARCH, margin=tables.settings.margin, **_addresses(tables))
    path = folder.path / "solution.json"
    if folder.done:
        return read_parsed(path, Solution.from_json)
    solution = solve(tables)
    write_text(path, solution.to_json())
    folder.commit()
    proof = solution.proof
    assert proof is not None, "a searched solution has a proof"
    proven = f"{proof.status} within {proof.gap:.1e}, {proof.seconds:.2f} s"
    summed = _SUMMED[tables.settings.score]
    run.log(f"search: summed {summed} {solution.score:.4g} ({proven}) {_predicted(solution)}")
    for serving in solution.further:
        run.log(f"search: in {serving.scenario}, {_predicted(serving)}")
    return solution


def correct(
    run: Run,
    tables: Tables,
    solution: Solution,
    evaluate: Callable[[Sequence[Blocks]], Sequence[WholeScore]],
    library: Library,
    data: TokenData,
) -> Correction:
    """The search's best solutions ranked by their scores as whole architectures, kept as correction.json.

    Args:
        tables: those in which `solution` was found.
        evaluate: scores architectures of `library` on the end of the scoring text of `data`.
    """
    folder = run.open(CORRECT, margin=tables.settings.margin, library=library, data=data, **_addresses(tables))
    file = folder.path / "correction.json"
    if not folder.done:
        settings = run.recipe.correct
        differing = min(settings.differing, tables.scores.num_layers)
        found = pool(tables, settings.pool, differing) if settings.pool else []
        # The best of a pool of diverse solutions may be another one of the same score.
        others = [replace(each, proof=None) for each in found if each.blocks != solution.blocks]
        correction = rerank([solution, *others], evaluate, tables)
        best = min(each.value(tables.settings.score) for each in correction.evaluated)
        own = correction.evaluated[0].value(tables.settings.score)
        run.log(f"correct: {len(correction.evaluated)} architectures compared, {own:.4g} -> {best:.4g}")
        write_text(file, correction.to_json())
        folder.commit()
    return read_parsed(file, Correction.from_json)


def rerank(
    solutions: Sequence[Solution], evaluate: Callable[[Sequence[Blocks]], Sequence[WholeScore]], tables: Tables
) -> Correction:
    """Solutions, the search's own first, ranked by their true scores.

    Another one comes before the search's own only if it is better by `MIN_IMPROVEMENT`.
    """
    wholes = evaluate([solution.blocks for solution in solutions])
    values = [whole.value(tables.settings.score) for whole in wholes]
    enough = values[0] - MIN_IMPROVEMENT * abs(values[0]) if math.isfinite(values[0]) else values[0]
    better = sorted((place for place, value in enumerate(values) if value < enough), key=lambda place: values[place])
    return Correction(evaluated=tuple(wholes), ranked=tuple(solutions[place] for place in [*better, 0]))


def _addresses(tables: Tables) -> dict[str, object]:
    """Of the tables, as inputs of a stage."""
    return {
        "scores": digest(tables.scores.to_json()),
        "costs": [digest(demand.costs.to_json()) for demand in tables.demands],
    }


def _predicted(serving: Solution | Serving) -> str:
    predicted, parent = serving.predicted, serving.parent
    speed, memory = predicted["throughput_tok_s"], predicted["memory_bytes"]
    return (
        f"at batch size {serving.batch_size}; predicted {speed:.4g} generated tok/s "
        f"({speed / parent['throughput_tok_s']:.2f}x the parent's), {memory / 1e9:.4g} GB of weights and KV cache "
        f"({memory / parent['memory_bytes']:.2f}x)"
    )
