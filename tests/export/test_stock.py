"""A child whose layers are alike is a model of its family that stock code loads."""

import re
from pathlib import Path

import pytest
import torch
from tests.conftest import random_tokens, save_byte_tokenizer
from tests.export.conftest import SaveChild
from tests.modeling.test_families import every_family
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from puzzle.errors import PuzzleError
from puzzle.export import export_stock
from puzzle.modeling import PuzzleForCausalLM, puzzle_config, save_checkpoint, tiny_config


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
    with pytest.raises(
        PuzzleError, match=rf"export to stock: found kv2\+w20, {re.escape(differing)}; a model of the family llama"
    ):
        export_stock(child, tmp_path / "out")


def save_uniform(family: str, folder: Path, empty: int | None = None, **sizes: int) -> tuple[PuzzleForCausalLM, Path]:
    """A random child of layers as the parent has them but for these sizes, one of them empty; in memory and on disk."""
    parent = puzzle_config(tiny_config(family))
    blocks = [{which: dict(entry) for which, entry in block.items()} for block in parent.blocks]
    for entry in (entry for block in blocks for entry in block.values()):
        entry |= {name: size for name, size in sizes.items() if name in entry}
    if empty is not None:
        blocks[empty] = {"attention": {"kind": "none"}, "ffn": {"kind": "none"}}
    torch.manual_seed(0)
    model = PuzzleForCausalLM(type(parent)(**parent.to_dict() | {"blocks": blocks})).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    folder.mkdir(exist_ok=True)
    save_byte_tokenizer(folder)
    save_checkpoint(model, folder / "child", extra_files_from=folder)
    return model, folder / "child"


@torch.no_grad()
@every_family
def test_children_of_every_family_in_its_own_class(family: str, tmp_path: Path) -> None:
    """Fewer KV heads, narrower FFNs and windows in all layers, one layer empty: experts are stored one by one."""
    latent = family in ("deepseek_v2", "deepseek_v3")
    sizes = {"intermediate_size": 48, "window": 4} | ({} if latent else {"num_key_value_heads": 1})
    model, child = save_uniform(family, tmp_path, empty=2, **sizes)
    loaded = AutoModelForCausalLM.from_pretrained(export_stock(child, tmp_path / "out")).eval()
    assert loaded.config.model_type == family
    assert loaded.config.num_hidden_layers == 5
    tokens_BT = torch.randint(128, (2, 24))
    assert torch.equal(loaded(tokens_BT).logits, model(tokens_BT).logits)
