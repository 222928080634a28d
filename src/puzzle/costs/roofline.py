"""The engine `roofline`: times by calculation, for a machine that one does not have, and to plan with.

A subblock takes the longer of two times: its operations at the machine's peak rate, and the bytes it must move
at its bandwidth, each peak times the share that good engines reach. Under tensor parallelism each subblock ends in an
all-reduce (Pope et al. 2023, section 3). Caches, launches within a subblock and imperfect overlap are not modelled.

Symbols: B batch, P prompt tokens, G generated tokens, D hidden size, V vocabulary, N devices.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from puzzle.artefacts import Scenario
from puzzle.costs.engine import Sample
from puzzle.errors import PuzzleError, one_line
from puzzle.explain import explain
from puzzle.modeling import PuzzleConfig
from puzzle.parents import open_parent
from puzzle.variants import BlockVariant, GroupedQuery, Variant, num_params

Positive = Annotated[float, Field(gt=0)]


class Machine(BaseModel):
    """One data sheet; see machines.yaml for the units."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    peak_tflops: dict[str, Positive]
    memory_gb_s: Positive
    memory_gb: Positive
    link_gb_s: Positive = 32.0
    link_us: Annotated[float, Field(ge=0)] = 10.0
    node_devices: Annotated[int, Field(ge=1)] = 8
    network_gb_s: Positive = 12.5
    compute_share: Annotated[float, Field(gt=0, le=1)] = 0.6
    bandwidth_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    layer_us: Annotated[float, Field(ge=0)] = 2.0


@dataclass(frozen=True)
class Work:
    """What one step asks of the machine."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes + other.bytes)


class RooflineEngine:
    """Stacks of the parent's shapes on the machine that `scenario.device` names, such as `h100-sxm` or `8xh100-sxm`."""

    def __init__(self, config: PuzzleConfig, scenario: Scenario) -> None:
        self._config, self._scenario = config, scenario
        self._machine, self._devices = read_machine(scenario.device)
        if scenario.dtype not in self._machine.peak_tflops:
            known = ", ".join(self._machine.peak_tflops)
            raise PuzzleError(f"scenario.dtype: {scenario.device} has no rate for {scenario.dtype}; use one of {known}")
        self._dtype: torch.dtype = getattr(torch, scenario.dtype)

    @property
    def environment(self) -> Mapping[str, str]:
        sheet = ", ".join(f"{name} {value}" for name, value in self._machine.model_dump().items())
        return {"engine": "roofline, calculated", "device": self._scenario.device, "data sheet": sheet}

    def conditions(self) -> AbstractContextManager[None]:
        return nullcontext()

    def measure(self, blocks: Sequence[BlockVariant], batch_size: int) -> Sample:
        """Calculate a prefill, and a decode step in the middle of the answer."""
        prompt, generated = self._scenario.prompt_tokens, self._scenario.generated_tokens
        return Sample(
            prefill_ms=self._step_ms(blocks, batch_size, new=prompt, context=prompt),
            decode_ms=self._step_ms(blocks, batch_size, new=1, context=prompt + generated // 2),
        )

    def measure_checkpoint(self, checkpoint: Path, batch_size: int) -> Sample:
        """Calculate a model's times from its shapes."""
        model = open_parent(str(checkpoint))
        return RooflineEngine(model.config, self._scenario).measure(model.architecture.blocks, batch_size)

    def _step_ms(self, blocks: Sequence[BlockVariant], batch_size: int, new: int, context: int) -> float:
        """One step of `new` tokens a sequence, after which the cache holds `context`."""
        subblocks = [
            subblock for block in blocks for subblock in (block.attention, block.ffn) if subblock.kind != "none"
        ]
        seconds = [self._seconds(self._work(subblock, batch_size, new, context)) for subblock in subblocks]
        reduces = len(subblocks) * self._all_reduce_s(batch_size * new)
        outer = self._seconds(self._outer_work(batch_size, new))
        return 1e3 * (sum(seconds) + reduces + outer + 1e-6 * self._machine.layer_us * len(blocks))

    def _seconds(self, work: Work) -> float:
        machine = self._machine
        operations = 1e12 * machine.peak_tflops[self._scenario.dtype] * machine.compute_share * self._devices
        bandwidth = 1e9 * machine.memory_gb_s * machine.bandwidth_share * self._devices
        return max(work.operations / operations, work.bytes / bandwidth)

    def _work(self, variant: Variant, batch_size: int, new: int, context: int) -> Work:
        """Of one subblock: its matrices once for all tokens, and for attention every query with the keys it sees."""
        size, tokens = self._dtype.itemsize, batch_size * new
        params = num_params(variant, self._config)
        hidden = self._config.hidden_size
        work = Work(2.0 * params * tokens, float(size * (params + 2 * tokens * hidden)))
        if not isinstance(variant, GroupedQuery):
            return work
        cached = batch_size * variant.kv_values(self._config, context)
        per_token = variant.kv_values(self._config, 1)
        seen = cached / batch_size / per_token  # keys that the last query sees
        pairs = batch_size * _pairs(new, context, seen)
        assert self._config.head_dim is not None
        width = self._config.num_attention_heads * self._config.head_dim
        return work + Work(4.0 * pairs * width, float(size * (cached + tokens * per_token)))

    def _outer_work(self, batch_size: int, new: int) -> Work:
        """Embeddings of all new tokens, and the head for the last of each sequence."""
        config, size = self._config, self._dtype.itemsize
        head = config.vocab_size * config.hidden_size
        return Work(2.0 * head * batch_size, float(size * (head + batch_size * new * config.hidden_size)))

    def _all_reduce_s(self, tokens: int) -> float:
        """Of one subblock's output over the devices: a ring moves 2 (N - 1) / N of it over each link."""
        if self._devices == 1:
            return 0.0
        moved = tokens * self._config.hidden_size * self._dtype.itemsize * 2 * (self._devices - 1) / self._devices
        return moved / (1e9 * self._machine.link_gb_s) + 1e-6 * self._machine.link_us


def _pairs(new: int, context: int, window: float) -> float:
    """Of one sequence: over its `new` last tokens, the sum of keys each sees, at most `window`; causal."""
    first = context - new + 1
    growing = max(0.0, min(context, window) - first + 1)
    return growing * (first + first + growing - 1) / 2 + (new - growing) * window


def read_machine(name: str, setting: str = "scenario.machine") -> tuple[Machine, int]:
    """A data sheet by the name of a known machine or of a YAML file, and how many devices: `8xh100-sxm`.

    Args:
        setting: where the name was given, for errors.
    """
    match = re.fullmatch(r"(?:([1-9][0-9]*)x)?(.+)", name)
    assert match is not None
    count, machine = int(match[1] or 1), match[2]
    known: dict[str, Any] = yaml.safe_load((files("puzzle.costs") / "machines.yaml").read_text(encoding="utf-8"))
    if machine in known:
        return Machine.model_validate(known[machine]), count
    try:
        ((_, sheet),) = yaml.safe_load(Path(machine).read_text(encoding="utf-8")).items()
        return Machine.model_validate(sheet), count
    except OSError:
        raise PuzzleError(
            f"{setting}: {name!r} is neither one of {', '.join(known)} nor a file; so many of one are 8xh100-sxm"
        ) from None
    except ValidationError as error:
        raise PuzzleError(f"{setting}: {machine}: {explain(error, Machine)}") from None
    except (yaml.YAMLError, AttributeError, ValueError) as error:
        raise PuzzleError(f"{setting}: {machine} is no data sheet ({one_line(error)})") from None
