"""Replace-1-block scores: the parent with one block replaced, as a model, on held-out text (paper section 2.3)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from puzzle.artefacts import ScoreRow, ScoreTable
from puzzle.data import TokenData
from puzzle.distributed.tasks import for_layers
from puzzle.library import LayerBlocks, Library
from puzzle.parents import Parent
from puzzle.runs import Run, StageFolder, progress, read_json, read_parsed, write_json, write_tensors, write_text
from puzzle.scores.suffix import METRICS, ScoringText, SuffixScorer, num_sequences
from puzzle.scores.task import Task, TaskScores, load_task, task_name
from puzzle.stages import SCORE
from puzzle.streams import Stream
from puzzle.variants import BlockVariant, Space

_KL, _LM_LOSS, _AGREEMENT, _COSINE = (METRICS.index(name) for name in ("kl", "lm_loss", "top1_agreement", "cosine"))


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
    table_file = stage.path / "scores.json"
    if not stage.done:
        scoring = _Scoring(run, stage, parent, data, library, space, task)
        for_layers(run, stage, scoring, [scoring.cost(layer) for layer in range(len(space.layers))])
        rows = [row for layer in range(len(space.layers)) for row in read_json(scoring.rows_file(layer))]
        table = ScoreTable(
            num_layers=len(space.layers),
            sequences=num_sequences(data, settings),
            sequence_length=data.sequence_length,
            rows=tuple(ScoreRow(**row) for row in rows),
        )
        write_text(table_file, table.to_json())
        stage.commit(blocks=len(table.rows))
    return read_parsed(table_file, ScoreTable.from_json)


@dataclass(frozen=True)
class _Scoring:
    """A task for any range of layers, also in another process; a finished layer is on disk."""

    run: Run
    stage: StageFolder
    parent: Parent
    data: TokenData
    library: Library
    space: Space
    task: Task | None

    def cost(self, layer: int) -> float:
        """Blocks times the layers after them, roughly."""
        return len(self.space.layers[layer].blocks()) * (len(self.space.layers) - layer)

    def rows_file(self, layer: int) -> Path:
        return self.stage.path / f"layer{layer:03d}.json"

    @torch.no_grad()
    def __call__(self, layers: range, folder: Path) -> None:
        missing = [layer for layer in layers if not self.rows_file(layer).exists()]
        if not missing:
            return
        text = ScoringText.cut(self.data, self.run.recipe.score)
        stream = Stream(self.run, self.parent, folder / "activations", self._candidate_bytes(text))
        tasks = TaskScores(self.task, self.run, stream, self.library, folder / "task.json")
        stream.prepare(stream.num_layers, {"final": text.inputs})
        scorer = SuffixScorer(stream, text)
        own = scorer.parent()
        with progress("score", sum(map(self.cost, missing))) as bar:
            for layer in missing:
                stream.prepare(layer, {"scoring": text.inputs})
                values = self._blocks(scorer, stream, text, layer)
                write_json(self.rows_file(layer), [asdict(row) for row in self._rows(layer, own, values, tasks)])
                bar.advance(self.cost(layer))
        stream.close()

    def _candidate_bytes(self, text: ScoringText) -> int:
        """What the candidates of a layer take: their weights, and a state of each."""
        config, dtype = self.parent.config, getattr(torch, self.run.recipe.precision)
        state_bytes = text.state_bytes(config.hidden_size, dtype)
        return max(
            sum(variant.weight_bytes(config, dtype) for variant in (*layer.attention, *layer.ffn))
            + len(layer.blocks()) * state_bytes
            for layer in self.space.layers
        )

    def _blocks(
        self, scorer: SuffixScorer, stream: Stream, text: ScoringText, layer: int
    ) -> dict[BlockVariant, Tensor]:
        """Per sequence, [n, M]: on the share of the text, or on all of it for what has one subblock replaced."""
        blocks = self.space.layers[layer].blocks()[1:]
        if not blocks:
            return {}
        modules = LayerBlocks(self.library, layer, blocks, stream.model)
        values = scorer.blocks(modules, blocks, text.share)
        whole = [block for block in blocks if self._parts(layer, block) is None]
        for block, rest in scorer.blocks(modules, whole, text.rest).items():
            values[block] = torch.cat([values[block], rest])
        write_tensors(self.stage.path / f"layer{layer:03d}.safetensors", _named(values))
        return values

    def _parts(self, layer: int, block: BlockVariant) -> tuple[BlockVariant, BlockVariant] | None:
        """The blocks with one of its subblocks beside the parent's own; None if it is such a block itself."""
        own = self.space.layers[layer].parent
        if own.attention == block.attention or own.ffn == block.ffn:
            return None
        return BlockVariant(block.attention, own.ffn), BlockVariant(own.attention, block.ffn)

    def _rows(
        self, layer: int, own: Tensor, values: Mapping[BlockVariant, Tensor], tasks: TaskScores
    ) -> list[ScoreRow]:
        """Means and standard errors; blocks that are not finite are left out and named in the log."""
        unchanged = own.clone()
        unchanged[:, _KL], unchanged[:, _COSINE], unchanged[:, _AGREEMENT] = 0.0, 0.0, 1.0
        parent_block = self.space.layers[layer].parent
        rows = [_row(layer, parent_block, unchanged, unchanged, None, tasks.of_parent())]
        for block, found in values.items():
            if not found.isfinite().all():
                self.run.log_warning(f"score of layer {layer} {block} is not finite; it cannot be chosen")
                continue
            names = self._parts(layer, block) if len(found) < len(own) else None
            parts = None if names is None else [values[name] for name in names]
            if parts is not None and not all(part.isfinite().all() for part in parts):
                parts = None
            rows.append(_row(layer, block, found, unchanged, parts, tasks.of_block(layer, block)))
        return rows


def _row(
    layer: int,
    block: BlockVariant,
    values: Tensor,
    unchanged: Tensor,
    parts: Sequence[Tensor] | None,
    task: float | None,
) -> ScoreRow:
    """A block's row: the figures of the unchanged parent on all sequences, and what the block adds to them.

    On sequences that it was not scored on, what it adds is known by its parts, if given: the sum of theirs on all
    sequences is a control variate, to which comes what the block adds beyond that sum on its own sequences. That has no
    bias.

    Args:
        values: of the block's own sequences, [n, M]. unchanged: of all. parts: of all, of each subblock alone.
    """
    added, count = values - unchanged[: len(values)], len(values)
    mean, variance = added.mean(0), _variance_of_mean(added[:, _KL])
    if parts is not None:
        summed = torch.stack([part - unchanged for part in parts]).sum(0)
        beyond = added - summed[:count]
        estimate = summed.mean(0) + beyond.mean(0)
        # A divergence is positive, and by chance an estimate of a small one is not.
        if estimate[_KL] > 0:
            mean = estimate
            variance = _variance_of_mean(summed[:, _KL]) + _variance_of_mean(beyond[:, _KL])
    means = dict(zip(METRICS, (unchanged.mean(0) + mean).tolist(), strict=True))
    return ScoreRow(layer=layer, block=block.name, kl_se=math.sqrt(variance), sequences=count, task=task, **means)


def _variance_of_mean(values: Tensor) -> float:
    return float(values.var() / len(values)) if len(values) > 1 else 0.0


def _named(values: Mapping[BlockVariant, Tensor]) -> dict[str, Tensor]:
    return {
        f"{block}.{name}": found[:, column] for block, found in values.items() for column, name in enumerate(METRICS)
    }
