"""The search with nothing to choose from but the parent's own subblocks and none (paper section 4.4)."""

from puzzle.search.baselines.base import Problem, is_noop
from puzzle.search.exact import Candidate


def noop_only(problem: Problem) -> Candidate | None:
    """The optimum over blocks of which each subblock is the parent's own or nothing."""
    parents = problem.parent
    return problem.optimum(row for row in problem.instance.scores.rows if _kept(row.block, parents[row.layer]))


def _kept(block: str, parent: str) -> bool:
    subblocks, owns = block.split("+"), parent.split("+")
    return is_noop(block) or (
        len(subblocks) == len(owns)
        and all(subblock in (own, "none") for subblock, own in zip(subblocks, owns, strict=True))
    )
