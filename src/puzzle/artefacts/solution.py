"""What the search decided, what it predicts, and the proof."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Absolute bounds on a model's totals; None is no bound. Names and units are those of `Totals`."""

    memory_bytes: float | None = None
    """At most."""
    throughput_tok_s: float | None = None
    """At least."""
    request_ms: float | None = None
    """At most."""
    prefill_ms: float | None = None
    """At most: the time to the first token."""
    decode_ms: float | None = None
    """At most: the time per output token."""
    params: float | None = None
    """At most."""

    def given(self) -> dict[str, float]:
        """The bounds that are set, by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Proof:
    """How far the search proved its solution."""

    status: Literal["optimal", "feasible"]
    """`optimal`: no feasible architecture has a lower sum of scores, up to the solver's tolerance `gap`."""
    bound: float
    """Lower bound on the sum of scores over all allowed batch sizes."""
    gap: float
    """(score - bound) / max(|score|, |bound|), 0 where both are 0."""
    solver: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Solution:
    """An architecture with its predicted score and totals, and the proof."""

    blocks: tuple[str, ...]
    """One block name a layer, such as `kv2+w512`."""
    batch_size: int
    score: float
    """Sum of the blocks' scores, by default of their KL: the additive estimate of the child's to the parent."""
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

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Solution":
        values = json.loads(text)
        values["blocks"] = tuple(values["blocks"])
        for name in ("asked", "bounds"):
            values[name] = Bounds(**values[name])
        values["proof"] = Proof(**values["proof"]) if values["proof"] else None
        return cls(**values)
