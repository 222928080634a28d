"""What the search decided, what it predicts, and the proof."""

from dataclasses import dataclass
from typing import Literal

from puzzle.artefacts.artefact import Artefact
from puzzle.artefacts.costs import Scenario
from puzzle.artefacts.scores import ScoreName

Bounds = dict[str, float]
"""Absolute bounds on a model by the keys of `QUANTITIES`, in their units; what is not bounded has no entry."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """How far the search proved its solution."""

    status: Literal["optimal", "feasible"]
    """`optimal`: no feasible architecture is better, up to the solver's tolerance `gap`."""
    bound: float
    """No architecture within the bounds, at any allowed batch size, has a lower sum of scores; or, where another
    quantity was made best (`search.objective`), a better value of that.
    """
    gap: float
    """|value - bound| / max(|value|, |bound|), 0 where both are 0."""
    solver: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A further scenario that the architecture serves, at a batch size of its own."""

    scenario: Scenario
    batch_size: int
    predicted: dict[str, float]
    """`Totals.as_dict` at `batch_size`."""
    parent: dict[str, float]
    asked: Bounds
    bounds: Bounds


@dataclass(frozen=True, kw_only=True)
class Solution(Artefact):
    """An architecture with its predicted score and totals, and the proof."""

    blocks: tuple[str, ...]
    """One block name a layer, such as `kv2+w512`."""
    batch_size: int
    score: float
    """Sum of the blocks' scores, by default of their KL: the estimate of the child's KL."""
    predicted: dict[str, float]
    """`Totals.as_dict` at `batch_size`."""
    parent: dict[str, float]
    """The parent's predicted totals that relative targets refer to."""
    asked: Bounds
    """The target in absolute numbers: what measurements should meet."""
    bounds: Bounds
    """What the predicted totals had to meet: the target with the search's margin."""
    proof: Proof | None
    """None for a baseline that proves nothing."""
    further: tuple[Serving, ...] = ()
    """The recipe's `scenarios`, in order."""
    notes: tuple[str, ...] = ()
    """Remarks on the target: bounds that every architecture meets, or that decide nothing."""

    @property
    def servings(self) -> tuple["Solution | Serving", ...]:
        """For each scenario, the main one first."""
        return (self, *self.further)


@dataclass(frozen=True, kw_only=True)
class WholeScore:
    """A whole architecture of the library's blocks beside the parent, means over the text that compares them."""

    kl: float
    """KL(parent || child) of the next-token distributions, nats per token."""
    kl_se: float
    """Standard error of `kl` over sequences."""
    lm_loss: float
    """Negative log-likelihood of the next token, nats per token."""
    top1_agreement: float
    cosine: float
    """1 - cosine of the final hidden states to the parent's, after the last norm."""

    def value(self, score: ScoreName) -> float:
        """What a search by `score` wants low; a task is not run on whole architectures, its searches take the KL."""
        return float(getattr(self, "kl" if score == "task" else score))


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An architecture within the bounds, as the scores' sum predicts it and as it is."""

    blocks: tuple[str, ...]
    predicted: float
    """The sum of its blocks' scores."""
    whole: WholeScore


@dataclass(frozen=True, kw_only=True)
class Correction(Artefact):
    """The search corrected by whole architectures: never worse than the search alone on the text that compares them."""

    score: ScoreName
    evaluated: tuple[Evaluated, ...]
    """The search's own first, then its next best solutions."""
    ranked: tuple[Solution, ...]
    """The best first, as far as it is better by `MIN_IMPROVEMENT`; the last is the search's own."""
