"""The stage: a solution in the run folder."""

from collections.abc import Sequence

from puzzle.artefacts import CostTable, ScoreTable, Serving, Solution
from puzzle.runs import Run, read_parsed, write_text
from puzzle.search.solve import solve

_VERSION = 2
_SUMMED = {"kl": "KL", "lm_loss": "rise in loss", "cosine": "cosine distance", "task": "fall in the task"}


def search(
    run: Run,
    scores: ScoreTable,
    costs: CostTable,
    inputs: Sequence[str],
    margin: float | None = None,
    further: Sequence[CostTable] = (),
) -> Solution:
    """The recipe's search, kept as solution.json.

    Args:
        inputs: addresses of the stages that made the tables.
        margin: in place of the recipe's `search.margin`.
        further: costs in the recipe's further `scenarios`.
    """
    recipe = run.recipe
    settings = recipe.search if margin is None else recipe.search.model_copy(update={"margin": margin})
    identity = {
        "target": recipe.target.model_dump(mode="json"),
        "scenarios": [each.target.model_dump(mode="json") for each in recipe.scenarios],
        "search": settings.model_dump(mode="json"),
        "batch_sizes": [list(table.batch_sizes) for table in (costs, *further)],
    }
    stage = run.stage("search", version=_VERSION, settings=identity, inputs=inputs)
    path = stage.path / "solution.json"
    if stage.done:
        return read_parsed(path, Solution.from_json)
    targets = [each.target for each in recipe.scenarios]
    served = list(zip(further, targets, strict=True))
    solution = solve(scores, costs, recipe.target, settings, further=served)
    write_text(path, solution.to_json())
    stage.commit()
    run.log(f"search: {_describe(solution, _SUMMED[settings.score])}")
    for serving in solution.further:
        run.log(f"search: in {serving.scenario}, {_predicted(serving)}")
    for note in solution.notes:
        run.log_warning(note)
    return solution


def _describe(solution: Solution, summed: str) -> str:
    """The solution in one line."""
    proof = solution.proof
    assert proof is not None, "a searched solution has a proof"
    proven = f"{proof.status} within {proof.gap:.1e}, {proof.seconds:.2f} s"
    return f"summed {summed} {solution.score:.4g} ({proven}) {_predicted(solution)}"


def _predicted(serving: Solution | Serving) -> str:
    predicted, parent = serving.predicted, serving.parent
    speed, memory = predicted["throughput_tok_s"], predicted["memory_bytes"]
    return (
        f"at batch size {serving.batch_size}; predicted {speed:.4g} generated tok/s "
        f"({speed / parent['throughput_tok_s']:.2f}x the parent's), {memory / 1e9:.4g} GB of weights and KV cache "
        f"({memory / parent['memory_bytes']:.2f}x)"
    )
