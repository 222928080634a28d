"""Figures of the benchmarks' pages, drawn from the kept rows in `results/`.

pip install matplotlib && python benchmarks/figures.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

HERE = Path(__file__).parent
COLOURS = {"paper": "#868e9c", "closed form": "#2b7fd0", "elastic": "#e0761b"}
SPEED_COLOURS = {"1.5x": "#7fb2e5", "2x": "#2b7fd0", "3x": "#08264f"}
QUALITY_SPEEDS = ("1.3x", "2x", "3x")
VARIANTS = (("attention", "kv3"), ("attention", "kv1"), ("ffn", "w256"), ("ffn", "w64"))


def main() -> None:
    """Draw every figure."""
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams |= {"svg.hashsalt": "puzzle", "svg.fonttype": "none"}  # the same rows give the same file
    draw_library(rows("library"))
    draw_ablations(rows("ablations"))
    draw_search_quality(rows("search_quality"))


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / "results" / f"{name}.jsonl").read_text().splitlines()]


def save(name: str) -> None:
    plt.savefig(HERE / "figures" / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close()


def draw_library(measured: Sequence[dict[str, Any]]) -> None:
    """Held-out loss against BLD steps, a panel for each of a few variants, a line for each way to start."""
    _, panels = plt.subplots(1, len(VARIANTS), figsize=(10, 2.6), sharex=True, layout="constrained")
    for axes, (subblock, variant) in zip(panels, VARIANTS, strict=True):
        own = [row for row in measured if (row["subblock"], row["variant"]) == (subblock, variant)]
        for method, colour in COLOURS.items():
            # An elastic library differs in its FFNs alone.
            if subblock == "attention" and method == "elastic":
                continue
            draw_method(axes, [row for row in own if row["method"] == method], method, colour)
        axes.set(title=f"{subblock} {variant}", xlabel="steps of 512 tokens", yscale="log")
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(left=-1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    panels[0].set_ylabel("held-out loss")
    panels[-1].legend(frameon=False, loc="upper right")
    save("library")


def draw_method(axes: Axes, own: Sequence[dict[str, Any]], method: str, colour: str) -> None:
    steps = sorted({row["steps"] for row in own})
    losses = [mean(row["loss"] for row in own if row["steps"] == step) for step in steps]
    axes.plot(steps, losses, "o-", color=colour, label=method, markersize=4)


def draw_ablations(measured: Sequence[dict[str, Any]]) -> None:
    """The child's KL before GKD, a row for each ablation, a dot for each speed."""
    names = list(dict.fromkeys(row["ablation"] for row in measured))
    _, axes = plt.subplots(figsize=(7, 0.34 * len(names) + 0.8))
    for speed, colour in SPEED_COLOURS.items():
        values = {row["ablation"]: row["kl"] for row in measured if row["speed"] == speed}
        axes.plot([values[name] for name in names], range(len(names)), "o", color=colour, label=speed)
        axes.axvline(values[names[0]], color=colour, linewidth=0.6, linestyle=":")
    axes.set(xscale="log", xlabel="KL to the parent before GKD, nats a token", yticks=range(len(names)))
    axes.set_yticklabels(names)
    axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1.0], labels=["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.grid(axis="y", linewidth=0.3)
    axes.legend(frameon=False, title="predicted speed")
    save("ablations")


def draw_search_quality(measured: Sequence[dict[str, Any]]) -> None:
    """The KL of every method's children, a panel for each speed: all seeds, before GKD (rings) and after it (dots)."""
    names = list(dict.fromkeys(row["method"] for row in measured))
    size = (10, 0.25 * len(names) + 0.9)
    _, panels = plt.subplots(1, len(QUALITY_SPEEDS), figsize=size, sharey=True, layout="constrained")
    for axes, speed in zip(panels, QUALITY_SPEEDS, strict=True):
        for after, fill in ((False, "none"), (True, "full")):
            own = [row for row in measured if row["speed"] == speed and bool(row["gkd"]) == after and "kl" in row]
            places = [names.index(row["method"]) + (0.15 if after else -0.15) for row in own]
            label = "after GKD" if after else "before GKD"
            axes.plot(
                [row["kl"] for row in own], places, "o", fillstyle=fill, markersize=4, color="#2b7fd0", label=label
            )
        axes.set(title=speed, xscale="log", xlabel="KL to the parent, nats a token", yticks=range(len(names)))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", linewidth=0.3)
    panels[0].set_yticklabels(names)
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False, loc="upper right")
    save("search_quality")


if __name__ == "__main__":
    main()
