"""How fast the search proves its solutions, beside CBC and CP-SAT, on generated instances: benchmarks/search.md.

    pip install pulp ortools
    python benchmarks/search.py                                              # everything; 70B-DEG takes longest
    python benchmarks/search.py --only 70B-A2 --count 20 --beside cbc        # one set

Shapes are Llama's; costs an H100 roofline's with noise; scores grow with compression, differ by depth, with noise. CPU
seconds of one thread; others' are of their own processes, without what it takes to write the program down. Every
instance is kept in `results/search.jsonl`.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from puzzle.artefacts import Bounds, CostRow, CostTable, PairTerm, Scenario, ScoreRow, ScoreTable
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search import frontier, pool
from puzzle.search.bounds import without
from puzzle.search.exact import Instance, best_architecture
from puzzle.search.explain import best_value
from puzzle.search.problem import Choices, bound_rows

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
LIMIT_S = 20.0
"""Of CPU time, for each program and solver; for the search itself of elapsed time."""
SETTINGS = SearchSettings(gap=1e-6, margin=0.0, time_limit_s=LIMIT_S)


class Answer(NamedTuple):
    seconds: float
    status: str
    """`optimal`, `infeasible`, `feasible` or `unknown`."""
    score: float | None
    blocks: tuple[str, ...] = ()

    @property
    def proven(self) -> bool:
        return self.status in ("optimal", "infeasible")

    def differs(self, other: "Answer") -> bool:
        """Whether two proofs exclude each other."""
        if not (self.proven and other.proven):
            return False
        if self.score is None or other.score is None:
            return self.score != other.score
        return abs(self.score - other.score) > 3e-6 * abs(self.score)


def half_costs(model: str) -> dict[tuple[str, str], tuple[int, int, float, float]]:
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
    layers, subblocks, quality = MODELS[model][0], half_costs(model), {}
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
        share = rng.uniform(0.4, 0.98) if bounds else rng.uniform(0.25, 0.85)
        bounds = bounds | {name: float(smallest + share * (reached - smallest))}
        solution = best_architecture(instance, bounds, SETTINGS)
    if case == "INF":
        fastest = best_value(instance, "request_ms", without(bounds, "request_ms"), SETTINGS)
        assert fastest is not None
        bounds = bounds | {"request_ms": 0.99 * fastest}
    return instance, bounds


def ours(instance: Instance, bounds: Bounds) -> Answer:
    start = time.process_time()
    solution = best_architecture(instance, bounds, SETTINGS)
    seconds = time.process_time() - start
    if solution is None:
        return Answer(seconds, "infeasible", None)
    assert solution.proof is not None
    return Answer(seconds, solution.proof.status, solution.score, solution.blocks)


def limited(
    choices: Choices, bounds: Bounds, others: Sequence[tuple[str, ...]], differing: int
) -> list[tuple[list[float], float]]:
    """Terms and upper limit of every row that other solvers are given."""
    away = [(choices.overlap(blocks).tolist(), float(len(blocks) - differing)) for blocks in others]
    return [*((row.terms.tolist(), row.limit) for row in bound_rows(choices, bounds)), *away]


def cbc(
    choices: Choices,
    bounds: Bounds,
    others: Sequence[tuple[str, ...]] = (),
    differing: int = 1,
    gap: float = SETTINGS.gap,
) -> Answer:
    """The same by CBC: every choice a binary, nothing left out beforehand."""
    import pulp

    program = pulp.LpProblem("search", pulp.LpMinimize)
    x = [pulp.LpVariable(f"x{place}", cat="Binary") for place in range(len(choices.blocks))]
    program += pulp.lpDot((choices.scores / choices.scores.max()).tolist(), x)
    for layer in range(choices.num_layers):
        program += pulp.lpSum(x[i] for i in np.flatnonzero(choices.layers == layer)) == 1
    for terms, limit in limited(choices, bounds, others, differing):
        program += pulp.lpDot(terms, x) <= limit
    before = _children_s()
    program.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=gap, timeLimit=LIMIT_S, timeMode="cpu"))
    seconds, status = _children_s() - before, pulp.LpStatus[program.status]
    if status != "Optimal":
        return Answer(seconds, "infeasible" if status == "Infeasible" else "unknown", None)
    chosen = [place for place, variable in enumerate(x) if variable.value() > 0.5]
    done = "optimal" if program.sol_status == pulp.LpSolutionOptimal else "feasible"
    return _answer(choices, seconds, done, chosen)


def cp_sat(
    choices: Choices,
    bounds: Bounds,
    others: Sequence[tuple[str, ...]] = (),
    differing: int = 1,
    gap: float = SETTINGS.gap,
) -> Answer:
    """The same by CP-SAT of OR-Tools."""
    program = {
        "num_layers": choices.num_layers,
        "layers": choices.layers.tolist(),
        "objective": (choices.scores / choices.scores.max()).tolist(),
        "rows": limited(choices, bounds, others, differing),
        "gap": gap,
        "limit_s": LIMIT_S,
    }
    command = [sys.executable, str(Path(__file__).parent / "cp_sat.py")]
    printed = subprocess.run(command, input=json.dumps(program), capture_output=True, text=True, check=True).stdout
    status, chosen, seconds = json.loads(printed)
    return _answer(choices, seconds, status.lower(), chosen)


def _answer(choices: Choices, seconds: float, status: str, chosen: Sequence[int]) -> Answer:
    if not chosen:
        return Answer(seconds, status, None)
    return Answer(seconds, status, float(choices.scores[chosen].sum()), tuple(choices.blocks[i] for i in chosen))


Solver = Callable[..., Answer]
OTHERS: dict[str, Solver] = {"cbc": cbc, "cp-sat": cp_sat}


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_set(kind: str, seeds: range, beside: Sequence[str]) -> Iterator[dict[str, object]]:
    """A row an instance, and one of the whole set."""
    found: dict[str, list[Answer]] = {name: [] for name in ("ours", *beside)}
    for seed in seeds:
        instance, bounds = make(kind, seed)
        found["ours"].append(ours(instance, bounds))
        for name in beside:
            found[name].append(OTHERS[name](instance.choices[0], bounds))
        last = {name: answers[-1] for name, answers in found.items()}
        differ = [name for name in beside if last["ours"].differs(last[name])]
        yield {"set": kind, "seed": seed, **{name: each[:3] for name, each in last.items()}, "differ": differ}
    yield {"set": kind, "instances": len(seeds)} | {name: _summary(answers) for name, answers in found.items()}


def _summary(answers: Sequence[Answer]) -> dict[str, float]:
    seconds = [answer.seconds for answer in answers]
    proven = sum(answer.proven for answer in answers)
    return {"median": statistics.median(seconds), "worst": max(seconds), "proven": proven}


def run_frontier(points: int, beside: Sequence[str]) -> Iterator[dict[str, object]]:
    """70B with a bound on memory; the others solve the same programs."""
    instance, bounds = make("70B-A2", 0)
    target = TargetSettings(memory=f"{bounds['memory_bytes']:.0f}B")
    start = time.process_time()
    solutions = frontier(instance.scores, instance.costs, target, SETTINGS, "throughput_tok_s", points)
    result: dict[str, object] = {"frontier": len(solutions), "ours": time.process_time() - start}
    for name in beside:
        answers = [OTHERS[name](instance.choices[0], solution.bounds) for solution in solutions]
        pairs = zip(solutions, answers, strict=True)
        result[name] = {
            "seconds": sum(answer.seconds for answer in answers),
            "proven": sum(answer.proven for answer in answers),
            "differ": sum(answer.differs(Answer(0.0, "optimal", solution.score)) for solution, answer in pairs),
        }
    yield result


def run_pool(differing: int, beside: Sequence[str]) -> Iterator[dict[str, object]]:
    """Ten of 70B-A2; each solver goes on from its own solutions."""
    instance, bounds = make("70B-A2", 0)
    target = TargetSettings(memory=f"{bounds['memory_bytes']:.0f}B", latency=f"{bounds['request_ms']!r}ms")
    start = time.process_time()
    solutions = pool(instance.scores, instance.costs, target, SETTINGS, 10, differing)
    spread = solutions[-1].score / solutions[0].score - 1
    result: dict[str, object] = {"pool": differing, "ours": time.process_time() - start, "spread": spread}
    result["proven"] = sum(each.proof is not None and each.proof.status == "optimal" for each in solutions)
    for name in beside:
        found: list[Answer] = []
        for _ in range(10):
            gap = 1e-3 if differing > 1 and found else SETTINGS.gap
            others = [answer.blocks for answer in found]
            found.append(OTHERS[name](instance.choices[0], bounds, others, differing, gap))
        seconds, proven = sum(answer.seconds for answer in found), sum(answer.proven for answer in found)
        result[name] = {"seconds": seconds, "proven": proven}
    yield result


def run_demands() -> Iterator[dict[str, object]]:
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
    for name, demands in asked.items():
        yield _demand(instance, bounds, free.score, name, demands)


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


def results(name: str, seeds: range, beside: Sequence[str]) -> Iterator[dict[str, object]]:
    if name == "frontier":
        return run_frontier(200, beside)
    if name == "pool":
        return itertools.chain.from_iterable(run_pool(differing, beside) for differing in (1, 4, 8))
    return run_demands() if name == "demands" else run_set(name, seeds, beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*SETS, "frontier", "pool", "demands"])
    parser.add_argument("--first", type=int, default=0, help="the first seed of a set")
    parser.add_argument("--count", type=int, default=20, help="so many seeds")
    parser.add_argument("--beside", nargs="*", choices=OTHERS, default=[*OTHERS], help="which other solvers")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.count)
    for name in options.only:
        for result in results(name, seeds, options.beside):
            print(json.dumps(result), flush=True)
            with KEPT.open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
