"""Replace-1-block scores: the parent with one block replaced, as a whole model, on held-out text (paper section 2.3).

Layer by layer: the inputs of layer i are kept for all scoring text, so that a candidate costs its own block and the
layers after it, not the whole model (law 9: the same as a full forward).
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.artefacts import ScoreRow, ScoreTable
from puzzle.blocks import BlockVariant, LayerSpace, Space, Variant, build_subblock
from puzzle.data import TokenData
from puzzle.library import Library
from puzzle.metrics import TokenMetrics, compare
from puzzle.modeling import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.runs import Run, Stage, progress, write_json, write_tensors, write_text

_BATCH_SIZE = 4
_METRICS = ("kl", "lm_loss", "top1_agreement")


def score(run: Run, parent: Parent, data: TokenData, library: Library, space: Space) -> ScoreTable:
    """Score every composed block of every layer; per-sequence figures are kept in `layerNNN.safetensors`."""
    settings = {"tokens": run.recipe.score.tokens, "precision": run.recipe.precision}
    stage = run.stage("score", version=1, settings=settings, inputs=(library.address, data.address))
    table_file = stage.path / "scores.json"
    if not stage.done:
        _score_layers(run, stage, parent, data, library, space)
        rows = [
            ScoreRow(**row)
            for layer in range(len(space.layers))
            for row in json.loads(_rows_file(stage, layer).read_text())
        ]
        table = ScoreTable(
            num_layers=len(space.layers),
            sequences=_num_sequences(run, data),
            sequence_length=data.sequence_length,
            rows=tuple(rows),
        )
        write_text(table_file, table.to_json())
        stage.commit(blocks=len(rows))
    return ScoreTable.from_json(table_file.read_text())


def _rows_file(stage: Stage, layer: int) -> Path:
    return stage.path / f"layer{layer:03d}.json"


def _num_sequences(run: Run, data: TokenData) -> int:
    return min(math.ceil(run.recipe.score.tokens / data.sequence_length), data.num_sequences("scoring"))


@torch.no_grad()
def _score_layers(run: Run, stage: Stage, parent: Parent, data: TokenData, library: Library, space: Space) -> None:
    model = parent.load(dtype=getattr(torch, run.recipe.precision), device=run.device)
    texts = _Texts.start(model, data, run)
    suffix_layers = [len(layer.blocks()) * (len(space.layers) - i) for i, layer in enumerate(space.layers)]
    with progress("score", sum(suffix_layers)) as bar:
        for index, layer_space in enumerate(space.layers):
            if not _rows_file(stage, index).exists():
                per_sequence = _score_layer(model, texts, library, index, layer_space)
                write_tensors(stage.path / f"layer{index:03d}.safetensors", _named(per_sequence))
                rows = _rows(run, index, layer_space, per_sequence)
                write_json(_rows_file(stage, index), [asdict(row) for row in rows])
            texts.advance(model, index)
            bar.advance(suffix_layers[index])


@dataclass
class _Texts:
    """The scoring text in batches: targets, the inputs of the current layer, and the parent's final hidden states."""

    targets_BT: list[Tensor]
    hidden_BTD: list[Tensor]
    final_BTD: list[Tensor]

    @classmethod
    def start(cls, model: PuzzleForCausalLM, data: TokenData, run: Run) -> "_Texts":
        targets, embedded, final = [], [], []
        for sequences in data.batches("scoring", _BATCH_SIZE, run.recipe.score.tokens):
            tokens_BT = sequences.to(run.device)
            targets.append(tokens_BT[:, 1:])
            embedded.append(model.model.embed_tokens(tokens_BT[:, :-1]))
            final.append(_run_layers(model, embedded[-1], first=0))
        return cls(targets, embedded, final)

    def advance(self, model: PuzzleForCausalLM, layer: int) -> None:
        """From the inputs of `layer` to those of the next."""
        for position, hidden_BTD in enumerate(self.hidden_BTD):
            self.hidden_BTD[position] = model.model.layers[layer](hidden_BTD, **model.model.context(hidden_BTD))


def _run_layers(model: PuzzleForCausalLM, hidden_BTD: Tensor, first: int) -> Tensor:
    context = model.model.context(hidden_BTD)
    for layer in model.model.layers[first:]:
        hidden_BTD = layer(hidden_BTD, **context)
    return hidden_BTD


def _score_layer(
    model: PuzzleForCausalLM, texts: _Texts, library: Library, index: int, layer_space: LayerSpace
) -> dict[BlockVariant, dict[str, Tensor]]:
    """Per-sequence metrics of every block but the parent's own, and of that for its LM loss."""
    modules = {
        variant: _module(model, library, index, variant) for variant in (*layer_space.attention, *layer_space.ffn)
    }
    collected: dict[BlockVariant, list[dict[str, Tensor]]] = {block: [] for block in layer_space.blocks()}
    for targets_BT, hidden_BTD, final_BTD in zip(texts.targets_BT, texts.hidden_BTD, texts.final_BTD, strict=True):
        context = model.model.context(hidden_BTD)
        for attention in layer_space.attention:
            blocks = [BlockVariant(attention, ffn) for ffn in layer_space.ffn]
            attended_BTD = modules[attention](hidden_BTD, **context)
            outputs = [modules[ffn](attended_BTD) for ffn in layer_space.ffn]
            finals_BTD = _run_layers(model, torch.cat(outputs), first=index + 1).chunk(len(outputs))
            metrics = compare(
                model,
                model,
                final_BTD.flatten(0, 1),
                [final.flatten(0, 1) for final in finals_BTD],
                targets_BT.flatten(),
            )
            for block, block_metrics in zip(blocks, metrics, strict=True):
                collected[block].append(_per_sequence(block_metrics, len(targets_BT)))
    return {
        block: {name: torch.cat([part[name] for part in parts]) for name in _METRICS}
        for block, parts in collected.items()
    }


def _module(model: PuzzleForCausalLM, library: Library, layer: int, variant: Variant) -> PuzzleDecoderLayer:
    state = {name: tensor.to(model.device, model.dtype) for name, tensor in library.state(layer, variant).items()}
    return build_subblock(variant, model.config, state)


def _per_sequence(metrics: TokenMetrics, batch_size: int) -> dict[str, Tensor]:
    return {name: getattr(metrics, name).double().unflatten(0, (batch_size, -1)).mean(1).cpu() for name in _METRICS}


def _named(per_sequence: dict[BlockVariant, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{block}.{name}": value for block, metrics in per_sequence.items() for name, value in metrics.items()}


def _rows(
    run: Run, layer: int, layer_space: LayerSpace, per_sequence: dict[BlockVariant, dict[str, Tensor]]
) -> list[ScoreRow]:
    """Means and standard errors; blocks that are not finite are left out and named in the log."""
    rows = []
    for block, metrics in per_sequence.items():
        if not all(value.isfinite().all() for value in metrics.values()):
            run.log_warning(f"score of layer {layer} {block} is not finite; it cannot be chosen")
            continue
        rows.append(_row(layer, block, metrics, is_parent=block == layer_space.parent))
    return rows


def _row(layer: int, block: BlockVariant, metrics: dict[str, Tensor], *, is_parent: bool) -> ScoreRow:
    kl: dict[str, Any] = {"kl": float(metrics["kl"].mean()), "kl_se": _standard_error(metrics["kl"])}
    if is_parent:
        # Its distribution is the parent's; what is left is the rounding of a batched against a single forward.
        kl = {"kl": 0.0, "kl_se": 0.0}
    return ScoreRow(
        layer=layer,
        block=block.name,
        lm_loss=float(metrics["lm_loss"].mean()),
        top1_agreement=1.0 if is_parent else float(metrics["top1_agreement"].mean()),
        **kl,
    )


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
