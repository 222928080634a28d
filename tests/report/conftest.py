"""Runs made up on the spot, of any number of layers; every number follows from the names of blocks and the layer."""

import math
from collections.abc import Callable, Sequence

import pytest

from puzzle.artefacts import CostRow, CostTable, Proof, Scenario, ScoreRow, ScoreTable, Solution, TaskScore
from puzzle.recipe import TargetSettings
from puzzle.report import ReportData, table_row

ATTENTION = {"kv8": 1.0, "kv2": 0.7, "linear": 0.2, "none": 0.0}
FFN = {"w512": 1.0, "w256": 0.5, "linear": 0.1, "none": 0.0}
"""Variants with their share of the parent's time."""
BATCH = 64


def _scores(num_layers: int) -> ScoreTable:
    rows = []
    for layer in range(num_layers):
        for attention, share in ATTENTION.items():
            for ffn, ffn_share in FFN.items():
                if (layer, attention, ffn) == (1, "none", "w512"):
                    continue  # a block whose score was not finite
                kl = ((1 - share) ** 2 + 2 * (1 - ffn_share) ** 2) * (0.02 + 0.3 * math.exp(-layer))
                rest = {"kl_se": kl / 20, "lm_loss": 2.8 + kl, "top1_agreement": math.exp(-kl), "cosine": kl / 10}
                rows.append(ScoreRow(layer=layer, block=f"{attention}+{ffn}", kl=kl, sequences=64, **rest))
    return ScoreTable(num_layers=num_layers, sequences=64, sequence_length=2048, rows=tuple(rows))


def _costs(num_layers: int) -> CostTable:
    def row(layer: int, part: str, variant: str, share: float) -> CostRow:
        kv = int(variant[2:]) * 1024 if variant.startswith("kv") else 0
        sizes = {"params": int(1e6 * share), "weight_bytes": int(4e6 * share), "kv_bytes_per_sequence": kv}
        times = {"prefill_ms": 10 * share, "decode_ms": 0.2 * share}
        return CostRow(layer=layer, part=part, variant=variant, batch_size=BATCH, **sizes, **times)  # type: ignore[arg-type]

    rows = [row(-1, "fixed", "", 0.5)]
    for layer in range(num_layers):
        rows += [row(layer, "attention", *item) for item in ATTENTION.items()]
        rows += [row(layer, "ffn", *item) for item in FFN.items()]
    scenario = Scenario(engine="torch", device="cpu", dtype="float32", prompt_tokens=256, generated_tokens=64)
    environment = {"threads": "2", "device_name": "Example CPU <8 cores>"}
    return CostTable(scenario=scenario, batch_sizes=(BATCH,), rows=tuple(rows), environment=environment)


def make(num_layers: int = 8) -> ReportData:
    scores, costs = _scores(num_layers), _costs(num_layers)
    parent = costs.totals(["kv8+w512"] * num_layers, BATCH).as_dict()
    asked = {"throughput_tok_s": 1.9 * parent["throughput_tok_s"], "memory_bytes": 0.8 * parent["memory_bytes"]}

    def solution(blocks: Sequence[str]) -> Solution:
        score, predicted = scores.total(blocks), costs.totals(blocks, BATCH).as_dict()
        proof = Proof(status="optimal", bound=score * 0.99, gap=0.01, solver="HiGHS 1.12.0", seconds=1.73)
        sums = {"score": score, "predicted": predicted, "parent": parent, "asked": asked, "bounds": asked}
        return Solution(blocks=tuple(blocks), batch_size=BATCH, proof=proof, **sums)

    blocks = (["kv8+w512", "kv2+w256", "kv2+w256", "linear+w256", "none+linear", "none+none"] + ["kv2+w256"] * 99)[
        :num_layers
    ]
    child, uniform = solution(blocks), solution(["kv2+w256"] * num_layers)
    recipe = "parent: meta-llama/<8B>\ntarget:\n  throughput: 1.9x # & more\n  memory: 80%\n"

    def row(blocks: Sequence[str], kl: float, slower: float) -> dict[str, float]:
        totals = costs.totals(blocks, BATCH)
        quality = {"test_loss": 2.5 + kl, "top1": 0.5 - kl, "kl": kl, "top1_agreement": 1 - kl}
        times = {"prefill_ms": totals.cost.prefill_ms * slower, "decode_ms": totals.cost.decode_ms * slower}
        predicted = totals.as_dict()
        return table_row(quality, predicted, times | {"throughput_tok_s": predicted["throughput_tok_s"] / slower})

    curve = [{"tokens": 1e4 * step, "loss": 1 / (1 + step), "validation_kl": 0.5 / (1 + step)} for step in range(11)]
    return ReportData(
        title="Run <one> & two",
        recipe_yaml=recipe,
        parent="a/parent",
        solution=child,
        targets=[TargetSettings(throughput="1.9x", memory="80%")],
        scores=scores,
        costs=costs,
        searched=child,
        uniform=uniform,
        frontier=[solution(["kv8+w512"] * kept + [*uniform.blocks[kept:]]) for kept in reversed(range(num_layers))],
        rows={
            "parent": row(["kv8+w512"] * num_layers, 0.0, 1.0),
            "child_before": row(child.blocks, 0.1, 1.25),
            "child": row(child.blocks, 0.05, 1.25),
            "uniform": row(uniform.blocks, 0.07, 0.8),
        },
        tasks={
            model: {
                "local_arc_challenge": TaskScore("acc_norm", 0.45 - lost, 0.01, 0.25, 1000, {}),
                "at_chance": TaskScore("acc", 0.26 - lost, 0.01, 0.25, 1000, {}),
                "open": TaskScore("exact_match", 2.0 - lost, 0.01, 0.2, 1000, {}),
            }
            for model, lost in (("parent", 0.0), ("child", 0.02), ("uniform", 0.04))
        },
        checks=[("child, search 1", "decode_ms", 3.0, 2.0)],
        curves={"child": curve, "uniform": curve},
        seconds={"calibrate": 34.2, "library": 1460, "search": 1.7},
        warnings=["close other <programs>"],
    )


@pytest.fixture(scope="session")
def make_data() -> Callable[..., ReportData]:
    return make
