"""A child whose layers are alike is a Llama that stock code loads."""

import re
from pathlib import Path

import pytest
import torch
from tests.conftest import random_tokens
from tests.export.conftest import SaveChild
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from puzzle.errors import PuzzleError
from puzzle.export import export_stock


@pytest.mark.parametrize("sizes", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}])
def test_logits_are_equal_without_our_code(save_child: SaveChild, tmp_path: Path, sizes: dict[str, bool]) -> None:
    model, child = save_child("none+none", "kv2+w20", "kv2+w20", "none+none", "kv2+w20", **sizes)
    loaded = AutoModelForCausalLM.from_pretrained(export_stock(child, tmp_path / "out")).eval()
    assert type(loaded) is LlamaForCausalLM
    assert len(loaded.model.layers) == 3
    tokens = random_tokens(2, 16)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("differing", ["kv1+w20", "kv2+w16", "none+w20", "kv2+linear", "kv2win8+w20"])
def test_layers_that_differ_are_refused(save_child: SaveChild, tmp_path: Path, differing: str) -> None:
    _, child = save_child("kv2+w20", differing)
    with pytest.raises(PuzzleError, match=rf"export to llama: found kv2\+w20, {re.escape(differing)} of"):
        export_stock(child, tmp_path / "out")
