"""The honest baseline: one smaller shape for all layers, and whole layers dropped, as people do without a search."""

from collections.abc import Sequence

from puzzle.artefacts import Bounds, CostTable, ScoreTable, Solution
from puzzle.errors import PuzzleError
from puzzle.search.bounds import evaluate_blocks, excesses, parent_totals
from puzzle.search.exact import Candidate

_DROPPED = "none+none"


def uniform_solution(
    scores: ScoreTable, costs: CostTable, bounds: Bounds, batch_size: int, influence: Sequence[float]
) -> Solution:
    """The best uniform architecture within `bounds`; its proof is None.

    All kept layers get the same block, KV heads and FFN width of the same numbers, the parent's own included. Layers
    are dropped whole, those of lowest block influence first, and as few as it takes for any such block to meet
    the bounds; at least one stays. Of the blocks that do, the one with the lowest summed score, of equals the fastest.

    Args:
        influence: per layer, how much it changes the residual stream.

    Raises:
        PuzzleError: no uniform architecture meets the bounds.
    """
    assert len(influence) == scores.num_layers, f"{len(influence)} influences for {scores.num_layers} layers"
    rising = sorted(range(scores.num_layers), key=lambda layer: influence[layer])
    scored = [{row.block for row in scores.layer(layer)} for layer in range(scores.num_layers)]
    for count in range(scores.num_layers):
        dropped, kept = set(rising[:count]), rising[count:]
        if any(_DROPPED not in scored[layer] for layer in dropped):
            break
        best: Candidate | None = None
        for block in sorted(filter(_is_uniform, set.intersection(*(scored[layer] for layer in kept)))):
            blocks = tuple(_DROPPED if layer in dropped else block for layer in range(scores.num_layers))
            score, totals = evaluate_blocks(scores, costs, blocks, batch_size)
            candidate = Candidate(blocks=blocks, score=score, totals=totals)
            if not excesses(totals, bounds) and candidate.beats(best):
                best = candidate
        if best:
            return best.solution(parent_totals(scores, costs), bounds, None)
    limits = ", ".join(f"{name} {bound:.6g}" for name, bound in bounds.given().items())
    raise PuzzleError(
        f"uniform baseline at batch size {batch_size}: no single block for all layers meets {limits}; loosen the "
        "target, or set evaluate.uniform_baseline to false"
    )


def _is_uniform(block: str) -> bool:
    attention, _, ffn = block.partition("+")
    return attention.startswith("kv") and ffn.startswith("w")
