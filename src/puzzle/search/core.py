"""Programs solved on their core: the few entries that reduced costs cannot exclude from being in a better solution.

The linear relaxation of a choice per layer under few bounds is nearly whole, so almost every entry that it does not
take is provably in no better solution. What is left is small; the answer is as exact as that of the whole program.
"""

import time
from dataclasses import replace

import numpy as np

from puzzle.search.highs import FAR, Outcome, Relaxation, minimise
from puzzle.search.labels import Enumeration, enumerate_near
from puzzle.search.problem import Program

_LABELS = (1024, 8192)
"""Labels at a time. Few find a solution, which narrows the search, and many then prove it; where that is not enough,
HiGHS is faster (benchmarks/search.md).
"""
_START = 1e-5
"""Least first width of an enumeration, as a share of the bound or of the largest term near it, whichever is more."""
_ROUNDING = 1e-12
"""Least width at all, as such a share: a bound and a solution at it are two sums."""
_WIDER = 1.4
"""By how much the next is wider while there is no solution: what is beyond the best one is for nothing."""
_GROWTH = 4
"""By how much a core grows in which there is no solution."""


def minimise_core(program: Program, relaxation: Relaxation, *, gap: float, time_limit_s: float) -> Outcome:
    """As `minimise` answers for the whole program: by enumeration near the bound, or where that is much by HiGHS."""
    end = time.monotonic() + time_limit_s
    ranked = np.sort(relaxation.reduced)
    width = float(ranked[min(program.num_layers * 9 // 8, len(ranked) - 1)])
    common = max(abs(relaxation.bound), _largest(program, relaxation, width)) or 1.0
    width = max(width, _START * common)
    best, labels = Enumeration(complete=False, positions=None, value=np.inf), iter(_LABELS)
    most = next(labels)
    # Of what is within the gap one solution is as good as another, so that nothing is to be enumerated.
    coarse = width <= gap * abs(relaxation.bound)
    able = not (program.links or coarse) and relaxation.bound > -np.inf
    while able and width <= ranked[-1] and time.monotonic() < end:
        found = enumerate_near(program, relaxation, width, most)
        best = found if found.value < best.value else best
        if found.complete and best.positions is not None:
            return Outcome(status="optimal", positions=best.positions, value=best.value, bound=best.value)
        if found.complete:
            width *= _WIDER
            continue
        width = min(width, max(best.value - relaxation.bound, _ROUNDING * common))
        if (more := next(labels, None)) is None:
            break
        most = more
    return _by_highs(program, relaxation, width, gap, end)


def _by_highs(program: Program, relaxation: Relaxation, width: float, gap: float, end: float) -> Outcome:
    """HiGHS on the entries whose reduced costs are at most `width`.

    A solution of the core is the best of all if it is no worse than any with an entry outside can be: the relaxation's
    bound plus the lowest reduced cost outside. If it is worse, its value says which entries are left to look at.
    """
    ranked = np.sort(relaxation.reduced)
    size = len(ranked)
    while True:
        kept = np.flatnonzero(relaxation.reduced <= width)
        outcome = minimise(program.restricted(kept), gap=gap, time_limit_s=end - time.monotonic())
        outside = relaxation.bound + ranked[len(kept)] if len(kept) < size else np.inf
        bound = max(relaxation.bound, min(outcome.bound, outside))
        if outcome.positions is not None:
            better = outcome.value - relaxation.bound
            if _largest(program, relaxation, width) > FAR * _largest(program, relaxation, better) > 0:
                width = better  # the answer to far larger terms is too coarse for these
                continue
            outcome = replace(outcome, positions=kept[outcome.positions], bound=min(bound, outcome.value))
            enough = outcome.value <= outside or outcome.value - bound <= gap * abs(outcome.value)
            if enough or outcome.status == "feasible":
                return outcome
            width = outcome.value - relaxation.bound
        elif outcome.status == "unknown" or len(kept) == size:
            return replace(outcome, bound=bound)
        else:
            width = ranked[min(_GROWTH * len(kept), size) - 1]


def _largest(program: Program, relaxation: Relaxation, width: float) -> float:
    """The largest term of the objective of entries whose reduced costs are at most `width`."""
    terms = program.objective[: len(relaxation.reduced)][relaxation.reduced <= width]
    return float(np.abs(terms).max(initial=0.0))
