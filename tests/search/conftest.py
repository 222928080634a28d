"""Tables small enough to enumerate, and the enumeration."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from puzzle.artefacts import Bounds, CostRow, CostTable, Scenario, ScoreRow, ScoreTable, Totals
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search import Tables

FFN = "w64"
BOUNDS = ("throughput_tok_s", "request_ms", "decode_ms", "prefill_ms", "memory_bytes", "params", "weight_bytes")


SETTINGS = SearchSettings(gap=1e-9, margin=0.0)


def ask(
    scores: ScoreTable,
    costs: CostTable,
    target: TargetSettings | None = None,
    settings: SearchSettings = SETTINGS,
    **given: Any,
) -> Tables:
    """What is asked of the search."""
    return Tables(scores=scores, costs=costs, target=target or TargetSettings(), settings=settings, **given)


def score_table(scores: Sequence[Sequence[tuple[str, float]]]) -> ScoreTable:
    """From one list of (block, KL) a layer, the parent's block first."""
    rows = tuple(
        ScoreRow(layer=layer, block=block, kl=kl, kl_se=0.0, lm_loss=0.0, top1_agreement=1.0, cosine=0.0, sequences=1)
        for layer, choices in enumerate(scores)
        for block, kl in choices
    )
    return ScoreTable(num_layers=len(scores), sequences=1, sequence_length=8, rows=rows)


def cost_table(rows: Sequence[CostRow], batch_sizes: Sequence[int], generated_tokens: int = 5) -> CostTable:
    scenario = Scenario(
        engine="torch", device="cpu", dtype="float32", prompt_tokens=8, generated_tokens=generated_tokens
    )
    return CostTable(scenario=scenario, batch_sizes=tuple(batch_sizes), rows=tuple(rows))


def cost_row(
    layer: int,
    part: str,
    variant: str,
    batch_size: int,
    *,
    params: int = 0,
    kv: int = 0,
    prefill: float = 0.0,
    decode: float = 0.0,
) -> CostRow:
    return CostRow(
        layer=layer,
        part=part,
        variant=variant,
        batch_size=batch_size,
        params=params,
        weight_bytes=2 * params,
        kv_bytes_per_sequence=kv,
        prefill_ms=prefill,
        decode_ms=decode,
    )


@st.composite
def tables(draw: st.DrawFn) -> tuple[ScoreTable, CostTable]:
    """1-4 layers of 2-4 choices at 1-3 batch sizes. Few distinct numbers, so that ties and duplicates are common."""
    batch_sizes = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3, unique=True))
    small, times = st.integers(0, 6), st.integers(0, 12).map(lambda quarters: quarters / 4) | st.floats(0, 3)
    rows = [cost_row(-1, "fixed", "", b, params=draw(small), prefill=1.0, decode=0.5) for b in batch_sizes]
    scores = []
    for layer in range(draw(st.integers(1, 4))):
        names = [f"kv{8 - place}" for place in range(draw(st.integers(2, 4)))]
        kl = [0.0, *draw(st.lists(st.integers(0, 8), min_size=len(names) - 1, max_size=len(names) - 1))]
        scores.append([(f"{name}+{FFN}", value / 8) for name, value in zip(names, kl, strict=True)])
        params, kv = {name: draw(small) for name in names}, {name: draw(small) for name in names}
        for b in batch_sizes:
            rows.append(cost_row(layer, "ffn", FFN, b, params=1, prefill=0.25, decode=0.25))
            rows += [
                cost_row(layer, "attention", n, b, params=params[n], kv=kv[n], prefill=draw(times), decode=draw(times))
                for n in names
            ]
    return score_table(scores), cost_table(rows, batch_sizes)


def architectures(scores: ScoreTable) -> Iterator[tuple[str, ...]]:
    layers = [[row.block for row in scores.layer(layer)] for layer in range(scores.num_layers)]
    return itertools.product(*layers)


def everything(scores: ScoreTable, costs: CostTable) -> list[tuple[float, Totals]]:
    """Score and totals of every architecture at every batch size."""
    return [
        (scores.total(blocks), costs.totals(blocks, batch_size))
        for batch_size in costs.batch_sizes
        for blocks in architectures(scores)
    ]


def within(totals: Totals, bounds: Bounds) -> bool:
    """The meaning of bounds on costs, written a second time; times with the stated tolerance."""
    values = totals.as_dict()
    for name, bound in bounds.items():
        if name == "score":
            continue
        if name == "throughput_tok_s":
            met = values[name] >= bound * (1 - 1e-8)
        elif name in ("memory_bytes", "params", "weight_bytes"):
            met = values[name] <= bound
        else:
            met = values[name] <= bound * (1 + 1e-8)
        if not met:
            return False
    return True
