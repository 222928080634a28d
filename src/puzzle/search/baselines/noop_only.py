"""The search with nothing to choose from but the parent's own halves and none (paper section 4.4)."""

from puzzle.search.baselines.base import Problem, is_noop
from puzzle.search.exact import Candidate


def noop_only(problem: Problem) -> Candidate | None:
    """The optimum over blocks of which each half is the parent's own or nothing."""
    parents = problem.parent
    return problem.optimum(row for row in problem.instance.scores.rows if _kept(row.block, parents[row.layer]))


def _kept(block: str, parent: str) -> bool:
    halves, owns = block.split("+"), parent.split("+")
    return is_noop(block) or (
        len(halves) == len(owns) and all(half in (own, "none") for half, own in zip(halves, owns, strict=True))
    )
