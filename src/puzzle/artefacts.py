"""The typed artefacts in which the stages meet: JSON files of plain data, without torch, with blocks by name.

Every number is defined in docs/numbers.md.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache, cached_property
from statistics import fmean
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from puzzle.errors import PuzzleError
from puzzle.quantities import COSTS

Part = Literal["attention", "ffn", "block", "fixed"]
ScoreName = Literal["kl", "lm_loss", "cosine", "task"]
"""What a search can add up, the lower the better."""
Bounds = dict[str, float]
"""Absolute bounds on a model by the keys of `QUANTITIES`, in their units; what is not bounded has no entry."""


class Artefact:
    """A dataclass that is a JSON file. A table, which has `rows`, has one line a row."""

    def to_json(self) -> str:
        values = asdict(self)  # type: ignore[call-overload]
        rows = values.pop("rows", None)
        return json.dumps(values, indent=1, default=sorted) + "\n" if rows is None else dump_rows(values, rows)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Back from `to_json`; a `ValueError`, `TypeError` or `KeyError` if it is not from there."""
        return _built(cls, json.loads(text))


def dump_rows(head: dict[str, Any], rows: Iterable[dict[str, Any]]) -> str:
    """JSON of `head` with a key `rows`, one line a row, so that a table can be read and compared line by line."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    start = json.dumps(head | {"rows": None}, indent=1, default=sorted).removesuffix("null\n}")
    return f"{start}[\n  {lines}\n ]\n}}\n"


_hints = cache(get_type_hints)


def _built(hint: Any, value: Any) -> Any:
    """A value of JSON as what a field's type asks for: dataclasses, tuples and frozensets; all else as it is."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint(**{name: _built(_hints(hint)[name], item) for name, item in dict(value).items()})
    origin, kinds = get_origin(hint), get_args(hint)
    if origin in (tuple, frozenset):
        return origin(_built(kinds[0], item) for item in value)
    return _built(kinds[0], value) if origin in (Union, UnionType) and value is not None else value


@dataclass(frozen=True)
class TaskScore:
    """What a model reaches in a task of lm-eval."""

    metric: str
    value: float
    stderr: float | None
    chance: float | None
    """What guessing gives; None where lower is better."""
    questions: int
    metrics: dict[str, tuple[float, float | None]]
    """All of the task's, with their standard errors."""

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f"±{self.stderr:.3f}" if self.stderr is not None else "")

    @property
    def meaning(self) -> str:
        guessing = "" if self.chance is None else f"; guessing gives {self.chance:.3g}"
        return f"{self.metric} of {self.questions} questions, and its standard error{guessing}"

    def kept(self, parent: "TaskScore") -> float:
        """Of what the parent has above chance, the share that is kept; NaN if that is within two standard errors."""
        if self.chance is None or parent.chance is None or parent.value - parent.chance <= 2 * (parent.stderr or 0.0):
            return math.nan
        return (self.value - self.chance) / (parent.value - parent.chance)


def mean_kept(tasks: Mapping[str, TaskScore], parent: Mapping[str, TaskScore]) -> float:
    """Mean of `TaskScore.kept` over the tasks in which the parent is above chance; NaN if there are none."""
    kept = [share for name, own in parent.items() if math.isfinite(share := tasks[name].kept(own))]
    return fmean(kept) if kept else math.nan


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """How the model will be served, the batch size left open."""

    engine: str
    device: str
    dtype: str
    prompt_tokens: int
    generated_tokens: int
    tensor_parallel: int = 1
    gpu_memory: float = 0.9

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.generated_tokens

    @property
    def identity(self) -> dict[str, Any]:
        """Its fields, those at their defaults left out: what was addressed before they were added stays where it is."""
        return {each.name: vars(self)[each.name] for each in fields(self) if vars(self)[each.name] != each.default}

    def __str__(self) -> str:
        where = f"{self.engine}, {self.device}, {self.dtype}"
        where += f", shared by {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        where += f", {self.gpu_memory:.0%} of its memory" if "gpu_memory" in self.identity else ""
        return f"{where}, prompt {self.prompt_tokens}, generate {self.generated_tokens}"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Costs that add up over the parts of a model; the times are those of one batch size."""

    params: int = 0
    weight_bytes: int = 0
    kv_bytes_per_sequence: int = 0
    """At the scenario's full length, prompt and generated tokens together."""
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    """One decode step of the whole batch, at the scenario's middle context length."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in COST_FIELDS})


COST_FIELDS = tuple(field.name for field in fields(Cost))


@dataclass(frozen=True, kw_only=True)
class Totals:
    """A whole model in a scenario at one batch size."""

    batch_size: int
    generated_tokens: int
    cost: Cost

    @property
    def memory_bytes(self) -> int:
        """Weights, and the KV cache of a full batch at full length; the engine's workspace not counted."""
        return self.cost.weight_bytes + self.batch_size * self.cost.kv_bytes_per_sequence

    @property
    def request_ms(self) -> float:
        """From a batch of prompts to its last token: the prefill gives the first token, decode steps the others."""
        return self.cost.prefill_ms + (self.generated_tokens - 1) * self.cost.decode_ms

    def as_dict(self) -> dict[str, float]:
        """The totals by the keys of `QUANTITIES`, and `batch_size` and `kv_bytes`."""
        counts = {"batch_size": self.batch_size, "kv_bytes": self.batch_size * self.cost.kv_bytes_per_sequence}
        return counts | {key: quantity.value(self) for key, quantity in COSTS.items()}


@dataclass(frozen=True, kw_only=True)
class CostRow(Cost):
    """One variant of one subblock of one layer at one batch size.

    Or, as `block`, a whole block, in tables of other libraries. Or, as `fixed`, what every child has: embeddings, final
    norm, head, and the engine's time per step that belongs to no layer; `layer` is then -1 and `variant` empty.
    """

    layer: int
    part: Part
    variant: str
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class CostTable(Artefact):
    """Costs of every variant of every layer in one scenario, at each batch size."""

    scenario: Scenario
    batch_sizes: tuple[int, ...]
    rows: tuple[CostRow, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """Engine version, device name, threads: what a figure must be quoted with."""
    unknown: frozenset[str] = frozenset()
    """Columns that no row was given, as happens in tables of other libraries; they stand at 0."""

    def to_json(self) -> str:
        values = asdict(self) | {"scenario": self.scenario.identity}
        return dump_rows(values, values.pop("rows"))

    @cached_property
    def _costs(self) -> dict[tuple[int, str, str, int], Cost]:
        return {(row.layer, row.part, row.variant, row.batch_size): row for row in self.rows}

    def fixed(self, batch_size: int) -> Cost:
        return self._costs[-1, "fixed", "", batch_size]

    def block(self, layer: int, block: str, batch_size: int) -> Cost:
        """The cost of a composed block such as `kv2+w512`: its own where it has a row, else its subblocks' added up."""
        if whole := self._costs.get((layer, "block", block, batch_size)):
            return whole
        attention, _, ffn = block.partition("+")
        return self._costs[layer, "attention", attention, batch_size] + self._costs[layer, "ffn", ffn, batch_size]

    def totals(self, blocks: Sequence[str], batch_size: int) -> Totals:
        """The predicted totals of an architecture, one block name a layer."""
        cost = sum((self.block(layer, block, batch_size) for layer, block in enumerate(blocks)), self.fixed(batch_size))
        return Totals(batch_size=batch_size, generated_tokens=self.scenario.generated_tokens, cost=cost)


@dataclass(frozen=True, kw_only=True)
class LibraryRow:
    """One variant of one subblock of one layer, or a whole block. Losses are normalised MSE on held-out text."""

    layer: int
    subblock: str
    """`attention`, `ffn`; `block` for one that was trained as a whole."""
    variant: str
    file: str
    """Its weights, relative to the run folder; empty for a variant without weights."""
    widened_from: str
    """The narrower variant whose weights these are, to be widened, where it ended better; else empty."""
    initial_loss: float
    loss: float
    """After training; never above `initial_loss`."""
    trained_tokens: int


@dataclass(frozen=True, kw_only=True)
class LibraryIndex(Artefact):
    """One row per layer, subblock and variant other than the parent's own."""

    rows: tuple[LibraryRow, ...]

    @cached_property
    def by_key(self) -> dict[tuple[int, str, str], LibraryRow]:
        return {(row.layer, row.subblock, row.variant): row for row in self.rows}


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """The parent with block `block` in place of its own in `layer`, on the scoring text (paper section 2.3)."""

    layer: int
    block: str
    kl: float
    kl_se: float
    lm_loss: float
    """Nats per token. If not all text was scored: the parent's on all of it, plus the mean difference on what was."""
    top1_agreement: float
    cosine: float
    sequences: int
    """Scored; fewer than the table's where the score is estimated from those of its subblocks."""
    task: float | None = None
    """Of the user's own function, the higher the better; none where that was not finite."""


@dataclass(frozen=True, kw_only=True)
class ScoreTable(Artefact):
    """One row per layer and composed block. A block without a row was not finite and cannot be chosen."""

    num_layers: int
    sequences: int
    sequence_length: int
    rows: tuple[ScoreRow, ...]
    noise: float = 0.0
    """KL of the parent to itself with other roundings: blocks below it count as equal. 0 in float32."""

    @cached_property
    def by_key(self) -> dict[tuple[int, str], ScoreRow]:
        return {(row.layer, row.block): row for row in self.rows}

    def layer(self, layer: int) -> list[ScoreRow]:
        return [row for row in self.rows if row.layer == layer]

    @cached_property
    def parent_blocks(self) -> list[str]:
        """The parent's own block of each layer: the first with a KL of exactly 0, others with 0 are ties."""
        first = {row.layer: row.block for row in reversed(self.rows) if row.kl == 0}
        if lacking := [layer for layer in range(self.num_layers) if layer not in first]:
            raise PuzzleError(f"scores of layers {lacking}: no block has a KL of 0 as the parent's has; score it again")
        return [first[layer] for layer in range(self.num_layers)]

    def value(self, layer: int, block: str, score: ScoreName = "kl") -> float:
        """What the block takes away from the parent's quality; of the parent's own block exactly 0.

        Of other blocks a KL is no less than the noise: below it nothing is known. `lm_loss` is the rise above the
        parent's, `task` the fall below it: both can be negative.
        """
        value = getattr(self.by_key[layer, block], score)
        if score == "kl" and self.noise and value:
            return max(float(value), self.noise)
        if score in ("kl", "cosine"):
            return float(value)
        parent = getattr(self.by_key[layer, self.parent_blocks[layer]], score)
        return float(parent - value if score == "task" else value - parent)

    def having(self, score: ScoreName) -> "ScoreTable":
        """The table of the blocks that have this score: all, unless it is `task`, which some may lack."""
        if score != "task":
            return self
        table = replace(self, rows=tuple(row for row in self.rows if row.task is not None))
        if not table.rows:
            found = "found task, but no block has a task score"
            raise PuzzleError(f"search.score: {found}; set score.task to `module:function` too")
        return table

    def total(self, blocks: Sequence[str], score: ScoreName = "kl") -> float:
        """The additive estimate of an architecture's score: the sum over its blocks."""
        return sum(self.value(layer, block, score) for layer, block in enumerate(blocks))


@dataclass(frozen=True, kw_only=True)
class Proof:
    """How far the search proved its solution."""

    status: Literal["optimal", "feasible"]
    """`optimal`: no feasible architecture is better, up to the solver's tolerance `gap`."""
    bound: float
    """No architecture within the bounds, at any allowed batch size, has a better value of `search.objective`."""
    gap: float
    """|value - bound| / max(|value|, |bound|), 0 where both are 0."""
    solver: str
    seconds: float

    def __str__(self) -> str:
        told = "proven optimal" + (f" to {self.gap:.1g}" if self.gap > 1e-5 else "")
        if self.status == "feasible":
            told = f"not proven, search.time_limit_s was over; at most {self.gap:.1%} from the best"
        return f"{told} ({self.solver}, {self.seconds:.2g} s)"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A further scenario that the architecture serves, at a batch size of its own; fields as in `Solution`."""

    scenario: Scenario
    batch_size: int
    predicted: dict[str, float]
    parent: dict[str, float]
    asked: Bounds
    bounds: Bounds


@dataclass(frozen=True, kw_only=True)
class Solution(Artefact):
    """An architecture with its predicted score and totals (`Totals.as_dict`), and the proof."""

    blocks: tuple[str, ...]
    """One block name a layer, such as `kv2+w512`."""
    batch_size: int
    score: float
    """Sum of the blocks' scores, by default of their KL: the estimate of the child's KL."""
    predicted: dict[str, float]
    parent: dict[str, float]
    """The parent's totals, which relative targets refer to."""
    asked: Bounds
    """What measurements should meet: the target."""
    bounds: Bounds
    """What the predicted totals had to meet: the target with the search's margin."""
    proof: Proof | None
    """None for a baseline that proves nothing."""
    further: tuple[Serving, ...] = ()
    """The recipe's `scenarios`, in order."""

    @property
    def servings(self) -> tuple["Solution | Serving", ...]:
        """For each scenario, the main one first."""
        return (self, *self.further)


@dataclass(frozen=True, kw_only=True)
class WholeScore:
    """A whole architecture of the library's blocks beside the parent: fields as in `ScoreRow`."""

    blocks: tuple[str, ...]
    kl: float
    kl_se: float
    lm_loss: float
    top1_agreement: float
    cosine: float

    def value(self, score: ScoreName) -> float:
        """What a search by `score` wants low; a task is not run on whole architectures, its searches take the KL."""
        return float(getattr(self, "kl" if score == "task" else score))


@dataclass(frozen=True, kw_only=True)
class Correction(Artefact):
    """The search corrected by whole architectures: never worse than the search alone on the text that compares them."""

    evaluated: tuple[WholeScore, ...]
    """The search's own first, then its next best solutions."""
    ranked: tuple[Solution, ...]
    """The best first, as far as it is better by `MIN_IMPROVEMENT`; the last is the search's own."""
