"""The child: the library's weights put together as a checkpoint that runs (law 5), and its sequential refinement.

A block of the library has only seen its inputs in the parent. So in refinement, from the first layer that differs from
the parent's, every block is trained on its inputs in the child, the layers before it refined already, towards the
parent's output of that layer. Of both models one layer at a time is in use; its inputs are on disk for every batch.

Shapes: B batch, T tokens, D hidden size.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from puzzle.data import TokenData
from puzzle.device import autocast
from puzzle.library import (
    ROUNDED,
    Library,
    Statistics,
    Student,
    decode,
    encode,
    encode_state,
    final_states,
    fit,
    held_out,
    student_texts,
)
from puzzle.modeling import PuzzleForCausalLM, empty_model, finish, save_checkpoint
from puzzle.parents import Parent, open_parent
from puzzle.runs import Progress, Run, progress, read_json, read_tensors, write_json, write_tensors, write_text
from puzzle.stages import BLD_BYTES, REALISE, REFINE, ROUND
from puzzle.streams import LayerPass, Stream, read_ahead
from puzzle.variants import Architecture, State, split_state


@dataclass(frozen=True)
class Child:
    """A child on disk."""

    path: Path
    """A Hugging Face checkpoint."""
    address: str
    architecture: Architecture

    def load(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> PuzzleForCausalLM:
        """The child, for inference."""
        return self.source().load(dtype=dtype, device=torch.device(device))

    def source(self) -> Parent:
        """Opened like a parent, so that it can be streamed."""
        return open_parent(str(self.path), address=self.address)


def realise(run: Run, parent: Parent, library: Library, blocks: tuple[str, ...]) -> Child:
    """Put the child of these blocks together, save it, and check that it computes what the library's blocks compute.

    Args:
        blocks: one block name a layer, such as `kv2+w512`.
    """
    architecture = Architecture.parse(blocks)
    stage = run.open(REALISE, parent=parent, library=library, blocks=list(blocks))
    child = Child(stage.path / "checkpoint", stage.address, architecture)
    if stage.done:
        return child
    blocks_of = [block.untyped for block in architecture.blocks]  # which are rounded when all training is over
    _save(parent, child, lambda layer: library.block_state(layer, blocks_of[layer]))
    tokens_BT = torch.arange(16, device=run.device).remainder(parent.config.vocab_size).unsqueeze(0)
    model = parent.load(device=run.device, layers=())
    names = tuple(block.name for block in blocks_of)
    ((expected_BTD,),) = final_states(library, model, [names], [tokens_BT])
    stream = Stream(run, child.source(), stage.path / "activations", dtype=torch.float32)
    (found_BTD,) = stream.finals("check", lambda: [tokens_BT])
    stream.close()
    error = float((stream.model.logits(found_BTD) - model.logits(expected_BTD)).abs().max())
    assert error <= 1e-4 * max(1.0, float(model.logits(expected_BTD).abs().max())), f"{error} off; this is a bug"
    stage.commit(params=child.source().num_params, reload_logit_error=error)
    return child


def refine(run: Run, parent: Parent, child: Child, data: TokenData) -> Child:
    """Train the child's blocks one after another, each on its inputs in the child.

    `layers.json` tells each layer's loss on held-out text before and after, which is never above that before: the
    better weights are kept (law 4). It is E||x - x'||^2 / E||x - x0||^2, with x0 the parent's input and x its output.

    With `refine.tokens` 0, and for a child that is the parent, it is the child itself.
    """
    pairs = enumerate(zip(child.architecture.blocks, parent.architecture.blocks, strict=True))
    first = next((layer for layer, (block, own) in pairs if block != own), parent.num_layers)
    if run.recipe.refine.tokens == 0 or first == parent.num_layers:
        return child
    stage = run.open(REFINE, parent=parent, child=child, data=data)
    refined = Child(stage.path / "checkpoint", stage.address, child.architecture)
    if stage.done:
        return refined
    refinement = _Refinement(run, parent, child, data, stage.path / "work", first)
    rows = refinement.rows()
    improved = sum(row["loss"] < row["initial_loss"] for row in rows)
    run.log(f"refine: {improved} of {len(rows)} layers came closer to the parent's")
    write_json(stage.path / "layers.json", rows)
    _save(parent, refined, refinement.state)
    stage.commit(layers=len(rows), improved=improved)
    shutil.rmtree(stage.path / "work")
    return refined


def rounded(run: Run, child: Child, statistics: Statistics) -> Child:
    """The child with its matrices rounded to the types of its blocks, and of `space.outer`, as float32.

    Their bytes are beside, so that a GGUF file has the same. A child without types is itself.
    """
    outer_type = run.recipe.space.outer
    if not (outer_type or any(each.type for block in child.architecture.blocks for each in block.subblocks)):
        return child
    stage = run.open(ROUND, child=child, statistics=statistics)
    found = Child(stage.path / "checkpoint", stage.address, child.architecture)
    if stage.done:
        return found
    source, encoded = child.source(), State()

    def layer_state(layer: int) -> State:
        state = source.layer_state(layer)
        for variant in child.architecture.blocks[layer].subblocks:
            if variant.type:
                own = split_state(state, variant.subblock, source.config)
                moments = statistics.moments(layer, variant.subblock) if run.recipe.space.importance else {}
                for name, value in encode_state(variant, own, moments, source.config).items():
                    encoded[f"model.layers.{layer}.{name}"] = value
                    state = state | {name: decode(value, variant.type)}
        return state

    outer = source.embeddings_and_head()
    if outer_type:
        for name, value in outer.items():
            if value.ndim > 1:
                encoded[name] = encode(value, outer_type)
                outer = outer | {name: decode(encoded[name], outer_type)}
    _save(source, found, layer_state, outer)
    write_tensors(found.path / ROUNDED, encoded)
    stage.commit()
    return found


class _Refinement:
    """The layers from `first` on, one after another; what is finished is on disk, in `folder`, and not done again."""

    def __init__(self, run: Run, parent: Parent, child: Child, data: TokenData, folder: Path, first: int) -> None:
        self._run, self._folder, self._layers = run, folder, range(first, parent.num_layers)
        folder.mkdir(exist_ok=True)
        self._child, self._blocks = child.source(), child.architecture.blocks
        batch_size = run.recipe.refine.batch_size
        self._steps = math.ceil(run.recipe.refine.tokens / (batch_size * data.sequence_length))
        self._texts = student_texts(data, run.recipe, batch_size, self._steps)
        self._child_texts = {f"child-{name}": batches for name, batches in self._texts.items()}
        params = max(block.num_params(parent.config) for block in self._blocks)
        self._stream = Stream(run, parent, folder / "activations", reserved_bytes=BLD_BYTES * params)

    def rows(self) -> list[dict[str, float]]:
        """Refine what is not yet; the losses of every layer."""
        self._stream.check_disk({**self._texts, **self._child_texts})
        files = {layer: self._folder / f"layer{layer:03d}.json" for layer in self._layers}
        done = sum(file.exists() for file in files.values())
        with progress("refine", self._steps * len(files), self._steps * done) as bar:
            for layer, file in files.items():
                if not file.exists():
                    self._prepare(layer)
                    write_json(file, self._refine(layer, bar))
        return [read_json(file) for file in files.values()]

    def state(self, layer: int) -> State:
        """A layer's weights: refined, if they are."""
        file = self._folder / f"layer{layer:03d}.safetensors"
        return read_tensors(file) if file.exists() else self._child.layer_state(layer)

    def _prepare(self, layer: int) -> None:
        """Have the inputs of `layer` in both models; those of the first layer are the parent's in both."""
        self._stream.prepare(layer, self._texts)
        if layer == self._layers.start:
            self._stream.prepare(layer, self._child_texts)
            return
        before = self._student(layer - 1, self.state(layer - 1))

        def forward(layers: range, hidden_BTD: Tensor) -> Tensor:
            assert layers == range(layer - 1, layer), f"the child's text has not reached layer {layer - 1}"
            context = self._stream.model.model.context(hidden_BTD)
            with autocast(hidden_BTD.device, hidden_BTD.dtype):
                return (hidden_BTD.float() + before.output(hidden_BTD.float(), context)).to(hidden_BTD.dtype)

        self._stream.advance(self._child_texts, range(layer - 1, layer), forward)

    def _refine(self, layer: int, bar: Progress) -> dict[str, float]:
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

    def _student(self, layer: int, state: State) -> Student:
        config, device = self._stream.model.config, self._run.device
        return Student(layer, self._blocks[layer].subblocks, config, state, 1.0, device, loss="refined")

    def _passes(self, layer: int, text: str, first: int = 0) -> Iterator[list[LayerPass]]:
        """The parent's layer on every batch from number `first` on, with the child's inputs in place of its own."""
        batches, read = self._texts[text], partial(self._stream.inputs, layer, f"child-{text}")
        passes = self._stream.passes(range(layer, layer + 1), text, batches(), first)
        inputs = read_ahead(islice(enumerate(batches()), first, None), read)
        for (seen,), (_, hidden_BTD) in zip(passes, inputs, strict=True):
            yield [replace(seen, inputs_BTD={"attention": hidden_BTD})]


def _save(parent: Parent, child: Child, layer_state: Callable[[int], State], outer: State | None = None) -> None:
    """Write a child's checkpoint, and beside it `architecture.json`.

    One layer is in memory at a time: each is written to a file of its own first, and files are mapped, not read.

    Args:
        layer_state: a layer's weights by their names in the layer, float32. outer: in place of the parent's embeddings,
            final norm and head.
    """
    write_text(child.path.with_name("architecture.json"), child.architecture.to_json())
    parts = child.path.with_name("parts")
    for folder in (parts, child.path):
        shutil.rmtree(folder, ignore_errors=True)
    parts.mkdir()
    write_tensors(parts / "outer.safetensors", outer or parent.embeddings_and_head())
    for layer in range(parent.num_layers):
        named = {f"model.layers.{layer}.{name}": tensor for name, tensor in layer_state(layer).items()}
        write_tensors(parts / f"layer{layer:03d}.safetensors", named)
    model = empty_model(child.architecture.configure(parent.config))
    state = {name: tensor for file in parts.iterdir() for name, tensor in read_tensors(file).items()}
    model.load_state_dict(state, strict=False, assign=True)
    save_checkpoint(finish(model, "cpu"), child.path, extra_files_from=parent.path)
    shutil.rmtree(parts)
