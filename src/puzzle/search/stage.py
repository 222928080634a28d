"""The stage: a solution in the run folder."""

from collections.abc import Sequence

from puzzle.artefacts import CostTable, ScoreTable, Solution
from puzzle.runs import Run, write_text
from puzzle.search.solve import solve

_VERSION = 1
_SUMMED = {"kl": "KL", "lm_loss": "rise in loss", "cosine": "cosine distance", "task": "fall in the task"}


def search(
    run: Run, scores: ScoreTable, costs: CostTable, inputs: Sequence[str], margin: float | None = None
) -> Solution:
    """The recipe's search, kept as solution.json.

    Args:
        inputs: addresses of the stages that made the two tables.
        margin: in place of the recipe's `search.margin`.
    """
    target, settings = run.recipe.target, run.recipe.search
    if margin is not None:
        settings = settings.model_copy(update={"margin": margin})
    identity = {
        "target": target.model_dump(mode="json"),
        "search": settings.model_dump(mode="json"),
        "batch_sizes": list(costs.batch_sizes),
    }
    stage = run.stage("search", version=_VERSION, settings=identity, inputs=inputs)
    path = stage.path / "solution.json"
    if stage.done:
        return Solution.from_json(path.read_text())
    solution = solve(scores, costs, target, settings)
    write_text(path, solution.to_json())
    stage.commit()
    run.log(f"search: {_describe(solution, _SUMMED[settings.score])}")
    return solution


def _describe(solution: Solution, summed: str) -> str:
    """The solution in one line."""
    predicted, parent, proof = solution.predicted, solution.parent, solution.proof
    speed, memory = predicted["throughput_tok_s"], predicted["memory_bytes"]
    assert proof is not None, "a searched solution has a proof"
    return (
        f"summed {summed} {solution.score:.4g} ({proof.status} within {proof.gap:.1e}, {proof.seconds:.2f} s) at "
        f"batch size {solution.batch_size}; predicted {speed:.4g} generated tok/s "
        f"({speed / parent['throughput_tok_s']:.2f}x the parent's), {memory / 1e9:.4g} GB of weights and KV cache "
        f"({memory / parent['memory_bytes']:.2f}x)"
    )
