"""DeciLM checkpoints: what vLLM's reader parses, computed again from the files alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import random_tokens
from tests.export.conftest import SaveChild
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from puzzle.errors import PuzzleError
from puzzle.export import convert, export_deci, export_gguf, export_stock
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def as_puzzle(folder: Path) -> PuzzleForCausalLM:
    """The model that vLLM builds from `block_configs`, in Puzzle's modules."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    blocks = []
    for block in config.block_configs:
        attention, ffn = {"kind": "none"}, {"kind": "none"}
        if not block.attention.no_op:
            kv_heads = config.num_attention_heads // block.attention.n_heads_in_group
            attention = {"kind": "gqa", "num_key_value_heads": kv_heads}
        if not block.ffn.no_op:
            ffn = {"kind": "gated", "intermediate_size": block.ffn.intermediate_size}
        blocks.append({"attention": attention, "ffn": ffn})
    assert len(blocks) == config.num_hidden_layers
    same = ("vocab_size", "hidden_size", "num_attention_heads", "head_dim", "rms_norm_eps", "rope_parameters")
    same += ("attention_bias", "mlp_bias", "tie_word_embeddings", "max_position_embeddings", "hidden_act")
    model = PuzzleForCausalLM(PuzzleConfig(blocks=blocks, **{name: getattr(config, name) for name in same}))
    missing, unexpected = model.load_state_dict(weights_in(folder), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if config.tie_word_embeddings else [], [])
    model.tie_weights()
    return model.to(config.dtype).eval()


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}},
    ],
)
def test_the_files_hold_the_whole_child(save_child: SaveChild, tmp_path: Path, sizes: dict[str, object]) -> None:
    """Also where the first layer that is not empty has no attention: it gets one that adds nothing."""
    model, child = save_child("none+none", "none+w48", "kv4+w48", "kv2+none", "none+none", "kv1+w20", **sizes)
    folder = export_deci(child, tmp_path / "out")
    blocks = json.loads((folder / "config.json").read_text())["block_configs"]
    assert [block["attention"]["n_heads_in_group"] for block in blocks] == [4, 1, 2, 4]
    tokens = random_tokens(2, 16)
    torch.testing.assert_close(as_puzzle(folder)(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


def test_files_with_weights_are_those_of_the_child_in_its_dtype(save_child: SaveChild, tmp_path: Path) -> None:
    model, child = save_child("none+w48", "none+none", "kv4+w48", "kv1+w20")
    model.bfloat16().save_pretrained(child, max_shard_size=10_000)
    (child / "model.safetensors").unlink()
    folder = export_deci(child, tmp_path / "out")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(folder.glob("*.safetensors"))) > 2
    tensors = weights_in(folder)
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    tokens = random_tokens(2, 16)
    torch.testing.assert_close(as_puzzle(folder)(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


def test_what_goes_with_it(save_child: SaveChild, tmp_path: Path) -> None:
    _, child = save_child("kv4+w48")
    folder = export_deci(child, tmp_path / "out")
    for name in ("LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (child / name).read_bytes()
    assert not (folder / "README.md").exists()
    assert [file.name for file in folder.glob("*.py")] == ["configuration_decilm.py"]
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a").input_ids
    AutoConfig.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "again")
    written, again = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert written["block_configs"] == again["block_configs"]


@torch.no_grad()
@pytest.mark.parametrize("write", [export_deci, export_stock])
def test_in_another_dtype(
    save_child: SaveChild, tmp_path: Path, write: Callable[[Path, Path, torch.dtype], Path]
) -> None:
    _, child = save_child("kv2+w20", "kv2+w20", head_dim=8)
    folder = write(child, tmp_path / "out", torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


WRITERS = pytest.mark.parametrize("write", [export_deci, export_stock, export_gguf])


@WRITERS
def test_nothing_is_written_of_what_is_refused(
    save_child: SaveChild, tmp_path: Path, write: Callable[[Path, Path], Path]
) -> None:
    _, child = save_child("kv4+w256", "kv4+rank4")
    with pytest.raises(PuzzleError, match=r"layer 1|kv4\+rank4"):
        write(child, tmp_path / "out")
    with pytest.raises(PuzzleError, match=r"has no config\.json"):
        write(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_plain_llama_is_exported_as_well(save_child: SaveChild, tmp_path: Path) -> None:
    model, child = save_child("kv2+w20", "kv2+w20", head_dim=8)
    folder, tokens = export_deci(export_stock(child, tmp_path / "llama"), tmp_path / "out"), random_tokens(2, 16)
    torch.testing.assert_close(as_puzzle(folder)(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("write", [export_deci, export_stock])
def test_only_checkpoints_are_replaced_and_never_the_child(
    save_child: SaveChild, tmp_path: Path, write: Callable[[Path, Path], Path]
) -> None:
    _, child = save_child("kv4+w48")
    before = sorted(file.name for file in child.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for target in (child, tmp_path, tmp_path / "mine"):
        with pytest.raises(PuzzleError, match="export"):
            write(child, target)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert sorted(file.name for file in child.iterdir()) == before


@pytest.mark.parametrize(("to", "name"), [("deci", "child-deci"), ("stock", "child-stock"), ("gguf", "child-f16.gguf")])
def test_formats_stand_beside_the_child_and_are_written_anew(save_child: SaveChild, to: str, name: str) -> None:
    _, child = save_child("kv4+w48")
    for _ in range(2):
        written = convert(child, to, "f16")
        assert written == child.with_name(name)
        assert written.exists()
