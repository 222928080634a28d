"""Replace-1-block scores: the parent with one block replaced, as a model, on held-out text (paper section 2.3).

The inputs of a layer are on disk for all scoring text, so that a candidate costs its own block and the layers after it,
not the whole model (law 9: the same as a full forward). Of a streamed parent the layers after the block are held a few
at a time, for as much text as the candidates' states then leave room for.

Shapes: A candidate blocks, B sequences a batch, T tokens, D hidden size, N = B * T, n sequences, M metrics.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.artefacts import ScoreRow, ScoreTable
from puzzle.data import TokenData
from puzzle.device import tokens_at_once
from puzzle.distributed.tasks import for_layers
from puzzle.errors import PuzzleError
from puzzle.library import LayerBlocks, Library
from puzzle.metrics import compare
from puzzle.modeling import PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.recipe import ScoreSettings
from puzzle.runs import Run, progress, read_json, read_parsed, write_json, write_tensors, write_text
from puzzle.scores.task import Task, load_task, task_name, task_score, with_block
from puzzle.stages import SCORE
from puzzle.streams import Stream, read_ahead
from puzzle.units import format_bytes
from puzzle.variants import BlockVariant, LayerSpace, Space

METRICS = ("kl", "lm_loss", "top1_agreement", "cosine")
"""Per-sequence means, the columns of [n, M]."""
_BATCH_TOKENS = 2048
"""Of a batch of text on disk, at least: all candidates of a layer have a state for each token."""
_NOISE = "noise.json"
_MIN_SHARE = 4
"""Sequences at least of the share for composed blocks: fewer say nothing of their own spread."""


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
    name = None if task is None else task_name(task)
    named = space.names if run.recipe.space.importance else [*space.names, ["without importance"]]
    stage = run.open(SCORE, library=library, data=data, space=named, task=name)
    table_file = stage.path / "scores.json"
    if not stage.done:
        for_layers(run, stage, partial(_score_layers, run, data, library, space, task, stage.path), _costs(space))
        files = (stage.path / f"layer{layer:03d}.json" for layer in range(len(space.layers)))
        table = ScoreTable(
            num_layers=len(space.layers),
            sequences=data.num_sequences("scoring", settings.tokens),
            sequence_length=data.sequence_length,
            rows=tuple(ScoreRow(**row) for file in files for row in read_json(file)),
            noise=read_json(stage.path / _NOISE) if (stage.path / _NOISE).exists() else 0.0,
        )
        if table.noise:
            run.log(f"score: a KL is known to {table.noise:.1e} nats, the parent's to itself; less counts as equal")
        write_text(table_file, table.to_json())
        stage.commit()
    return read_parsed(table_file, ScoreTable.from_json)


def _costs(space: Space) -> list[float]:
    """Of each layer: blocks times the layers after them, roughly."""
    return [len(layer.scored()) * (len(space.layers) - index) for index, layer in enumerate(space.layers)]


@torch.no_grad()
def _score_layers(
    run: Run, data: TokenData, library: Library, space: Space, task: Task | None, out: Path, layers: range, folder: Path
) -> None:
    """The task of a range of layers, also in another process: those that have no file yet."""
    files = {layer: out / f"layer{layer:03d}.json" for layer in layers}
    missing = [layer for layer, file in files.items() if not file.exists()]
    if not missing:
        return
    parent, dtype, costs = library.parent, getattr(torch, run.recipe.precision), _costs(space)
    batch_tokens = max(_BATCH_TOKENS, tokens_at_once(run.device, parent.config.hidden_size) // 4)
    state_bytes = max(batch_tokens, data.sequence_length) * parent.config.hidden_size * dtype.itemsize
    weights = [sum(each.weight_bytes(parent.config, dtype) for each in choices.variants) for choices in space.layers]
    states = [state_bytes * len(choices.scored()) for choices in space.layers]
    reserved_bytes = max(map(sum, zip(weights, states, strict=True)))
    stream = Stream(run, parent, folder / "activations", reserved_bytes)
    if task is not None and not stream.resident:
        raise PuzzleError(
            f"score.task: needs the whole parent in memory, {format_bytes(sum(stream.layer_bytes))} of layers, and "
            f"beside the candidates {format_bytes(max(0, stream.room(())))} are left; raise execution.memory or "
            "leave score.task out"
        )
    scorer = SuffixScorer(stream, data, run.recipe.score, batch_tokens)
    stream.prepare(stream.num_layers, {scorer.final: scorer.inputs})
    unchanged = scorer.parent()
    with progress("score", sum(costs[layer] for layer in missing)) as bar:
        for layer in missing:
            stream.prepare(layer, {scorer.scoring: scorer.inputs})
            own, *blocks = space.layers[layer].scored()
            modules = LayerBlocks(library, layer, blocks, stream.model)
            if layer == 0 and dtype == torch.bfloat16:
                disturbed = _Disturbed(library, layer, [own], stream.model)
                again = scorer.blocks(disturbed, [own] * (1 + len(blocks)), range(1))[own]
                write_json(out / _NOISE, max(0.0, float(again[:, METRICS.index("kl")].mean())))
            values = scorer.blocks(modules, blocks, scorer.shared)
            single = [block for block in blocks if own.attention == block.attention or own.ffn == block.ffn]
            for block, rest in scorer.blocks(modules, single, scorer.rest).items():
                values[block] = torch.cat([values[block], rest])
            columns = {f"{b.name}.{name}": v[:, i] for b, v in values.items() for i, name in enumerate(METRICS)}
            write_tensors(files[layer].with_suffix(".safetensors"), columns)
            rows = []
            for block, found in {own: unchanged, **values}.items():
                if not found.isfinite().all():
                    run.log_warning(f"score of layer {layer} {block.name} is not finite; it cannot be chosen")
                    continue
                alone = [BlockVariant(block.attention, own.ffn), BlockVariant(own.attention, block.ffn)]
                parts = [values[part] for part in alone] if len(found) < len(unchanged) else []
                row = {"layer": layer, "block": block.name, **_figures(found, unchanged, parts)}
                if task is not None:
                    model = partial(with_block, stream.model, layer, block, library)
                    label = "parent" if block == own else f"layer {layer} {block.name}"
                    row["task"] = task_score(run, task, folder / "task.json", label, model)
                rows.append(row)
            write_json(files[layer], rows + summed(space.layers[layer], rows))
            bar.advance(costs[layer])
    stream.close()


def summed(choices: LayerSpace, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of blocks with types that were not measured: what their shapes add, and the types of their subblocks alone.

    What types add hardly depends on the shape, and adds up better than what shapes do (benchmarks/bits.md).
    """
    known, own = {row["block"]: row for row in rows}, choices.parent
    found = []
    for block in choices.blocks():
        twins = [each for each in block.subblocks if each.type]
        alone = [
            replace(own, **{twin.subblock: replace(own.subblock(twin.subblock), type=twin.type)}) for twin in twins
        ]
        names = [block.untyped.name, *(each.name for each in alone)]
        if block.name in known or not all(name in known for name in names):
            continue
        parts = [known[name] for name in names]
        sums = {name: sum(part[name] for part in parts) - len(twins) * known[own.name][name] for name in METRICS}
        error = math.sqrt(sum(part["kl_se"] ** 2 for part in parts))
        row = {"layer": parts[0]["layer"], "block": block.name, "sequences": parts[0]["sequences"]}
        found.append({**row, **sums, "kl_se": error})
    return found


class _Disturbed(LayerBlocks):
    """Blocks whose outputs differ in the last bit of some values: that alters all roundings after them, but no more."""

    def outputs(self, blocks: Sequence[BlockVariant], hidden_BTD: Tensor) -> Tensor:
        states_BTD = super().outputs(blocks, hidden_BTD)
        states_BTD.view(torch.int16)[..., ::16].bitwise_xor_(1)
        return states_BTD


def _figures(values: Tensor, unchanged: Tensor, parts: Sequence[Tensor]) -> dict[str, Any]:
    """A block's figures: those of the unchanged parent on all sequences, and what the block adds to them.

    The sum of what its parts add on all sequences, if given, is a control variate: to it comes what the block adds
    beyond that sum on its own sequences. That has no bias.

    Args:
        values: of the block's own sequences, [n, M]. unchanged: of all. parts: of all, of each subblock alone.
    """
    added, count = values - unchanged[: len(values)], len(values)
    mean, variance = added.mean(0), variance_of_kl(added)
    if parts:
        summed = torch.stack([part - unchanged for part in parts]).sum(0)
        beyond = added - summed[:count]
        estimate = summed.mean(0) + beyond.mean(0)
        # A divergence is positive, and by chance an estimate of a small one is not; parts may not be finite.
        if estimate.isfinite().all() and estimate[0] > 0:
            mean, variance = estimate, variance_of_kl(summed) + variance_of_kl(beyond)
    means = dict(zip(METRICS, (unchanged.mean(0) + mean).tolist(), strict=True))
    return {**means, "kl_se": math.sqrt(variance), "sequences": count}


class SuffixScorer:
    """Scores blocks on batches of a text, prepared to the end as `final`, to the blocks' layer as `scoring`."""

    def __init__(
        self, stream: Stream, data: TokenData, settings: ScoreSettings, batch_tokens: int = _BATCH_TOKENS
    ) -> None:
        self._stream, self._model = stream, stream.model
        count = data.num_sequences("scoring", settings.tokens)
        share = max(_MIN_SHARE, math.ceil((settings.composed_share or 1.0) * count))
        share = share if count >= 2 * _MIN_SHARE and share < count else count
        size = max(1, batch_tokens // data.sequence_length)
        self.scoring, self.final = f"scoring{size}", f"final{size}"  # another device may find them in other batches
        starts = [*range(0, share, size), *range(share, count, size)]
        batches = (data.sequences("scoring", slice(*ends)) for ends in pairwise([*starts, count]))
        self._batches = [tokens_BT.to(self._model.device) for tokens_BT in batches]
        shared = len(range(0, share, size))
        self.shared, self.rest = range(shared), range(shared, len(self._batches))
        """The batches that all blocks are scored on, and those for blocks with one subblock replaced alone."""

    def inputs(self) -> Iterator[Tensor]:
        """The text, [B, T]."""
        return (tokens_BT[:, :-1] for tokens_BT in self._batches)

    def parent(self) -> Tensor:
        """The parent's own metrics, [n, M]; exact where they compare it with itself."""
        last = self._stream.num_layers
        finals = read_ahead(range(len(self._batches)), partial(self._hidden, self.final, last))
        unchanged = torch.cat([self._metrics(batch, own_BTD, own_BTD)[0] for batch, own_BTD in finals]).cpu()
        for name, value in (("kl", 0.0), ("cosine", 0.0), ("top1_agreement", 1.0)):
            unchanged[:, METRICS.index(name)] = value
        return unchanged

    def blocks(
        self, modules: LayerBlocks, blocks: Sequence[BlockVariant], batches: range
    ) -> dict[BlockVariant, Tensor]:
        """The metrics of each of the blocks, [n, M]."""
        if not blocks or not batches:
            return {}
        parts, stream = [], self._stream
        states_room = max(0, stream.room(()) // 2)
        config, itemsize = self._model.config, self._model.dtype.itemsize
        batch_bytes = len(blocks) * self._batches[0].numel() * config.hidden_size * itemsize
        # Every layer is in memory, or is read again for each round of batches.
        at_once = 1 if stream.resident else max(1, states_room // batch_bytes)
        sequences = max(1, tokens_at_once(self._model.device, config.hidden_size) // (self._batches[0].shape[1] - 1))
        ends = (self.scoring, modules.layer), (self.final, stream.num_layers)
        read = read_ahead(batches, lambda batch: [self._hidden(text, layer, batch) for text, layer in ends])
        while together := [*islice(read, at_once)]:
            states = [modules.outputs(blocks, hidden_BTD) for _, (hidden_BTD, _) in together]
            for layers in stream.walk(range(modules.layer + 1, stream.num_layers), states_room):
                for part_BTD in chain.from_iterable(state_BTD.split(sequences) for state_BTD in states):
                    part_BTD.copy_(stream.forward(layers, part_BTD))
            parts += [
                self._metrics(batch, final_BTD, state_BTD)
                for (batch, (_, final_BTD)), state_BTD in zip(together, states, strict=True)
            ]
        return dict(zip(blocks, torch.cat(parts, dim=1).cpu(), strict=True))  # the only wait for the device

    def _hidden(self, text: str, layer: int, batch: int) -> Tensor:
        """What enters a layer, [B, T, D]."""
        return self._stream.inputs(layer, text, (batch, self._batches[batch][:, :-1]))

    def _metrics(self, batch: int, final_BTD: Tensor, states_BTD: Tensor) -> Tensor:
        """Of candidates whose final states follow one another in [A * B, T, D], beside the parent's. [A, B, M]"""
        states_ABTD = states_BTD.unflatten(0, (-1, len(final_BTD)))
        return per_sequence(self._model, final_BTD, states_ABTD, self._batches[batch])


def per_sequence(model: PuzzleForCausalLM, parent_BTD: Tensor, states_ABTD: Tensor, tokens_BT: Tensor) -> Tensor:
    """Metrics of final states beside the parent's, means over each sequence's tokens, [A, B, M].

    Args:
        model: the parent, for its final norm and head. tokens_BT: inputs and the last target, [B, T + 1].
    """
    targets_N = tokens_BT[:, 1:].flatten().to(states_ABTD.device)
    metrics = compare(model, model, parent_BTD.flatten(0, 1), states_ABTD.flatten(1, 2), targets_N)
    columns = [getattr(metrics, name).double().unflatten(1, (len(tokens_BT), -1)).mean(2) for name in METRICS]
    return torch.stack(columns, dim=2)


def variance_of_kl(values: Tensor) -> float:
    """Of the mean KL over sequences, [n, M]."""
    return float(values[:, 0].var() / len(values)) if len(values) > 1 else 0.0
