"""How fast the search proves its solutions, beside CBC, on generated instances: benchmarks/search.md.

    pip install pulp
    python benchmarks/search.py --out search.json               # instances, frontier, pool; half an hour, or
    python benchmarks/search.py --only 70B-A2 --count 20        # one set

Shapes are Llama's; costs an H100 roofline's with noise; scores grow with compression, differ by depth, with noise. CPU
seconds of one thread; CBC's are its own process's, without what PuLP takes to write the program down.
"""

import argparse
import itertools
import json
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pulp

from puzzle.artefacts import Bounds, CostRow, CostTable, PairTerm, Scenario, ScoreRow, ScoreTable
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search import frontier, pool
from puzzle.search.exact import Instance, best_architecture
from puzzle.search.explain import best_value
from puzzle.search.problem import Choices, bound_rows

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
LIMIT_S = 60.0
SETTINGS = SearchSettings(gap=1e-6, margin=0.0, time_limit_s=LIMIT_S)


def half_costs(model: str) -> dict[tuple[str, str], tuple[int, int, float, float]]:
    """Parameters, KV bytes per sequence, prefill ms and decode ms of each variant of each half."""
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
    layers, halves, quality = MODELS[model][0], half_costs(model), {}
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
            noise = {key: 1 + 0.02 * rng.standard_normal(2) for key in halves} if not degenerate else {}
        for (one, a), (other, f) in ((x, y) for x in halves if x[0] == "attention" for y in halves if y[0] == "ffn"):
            left, right = quality[one, a], quality[other, f]
            score = 0.01 * (left + right - 0.3 * min(left, right)) * (1 if degenerate else rng.lognormal(0, 0.05))
            score = round(score, 3) if degenerate else score
            score_rows.append(_score(layer, f"{a}+{f}", 0.0 if (a, f) == ("kv8", "w100") else max(score, 1e-9)))
        for (part, name), cost in halves.items():
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


def make(kind: str, seed: int) -> tuple[Instance, Bounds]:
    """An instance, with bounds between 25 and 85 % of the way from the smallest model to the parent, one after another,
    each chosen so that the best solution so far breaks it; or, infeasible, 1 % below what the others leave reachable.
    """
    model, _, case = kind.partition("-")
    rng = np.random.default_rng([seed, *kind.encode()])
    instance = Instance.of(*tables(model, rng, case == "DEG"))
    (choices,) = instance.choices
    bounds, solution = Bounds(), best_architecture(instance, Bounds(), SETTINGS)
    for name in BOUNDED["A4" if case == "A4" else "A2"]:
        assert solution is not None
        smallest = choices.fixed[name] + sum(
            choices.costs[name][choices.layers == layer].min() for layer in range(choices.num_layers)
        )
        reached = min(solution.predicted[name], smallest + 0.85 * (instance.parent[name] - smallest))
        share = rng.uniform(0.4, 0.98) if bounds.given() else rng.uniform(0.25, 0.85)
        bounds = replace(bounds, **{name: float(smallest + share * (reached - smallest))})
        solution = best_architecture(instance, bounds, SETTINGS)
    if case == "INF":
        fastest = best_value(instance, "request_ms", replace(bounds, request_ms=None), SETTINGS)
        assert fastest is not None
        bounds = replace(bounds, request_ms=0.99 * fastest)
    return instance, bounds


def ours(instance: Instance, bounds: Bounds) -> tuple[float, str, float | None]:
    start = time.process_time()
    solution = best_architecture(instance, bounds, SETTINGS)
    seconds = time.process_time() - start
    if solution is None:
        return seconds, "infeasible", None
    assert solution.proof is not None
    return seconds, solution.proof.status, solution.score


def cbc(
    choices: Choices, bounds: Bounds, others: Sequence[tuple[str, ...]] = (), differing: int = 1, gap: float = 1e-6
) -> tuple[float, str, float | None, tuple[str, ...]]:
    """The same by CBC: every choice a binary, nothing left out beforehand."""
    program = pulp.LpProblem("search", pulp.LpMinimize)
    x = [pulp.LpVariable(f"x{place}", cat="Binary") for place in range(len(choices.blocks))]
    scale = choices.scores.max()
    program += pulp.lpSum(x[i] * float(choices.scores[i] / scale) for i in range(len(x)))
    for layer in range(choices.num_layers):
        program += pulp.lpSum(x[i] for i in np.flatnonzero(choices.layers == layer)) == 1
    for row in bound_rows(choices, bounds):
        program += pulp.lpSum(x[i] * float(row.terms[i]) for i in range(len(x))) <= row.limit
    for blocks in others:
        program += pulp.lpSum(x[i] for i in np.flatnonzero(choices.overlap(blocks))) <= len(blocks) - differing
    before = _children_s()
    program.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=gap, timeLimit=LIMIT_S))
    seconds, status = _children_s() - before, pulp.LpStatus[program.status]
    if status != "Optimal":
        return seconds, "infeasible" if status == "Infeasible" else "unknown", None, ()
    chosen = np.array([place for place, variable in enumerate(x) if variable.value() > 0.5])
    done = "optimal" if program.sol_status == pulp.LpSolutionOptimal else "feasible"
    return seconds, done, float(choices.scores[chosen].sum()), tuple(choices.blocks[i] for i in chosen)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_set(kind: str, count: int, with_cbc: bool) -> dict[str, object]:
    found, theirs, disagree = [], [], 0
    for seed in range(count):
        instance, bounds = make(kind, seed)
        found.append(ours(instance, bounds))
        if with_cbc:
            theirs.append(cbc(instance.choices[0], bounds)[:3])
            (_, done, score), (_, other_done, other) = found[-1], theirs[-1]
            if {done, other_done} <= {"optimal", "infeasible"}:
                same = score == other if None in (score, other) else abs(score - other) <= 3e-6 * abs(score)
                disagree += not same
        print(kind, seed, found[-1], theirs[-1:] or "", flush=True)
    result: dict[str, object] = {"set": kind, "instances": count, "ours": _summary(found)}
    if with_cbc:
        result |= {"cbc": _summary(theirs), "disagree": disagree}
        result["times"] = statistics.median(s for s, *_ in theirs) / statistics.median(s for s, *_ in found)
    return result


def _summary(runs: list[tuple[float, str, float | None]]) -> dict[str, float]:
    seconds = [each for each, *_ in runs]
    proven = sum(status in ("optimal", "infeasible") for _, status, _ in runs)
    return {"median": statistics.median(seconds), "worst": max(seconds), "proven": proven}


def run_frontier(points: int, with_cbc: bool) -> dict[str, object]:
    """70B with a bound on memory; CBC solves the same programs."""
    instance, bounds = make("70B-A2", 0)
    target = TargetSettings(memory=f"{bounds.memory_bytes:.0f}B")
    start = time.process_time()
    solutions = frontier(instance.scores, instance.costs, target, SETTINGS, "throughput_tok_s", points)
    result: dict[str, object] = {"frontier": len(solutions), "ours": time.process_time() - start}
    if with_cbc:
        theirs = [cbc(instance.choices[0], solution.bounds) for solution in solutions]
        result["cbc"] = sum(seconds for seconds, *_ in theirs)
        result["cbc_proven"] = sum(done == "optimal" for _, done, *_ in theirs)
        pairs = zip(solutions, theirs, strict=True)
        result["disagree"] = sum(abs(s.score - score) > 3e-6 * s.score for s, (_, _, score, _) in pairs if score)
    return result


def run_pool(differing: int, with_cbc: bool) -> dict[str, object]:
    """Ten of 70B-A2; each solver goes on from its own solutions."""
    instance, bounds = make("70B-A2", 0)
    target = TargetSettings(memory=f"{bounds.memory_bytes:.0f}B", latency=f"{bounds.request_ms!r}ms")
    start = time.process_time()
    solutions = pool(instance.scores, instance.costs, target, SETTINGS, 10, differing)
    spread = solutions[-1].score / solutions[0].score - 1
    result: dict[str, object] = {"pool": differing, "ours": time.process_time() - start, "spread": spread}
    result["proven"] = sum(each.proof is not None and each.proof.status == "optimal" for each in solutions)
    if with_cbc:
        seconds, found, gap = 0.0, [], SETTINGS.gap
        for _ in range(10):
            taken, _, _, blocks = cbc(instance.choices[0], bounds, found, differing, gap)
            seconds, gap = seconds + taken, 1e-3 if differing > 1 else SETTINGS.gap
            found.append(blocks)
        result["cbc"] = seconds
    return result


def run_demands() -> list[dict[str, object]]:
    """70B-A2 with what needs auxiliary columns, or ties layers together; `cost` is the rise of the summed score."""
    instance, bounds = make("70B-A2", 0)
    free, rng = best_architecture(instance, bounds, SETTINGS), np.random.default_rng(0)
    assert free is not None
    parent = [instance.scores.parent_row(layer).block for layer in range(len(free.blocks))]
    changed = [layer for layer, block in enumerate(free.blocks) if block != parent[layer]][:12]
    names = [[row.block for row in instance.scores.layer(layer)] for layer in range(len(free.blocks))]
    adjacent = [
        _pair(layer, layer + 1, rng.choice(names[layer]), rng.choice(names[layer + 1]), rng.normal(0, 1e-4))
        for layer in range(len(names) - 1)
        for _ in range(16)
    ]
    chosen = [
        _pair(one, other, free.blocks[one], free.blocks[other], abs(rng.normal(0, 2e-4)))
        for one, other in itertools.combinations(changed, 2)
    ]
    asked: dict[str, dict[str, object]] = {
        f"{len(adjacent)} pair terms of adjacent layers": {"pairs": adjacent},
        f"{len(chosen)} pair terms among 12 layers of the solution": {"pairs": chosen},
        "layers equal in fours": {"constraints": SETTINGS.model_copy(update={"equal": 4})},
        **{f"at most {n} blocks": {"constraints": SETTINGS.model_copy(update={"kinds": n})} for n in (12, 8, 4)},
    }
    return [_demand(instance, bounds, free.score, name, demands) for name, demands in asked.items()]


def _pair(one: int, other: int, block: str, another: str, score: float) -> PairTerm:
    return PairTerm(layers=(one, other), blocks=(str(block), str(another)), score=float(score))


def _demand(
    instance: Instance, bounds: Bounds, free: float, name: str, demands: dict[str, object]
) -> dict[str, object]:
    asked = Instance.of(instance.scores, instance.costs, **demands)
    start = time.process_time()
    solution = best_architecture(asked, bounds, SETTINGS)
    seconds = time.process_time() - start
    assert solution is not None
    assert solution.proof is not None
    return {"demand": name, "ours": seconds, "status": solution.proof.status, "cost": solution.score / free - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*SETS, "frontier", "pool", "demands"])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--alone", action="store_true", help="without CBC")
    parser.add_argument("--out", type=Path, help="a JSON line a result is added to it")
    options = parser.parse_args()
    for name in options.only:
        if name == "frontier":
            results = [run_frontier(200, not options.alone)]
        elif name == "pool":
            results = [run_pool(differing, not options.alone) for differing in (1, 4, 8)]
        elif name == "demands":
            results = run_demands()
        else:
            results = [run_set(name, options.count, not options.alone)]
        for result in results:
            print(json.dumps(result), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
