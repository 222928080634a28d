"""Solutions for a terminal: the block of each layer, what is predicted beside the parent, and what is proven."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from puzzle.artefacts import Bounds, Solution
from puzzle.quantities import QUANTITIES
from puzzle.report import numbers
from puzzle.report.table import METRICS, final_table

_PREDICTED = {
    "throughput_tok_s": "predicted_tok_s",
    "prefill_ms": "predicted_prefill_ms",
    "decode_ms": "predicted_decode_ms",
}
"""From the names of `Totals` to those of the result table, where these differ."""


def solution_table(solution: Solution, parent: Sequence[str]) -> RenderableType:
    """One line a run of equal layers, then the predicted totals, then the proof.

    Args:
        parent: the parent's own block of each layer.
    """
    layers = Table(box=None, pad_edge=False)
    layers.add_column("layers", justify="right")
    layers.add_column("block")
    layers.add_column("parent's")
    pairs = list(zip(solution.blocks, parent, strict=True))
    for (block, own), run in groupby(range(len(pairs)), key=lambda layer: pairs[layer]):
        first, *others = run
        place = f"{first}-{others[-1]}" if others else f"{first}"
        layers.add_row(place, Text(block), Text("the same" if block == own else own))
    rows = {"parent": _row(solution.parent), "child": _row(solution.predicted)}
    known = {key for row in rows.values() for key, value in row.items() if value}
    totals = final_table({model: {key: row[key] for key in row if key in known} for model, row in rows.items()})
    return Group(layers, "", totals, "", Text(_verdict(solution)))


def solutions_table(solutions: Sequence[Solution], parent: Sequence[str], quantity: str) -> Table:
    """One line a solution: the quantity, absolute and as a multiple of the parent's, the score, and what has changed.

    Args:
        quantity: in `Totals`.
    """
    table = Table(box=None, pad_edge=False)
    for name in (QUANTITIES[quantity].setting.replace("_", " "), "x parent", "score", "gap", "batch", "layers changed"):
        table.add_column(name, justify="right")
    for solution in solutions:
        value = solution.predicted[quantity]
        table.add_row(
            _written(quantity, value),
            numbers.ratio(value / solution.parent[quantity]),
            numbers.plain(solution.score),
            f"{solution.proof.gap:.0e}" if solution.proof else numbers.MISSING,
            str(solution.batch_size),
            str(sum(block != own for block, own in zip(solution.blocks, parent, strict=True))),
        )
    return table


def _row(totals: Mapping[str, float]) -> dict[str, float]:
    names = {metric.key for metric in METRICS}
    renamed = {_PREDICTED.get(name, name): value for name, value in totals.items()}
    return {name: value for name, value in renamed.items() if name in names}


def _verdict(solution: Solution) -> str:
    """Score, proof, bounds and notes, a line each."""
    proof = solution.proof
    proven = f"{proof.status} within {proof.gap:.1e} ({proof.solver}, {proof.seconds:.2g} s)" if proof else "none"
    score = f"{numbers.plain(solution.score)} at batch size {solution.batch_size}"
    lines = [f"summed score: {score}", f"proof: {proven}", f"asked: {_asked(solution.asked)}"]
    for serving in solution.further:
        reached = [f"{_setting(name)} {_stated(name, serving.predicted[name])}" for name in serving.asked]
        where = f"in {serving.scenario}, at batch size {serving.batch_size}"
        lines.append(f"asked {where}: {_asked(serving.asked)}; predicted: {', '.join(reached)}")
    return "\n".join([*lines, *(f"note: {note}" for note in solution.notes)])


def _asked(bounds: Bounds) -> str:
    asked = [
        f"{_setting(name)} {'at least' if QUANTITIES[name].at_least else 'at most'} {_stated(name, bound)}"
        for name, bound in bounds.items()
    ]
    return ", ".join(asked)


def _setting(name: str) -> str:
    return QUANTITIES[name].setting.replace("_", " ")


def _written(name: str, value: float) -> str:
    """A value of `Totals` as the result table writes it."""
    formats = {metric.key: metric.format for metric in METRICS}
    return formats.get(_PREDICTED.get(name, name), numbers.plain)(value)


def _stated(name: str, value: float) -> str:
    """The same with its unit, where the table has that in its head."""
    return _written(name, value) + {"throughput_tok_s": " tok/s", "request_ms": " ms"}.get(name, "")
