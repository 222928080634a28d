"""From an architecture to a child: the library's weights put together, as a checkpoint that runs (law 5)."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from puzzle.blocks import Architecture, BlockVariant, build_subblock
from puzzle.library import Library
from puzzle.modeling import PuzzleForCausalLM, save_checkpoint
from puzzle.parents import Parent, finish
from puzzle.runs import Run, write_text

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


def realise(run: Run, parent: Parent, library: Library, blocks: tuple[str, ...]) -> Child:
    """Put the child of these blocks together, save it, and check that it computes what the library's blocks compute.

    Args:
        blocks: one block name a layer, such as `kv2+w512`.
    """
    architecture = Architecture(tuple(BlockVariant.parse(name) for name in blocks))
    stage = run.stage("realise", version=1, settings={"blocks": list(blocks)}, inputs=(parent.address, library.address))
    child = Child(stage.path / "checkpoint", stage.address, architecture)
    if stage.done:
        return child
    write_text(stage.path / "architecture.json", architecture.to_json())
    model = assemble(parent, library, architecture)
    shutil.rmtree(child.path, ignore_errors=True)
    save_checkpoint(model, child.path, extra_files_from=parent.path)
    error = _largest_difference(parent, library, child)
    stage.commit(params=sum(parameter.numel() for parameter in model.parameters()), reload_logit_error=error)
    return child


def assemble(parent: Parent, library: Library, architecture: Architecture) -> PuzzleForCausalLM:
    """The child in memory, in float32 on the CPU."""
    state = parent.outer_state()
    for layer, block in enumerate(architecture.blocks):
        for name, tensor in library.block_state(layer, block).items():
            state[f"model.layers.{layer}.{name}"] = tensor
    with torch.device("meta"):
        model = PuzzleForCausalLM(architecture.configure(parent.config))
    model.load_state_dict(state, strict=False, assign=True)
    return finish(model, "cpu")


@torch.no_grad()
def swapped_logits(model: PuzzleForCausalLM, library: Library, architecture: Architecture, tokens_BT: Tensor) -> Tensor:
    """Logits of the parent `model` with every block swapped in memory for the architecture's, [B, T, V]."""
    hidden_BTD = model.model.embed_tokens(tokens_BT)
    context = model.model.context(hidden_BTD)
    for layer, block in enumerate(architecture.blocks):
        for variant in (block.attention, block.ffn):
            module = build_subblock(variant, model.config, library.state(layer, variant))
            hidden_BTD = module(hidden_BTD, **context)
    return model.lm_head(model.model.norm(hidden_BTD))


def _largest_difference(parent: Parent, library: Library, child: Child) -> float:
    """Largest difference of logits between the saved child and the parent with the blocks swapped in."""
    tokens_BT = torch.arange(_CHECK_TOKENS).remainder(parent.config.vocab_size).unsqueeze(0)
    expected = swapped_logits(parent.load(), library, child.architecture, tokens_BT)
    found = child.load()(tokens_BT).logits
    error = float((found - expected).abs().max())
    scale = float(expected.abs().max())
    assert error <= 1e-4 * max(scale, 1.0), f"the saved child is off by {error} of {scale}; this is a bug"
    return error
