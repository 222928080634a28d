"""From samples and shapes to the rows of a cost table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import torch

from puzzle.artefacts import CostRow, Scenario
from puzzle.artefacts.costs import Part
from puzzle.costs.engine import Sample, Times, spread, typical
from puzzle.costs.memory import fixed_memory, subblock_memory
from puzzle.costs.slopes import FIXED, PartName, Plan, StackTimes, part_name
from puzzle.modeling import PuzzleConfig
from puzzle.variants import Space


def cost_rows(
    config: PuzzleConfig, space: Space, scenario: Scenario, batch_size: int, times: Mapping[PartName, Times]
) -> Iterator[CostRow]:
    """The rows at one batch size: what is fixed, then every variant of every layer."""
    dtype, tokens = getattr(torch, scenario.dtype), scenario.total_tokens
    parts: list[tuple[int, Part, str, PartName]] = [(-1, "fixed", "", FIXED)]
    sizes = {FIXED: fixed_memory(config, dtype)}
    for index, layer in enumerate(space.layers):
        for variant in (*layer.attention, *layer.ffn):
            name = part_name(variant)
            last = variant.subblock == "ffn" and index == len(space.layers) - 1
            parts.append((index, variant.subblock, variant.name, ("last ffn", variant.name) if last else name))
            sizes[name] = sizes.get(name) or subblock_memory(variant, config, dtype, tokens)
    for index, part, variant_name, timed_as in parts:
        size = sizes[part, variant_name]
        yield CostRow(
            layer=index,
            part=part,
            variant=variant_name,
            batch_size=batch_size,
            params=size.params,
            weight_bytes=size.weight_bytes,
            kv_bytes_per_sequence=size.kv_bytes_per_sequence,
            **asdict(times[timed_as]),
        )


def part_times(plan: Plan, rounds: Sequence[Mapping[str, Sample]]) -> dict[PartName, Times]:
    """Times of every part, and their spreads over the rounds.

    Args:
        rounds: for each round the samples by the name of the stack.
    """
    prefill = _costs(plan, [{stack: sample.prefill_ms for stack, sample in samples.items()} for samples in rounds])
    decode = _costs(plan, [{stack: sample.decode_ms for stack, sample in samples.items()} for samples in rounds])
    return {
        part: Times(
            prefill_ms=prefill[part][0],
            decode_ms=decode[part][0],
            prefill_ms_spread=prefill[part][1],
            decode_ms_spread=decode[part][1],
        )
        for part in prefill
    }


def _costs(plan: Plan, rounds: Sequence[StackTimes]) -> dict[PartName, tuple[float, float]]:
    """Cost and spread of every part, in ms."""
    stack_ms = {stack: typical([times[stack] for times in rounds]) for stack in rounds[0]}
    by_round = [plan.costs(times) for times in rounds]
    return {
        part: (max(cost_ms, 0.0), spread([costs[part] for costs in by_round]))
        for part, cost_ms in plan.costs(stack_ms).items()
    }
