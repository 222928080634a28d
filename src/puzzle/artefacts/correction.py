"""The search's best solutions scored as whole architectures, and what was chosen for it."""

from dataclasses import dataclass

from puzzle.artefacts.artefact import Artefact
from puzzle.artefacts.scores import ScoreName
from puzzle.artefacts.solution import Solution


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
