"""The one way to run a model over text layer by layer, whether or not it fits in memory.

A model that fits is loaded once: it is *resident*. Of a larger one, which is *streamed*, only embeddings, final norm,
head and the layers in use hold weights. A thread reads the next layers and the next batch while these are in use, and
what enters the layers in use is kept on disk for every batch of every text. What is counted against the memory is
weights and what the caller asks for; what one batch takes on its way through a layer, and its logits, come on top.

Shapes: B batch, T tokens, D hidden size.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleDecoderLayer
from puzzle.parents import Parent
from puzzle.runs import Run, read_json, read_tensors, write_json, write_tensors
from puzzle.units import format_bytes
from puzzle.variants import State, Subblock

Texts = Mapping[str, Callable[[], Iterable[Tensor]]]
"""Named texts: each gives its batches of tokens, [B, T], in order, as often as it is called."""

_Item = TypeVar("_Item")
_Read = TypeVar("_Read")


def packed(items: Iterable[_Item], size: Callable[[_Item], int], room: int) -> Iterator[list[_Item]]:
    """Consecutive items, as many at a time as `room` has space for, but always at least one."""
    group: list[_Item] = []
    used = 0
    for item in items:
        if group and used + size(item) > room:
            yield group
            group, used = [], 0
        group.append(item)
        used += size(item)
    if group:
        yield group


def read_ahead(items: Iterable[_Item], read: Callable[[_Item], _Read]) -> Iterator[tuple[_Item, _Read]]:
    """Each item with what `read` gives for it; a thread reads the next while this one is in use."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in items:
            reading = item, thread.submit(read, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = reading
        if waiting is not None:
            yield waiting[0], waiting[1].result()


@dataclass(frozen=True, kw_only=True)
class LayerPass:
    """One layer on one batch. A subblock's output is what it adds to the residual stream, zeros if it is absent."""

    index: int
    layer: PuzzleDecoderLayer
    context: dict[str, Any]
    """What the layer is called with beside the hidden states."""
    input_BTD: Tensor
    attention_BTD: Tensor
    """The attention subblock's output."""
    middle_BTD: Tensor
    """The FFN subblock's input."""
    ffn_BTD: Tensor
    """The FFN subblock's output."""
    output_BTD: Tensor
    """The layer's output."""

    def subblock_input(self, subblock: Subblock) -> Tensor:
        return self.input_BTD if subblock == "attention" else self.middle_BTD

    def subblock_output(self, subblock: Subblock) -> Tensor:
        return self.attention_BTD if subblock == "attention" else self.ffn_BTD


class Activations:
    """Hidden states on disk: of each text the inputs of one layer, batch by batch.

        FOLDER/TEXT/LAYER/BATCH.safetensors
        FOLDER/TEXT/ready.json                 the layer of which every batch is there

    They can be computed again, so that nothing waits until they are on the disk itself.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def ready(self, text: str) -> int:
        """The layer whose inputs are complete; 0 if there is none."""
        file = self._ready_file(text)
        return int(read_json(file)["layer"]) if file.exists() else 0

    def read(self, text: str, layer: int, batch: int) -> Tensor:
        return read_tensors(self._file(text, layer, batch))["hidden_BTD"]

    @torch.no_grad()
    def advance(
        self,
        text: str,
        batches: Iterable[Tensor],
        layers: range,
        inputs: Callable[[tuple[int, Tensor]], Tensor],
        forward: Callable[[Tensor], Tensor],
    ) -> None:
        """Replace the inputs of the first of `layers` by the outputs of the last; batches that are there already stay.

        Args:
            inputs: the hidden states of a batch, by its number and tokens. forward: runs them through `layers`.
        """
        self.keep(text, layers.start, layers.stop)
        self._file(text, layers.stop, 0).parent.mkdir(parents=True, exist_ok=True)
        missing = (item for item in enumerate(batches) if not self._file(text, layers.stop, item[0]).exists())
        for (batch, _), hidden_BTD in read_ahead(missing, inputs):
            write_tensors(self._file(text, layers.stop, batch), {"hidden_BTD": forward(hidden_BTD)}, flush=False)
        write_json(self._ready_file(text), {"layer": layers.stop})
        self.keep(text, layers.stop)

    def keep(self, text: str, *layers: int) -> None:
        """Delete the inputs of all other layers."""
        for folder in (self._folder / text).glob("[0-9]*"):
            if int(folder.name) not in layers:
                shutil.rmtree(folder)

    def back_to(self, text: str, layer: int) -> int:
        """The layer, no later than `layer`, that is ready; inputs of a later one are deleted."""
        if (ready := self.ready(text)) <= layer:
            return ready
        self._ready_file(text).unlink()
        self.keep(text)
        return 0

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def num_bytes(self, without: Collection[str] = ()) -> int:
        folders = [folder for folder in self._folder.glob("*") if folder.name not in without]
        return sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors"))

    def _ready_file(self, text: str) -> Path:
        return self._folder / text / "ready.json"

    def _file(self, text: str, layer: int, batch: int) -> Path:
        return self._folder / text / f"{layer:03d}" / f"{batch:06d}.safetensors"


class Stream:
    """A model for inference, any range of its layers over any text.

    Args:
        source: the parent, or a child on disk opened like one.
        folder: for hidden states while they are needed; `close` deletes it.
        reserved_bytes: memory that the caller needs beside the model all the time.
        dtype: of weights and hidden states; None: the recipe's `precision`.
        device: None: the run's.
    """

    def __init__(
        self,
        run: Run,
        source: Parent,
        folder: Path,
        reserved_bytes: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._run, self._source, self.activations = run, source, Activations(folder)
        room = run.memory_bytes - reserved_bytes  # asked before any weights are loaded
        dtype = dtype or getattr(torch, run.recipe.precision)
        blocks, config = source.architecture.blocks, source.config
        params = [block.num_params(config) for block in blocks]
        self.layer_bytes = [dtype.itemsize * count for count in params]
        self.outer_bytes = dtype.itemsize * (source.num_params - sum(params))
        """Of embeddings, final norm and head, which are always held."""
        self._room = room - self.outer_bytes
        self.resident = sum(self.layer_bytes) <= self._room
        self.model = source.load(dtype=dtype, device=device or run.device, layers=None if self.resident else ())
        self.num_layers = len(blocks)

    def room(self, layers: Iterable[int]) -> int:
        """Bytes that are left while these layers are held."""
        return self._room - sum(self.layer_bytes if self.resident else (self.layer_bytes[layer] for layer in layers))

    def groups(
        self, layers: Iterable[int], extra_bytes: Callable[[int], int], begun: Collection[int] = ()
    ) -> Iterator[range]:
        """Ranges of layers, each as long as its weights and `extra_bytes` fit the memory, but at least one layer.

        Ranges of a streamed model hold no layer that is not asked for.

        Args:
            extra_bytes: what a layer needs beside its own weights.
            begun: layers that an attempt before this one was at; they come first, in ranges of their own.
        """
        parts = [[i for i in layers if i in begun], [i for i in layers if i not in begun]]
        if not self.resident:
            runs = [groupby(enumerate(part), key=lambda pair: pair[1] - pair[0]) for part in parts]
            parts = [[layer for _, layer in run] for part in runs for _, run in part]
        own = [0] * self.num_layers if self.resident else self.layer_bytes
        for part in parts:
            for group in packed(part, lambda layer: extra_bytes(layer) + own[layer], self.room(())):
                yield range(group[0], group[-1] + 1)

    def hold(self, layers: Collection[int], weights: Mapping[int, State] | None = None) -> None:
        """Hold the weights of these layers; of a streamed model, of no others.

        Args:
            weights: the layers' tensors, if they were read before.
        """
        if self.resident:
            return
        held = list(self.model.model.layers)
        for index, layer in enumerate(held):
            if index not in layers:
                layer.to("meta")
        for index in layers:
            if any(parameter.is_meta for parameter in held[index].parameters()):
                state = self._read([index])[index] if weights is None else weights[index]
                held[index].load_state_dict(state, assign=True)
                held[index].requires_grad_(False)

    def walk(self, layers: range, reserved_bytes: int = 0) -> Iterator[range]:
        """`layers` in order, as many at a time as fit the memory twice: held, while a thread reads the next ones.

        Args:
            reserved_bytes: memory that the caller needs meanwhile.
        """
        if self.resident:
            yield layers
            return
        groups = packed(layers, lambda layer: 2 * self.layer_bytes[layer], self._room - reserved_bytes)
        for group, weights in read_ahead(groups, self._read):
            self.hold(group, weights)
            weights.clear()
            yield range(group[0], group[-1] + 1)
            self.hold(())

    def _read(self, layers: Iterable[int]) -> dict[int, State]:
        device, dtype = self.model.device, self.model.dtype
        return {index: self._source.layer_state(index, dtype, device) for index in layers}

    @torch.no_grad()
    def embed(self, tokens_BT: Tensor) -> Tensor:
        """The inputs of layer 0."""
        return self.model.embed(tokens_BT.to(self.model.device))

    def prepare(self, layer: int, texts: Texts) -> None:
        """Have the inputs of `layer` on disk for every batch of `texts`; those of layer 0 are embeddings, not kept.

        Goes on from the nearest layer before it that is on disk, and after a kill from the last batch that was written.
        No more than two layers' inputs of a text are on disk at a time. A streamed model holds no layer afterwards.
        """
        starts = {name: self.activations.back_to(name, layer) for name in texts}
        behind = {name: batches for name, batches in texts.items() if starts[name] < layer}
        if not behind:
            return
        self.check_disk(behind)
        for group in self.walk(range(min(starts.values()), layer)):
            for name, batches in behind.items():
                if (start := max(group.start, starts[name])) < group.stop:
                    layers = range(start, group.stop)
                    inputs, forward = partial(self.inputs, start, name), partial(self.forward, layers)
                    self.activations.advance(name, batches(), layers, inputs, forward)

    @torch.no_grad()
    def inputs(self, layer: int, text: str, numbered_BT: tuple[int, Tensor]) -> Tensor:
        """The inputs of `layer` for a batch of a text that was prepared for it, by number and tokens. [B, T, D]"""
        batch, tokens_BT = numbered_BT
        if layer == 0:
            return self.embed(tokens_BT)
        return self.activations.read(text, layer, batch).to(self.model.device)

    @torch.no_grad()
    def forward(self, layers: range, hidden_BTD: Tensor) -> Tensor:
        """The outputs of the last of `layers`, which are held."""
        context = self.model.model.context(hidden_BTD)
        for index in layers:
            hidden_BTD = self.model.model.layers[index](hidden_BTD, **context)
        return hidden_BTD

    def passes(
        self, layers: range, text: str, batches: Iterable[Tensor], first: int = 0
    ) -> Iterator[Iterator[LayerPass]]:
        """For each batch of a text that was prepared for the first of `layers`, its way through them, layer by layer.

        Args:
            first: number of the first batch; those before it are skipped.
        """
        numbered = islice(enumerate(batches), first, None)
        for _, hidden_BTD in read_ahead(numbered, partial(self.inputs, layers.start, text)):
            yield self.through(layers, hidden_BTD)

    def through(self, layers: range, hidden_BTD: Tensor) -> Iterator[LayerPass]:
        """Each of `layers` in order. Gradients are off for this model alone: the caller may train beside it."""
        with torch.no_grad():
            context = self.model.model.context(hidden_BTD)
        for index in layers:
            layer = cast(PuzzleDecoderLayer, self.model.model.layers[index])
            with torch.no_grad():
                attention_BTD = layer.subblock_output("attention", hidden_BTD, **context)
                middle_BTD = hidden_BTD + attention_BTD
                ffn_BTD = layer.subblock_output("ffn", middle_BTD, **context)
                output_BTD = middle_BTD + ffn_BTD
            yield LayerPass(
                index=index,
                layer=layer,
                context=context,
                input_BTD=hidden_BTD,
                attention_BTD=attention_BTD,
                middle_BTD=middle_BTD,
                ffn_BTD=ffn_BTD,
                output_BTD=output_BTD,
            )
            hidden_BTD = output_BTD

    def finals(self, text: str, batches: Callable[[], Iterable[Tensor]]) -> Iterator[Tensor]:
        """The outputs of the last layer, batch by batch; on disk only if the model is streamed. [B, T, D]"""
        layers = range(self.num_layers)
        if self.resident:
            yield from (self.forward(layers, self.embed(tokens_BT)) for tokens_BT in batches())
            return
        self.prepare(self.num_layers, {text: batches})
        for numbered_BT in enumerate(batches()):
            yield self.inputs(self.num_layers, text, numbered_BT)

    def close(self) -> None:
        """Delete what was kept on disk."""
        self.activations.close()

    def check_disk(self, texts: Texts, models: int = 1) -> None:
        """Refuse what does not fit `execution.disk`: the inputs of one layer for every text, and of a second for one
        text at a time, beside what there is.

        Args:
            models: how many keep so much.
        """
        tokens = {name: sum(tokens_BT.numel() for tokens_BT in batches()) for name, batches in texts.items()}
        token_bytes = self._source.config.hidden_size * self.model.dtype.itemsize
        needed = models * (sum(tokens.values()) + max(tokens.values())) * token_bytes
        needed += self.activations.num_bytes(without=texts.keys())
        allowed = self._run.disk_bytes
        if self._run.recipe.execution.disk is None:  # what is free does not hold what is here already
            allowed += self.activations.num_bytes()
        if needed > allowed:
            raise PuzzleError(
                f"execution.disk: the activations of {sum(tokens.values()):,} tokens ({', '.join(texts)}) take "
                f"{format_bytes(needed)}, allowed are {format_bytes(allowed)}; raise execution.disk or "
                "execution.memory, or take fewer tokens"
            )
