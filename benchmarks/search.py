"""How fast the search proves its solutions on generated instances: benchmarks/search.md.

    python benchmarks/search.py                              # everything
    python benchmarks/search.py --only 70B-A2 --count 5      # one set

Shapes are Llama's; costs an H100 roofline's with noise; scores grow with compression, differ by depth, with noise. CPU
seconds of one thread, without the making of the arrays. Every instance is kept in `results/search.jsonl`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from puzzle.artefacts import Bounds, CostRow, CostTable, Scenario, ScoreRow, ScoreTable
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search import Tables, frontier, pool
from puzzle.search.exact import best
from puzzle.search.tables import Objective

KEPT = Path(__file__).parent / "results" / "search.jsonl"
MODELS = {"8B": (32, 4096, 14336, 32), "70B": (80, 8192, 28672, 64), "405B": (126, 16384, 53248, 128)}
"""Layers, hidden size, FFN width, attention heads; 8 KV heads of 128."""
ATTENTION = {"kv8": 8, "kv4": 4, "kv2": 2, "kv1": 1, "linear": None, "none": 0}
FFN = {
    "w100": 1.0,
    "w87": 0.87,
    "w75": 0.75,
    "w50": 0.5,
    "w25": 0.25,
    "w20": 0.2,
    "w10": 0.1,
    "linear": None,
    "none": 0,
}
BATCH, PROMPT, GENERATED = 64, 2048, 512
FLOPS, BANDWIDTH = 0.55 * 989e12, 0.8 * 3.35e12
SETS = ("8B-A2", "70B-A2", "70B-A4", "70B-DEG", "70B-INF", "405B-A2", "405B-A4")
BOUNDED = {"A2": ("memory_bytes", "request_ms"), "A4": ("memory_bytes", "request_ms", "params", "prefill_ms")}
SETTINGS = SearchSettings(gap=1e-6, margin=0.0, time_limit_s=60.0)


def subblock_costs(model: str) -> dict[tuple[str, str], tuple[int, int, float, float]]:
    """Parameters, KV bytes per sequence, prefill ms and decode ms of each variant of each subblock."""
    _, hidden, width, heads = MODELS[model]
    found = {}
    for part, variants in (("attention", ATTENTION), ("ffn", FFN)):
        for name, size in variants.items():
            if name == "none":
                found[part, name] = (0, 0, 0.0, 0.0)
                continue
            params, kv = hidden * hidden, 0
            if part == "attention" and size is not None:
                params, kv = 2 * hidden * heads * 128 + 2 * hidden * size * 128, 4 * size * 128 * (PROMPT + GENERATED)
            elif size is not None:
                params = 3 * hidden * int(width * size) // 64 * 64
            launch_ms = 6e-3 if part == "attention" else 3e-3
            prefill = 2e3 * params * BATCH * PROMPT / FLOPS + launch_ms
            decode = 1e3 * max(2 * params * BATCH / FLOPS, (2 * params + BATCH * kv) / BANDWIDTH) + launch_ms
            found[part, name] = (params, kv, prefill, decode)
    return found


def tables(model: str, rng: np.random.Generator, degenerate: bool) -> tuple[ScoreTable, CostTable]:
    """54 blocks a layer. Degenerate: scores of few values, and layers alike in groups of eight."""
    layers, subblocks, quality = MODELS[model][0], subblock_costs(model), {}
    losses = {"attention": [0, 0.02, 0.06, 0.12, 0.3, 0.4], "ffn": [0, 0.01, 0.03, 0.1, 0.3, 0.35, 0.5, 0.7, 0.8]}
    score_rows, cost_rows = [], [_cost(-1, "fixed", "", (2 * 128256 * MODELS[model][1], 0, 2.0, 0.1))]
    for layer in range(layers):
        if not (degenerate and layer % 8):
            depth = 0.5 + 2.0 * abs(layer / layers - 0.4) + (4.0 if layer < 2 else 0.0)
            quality = {
                (part, name): loss * depth * rng.lognormal(0, 0.3)
                for part, variants in (("attention", ATTENTION), ("ffn", FFN))
                for name, loss in zip(variants, losses[part], strict=True)
            }
            noise = {key: 1 + 0.02 * rng.standard_normal(2) for key in subblocks} if not degenerate else {}
        for (one, a), (other, f) in (
            (x, y) for x in subblocks if x[0] == "attention" for y in subblocks if y[0] == "ffn"
        ):
            left, right = quality[one, a], quality[other, f]
            score = 0.01 * (left + right - 0.3 * min(left, right)) * (1 if degenerate else rng.lognormal(0, 0.05))
            score = round(score, 3) if degenerate else score
            score_rows.append(_score(layer, f"{a}+{f}", 0.0 if (a, f) == ("kv8", "w100") else max(score, 1e-9)))
        for (part, name), cost in subblocks.items():
            factors = noise.get((part, name), np.ones(2))
            cost_rows.append(_cost(layer, part, name, (*cost[:2], cost[2] * factors[0], cost[3] * factors[1])))
    scenario = Scenario(
        engine="roofline", device="h100", dtype="bfloat16", prompt_tokens=PROMPT, generated_tokens=GENERATED
    )
    scores = ScoreTable(num_layers=layers, sequences=1, sequence_length=PROMPT, rows=tuple(score_rows))
    return scores, CostTable(scenario=scenario, batch_sizes=(BATCH,), rows=tuple(cost_rows))


def _score(layer: int, block: str, kl: float) -> ScoreRow:
    return ScoreRow(
        layer=layer, block=block, kl=kl, kl_se=0.0, lm_loss=0.0, top1_agreement=1.0, cosine=0.0, sequences=1
    )


def _cost(layer: int, part: str, variant: str, cost: tuple[int, int, float, float]) -> CostRow:
    params, kv, prefill, decode = cost
    return CostRow(
        layer=layer,
        part=part,
        variant=variant,
        batch_size=BATCH,
        params=int(params),
        weight_bytes=2 * int(params),
        kv_bytes_per_sequence=kv,
        prefill_ms=float(prefill),
        decode_ms=float(decode),
    )


def make(kind: str, seed: int) -> tuple[Tables, Bounds]:
    """An instance, with bounds between 25 and 85 % of the way from the smallest model to the parent, one after another,
    each chosen so that the best solution so far breaks it; or, infeasible, 1 % below what the others leave reachable.
    """
    model, _, case = kind.partition("-")
    rng = np.random.default_rng([seed, *kind.encode()])
    scores, costs = tables(model, rng, case == "DEG")
    made = Tables(scores=scores, costs=costs, settings=SETTINGS)
    (choices,), parent = made.choices[0], made.demands[0].parent
    bounds, solution = Bounds(), best(made)
    for name in BOUNDED["A4" if case == "A4" else "A2"]:
        assert solution is not None
        smallest = choices.fixed[name] + sum(
            choices.terms[name][made.groups == group].min() for group in range(scores.num_layers)
        )
        reached = min(solution.predicted[name], smallest + 0.85 * (parent[name] - smallest))
        share = rng.uniform(0.4, 0.98) if bounds else rng.uniform(0.25, 0.85)
        bounds = bounds | {name: float(smallest + share * (reached - smallest))}
        solution = best(made, [bounds])
    if case == "INF":
        fastest = best(made, [{"memory_bytes": bounds["memory_bytes"]}], objective=Objective("request_ms"))
        assert fastest is not None
        bounds = bounds | {"request_ms": 0.99 * fastest.predicted["request_ms"]}
    return made, bounds


def run_set(kind: str, seeds: range) -> Iterator[dict[str, object]]:
    """A row an instance, and one of the whole set."""
    seconds, proven = [], 0
    for seed in seeds:
        made, bounds = make(kind, seed)
        start = time.process_time()
        solution = best(made, [bounds])
        seconds.append(time.process_time() - start)
        status = solution.proof.status if solution and solution.proof else "infeasible"
        proven += status != "feasible"
        score = solution.score if solution else None
        yield {"set": kind, "seed": seed, "seconds": seconds[-1], "status": status, "score": score, "bounds": bounds}
    summary = {"median": statistics.median(seconds), "worst": max(seconds), "proven": proven}
    yield {"set": kind, "instances": len(seeds), **summary}


def asked(name: str) -> Tables:
    """70B-A2 with its bounds, or that on memory alone."""
    made, bounds = make("70B-A2", 0)
    texts = {"memory": f"{bounds['memory_bytes']:.0f}B"}
    texts |= {} if name == "frontier" else {"latency": f"{bounds['request_ms']!r}ms"}
    return replace(made, target=TargetSettings.model_validate(texts))


def run_frontier() -> Iterator[dict[str, object]]:
    made = asked("frontier")
    start = time.process_time()
    solutions = frontier(made, points=200)
    yield {"frontier": len(solutions), "seconds": time.process_time() - start}


def run_pools() -> Iterator[dict[str, object]]:
    """Ten of 70B-A2."""
    made = asked("pool")
    for differing in (1, 4, 8):
        start = time.process_time()
        solutions = pool(made, 10, differing)
        seconds, spread = time.process_time() - start, solutions[-1].score / solutions[0].score - 1
        proven = sum(each.proof is not None and each.proof.status == "optimal" for each in solutions)
        yield {"pool": differing, "seconds": seconds, "spread": spread, "proven": proven}


def results(name: str, seeds: range) -> Iterator[dict[str, object]]:
    if name == "frontier":
        return run_frontier()
    return run_pools() if name == "pool" else run_set(name, seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*SETS, "frontier", "pool"])
    parser.add_argument("--first", type=int, default=0, help="the first seed of a set")
    parser.add_argument("--count", type=int, default=20, help="number of seeds")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.count)
    for name in options.only:
        for result in results(name, seeds):
            print(json.dumps(result), flush=True)
            with KEPT.open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
