"""Sequential refinement: block by block, the child learns the outputs of the parent's layers from inputs of its own.

A block of the library has only seen its inputs in the parent; in the child, it gets what the blocks before it made of
the text. So from the first layer that differs from the parent's, every block is trained on its inputs in the child, the
layers before it refined already, towards the parent's output of that layer. Of both models one layer at a time is in
use; its inputs are kept on disk for every batch.

Shapes: B batch, T tokens, D hidden size.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from torch import Tensor

from puzzle.child.realise import Child, save_child
from puzzle.data import TokenData
from puzzle.device import autocast
from puzzle.library import Student, fit, held_out, student_texts
from puzzle.parents import Parent
from puzzle.runs import Progress, Run, progress, read_json, read_tensors, write_json, write_tensors
from puzzle.stages import BLD_BYTES, REFINE
from puzzle.streams import Activations, LayerPass, Stream, read_ahead
from puzzle.variants import State


def refine(run: Run, parent: Parent, child: Child, data: TokenData) -> Child:
    """Train the child's blocks one after another, each on its inputs in the child.

    `layers.json` tells each layer's loss on held-out text before and after, which is never above that before: the
    better weights are kept (law 4). It is E||x - x'||^2 / E||x - x0||^2, with x0 the parent's input and x its output.

    With `refine.tokens` 0, and for a child that is the parent, it is the child itself.
    """
    pairs = enumerate(zip(child.architecture.blocks, parent.architecture.blocks, strict=True))
    first = next((layer for layer, (block, own) in pairs if block != own), parent.num_layers)
    layers = range(first, parent.num_layers)
    if run.recipe.refine.tokens == 0 or not layers:
        return child
    stage = run.open(REFINE, parent=parent, child=child, data=data)
    refined = Child(stage.path / "checkpoint", stage.address, child.architecture)
    if stage.done:
        return refined
    refinement = _Refinement(run, parent, child, data, stage.path / "work", layers)
    rows = refinement.rows()
    better = [row for row in rows if row["loss"] < row["initial_loss"]]
    run.log(f"refine: {len(better)} of {len(rows)} layers came closer to the parent's")
    write_json(stage.path / "layers.json", rows)
    save_child(parent, child.architecture, refinement.state, refined.path)
    stage.commit(layers=len(rows), improved=len(better))
    shutil.rmtree(stage.path / "work")
    return refined


class _Refinement:
    """The layers one after another; what is finished is on disk and is not done again.

    Args:
        folder: for everything that goes on after a kill.
    """

    def __init__(self, run: Run, parent: Parent, child: Child, data: TokenData, folder: Path, layers: range) -> None:
        self._run, self._folder, self._layers = run, folder, layers
        folder.mkdir(exist_ok=True)
        self._child, self._blocks = child.source(), child.architecture.blocks
        batch_size = run.recipe.refine.batch_size
        self._steps = math.ceil(run.recipe.refine.tokens / (batch_size * data.sequence_length))
        self._texts = student_texts(data, run.recipe, batch_size, self._steps)
        params = max(block.num_params(parent.config) for block in self._blocks)
        self._stream = Stream(run, parent, folder / "parent", reserved_bytes=BLD_BYTES * params)
        self._activations = Activations(folder / "child")

    def rows(self) -> list[dict[str, float]]:
        """Refine what is not yet; the losses of every layer."""
        self._stream.check_disk(self._texts, models=2)
        files = {layer: self._folder / f"layer{layer:03d}.json" for layer in self._layers}
        done = sum(file.exists() for file in files.values())
        with progress("refine", self._steps * len(files), self._steps * done) as bar:
            for layer, file in files.items():
                if not file.exists():
                    write_json(file, self._refine(layer, bar))
        return [read_json(file) for file in files.values()]

    def state(self, layer: int) -> State:
        """A layer's weights: refined, if they are."""
        file = self._folder / f"layer{layer:03d}.safetensors"
        return read_tensors(file) if file.exists() else self._child.layer_state(layer)

    def _refine(self, layer: int, bar: Progress) -> dict[str, float]:
        self._prepare(layer)
        student, training = self._student(layer, self._child.layer_state(layer)), self._folder / f"training{layer:03d}"
        passes, precision = partial(self._passes, layer), self._stream.model.dtype

        def measured() -> tuple[float, float]:
            return held_out([student], passes("validation"), precision)[student.name]

        student.power = measured()[1] or 1.0  # 1 for a layer of the parent that adds nothing
        initial = loss = measured()[0]
        if student.parameters():
            start, rate = student.state(), self._run.recipe.refine.learning_rate
            text = partial(passes, "training")
            fit([student], text, steps=self._steps, learning_rate=rate, precision=precision, folder=training, bar=bar)
            loss = measured()[0]
            write_tensors(self._folder / f"layer{layer:03d}.safetensors", student.state() if loss < initial else start)
        shutil.rmtree(training, ignore_errors=True)
        return {"layer": layer, "initial_loss": initial, "loss": min(loss, initial)}

    def _prepare(self, layer: int) -> None:
        """Have the inputs of `layer` in both models; the layers before it are refined."""
        for earlier in range(self._layers.start, layer):
            for text, batches in self._texts.items():
                if self._activations.ready(text) <= earlier:
                    forward = partial(self._forward, self._student(earlier, self.state(earlier)))
                    inputs, one = partial(self._inputs, earlier, text), range(earlier, earlier + 1)
                    self._activations.advance(text, batches(), one, inputs, forward)
        self._stream.prepare(layer, self._texts)

    def _student(self, layer: int, state: State) -> Student:
        config, device = self._stream.model.config, self._run.device
        return Student(layer, self._blocks[layer].subblocks, config, state, 1.0, device, loss="refined")

    def _inputs(self, layer: int, text: str, numbered_BT: tuple[int, Tensor]) -> Tensor:
        """The inputs of `layer` in the child for a batch; of the first layer they are the parent's. [B, T, D]"""
        if layer == self._layers.start:
            return self._stream.inputs(layer, text, numbered_BT)
        return self._activations.read(text, layer, numbered_BT[0]).to(self._run.device)

    def _forward(self, student: Student, hidden_BTD: Tensor) -> Tensor:
        """The refined layer's output."""
        context = self._stream.model.model.context(hidden_BTD)
        with autocast(hidden_BTD.device, hidden_BTD.dtype):
            return (hidden_BTD.float() + student.output(hidden_BTD.float(), context)).to(hidden_BTD.dtype)

    def _passes(self, layer: int, text: str, first: int = 0) -> Iterator[list[LayerPass]]:
        """The parent's layer on every batch from number `first` on, with the child's inputs in place of its own."""
        batches, one = self._texts[text], range(layer, layer + 1)
        child_inputs = read_ahead(islice(enumerate(batches()), first, None), partial(self._inputs, layer, text))
        for layer_passes in self._stream.passes(one, text, batches(), first):
            _, hidden_BTD = next(child_inputs)
            yield [replace(next(layer_passes), inputs_BTD={"attention": hidden_BTD})]
