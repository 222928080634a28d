"""What whole architectures turned out to be worth, and what was chosen for it."""

from dataclasses import dataclass

from puzzle.artefacts.artefact import Artefact
from puzzle.artefacts.scores import ScoreName
from puzzle.artefacts.solution import Solution

WORTH = 0.03
"""By what share another architecture must be better than the search's own to take its place: documents differ by more
than what is less, so that it is gone on other text (benchmarks/search_quality.md).
"""


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
class Judged:
    """An architecture within the bounds, as the scores' sum predicts it and as it is."""

    blocks: tuple[str, ...]
    predicted: float
    """The sum of its blocks' scores."""
    whole: WholeScore
    step: str
    """Which step proposed it: `search`, `pool`, `depth`, `rounds`, `pairs`."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step came to."""

    name: str
    evaluated: int
    """Whole architectures that no step before had to evaluate."""
    before: float
    """The best value within the bounds; see `WholeScore.value`."""
    after: float


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """An architecture after some short GKD."""

    blocks: tuple[str, ...]
    tokens: int
    validation_kl: float


@dataclass(frozen=True, kw_only=True)
class Correction(Artefact):
    """The search corrected by whole architectures: never worse than the search alone on the text that compares them."""

    score: ScoreName
    tokens: int
    """Of that text: the end of the scoring range."""
    judged: tuple[Judged, ...]
    """Every architecture that was within the bounds; the first is the search's own."""
    tau: float | None
    """Kendall's, of predicted against true over the search's pool; None without one, or without any order in it."""
    spearman: float | None
    """Spearman's rho of the same."""
    steps: tuple[Step, ...]
    finalists: tuple[Finalist, ...]
    """In the order in which they were trained; none without short GKD."""
    ranked: tuple[Solution, ...]
    """The best first, as far as it is better by `WORTH`; the last is the search's own."""
