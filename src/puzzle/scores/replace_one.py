"""Replace-1-block scores: the parent with one block replaced, as a model, on held-out text (paper section 2.3)."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.artefacts import ScoreRow, ScoreTable
from puzzle.data import TokenData
from puzzle.distributed.tasks import for_layers
from puzzle.library import LayerBlocks, Library
from puzzle.parents import Parent
from puzzle.runs import Run, progress, read_json, read_parsed, write_json, write_tensors, write_text
from puzzle.scores.suffix import KL, METRICS, SuffixScorer, state_bytes, variance_of_mean
from puzzle.scores.task import Task, check_memory, load_task, task_name, task_score, with_block
from puzzle.stages import SCORE
from puzzle.streams import Stream
from puzzle.variants import BlockVariant, Space


def score(
    run: Run, parent: Parent, data: TokenData, library: Library, space: Space, task: Task | None = None
) -> ScoreTable:
    """Score every composed block of every layer; per-sequence figures are kept in `layerNNN.safetensors`.

    Args:
        task: in place of the recipe's `score.task`. The address has its module and name, not its code.
    """
    settings = run.recipe.score
    if task is None and settings.task is not None:
        task = load_task(settings.task)
    blocks = [[block.name for block in layer.blocks()] for layer in space.layers]
    name = None if task is None else task_name(task)
    stage = run.open(SCORE, library=library, data=data, space=blocks, task=name)
    table_file, layers = stage.path / "scores.json", range(len(space.layers))
    if not stage.done:
        work = partial(_score_layers, run, parent, data, library, space, task, stage.path)
        for_layers(run, stage, work, [_cost(space, layer) for layer in layers])
        table = ScoreTable(
            num_layers=len(layers),
            sequences=data.num_sequences("scoring", settings.tokens),
            sequence_length=data.sequence_length,
            rows=tuple(ScoreRow(**row) for layer in layers for row in read_json(_rows_file(stage.path, layer))),
        )
        write_text(table_file, table.to_json())
        stage.commit(blocks=len(table.rows))
    return read_parsed(table_file, ScoreTable.from_json)


def _cost(space: Space, layer: int) -> float:
    """Blocks times the layers after them, roughly."""
    return len(space.layers[layer].blocks()) * (len(space.layers) - layer)


def _rows_file(path: Path, layer: int) -> Path:
    return path / f"layer{layer:03d}.json"


@torch.no_grad()
def _score_layers(
    run: Run,
    parent: Parent,
    data: TokenData,
    library: Library,
    space: Space,
    task: Task | None,
    path: Path,
    layers: range,
    folder: Path,
) -> None:
    """The task of a range of layers, also in another process: those that have no file yet."""
    missing = [layer for layer in layers if not _rows_file(path, layer).exists()]
    if not missing:
        return
    dtype = getattr(torch, run.recipe.precision)
    one_state = state_bytes(data, parent.config, dtype)
    candidate_bytes = max(
        sum(variant.weight_bytes(parent.config, dtype) for variant in (*choices.attention, *choices.ffn))
        + len(choices.blocks()) * one_state
        for choices in space.layers
    )
    stream = Stream(run, parent, folder / "activations", candidate_bytes)
    if task is not None:
        check_memory(stream)
    scorer = SuffixScorer(stream, data, run.recipe.score)
    stream.prepare(stream.num_layers, {"final": scorer.inputs})
    unchanged = scorer.parent()
    for name, value in (("kl", 0.0), ("cosine", 0.0), ("top1_agreement", 1.0)):
        unchanged[:, METRICS.index(name)] = value
    with progress("score", sum(_cost(space, layer) for layer in missing)) as bar:
        for layer in missing:
            stream.prepare(layer, {"scoring": scorer.inputs})
            own, *blocks = space.layers[layer].blocks()
            modules = LayerBlocks(library, layer, blocks, stream.model)
            values = scorer.blocks(modules, blocks, scorer.shared)
            whole = [block for block in blocks if own.attention == block.attention or own.ffn == block.ffn]
            for block, rest in scorer.blocks(modules, whole, scorer.rest).items():
                values[block] = torch.cat([values[block], rest])
            columns = {f"{block}.{name}": values[block][:, i] for block in values for i, name in enumerate(METRICS)}
            write_tensors(path / f"layer{layer:03d}.safetensors", columns)
            rows = []
            for block, found in {own: unchanged, **values}.items():
                if not found.isfinite().all():
                    run.log_warning(f"score of layer {layer} {block} is not finite; it cannot be chosen")
                    continue
                parts = [BlockVariant(block.attention, own.ffn), BlockVariant(own.attention, block.ffn)]
                row = _figures(
                    found, unchanged, [values[part] for part in parts] if len(found) < len(unchanged) else []
                )
                if task is not None:
                    model = partial(with_block, stream.model, layer, block, library)
                    label = "parent" if block == own else f"layer {layer} {block}"
                    row["task"] = task_score(run, task, folder / "task.json", label, model)
                rows.append({"layer": layer, "block": block.name, **row})
            write_json(_rows_file(path, layer), rows)
            bar.advance(_cost(space, layer))
    stream.close()


def _figures(values: Tensor, unchanged: Tensor, parts: Sequence[Tensor]) -> dict[str, Any]:
    """A block's figures: those of the unchanged parent on all sequences, and what the block adds to them.

    On sequences that it was not scored on, what it adds is known by its parts, if given: the sum of theirs on all
    sequences is a control variate, to which comes what the block adds beyond that sum on its own sequences. That has no
    bias.

    Args:
        values: of the block's own sequences, [n, M]. unchanged: of all. parts: of all, of each subblock alone.
    """
    added, count = values - unchanged[: len(values)], len(values)
    mean, variance = added.mean(0), variance_of_mean(added[:, KL])
    if parts:
        summed = torch.stack([part - unchanged for part in parts]).sum(0)
        beyond = added - summed[:count]
        estimate = summed.mean(0) + beyond.mean(0)
        # A divergence is positive, and by chance an estimate of a small one is not; parts may not be finite.
        if estimate.isfinite().all() and estimate[KL] > 0:
            mean, variance = estimate, variance_of_mean(summed[:, KL]) + variance_of_mean(beyond[:, KL])
    means = dict(zip(METRICS, (unchanged.mean(0) + mean).tolist(), strict=True))
    return {**means, "kl_se": math.sqrt(variance), "sequences": count}
