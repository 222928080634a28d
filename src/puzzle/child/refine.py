"""Sequential refinement: block by block, the child learns the parent's layers from inputs of its own.

A block of the library has only seen what enters it in the parent; in the child, it gets what the blocks before it made
of the text. So from the first layer that differs from the parent's, every block is trained on what enters it in the
child, the layers before it refined already, towards the parent's output of that layer. Of both models only one layer is
in memory; what enters it is kept on disk for every batch.

Shapes: B batch, T tokens, D hidden size.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.child.realise import Child, save_child
from puzzle.data import TokenData
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.parents import LayerPass, Parent, ParentPasses, Texts, open_parent
from puzzle.runs import Progress, Run, progress, read_json, read_tensors, write_json, write_tensors
from puzzle.training import BETAS, TrainingState, autocast, learning_rate, set_learning_rate
from puzzle.units import format_bytes
from puzzle.variants import SUBBLOCKS, BlockVariant, State, build_subblock, num_params, split_state

_WARMUP = 0.05
_MAX_GRAD_NORM = 1.0
_BYTES_PER_TRAINED_PARAMETER = 20
"""float32 weight, gradient, two AdamW moments, and the weights before training."""


@dataclass(frozen=True, kw_only=True)
class RefinedLayer:
    """Held-out losses of one layer, E||x - x'||^2 over that of the parent's contribution; x is the parent's output."""

    layer: int
    initial_loss: float
    loss: float
    """After training; never above `initial_loss`: the better weights are kept (law 4)."""


def refine(run: Run, parent: Parent, child: Child, data: TokenData) -> Child:
    """Train the child's blocks one after another, each on what enters it in the child; `layers.json` tells the losses.

    With `refine.tokens` 0, and for a child that is the parent, it is the child itself.
    """
    layers = _differing(parent, child)
    if run.recipe.refine.tokens == 0 or not layers:
        return child
    settings = run.recipe.refine.model_dump(mode="json") | {
        "validation_tokens": run.recipe.library.validation_tokens,
        "precision": run.recipe.precision,
        "seed": run.recipe.seed,
    }
    stage = run.stage("refine", version=1, settings=settings, inputs=(parent.address, child.address, data.address))
    refined = Child(stage.path / "checkpoint", stage.address, child.architecture)
    if stage.done:
        return refined
    refinement = _Refinement(run, parent, child, data, stage.path, layers)
    rows = refinement.rows()
    better = [row for row in rows if row.loss < row.initial_loss]
    run.log(f"refine: {len(better)} of {len(rows)} layers came closer to the parent's")
    write_json(stage.path / "layers.json", [asdict(row) for row in rows])
    save_child(parent, child.architecture, refinement.state, refined.path)
    stage.commit(layers=len(rows), improved=len(better))
    refinement.close()
    return refined


def _differing(parent: Parent, child: Child) -> range:
    """The layers from the first that differs from the parent's."""
    pairs = list(zip(child.architecture.blocks, parent.architecture.blocks, strict=True))
    first = next((layer for layer, (block, own) in enumerate(pairs) if block != own), len(pairs))
    return range(first, len(pairs))


class _Block:
    """One block of the child on the device, in float32."""

    def __init__(self, block: BlockVariant, config: PuzzleConfig, state: State, device: torch.device) -> None:
        own = {name: value.to(device, copy=True) for name, value in state.items()}
        self._modules = [
            build_subblock(block.subblock(subblock), config, split_state(own, subblock)) for subblock in SUBBLOCKS
        ]
        self.parameters = {name: value for module in self._modules for name, value in module.named_parameters()}

    def __call__(self, hidden_BTD: Tensor, context: Mapping[str, Any]) -> Tensor:
        """The block's output in float32; inside, the precision of what enters."""
        with autocast(hidden_BTD.device, hidden_BTD.dtype):
            output_BTD = hidden_BTD.float()
            for module in self._modules:
                output_BTD = module(output_BTD, **context)
        return output_BTD

    def error(self, seen: LayerPass, hidden_BTD: Tensor) -> Tensor:
        """Squared error, per element, of its output to the parent's, from what enters in the child. []"""
        return (self(hidden_BTD, seen.context) - seen.left_BTD.float()).square().mean()

    def state(self) -> State:
        return {name: value.detach() for name, value in self.parameters.items()}


def _training_bytes(block: BlockVariant, config: PuzzleConfig) -> int:
    return _BYTES_PER_TRAINED_PARAMETER * sum(num_params(block.subblock(subblock), config) for subblock in SUBBLOCKS)


class _ChildInputs:
    """What enters one layer in the child, on disk for every batch; what enters the first is what enters the parent's.

    Args:
        first: the first layer that differs.
    """

    def __init__(self, folder: Path, passes: ParentPasses, first: int) -> None:
        self._folder, self._passes, self._first = folder, passes, first

    @property
    def ready(self) -> int:
        """The layer whose inputs are complete."""
        return int(read_json(self._ready_file)["layer"]) if self._ready_file.exists() else self._first

    def entering(self, layer: int, text: str, index: int, tokens_BT: Tensor) -> Tensor:
        """What enters `layer`, which is ready, for a batch. [B, T, D]"""
        if layer == self._first:
            return self._passes.entering(layer, text, index, tokens_BT)
        return read_tensors(self._file(text, layer, index))["hidden_BTD"].to(self._passes.model.device)

    @torch.no_grad()
    def advance(self, texts: Texts, layer: int, block: _Block) -> None:
        """From what enters `layer`, which is `block`, to what enters the next; what is on disk already is kept."""
        for text, batches in texts.items():
            for index, tokens_BT in enumerate(batches()):
                file = self._file(text, layer + 1, index)
                if not file.exists():
                    hidden_BTD = self.entering(layer, text, index, tokens_BT)
                    left_BTD = block(hidden_BTD, self._passes.model.model.context(hidden_BTD))
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_tensors(file, {"hidden_BTD": left_BTD.to(hidden_BTD.dtype)})
        write_json(self._ready_file, {"layer": layer + 1})
        shutil.rmtree(self._layer_folder(layer), ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _ready_file(self) -> Path:
        return self._folder / "ready.json"

    def _layer_folder(self, layer: int) -> Path:
        return self._folder / f"{layer:03d}"

    def _file(self, text: str, layer: int, index: int) -> Path:
        return self._layer_folder(layer) / f"{text}{index:06d}.safetensors"


class _Refinement:
    """The layers one after another; what is finished is on disk and is not done again."""

    def __init__(self, run: Run, parent: Parent, child: Child, data: TokenData, folder: Path, layers: range) -> None:
        self._run, self._data, self._folder, self._layers = run, data, folder, layers
        self._source = open_parent(str(child.path))
        self._blocks = child.architecture.blocks
        self._settings = run.recipe.refine
        self._steps = math.ceil(self._settings.tokens / (self._settings.batch_size * data.sequence_length))
        self._texts: Texts = {"training": self._training, "validation": self._validation}
        largest = max(_training_bytes(self._blocks[layer], parent.config) for layer in layers)
        self._passes = ParentPasses(run, parent, folder / "parent", reserved_bytes=largest)
        self._inputs = _ChildInputs(folder / "child", self._passes, layers.start)

    def rows(self) -> list[RefinedLayer]:
        """Refine what is not yet; the losses of every layer."""
        self._check_disk()
        done = sum(self._row_file(layer).exists() for layer in self._layers)
        with progress("refine", self._steps * len(self._layers), self._steps * done) as bar:
            for layer in self._layers:
                if not self._row_file(layer).exists():
                    self._refine(layer, bar)
        return [RefinedLayer(**read_json(self._row_file(layer))) for layer in self._layers]

    def state(self, layer: int) -> State:
        """A layer's weights: refined, if they are."""
        file = self._state_file(layer)
        return read_tensors(file) if file.exists() else self._source.layer_state(layer)

    def close(self) -> None:
        """Delete what is in the checkpoint now, and what was kept for the layers' sake."""
        self._passes.close()
        self._inputs.close()
        for layer in self._layers:
            self._state_file(layer).unlink(missing_ok=True)
            self._row_file(layer).unlink(missing_ok=True)

    def _refine(self, layer: int, bar: Progress) -> None:
        self._enter(layer)
        power = self._contribution_power(layer)
        start = self._source.layer_state(layer)
        block = self._block(layer, start)
        initial = self._held_out_loss(block, layer, power)
        loss = initial
        if block.parameters:
            self._train(block, layer, power, bar)
            loss = self._held_out_loss(block, layer, power)
            write_tensors(self._state_file(layer), block.state() if loss < initial else start)
        row = RefinedLayer(layer=layer, initial_loss=initial, loss=min(loss, initial))
        write_json(self._row_file(layer), asdict(row))
        self._training_file(layer).unlink(missing_ok=True)

    def _enter(self, layer: int) -> None:
        """Have what enters `layer` in both models; the layers before it are refined."""
        for earlier in range(self._inputs.ready, layer):
            self._inputs.advance(self._texts, earlier, self._block(earlier, self.state(earlier)))
        self._passes.prepare(layer, self._texts)
        self._passes.hold(range(layer, layer + 1))

    def _block(self, layer: int, state: State) -> _Block:
        return _Block(self._blocks[layer], self._passes.model.config, state, self._run.device)

    def _seen(self, text: str, layer: int, index: int, tokens_BT: Tensor) -> tuple[LayerPass, Tensor]:
        """The parent's layer, and what enters it in the child, for a batch."""
        seen = next(self._passes.through(range(layer, layer + 1), text, index, tokens_BT))
        return seen, self._inputs.entering(layer, text, index, tokens_BT)

    def _train(self, block: _Block, layer: int, power: float, bar: Progress) -> None:
        """AdamW on all of the block; resumes from the state on disk."""
        parameters = {name: value.requires_grad_(True) for name, value in block.parameters.items()}
        optimizer = torch.optim.AdamW(parameters.values(), betas=BETAS, weight_decay=0.0, fused=True)
        state = TrainingState(self._training_file(layer), parameters, optimizer)
        first = state.restore()
        bar.advance(first)
        for step in range(first, self._steps):
            rate = learning_rate(step, steps=self._steps, peak=self._settings.learning_rate, warmup=_WARMUP)
            set_learning_rate(optimizer, rate)
            seen, hidden_BTD = self._seen("training", layer, step, self._batch(step))
            loss = block.error(seen, hidden_BTD) / power
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), _MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            state.save_if_due(step + 1)
            bar.advance(layer=layer, loss=float(loss.detach()))

    @torch.no_grad()
    def _held_out_loss(self, block: _Block, layer: int, power: float) -> float:
        """Inf where it is not finite."""
        loss = self._mean(block.error, layer) / power
        return loss if math.isfinite(loss) else math.inf

    @torch.no_grad()
    def _contribution_power(self, layer: int) -> float:
        """E[(x' - x)^2] of the parent's layer from x to x', on held-out text, per element."""
        power = self._mean(lambda seen, _: (seen.attention_BTD.float() + seen.ffn_BTD.float()).square().mean(), layer)
        return power or 1.0  # a parent's layer that adds nothing has no scale

    def _mean(self, figure: Callable[[LayerPass, Tensor], Tensor], layer: int) -> float:
        """Over the tokens of the held-out text."""
        total, count = 0.0, 0
        for index, tokens_BT in enumerate(self._validation()):
            total += float(figure(*self._seen("validation", layer, index, tokens_BT))) * tokens_BT.numel()
            count += tokens_BT.numel()
        return total / count

    def _check_disk(self) -> None:
        """Inputs of two layers of both models are on disk for a while."""
        tokens = sum(tokens_BT.numel() for text in self._texts.values() for tokens_BT in text())
        model = self._passes.model
        needed = 4 * tokens * model.config.hidden_size * model.dtype.itemsize
        if needed > self._run.disk_bytes:
            raise PuzzleError(
                f"execution.disk: refine keeps activations of {tokens:,} tokens, {format_bytes(needed)}, allowed are "
                f"{format_bytes(self._run.disk_bytes)}; raise execution.disk, or lower refine.tokens"
            )

    def _training(self) -> Iterator[Tensor]:
        return (self._batch(step) for step in range(self._steps))

    def _batch(self, step: int) -> Tensor:
        return self._data.training_batch(step, self._settings.batch_size, self._run.recipe.seed)[:, :-1]

    def _validation(self) -> Iterator[Tensor]:
        tokens = self._run.recipe.library.validation_tokens
        for sequences in self._data.batches("validation", self._settings.batch_size, tokens):
            yield sequences[:, :-1]

    def _state_file(self, layer: int) -> Path:
        return self._folder / f"layer{layer:03d}.safetensors"

    def _row_file(self, layer: int) -> Path:
        return self._folder / f"layer{layer:03d}.json"

    def _training_file(self, layer: int) -> Path:
        return self._folder / f"training{layer:03d}.safetensors"
