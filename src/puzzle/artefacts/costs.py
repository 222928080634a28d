"""What blocks cost in a scenario, and the totals of a whole model. Every number is defined in docs/numbers.md."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Literal

from puzzle.artefacts.artefact import Artefact
from puzzle.quantities import COSTS


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """How the model will be served, the batch size left open."""

    engine: str
    device: str
    dtype: str
    prompt_tokens: int
    generated_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.generated_tokens

    def __str__(self) -> str:
        where = f"{self.engine}, {self.device}, {self.dtype}"
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
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in _COSTS})


_COSTS = tuple(field.name for field in fields(Cost))


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

    @property
    def throughput_tok_s(self) -> float:
        return self.as_dict()["throughput_tok_s"]

    def as_dict(self) -> dict[str, float]:
        """The totals by the keys of `QUANTITIES`, and `batch_size` and `kv_bytes`."""
        counts = {"batch_size": self.batch_size, "kv_bytes": self.batch_size * self.cost.kv_bytes_per_sequence}
        return counts | {key: quantity.value(self) for key, quantity in COSTS.items()}


Part = Literal["attention", "ffn", "block", "fixed"]


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """One variant of one subblock of one layer at one batch size.

    Or, as `block`, a whole block whose subblocks were not measured apart (tables of other libraries). Or, as `fixed`,
    what every child has: embeddings, final norm, head, and the engine's time per step that belongs to no layer; `layer`
    is then -1 and `variant` empty.
    """

    layer: int
    part: Part
    variant: str
    batch_size: int
    params: int
    weight_bytes: int
    kv_bytes_per_sequence: int
    prefill_ms: float
    decode_ms: float

    @property
    def cost(self) -> Cost:
        return Cost(**{name: getattr(self, name) for name in _COSTS})


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

    @cached_property
    def _costs(self) -> dict[tuple[int, str, str, int], Cost]:
        return {(row.layer, row.part, row.variant, row.batch_size): row.cost for row in self.rows}

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
        cost = self.fixed(batch_size)
        for layer, block in enumerate(blocks):
            cost = cost + self.block(layer, block, batch_size)
        return Totals(batch_size=batch_size, generated_tokens=self.scenario.generated_tokens, cost=cost)
