"""Runs made up on the spot: numbers that look like a real run's, of any number of layers."""

import math
import random
from collections.abc import Callable

import pytest

from puzzle.artefacts import (
    Bounds,
    CostRow,
    CostTable,
    LibraryIndex,
    LibraryRow,
    Proof,
    Scenario,
    ScoreRow,
    ScoreTable,
    Solution,
)
from puzzle.costs import Timed
from puzzle.report import ReportData

ATTENTION = {"kv8": 0.0, "kv4": 0.02, "kv2": 0.05, "kv1": 0.09, "linear": 0.10, "none": 0.13}
FFN = {"w512": 0.0, "w448": 0.01, "w384": 0.03, "w256": 0.08, "w128": 0.2, "w96": 0.24, "w64": 0.30}
FFN |= {"linear": 0.28, "none": 0.34}
BATCH = 64
BOUND = 1.9


def _need(layer: int, num_layers: int) -> float:
    """The first and last layers matter most, as in real models."""
    return 0.15 + 3 * math.exp(-layer) + math.exp(layer - num_layers + 1)


def _scores(num_layers: int, rng: random.Random) -> ScoreTable:
    rows = []
    for layer in range(num_layers):
        for attention, attention_loss in ATTENTION.items():
            for ffn, ffn_loss in FFN.items():
                kl = (
                    0.1
                    * (attention_loss**2 + ffn_loss**2)
                    * _need(layer, num_layers)
                    * math.exp(rng.uniform(-1.2, 1.2))
                )
                if (layer, attention, ffn) == (1, "none", "none"):
                    continue  # a block whose score was not finite
                rows.append(
                    ScoreRow(
                        layer=layer,
                        block=f"{attention}+{ffn}",
                        kl=kl,
                        kl_se=kl / 20,
                        lm_loss=2.8 + kl,
                        top1_agreement=math.exp(-kl),
                        cosine=kl / 10,
                        sequences=64,
                    )
                )
    return ScoreTable(num_layers=num_layers, sequences=32, sequence_length=2048, rows=tuple(rows))


def _costs(num_layers: int) -> CostTable:
    def row(layer: int, part: str, variant: str, size: float) -> CostRow:
        kv = int(variant[2:]) * 1024 if variant.startswith("kv") else 0
        return CostRow(
            layer=layer,
            part=part,  # type: ignore[arg-type]
            variant=variant,
            batch_size=BATCH,
            params=int(1e6 * size),
            weight_bytes=int(4e6 * size),
            kv_bytes_per_sequence=kv,
            prefill_ms=10 * size,
            decode_ms=0.2 * size + kv / 2e4,
        )

    rows = [row(-1, "fixed", "", 4.0)]
    for layer in range(num_layers):
        rows += [row(layer, "attention", name, {"none": 0.0, "linear": 0.15}.get(name, 0.6)) for name in ATTENTION]
        rows += [row(layer, "ffn", name, int(name[1:]) / 256 if name[0] == "w" else 0.1) for name in FFN]
    scenario = Scenario(engine="torch", device="cpu", dtype="float32", prompt_tokens=256, generated_tokens=64)
    environment = {"torch": "2.13.0", "threads": "2", "device_name": "Example CPU <8 cores>"}
    return CostTable(scenario=scenario, batch_sizes=(BATCH,), rows=tuple(rows), environment=environment)


def _library(num_layers: int, rng: random.Random) -> LibraryIndex:
    rows = []
    for subblock, variants in (("attention", ATTENTION), ("ffn", FFN)):
        for name, loss in [*variants.items()][1:]:
            for layer in range(num_layers):
                start = (
                    1.0 if name == "none" else min(1.0, loss * _need(layer, num_layers) ** 0.3 * rng.uniform(0.8, 1.2))
                )
                trained = name not in ("linear", "none")
                rows.append(
                    LibraryRow(
                        widened_from="",
                        layer=layer,
                        subblock=subblock,
                        variant=name,
                        file="",
                        initial_loss=start,
                        loss=start * rng.uniform(0.3, 0.6) if trained else start,
                        trained_tokens=1_000_000 if trained else 0,
                    )
                )
    return LibraryIndex(rows=tuple(rows))


def _solution(scores: ScoreTable, costs: CostTable, price: float, *, proof: bool = True) -> Solution:
    """The best trade at `price` nats per millisecond of a request, which is a point of the frontier."""
    parent = costs.totals(["kv8+w512"] * scores.num_layers, BATCH).as_dict()
    blocks = []
    for layer in range(scores.num_layers):
        rows = scores.layer(layer)

        def total(row: ScoreRow, layer: int = layer) -> float:
            cost = costs.block(layer, row.block, BATCH)
            return row.kl + price * (cost.prefill_ms + 63 * cost.decode_ms)

        blocks.append(min(rows, key=total).block)
    score = scores.total(blocks)
    target = Bounds(throughput_tok_s=BOUND * parent["throughput_tok_s"], memory_bytes=0.8 * parent["memory_bytes"])
    return Solution(
        blocks=tuple(blocks),
        batch_size=BATCH,
        score=score,
        predicted=costs.totals(blocks, BATCH).as_dict(),
        parent=parent,
        asked=target,
        bounds=target,
        proof=Proof(status="optimal", bound=score * (1 - 1e-7), gap=1e-7, solver="HiGHS 1.12.0", seconds=1.73)
        if proof
        else None,
    )


def _uniform(child: Solution, scores: ScoreTable, costs: CostTable) -> Solution:
    count = scores.num_layers
    blocks = ["none+none" if 2 < layer < 2 + count // 4 else "kv2+w256" for layer in range(count)]
    return Solution(
        blocks=tuple(blocks),
        batch_size=BATCH,
        score=scores.total(blocks),
        predicted=costs.totals(blocks, BATCH).as_dict(),
        parent=child.parent,
        asked=child.asked,
        bounds=child.bounds,
        proof=None,
    )


def _row(totals: dict[str, float], rng: random.Random, loss: float, top1: float, kl: float) -> dict[str, float]:
    row = {"test_loss": loss, "top1": top1, "kl": kl, "top1_agreement": math.exp(-2 * kl)}
    row |= {key: totals[key] for key in ("params", "weight_bytes", "kv_bytes", "memory_bytes")}
    for name, key in (("tok_s", "throughput_tok_s"), ("prefill_ms", "prefill_ms"), ("decode_ms", "decode_ms")):
        row[f"predicted_{name}"] = totals[key]
        row[f"measured_{name}"] = totals[key] * rng.uniform(0.95, 1.05)
    return row


def _checks(child: Solution, rng: random.Random) -> list[dict[str, Timed]]:
    """Two searches, the first one's predictions worse."""

    def timed(totals: dict[str, float], scatter: float) -> Timed:
        predicted = totals["prefill_ms"], totals["decode_ms"]
        prefill, decode = (value * rng.uniform(1 - scatter, 1 + scatter) for value in predicted)
        return Timed(predicted=predicted, measured=(prefill, decode))

    blend = {name: (child.parent[name] + child.predicted[name]) / 2 for name in ("prefill_ms", "decode_ms")}
    models = {"parent": child.parent, "child": child.predicted, "blend": blend}
    return [{name: timed(totals, scatter) for name, totals in models.items()} for scatter in (0.1, 0.02)]


def _curve(start: float, end: float, rng: random.Random, points: int = 900) -> list[dict[str, float]]:
    curve = []
    for step in range(points):
        level = end + (start - end) * math.exp(-6 * step / points)
        point = {"tokens": 16_384.0 * (step + 1), "loss": level * rng.uniform(0.9, 1.1)}
        curve.append(point | ({"validation_kl": level} if step % 60 == 0 else {}))
    return curve


def make(num_layers: int, *, partial: bool = False) -> ReportData:
    rng = random.Random(0)
    scores, costs, library = _scores(num_layers, rng), _costs(num_layers), _library(num_layers, rng)
    frontier = [_solution(scores, costs, 10.0 ** (-6.5 + 0.125 * step)) for step in range(28)]
    child = next(
        point for point in frontier if point.predicted["throughput_tok_s"] >= BOUND * point.parent["throughput_tok_s"]
    )
    recipe = "parent: meta-llama/<8B>\ntarget:\n  throughput: 1.9x # & more\n  memory: 80%\n"
    basis = {
        "title": "Run <one> & two",
        "recipe_yaml": recipe,
        "parent": "meta-llama/Llama-3.1-8B-Instruct",
        "solution": child,
        "scores": scores,
        "costs": costs,
        "library": library,
    }
    if partial:
        return ReportData(**basis)
    uniform = _uniform(child, scores, costs)
    return ReportData(
        **basis,
        uniform=uniform,
        frontier=frontier[::2],
        rows={
            "parent": _row(child.parent, rng, 2.7312, 0.4731, 0.0),
            "child_before": _row(child.predicted, rng, 3.1415, 0.4102, 0.3127),
            "child": _row(child.predicted, rng, 2.8093, 0.4610, 0.0817),
            "uniform": _row(uniform.predicted, rng, 2.9377, 0.4388, 0.1931),
        },
        checks=_checks(child, rng),
        curves={"child": _curve(0.6, 0.08, rng), "uniform": _curve(1.1, 0.19, rng)},
        seconds={"calibrate": 34.2, "library": 1460, "costs": 48, "score": 310.0, "search": 1.7, "distil": 5230},
        versions={"puzzle": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
    )


@pytest.fixture(scope="session")
def make_data() -> Callable[..., ReportData]:
    return make
