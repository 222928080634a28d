"""Children of all kinds, and how far an engine's logits are from torch's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.conftest import pico_puzzle, save_byte_tokenizer
from torch import Tensor, nn

from puzzle.modeling import MODULES, PuzzleConfig, PuzzleForCausalLM, save_checkpoint
from puzzle.variants import REGISTRY, ParentSubblock, State, Variant, register

VOCAB = 288
"""More than the tokenizer has: the rest only pads the embeddings."""
TOKENS = [65, 3, 200, 17, 90, 91, 92, 5, 5, 130, 7, 44]
ROUNDING = 1e-4
"""Largest difference of logits of size 10, in float32; measured are up to 2.4e-5 (docs/engines.md)."""
MIXED = tuple(
    tuple(blocks.split())
    for blocks in (
        "none+none none+w48 kv4+none kv1+w16 none+w16 kv2+none none+none kv4+w16",  # any format
        "none+w48 kv4+none linear+w48 none+none kv1+w16 linear+none none+w48 kv2+none",  # llama.cpp as well
        "none+none linear+none kv4+w16 linear+w16 kv2+none none+w16 kv4+w48 linear+none",
        "kv4+none kv2+none kv1+none none+w48 none+w16 linear+w48 linear+none none+none",
        "none+linear kv4+rank6 linear+none kv2+linear none+rank6 linear+linear kv1+none none+linear",  # own modules
    )
)


class Gain(nn.Module):
    def __init__(self, config: Any, entry: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states


@dataclass(frozen=True)
class GainFFN(Variant):
    """A kind from outside the package."""

    subblock = "ffn"
    kind = grammar = "gain"
    module = Gain

    def fits(self, own: Variant, config: PuzzleConfig) -> bool:
        return True

    def initialise(self, parent: ParentSubblock) -> State:
        raise NotImplementedError


@contextmanager
def kind_from_outside() -> Iterator[None]:
    """`gain` is an FFN inside."""
    register(GainFFN)
    yield
    del REGISTRY["ffn"]["gain"], MODULES["ffn", "gain"]


def save(folder: Path, *blocks: str, **overrides: object) -> tuple[PuzzleForCausalLM, Path]:
    """A random child of these blocks, in memory and on disk."""
    return save_as_child(pico_puzzle(*blocks, **{"vocab_size": VOCAB, "hidden_size": 64, **overrides}), folder)


def save_as_child(model: PuzzleForCausalLM, folder: Path) -> tuple[PuzzleForCausalLM, Path]:
    """The model, and where it is written with a tokenizer."""
    folder.mkdir(parents=True)
    save_byte_tokenizer(folder)
    save_checkpoint(model, folder / "child", extra_files_from=folder)
    return model, folder / "child"


@torch.no_grad()
def logits_of(model: PuzzleForCausalLM, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens])).logits[0]


def greedy(model: PuzzleForCausalLM, tokens: list[int], count: int) -> list[int]:
    generated = model.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return generated[0, len(tokens) :].tolist()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())
