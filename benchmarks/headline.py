"""A finished run's result on llama.cpp: parent and child timed in turns, the child's quality beside its speed.

    python benchmarks/headline.py RUN [THREADS]

Prints the figures and draws `figures/headline.html`, in which the paper's own point lies as well: other models, other
hardware, another measure of quality, so a mark to aim at and no comparison.
"""

import json
import sys
from pathlib import Path

import plotly.graph_objects as go
import torch

from puzzle.artefacts import Cost, Totals
from puzzle.costs import scenario_of, summarise, time_models
from puzzle.parents import open_parent
from puzzle.runs.run import read_recipe

PAPER = {"speed": 2.17, "kept": 0.984}
"""Nemotron-51B: throughput on one H100 at FP8, and the share of Llama-3.1-70B's mean accuracy (arXiv 2411.19146)."""
ROUNDS = 9
FIGURE = Path(__file__).parent / "figures" / "headline.html"


def main(folder: str, threads: str = "1") -> None:
    """Time both, print, draw."""
    torch.set_num_threads(int(threads))
    run = Path(folder)
    recipe = read_recipe(run)
    rows = json.loads((run / "summary.json").read_text())["rows"]
    scenario = scenario_of(recipe.scenario.model_copy(update={"engine": "llama.cpp"}), torch.device("cpu"))
    (batch_size,) = recipe.scenario.batch_sizes
    parent = open_parent(recipe.parent)
    models = {"parent": parent.path, "child": run / "child"}
    measured = time_models([(path, batch_size) for path in models.values()], scenario, ROUNDS)
    times = {name: summarise(samples) for name, samples in zip(models, measured, strict=True)}
    speeds = {}
    for name, time in times.items():
        cost = Cost(prefill_ms=time.prefill_ms, decode_ms=time.decode_ms)
        totals = Totals(batch_size=batch_size, generated_tokens=scenario.generated_tokens, cost=cost)
        speeds[name] = totals.as_dict()["throughput_tok_s"]
        print(f"| {name} | {speeds[name]:,.0f} | {time.prefill_ms:.4g} | {time.decode_ms:.4g} |")
    child = {"speed": speeds["child"] / speeds["parent"], "kept": rows["child"]["top1"] / rows["parent"]["top1"]}
    print(
        f"{scenario}, batch {batch_size}: {child['speed']:.2f}x at {child['kept']:.1%} of the parent's top-1 accuracy"
    )
    print(f"(on the run's own engine {rows['child']['measured_tok_s'] / rows['parent']['measured_tok_s']:.2f}x)")
    draw({"this child, llama.cpp, top-1 accuracy": child, "paper, H100, mean of benchmarks": PAPER})


def draw(points: dict[str, dict[str, float]]) -> None:
    """Quality kept against speed-up, a point each; the parent is at 1x and 100 %."""
    everything = {"parent": {"speed": 1.0, "kept": 1.0}, **points}
    marks = [
        go.Scatter(x=[point["speed"]], y=[100 * point["kept"]], name=name, mode="markers", marker={"size": 12})
        for name, point in everything.items()
    ]
    figure = go.Figure(marks)
    figure.update_layout(template="plotly_white", width=700, height=420)
    figure.update_xaxes(title="throughput, x the parent's")
    figure.update_yaxes(title="quality kept, %")
    figure.write_html(FIGURE, include_plotlyjs="cdn", div_id="headline")


if __name__ == "__main__":
    main(*sys.argv[1:])
