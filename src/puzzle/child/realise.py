"""From an architecture to a child: the library's weights put together, as a checkpoint that runs (law 5)."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from puzzle.library import Library, final_states
from puzzle.modeling import PuzzleForCausalLM, empty_model, finish, save_checkpoint
from puzzle.parents import Parent, open_parent
from puzzle.runs import Run, read_tensors, write_tensors, write_text
from puzzle.stages import REALISE
from puzzle.streams import Stream
from puzzle.variants import Architecture, State

_CHECK_TOKENS = 16


@dataclass(frozen=True)
class Child:
    """A child on disk."""

    path: Path
    """A Hugging Face checkpoint."""
    address: str
    architecture: Architecture

    def load(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> PuzzleForCausalLM:
        """The child, for inference."""
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype)
        return model.to(device).eval().requires_grad_(False)

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
    save_child(parent, architecture, lambda layer: library.block_state(layer, architecture.blocks[layer]), child.path)
    error = _largest_difference(run, parent, library, child)
    stage.commit(params=child.source().num_params, reload_logit_error=error)
    return child


def save_child(parent: Parent, architecture: Architecture, layer_state: Callable[[int], State], path: Path) -> None:
    """Write a child's checkpoint, and beside it `architecture.json`.

    One layer is in memory at a time: each is written to a file of its own first, and files are mapped, not read.

    Args:
        layer_state: a layer's weights by their names in the layer, float32.
        path: a folder; what is there already is replaced.
    """
    write_text(path.with_name("architecture.json"), architecture.to_json())
    parts = path.with_name("parts")
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    write_tensors(parts / "outer.safetensors", parent.embeddings_and_head())
    for layer in range(len(architecture.blocks)):
        named = {f"model.layers.{layer}.{name}": tensor for name, tensor in layer_state(layer).items()}
        write_tensors(parts / f"layer{layer:03d}.safetensors", named)
    model = empty_model(architecture.configure(parent.config))
    state = {name: tensor for file in parts.iterdir() for name, tensor in read_tensors(file).items()}
    model.load_state_dict(state, strict=False, assign=True)
    shutil.rmtree(path, ignore_errors=True)
    save_checkpoint(finish(model, "cpu"), path, extra_files_from=parent.path)
    del model, state
    shutil.rmtree(parts)


@torch.no_grad()
def swapped_logits(model: PuzzleForCausalLM, library: Library, architecture: Architecture, tokens_BT: Tensor) -> Tensor:
    """Logits of the parent `model` with every block swapped for the architecture's, one at a time, [B, T, V].

    Args:
        model: its own layers need no weights.
    """
    ((final_BTD,),) = final_states(library, model, [architecture.names], [tokens_BT])
    return model.logits(final_BTD)


@torch.no_grad()
def streamed_logits(run: Run, child: Child, tokens_BT: Tensor) -> Tensor:
    """The saved child's logits in float32, with as many of its layers in memory as fit, [B, T, V]."""
    stream = Stream(run, child.source(), child.path.with_name("activations"), dtype=torch.float32)
    (final_BTD,) = stream.finals("check", lambda: [tokens_BT])
    stream.close()
    return stream.model.logits(final_BTD)


def _largest_difference(run: Run, parent: Parent, library: Library, child: Child) -> float:
    """Largest difference of logits between the saved child and the parent with the blocks swapped in."""
    tokens_BT = torch.arange(_CHECK_TOKENS, device=run.device).remainder(parent.config.vocab_size).unsqueeze(0)
    model = parent.load(device=run.device, layers=())
    expected = swapped_logits(model, library, child.architecture, tokens_BT)
    error = float((streamed_logits(run, child, tokens_BT) - expected).abs().max())
    scale = float(expected.abs().max())
    assert error <= 1e-4 * max(scale, 1.0), f"the saved child is off by {error} of {scale}; this is a bug"
    return error
