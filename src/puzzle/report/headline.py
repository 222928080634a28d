"""The first things to read: the three numbers that matter, how they were taken, and whether the target is met."""

from collections.abc import Callable
from dataclasses import dataclass

from puzzle.report import numbers
from puzzle.report.data import ReportData
from puzzle.report.table import child_over_parent, value_of


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number in large type."""

    number: str
    label: str
    detail: str


def tiles(data: ReportData) -> list[Tile]:
    """Speed-up, quality kept and memory; what is not measured yet is predicted, and says so."""
    return [_speed(data), _quality(data), _memory(data)]


def _speed(data: ReportData) -> Tile:
    predicted = child_over_parent(data.rows, "predicted_tok_s")
    if predicted is None:
        predicted = data.solution.predicted["throughput_tok_s"] / data.solution.parent["throughput_tok_s"]
    measured = child_over_parent(data.rows, "measured_tok_s")
    if measured is None:
        return Tile(
            number=numbers.ratio(predicted), label="the parent's throughput, predicted", detail="not measured yet"
        )
    child, parent = (numbers.tokens_per_second(data.rows[model]["measured_tok_s"]) for model in ("child", "parent"))
    return Tile(
        number=numbers.ratio(measured),
        label="the parent's throughput, measured",
        detail=f"{child}; parent {parent}; predicted {numbers.ratio(predicted)}",
    )


def _quality(data: ReportData) -> Tile:
    """Quality kept: the child's metric divided by the parent's, per metric."""
    top1, loss = child_over_parent(data.rows, "top1"), child_over_parent(data.rows, "test_loss")
    kl = value_of(data.rows.get("child", {}), "kl")
    details = [
        *([f"test loss {numbers.ratio(loss)} the parent's"] if loss is not None and top1 is not None else []),
        *([f"KL to the parent {numbers.significant(kl)} nats per token"] if kl is not None else []),
    ]
    if top1 is not None:
        return Tile(number=numbers.percent(top1), label="of the parent's top-1 accuracy", detail="; ".join(details))
    if loss is not None:
        return Tile(number=numbers.ratio(loss), label="the parent's test loss", detail="; ".join(details))
    return Tile(
        number=numbers.plain(data.solution.score),
        label="sum of scores: KL to the parent, predicted",
        detail="; ".join(["quality not measured yet", *details]),
    )


def _memory(data: ReportData) -> Tile:
    """The table's figures are of one batch size; the search's parent may have another, its best."""
    child, parent = (value_of(data.rows.get(model, {}), "memory_bytes") for model in ("child", "parent"))
    batch = ""
    if child is None or parent is None:
        child, parent = data.solution.predicted["memory_bytes"], data.solution.parent["memory_bytes"]
        batch = f" at batch {data.solution.parent['batch_size']:g}"
    return Tile(
        number=numbers.size(child),
        label="of memory for weights and KV cache",
        detail=f"{numbers.percent(child / parent)} of the parent's {numbers.size(parent)}{batch}",
    )


def scenario_line(data: ReportData) -> str:
    """What every speed and memory figure must be quoted with."""
    scenario = data.costs.scenario
    environment = "".join(f", {key.replace('_', ' ')} {value}" for key, value in data.costs.environment.items())
    return (
        f"{scenario.engine} on {scenario.device}, {scenario.dtype}, batch {data.solution.batch_size}, "
        f"prompt {scenario.prompt_tokens}, generated {scenario.generated_tokens} tokens{environment}"
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """One bound of the target, and what came of it."""

    quantity: str
    asked: str
    predicted: str
    measured: str
    verdict: str


@dataclass(frozen=True)
class _Bounded:
    label: str
    at_least: bool
    format: Callable[[float], str]


_BOUNDED = {
    "throughput_tok_s": _Bounded("throughput", True, numbers.tokens_per_second),
    "memory_bytes": _Bounded("memory", False, numbers.size),
    "request_ms": _Bounded("time of a request", False, numbers.milliseconds),
    "prefill_ms": _Bounded("time to first token", False, numbers.milliseconds),
    "decode_ms": _Bounded("time per output token", False, numbers.milliseconds),
    "params": _Bounded("parameters", False, numbers.count),
    "weight_bytes": _Bounded("weights on disk", False, numbers.size),
}
"""By the names of `Bounds`."""
_COUNTED = ("memory_bytes", "params", "weight_bytes")
"""Known exactly from the architecture, so that nothing is left to measure."""


def checks(data: ReportData) -> list[Check]:
    """The target bound by bound."""
    bounds = data.solution.asked
    return [_check(data, name, bounds[name]) for name in _BOUNDED if name in bounds]


def _check(data: ReportData, name: str, bound: float) -> Check:
    quantity, predicted = _BOUNDED[name], data.solution.predicted[name]
    measured = None if name in _COUNTED else _measured(data, name)
    actual = predicted if name in _COUNTED else measured
    return Check(
        quantity=quantity.label,
        asked=f"{'at least' if quantity.at_least else 'at most'} {quantity.format(bound)}",
        predicted=quantity.format(predicted),
        measured="exact" if name in _COUNTED else _or_missing(quantity, measured),
        verdict="not measured yet" if actual is None else _verdict(actual, bound, quantity.at_least),
    )


def _measured(data: ReportData, name: str) -> float | None:
    child = data.rows.get("child", {})
    prefill, decode = value_of(child, "measured_prefill_ms"), value_of(child, "measured_decode_ms")
    if name == "request_ms":
        steps = data.costs.scenario.generated_tokens - 1
        return None if prefill is None or decode is None else prefill + steps * decode
    return {"prefill_ms": prefill, "decode_ms": decode, "throughput_tok_s": value_of(child, "measured_tok_s")}[name]


def _or_missing(quantity: _Bounded, value: float | None) -> str:
    return numbers.MISSING if value is None else quantity.format(value)


def _verdict(actual: float, bound: float, at_least: bool) -> str:
    if actual >= bound if at_least else actual <= bound:
        return "met"
    return f"missed by {numbers.percent(abs(actual / bound - 1))}"
