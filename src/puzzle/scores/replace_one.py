"""Replace-1-block scores: the parent with one block replaced, as a model, on held-out text (paper section 2.3)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from puzzle.artefacts import ScoreRow, ScoreTable
from puzzle.data import TokenData
from puzzle.distributed.tasks import for_layers
from puzzle.errors import PuzzleError
from puzzle.library import Library
from puzzle.parents import Parent, ParentPasses
from puzzle.runs import (
    Run,
    StageFolder,
    progress,
    read_json,
    read_parsed,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from puzzle.scores.race import rounds, survivors
from puzzle.scores.suffix import METRICS, LayerBlocks, ScoringText, SuffixScorer
from puzzle.scores.task import Task, load_task, run_task, task_name, with_block
from puzzle.units import format_bytes
from puzzle.variants import BlockVariant, Space, weight_bytes

_KL, _LM_LOSS, _AGREEMENT, _COSINE = (METRICS.index(name) for name in ("kl", "lm_loss", "top1_agreement", "cosine"))
PerSequence = dict[BlockVariant, Tensor]
"""The metrics of each block, [sequences, METRICS]."""


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
    identity = {
        "blocks": [[block.name for block in layer.blocks()] for layer in space.layers],
        "tokens": settings.tokens,
        "race": settings.race,
        "composed": settings.composed,
        "task": None if task is None else task_name(task),
        "precision": run.recipe.precision,
    }
    stage = run.stage("score", version=2, settings=identity, inputs=(library.address, data.address))
    table_file = stage.path / "scores.json"
    if not stage.done:
        layers = space.layers
        suffixes = [len(layer.blocks()) * (len(layers) - index) for index, layer in enumerate(layers)]
        for_layers(run, stage, partial(_score_layers, run, stage, parent, data, library, space, task), suffixes)
        table = _read_table(run, stage, data, len(layers))
        write_text(table_file, table.to_json())
        stage.commit(blocks=len(table.rows))
    return read_parsed(table_file, ScoreTable.from_json)


def _score_layers(
    run: Run,
    stage: StageFolder,
    parent: Parent,
    data: TokenData,
    library: Library,
    space: Space,
    task: Task | None,
    layers: range,
    folder: Path,
) -> None:
    """A task: the rows of those layers that have none yet."""
    missing = [layer for layer in layers if not _rows_file(stage, layer).exists()]
    if missing:
        _Scoring(run, stage, parent, data, library, space, task, folder).score(missing)


def _read_table(run: Run, stage: StageFolder, data: TokenData, num_layers: int) -> ScoreTable:
    sequences = _num_sequences(run, data)
    rows = [ScoreRow(**row) for layer in range(num_layers) for row in read_json(_rows_file(stage, layer))]
    if len(rounds(run.recipe.score.race, sequences)) > 1:
        run.log(f"score: {_race_outcome(rows, sequences)}")
    return ScoreTable(
        num_layers=num_layers, sequences=sequences, sequence_length=data.sequence_length, rows=tuple(rows)
    )


def _num_sequences(run: Run, data: TokenData) -> int:
    return min(math.ceil(run.recipe.score.tokens / data.sequence_length), data.num_sequences("scoring"))


def _rows_file(stage: StageFolder, layer: int) -> Path:
    return stage.path / f"layer{layer:03d}.json"


class _Scoring:
    """One process's work, layer by layer; a finished layer is on disk, and so is the first round of a race."""

    def __init__(
        self,
        run: Run,
        stage: StageFolder,
        parent: Parent,
        data: TokenData,
        library: Library,
        space: Space,
        task: Task | None,
        folder: Path,
    ) -> None:
        self._run, self._stage, self._library, self._space, self._task = run, stage, library, space, task
        self._parent, self._folder = parent, folder
        self._sequences = _num_sequences(run, data)
        self._text = ScoringText.cut(data, rounds(run.recipe.score.race, self._sequences))

    @torch.no_grad()
    def score(self, layers: Sequence[int]) -> None:
        passes, scorer = self._passes, SuffixScorer(self._run, self._passes, self._text)
        num_layers = len(self._space.layers)
        passes.prepare(num_layers, {"final": self._text.inputs})
        parent = scorer.parent(range(len(self._text.batches)))
        suffix_layers = {i: len(self._space.layers[i].blocks()) * (num_layers - i) for i in layers}
        with progress("score", sum(suffix_layers.values())) as bar:
            for layer in layers:
                passes.prepare(layer, {"scoring": self._text.inputs})
                blocks = LayerBlocks(self._library, layer, self._space.layers[layer].blocks(), passes.model)
                per_sequence = self._per_sequence(scorer, blocks)
                if per_sequence:
                    write_tensors(self._stage.path / f"layer{layer:03d}.safetensors", _named(per_sequence))
                rows = [asdict(row) for row in self._rows(layer, parent, per_sequence)]
                write_json(_rows_file(self._stage, layer), rows)
                self._first_round_file(layer).unlink(missing_ok=True)
                bar.advance(suffix_layers[layer])
        passes.close()

    @cached_property
    def _passes(self) -> ParentPasses:
        config, dtype = self._parent.config, getattr(torch, self._run.recipe.precision)
        state_bytes = self._text.state_bytes(config.hidden_size, dtype)
        candidate_bytes = [
            sum(weight_bytes(variant, config, dtype) for variant in (*layer.attention, *layer.ffn))
            + len(layer.blocks()) * state_bytes
            for layer in self._space.layers
        ]
        passes = ParentPasses(self._run, self._parent, self._folder / "activations", max(candidate_bytes))
        if self._task is not None and not passes.resident:
            raise PuzzleError(
                f"score.task: needs the whole parent in memory, {format_bytes(sum(passes.layer_bytes))} and "
                f"{format_bytes(max(candidate_bytes))} for candidates, allowed are "
                f"{format_bytes(self._run.memory_bytes)}; raise execution.memory or leave score.task out"
            )
        return passes

    def _per_sequence(self, scorer: SuffixScorer, layer_blocks: LayerBlocks) -> PerSequence:
        """Of every block but the parent's own: all sequences, or those of the first round for what stops there."""
        blocks = self._space.layers[layer_blocks.layer].blocks()[1:]
        first, *later = self._text.rounds
        if not blocks or not later:
            return scorer.blocks(layer_blocks, blocks, first)
        file = self._first_round_file(layer_blocks.layer)
        if not file.exists():
            write_tensors(file, _named(scorer.blocks(layer_blocks, blocks, first)))
        scores = _from_named(read_tensors(file), blocks)
        if self._run.recipe.score.composed == "estimated":
            left = [block for block in blocks if self._subblocks(layer_blocks.layer, block) is None]
        else:
            left = survivors({block: values[:, _KL] for block, values in scores.items()}, self._parent.config)
        for block, values in scorer.blocks(layer_blocks, left, later[0]).items():
            scores[block] = torch.cat([scores[block], values])
        return scores

    def _rows(self, layer: int, parent: Tensor, per_sequence: PerSequence) -> list[ScoreRow]:
        """Means and standard errors; blocks that are not finite are left out and named in the log."""
        own = self._space.layers[layer].parent
        rows = [
            ScoreRow(
                layer=layer,
                block=own.name,
                kl=0.0,
                kl_se=0.0,
                lm_loss=float(parent[:, _LM_LOSS].mean()),
                top1_agreement=1.0,
                cosine=0.0,
                sequences=self._sequences,
                task=self._task_score("parent"),
            )
        ]
        for block, values in per_sequence.items():
            if not values.isfinite().all():
                self._run.log_warning(f"score of layer {layer} {block} is not finite; it cannot be chosen")
                continue
            estimated = self._run.recipe.score.composed == "estimated"
            runs_task = estimated or len(values) == self._sequences
            task = self._task_score(f"layer {layer} {block}", layer, block) if runs_task else None
            subblocks = self._subblocks(layer, block) if estimated and len(values) < self._sequences else None
            scored_halves = None if subblocks is None else [per_sequence[subblock] for subblock in subblocks]
            if scored_halves is not None and not all(subblock.isfinite().all() for subblock in scored_halves):
                scored_halves = None
            rows.append(_row(layer, block, values, parent, scored_halves, task))
        return rows

    def _subblocks(self, layer: int, block: BlockVariant) -> tuple[BlockVariant, BlockVariant] | None:
        """The blocks with one of its subblocks beside the parent's own; None if it is such a block itself."""
        own = self._space.layers[layer].parent
        if own.attention == block.attention or own.ffn == block.ffn:
            return None
        return BlockVariant(block.attention, own.ffn), BlockVariant(own.attention, block.ffn)

    def _task_score(self, label: str, layer: int = 0, block: BlockVariant | None = None) -> float | None:
        """Of a block in the parent, or of the parent itself; kept in `task.json` from one start to the next."""
        if self._task is None:
            return None
        file = self._folder / "task.json"
        known: dict[str, float | None] = read_json(file) if file.exists() else {}
        if label not in known:
            model = self._passes.model
            if block is not None:
                model = with_block(model, layer, block, self._library.block_state(layer, block))
            number = run_task(self._task, model)
            if not math.isfinite(number):
                if block is None:
                    raise PuzzleError(f"score.task: {task_name(self._task)} is {number} for the parent itself")
                self._run.log_warning(f"task score of {label} is {number}; it has none")
            known[label] = number if math.isfinite(number) else None
            write_json(file, known)
        return known[label]

    def _first_round_file(self, layer: int) -> Path:
        return self._stage.path / f"layer{layer:03d}.round1.safetensors"


def _row(
    layer: int,
    block: BlockVariant,
    values: Tensor,
    parent: Tensor,
    subblocks: Sequence[Tensor] | None,
    task: float | None,
) -> ScoreRow:
    """A block's row, as the parent's figures on all sequences and what the block adds to them.

    What it was not scored on is known by its subblocks, if given: their sum on all sequences is a control variate, to
    which comes what the block has beyond them on the sequences that it was scored on. That has no bias.
    """
    base = parent.clone()
    base[:, _KL], base[:, _COSINE], base[:, _AGREEMENT] = 0.0, 0.0, 1.0
    added, count = values - base[: len(values)], len(values)
    variance = _variance_of_mean(added[:, _KL])
    mean = added.mean(0)
    if subblocks is not None:
        summed = torch.stack([subblock - base for subblock in subblocks]).sum(0)
        beyond = added - summed[:count]
        estimate = summed.mean(0) + beyond.mean(0)
        # A divergence is positive, and by chance an estimate of a small one is not.
        if estimate[_KL] > 0:
            mean = estimate
            variance = _variance_of_mean(summed[:, _KL]) + _variance_of_mean(beyond[:, _KL])
    means = dict(zip(METRICS, (base.mean(0) + mean).tolist(), strict=True))
    return ScoreRow(layer=layer, block=block.name, kl_se=math.sqrt(variance), sequences=count, task=task, **means)


def _variance_of_mean(values: Tensor) -> float:
    return float(values.var() / len(values)) if len(values) > 1 else 0.0


def _race_outcome(rows: Sequence[ScoreRow], sequences: int) -> str:
    others = [row for row in rows if row.kl != 0]
    stopped = sum(row.sequences < sequences for row in others)
    saved = 1 - sum(row.sequences for row in others) / max(1, len(others) * sequences)
    return f"{stopped} of {len(others)} blocks stopped after the first round, which saved {saved:.0%} of the sequences"


def _named(per_sequence: PerSequence) -> dict[str, Tensor]:
    return {
        f"{block}.{name}": values[:, column]
        for block, values in per_sequence.items()
        for column, name in enumerate(METRICS)
    }


def _from_named(tensors: Mapping[str, Tensor], blocks: Sequence[BlockVariant]) -> PerSequence:
    return {block: torch.stack([tensors[f"{block}.{name}"] for name in METRICS], dim=1) for block in blocks}
