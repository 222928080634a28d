"""The rows of a cost table: exact sizes from the modules' real shapes (law 10), times from samples of stacks."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from puzzle.artefacts import Cost, CostRow, Scenario
from puzzle.artefacts.costs import Part
from puzzle.costs.engine import Sample
from puzzle.costs.slopes import FIXED, PartName, Plan, part_name
from puzzle.costs.timing import typical, without_drift
from puzzle.modeling import PuzzleConfig, empty_model
from puzzle.variants import Space, Variant


def subblock_memory(variant: Variant, config: PuzzleConfig, dtype: torch.dtype, tokens: int) -> Cost:
    """Parameters, weight bytes and KV bytes of one subblock, its norm and biases included.

    Args:
        dtype: in which weights and KV cache are held.
        tokens: of one sequence at full length, prompt and generated.
    """
    return Cost(
        params=variant.num_params(config),
        weight_bytes=variant.weight_bytes(config, dtype),
        kv_bytes_per_sequence=variant.kv_bytes(config, tokens, dtype),
    )


def fixed_memory(config: PuzzleConfig, dtype: torch.dtype) -> Cost:
    """What every child has: embeddings, final norm and head, a tied head counted once."""
    parameters = empty_model(config).named_parameters()
    params = sum(parameter.numel() for name, parameter in parameters if not name.startswith("model.layers."))
    return Cost(params=params, weight_bytes=params * dtype.itemsize)


def part_times(plan: Plan, samples: Mapping[str, Sequence[Sample]]) -> dict[PartName, Sample]:
    """What every part adds to a model's times; at least 0, where noise says otherwise.

    Args:
        samples: by the name of the stack, as many of each, one a round.
    """
    prefill_ms = _costs_ms(plan, {stack: [each.prefill_ms for each in rounds] for stack, rounds in samples.items()})
    decode_ms = _costs_ms(plan, {stack: [each.decode_ms for each in rounds] for stack, rounds in samples.items()})
    return {part: Sample(prefill_ms=prefill_ms[part], decode_ms=decode_ms[part]) for part in prefill_ms}


def _costs_ms(plan: Plan, rounds_ms: Mapping[str, Sequence[float]]) -> dict[PartName, float]:
    typical_ms = map(typical, without_drift(list(rounds_ms.values())))
    costs_ms = plan.costs(dict(zip(rounds_ms, typical_ms, strict=True)))
    return {part: max(cost_ms, 0.0) for part, cost_ms in costs_ms.items()}


def cost_rows(
    config: PuzzleConfig, space: Space, scenario: Scenario, batch_size: int, times: Mapping[PartName, Sample]
) -> Iterator[CostRow]:
    """The rows at one batch size: what is fixed, then every variant of every layer."""
    dtype, tokens = getattr(torch, scenario.dtype), scenario.total_tokens

    def row(layer: int, part: Part, variant: str, size: Cost, timed_as: PartName) -> CostRow:
        cost = size + Cost(prefill_ms=times[timed_as].prefill_ms, decode_ms=times[timed_as].decode_ms)
        return CostRow(layer=layer, part=part, variant=variant, batch_size=batch_size, **vars(cost))

    yield row(-1, "fixed", "", fixed_memory(config, dtype), FIXED)
    alternatives = {variant for layer in space.layers for variant in (*layer.attention, *layer.ffn)}
    sizes = {variant: subblock_memory(variant, config, dtype, tokens) for variant in alternatives}
    for index, layer in enumerate(space.layers):
        for variant in (*layer.attention, *layer.ffn):
            last = variant.subblock == "ffn" and index == len(space.layers) - 1
            timed_as: PartName = ("last ffn", variant.name) if last else part_name(variant)
            yield row(index, variant.subblock, variant.name, sizes[variant], timed_as)
