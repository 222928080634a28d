"""The engine `roofline`: times by calculation, for a machine that one does not have, and to plan with.

A subblock takes the longer of two times: its operations at the machine's peak rate, and the bytes it must move
at its bandwidth, each peak times the share that good engines reach. Under tensor parallelism each subblock ends in an
all-reduce over all devices (Pope et al. 2023, section 3). Caches, launches and imperfect overlap are not modelled.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import torch
import yaml
from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationError

from puzzle.artefacts import Scenario
from puzzle.costs.engine import Engine, Model, Sample, shapes_of
from puzzle.errors import PuzzleError, one_line
from puzzle.explain import explain
from puzzle.given import parse_yaml, read_given
from puzzle.modeling import PuzzleConfig
from puzzle.recipe import Section
from puzzle.variants import Architecture, Variant

Share = Annotated[float, Field(gt=0, le=1)]


class Machine(Section):
    """One data sheet; see machines.yaml for the units."""

    peak_tflops: dict[str, PositiveFloat]
    memory_gb_s: PositiveFloat
    memory_gb: PositiveFloat
    link_gb_s: PositiveFloat = 32.0
    link_us: NonNegativeFloat = 10.0
    compute_share: Share = 0.6
    bandwidth_share: Share = 0.8
    layer_us: NonNegativeFloat = 2.0


class RooflineEngine(Engine):
    """Stacks of the parent's shapes on the machine that `scenario.device` names, such as `h100-sxm` or `8xh100-sxm`."""

    version = "roofline, calculated"

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self._machine, self._devices = read_machine(scenario.device)
        self._dtype: torch.dtype = getattr(torch, scenario.dtype)
        if scenario.dtype not in (known := self._machine.peak_tflops):
            raise PuzzleError(f"scenario.dtype: found {scenario.dtype}; use one of {', '.join(known)}")

    @cached_property
    def environment(self) -> Mapping[str, str]:
        sheet = ", ".join(f"{name} {value}" for name, value in self._machine.model_dump().items())
        return {"engine": self.version, "device": self.scenario.device, "data sheet": sheet}

    def measure(self, model: Model, batch_sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
        """Calculate a prefill, and a decode step in the middle of the answer, from a model's shapes."""
        config, prompt = shapes_of(model), self.scenario.prompt_tokens
        steps = ((prompt, prompt), (1, prompt + self.scenario.generated_tokens // 2))
        return [[Sample(*(self._step_ms(config, size, *step) for step in steps))] * rounds for size in batch_sizes]

    def _step_ms(self, config: PuzzleConfig, batch_size: int, new: int, context: int) -> float:
        """One step of `new` tokens a sequence, after which the cache holds `context`."""
        size, blocks = self._dtype.itemsize, Architecture.of(config).blocks
        counts = Counter(variant for block in blocks for variant in block.subblocks if not variant.absent)
        tokens, hidden, head = batch_size * new, config.hidden_size, config.vocab_size * config.hidden_size

        def subblock_s(variant: Variant) -> float:
            """Weights are read once for all tokens; each sequence reads its cache whole and adds what is new."""
            cache = variant.kv_bytes(config, context, self._dtype) + new * variant.kv_bytes(config, 1, self._dtype)
            moved = variant.weight_bytes(config, self._dtype) + batch_size * cache + 2 * tokens * hidden * size
            return self._seconds(batch_size * variant.operations(config, new, context), moved)

        seconds = sum(count * subblock_s(variant) for variant, count in counts.items())
        seconds += self._seconds(2.0 * head * batch_size, size * (head + tokens * hidden))  # embeddings and head
        if self._devices > 1:  # a ring moves 2 (N - 1) / N of each subblock's output over each link
            moved = tokens * hidden * size * 2 * (self._devices - 1) / self._devices
            seconds += counts.total() * (moved / (1e9 * self._machine.link_gb_s) + 1e-6 * self._machine.link_us)
        return 1e3 * (seconds + 1e-6 * self._machine.layer_us * len(blocks))

    def _seconds(self, operations: float, moved_bytes: float) -> float:
        rate = 1e12 * self._machine.peak_tflops[self.scenario.dtype] * self._machine.compute_share * self._devices
        bandwidth = 1e9 * self._machine.memory_gb_s * self._machine.bandwidth_share * self._devices
        return max(operations / rate, moved_bytes / bandwidth)


def read_machine(name: str, setting: str = "scenario.machine") -> tuple[Machine, int]:
    """A data sheet by the name of a known machine or of a YAML file, and how many devices: `8xh100-sxm`."""
    count, machine = re.findall(r"^(?:([1-9][0-9]*)x)?(.+)", name)[0]
    known = yaml.safe_load((files("puzzle.costs") / "machines.yaml").read_text(encoding="utf-8"))
    if len(meant := [each for each in known if each.startswith(machine)]) == 1:
        machine = meant[0]  # h100 is h100-sxm
    try:
        (sheet,) = [known[machine]] if machine in known else parse_yaml(read_given(Path(machine))).values()
        return Machine.model_validate(sheet), int(count or 1)
    except OSError:
        found = f"{name!r} is neither one of {', '.join(known)} nor a file"
        raise PuzzleError(f"{setting}: {found}; so many of one are 8xh100-sxm") from None
    except ValidationError as error:
        raise PuzzleError(f"{setting}: {machine}: {explain(error, Machine)}") from None
    except (AttributeError, ValueError) as error:
        raise PuzzleError(f"{setting}: {machine} is no data sheet ({one_line(error)})") from None
