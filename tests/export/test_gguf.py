"""GGUF files: types, metadata, tokenizer; that llama.cpp computes the same is tested in tests/engines."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tests.export.conftest import SaveChild

from puzzle.errors import PuzzleError
from puzzle.export import export_gguf

SWITCHES = dict.fromkeys(("special", "normalized", "single_word", "lstrip", "rstrip"), False)
ADDED_TOKENS = [{"id": index, "content": f"<{index}>", **SWITCHES} for index in range(257, 261)]


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def edit_json(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_metadata(save_child: SaveChild, tmp_path: Path) -> None:
    _, child = save_child("none+w48", "kv2+w48", "kv1+w48")
    found = fields(export_gguf(child, tmp_path / "model.gguf"))
    assert found["general.architecture"] == "deci"
    assert found["deci.attention.head_count"] == 4  # layers agree: a scalar
    assert found["deci.attention.head_count_kv"] == [0, 2, 1]
    assert found["deci.feed_forward_length"] == 48
    assert found["deci.attention.key_length"] == found["deci.rope.dimension_count"] == 12
    assert found["deci.block_count"] == 3
    assert found["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert len(found["tokenizer.ggml.tokens"]) == found["deci.vocab_size"] == 260
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (0, 3)
    assert found["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize(("dtype", "error"), [("f32", 0.0), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2)])
def test_types(save_child: SaveChild, tmp_path: Path, dtype: Any, error: float) -> None:
    model, child = save_child("kv4+w48")
    file = export_gguf(child, tmp_path / "m", dtype=dtype)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.ffn_gate.weight"].tensor_type.name == dtype.upper()
    # Its rows of 48 are no whole blocks of 32.
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == ("F16" if dtype == "q8_0" else dtype.upper())
    stored = tensors["blk.0.ffn_gate.weight"]
    values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
    expected = model.model.layers[0].mlp.gate_proj.weight.detach()
    assert float((values - expected).abs().max() / expected.abs().max()) <= error


def test_rows_are_layers_but_for_the_gaps_of_llama_cpp(save_child: SaveChild, tmp_path: Path) -> None:
    """Empty layers vanish, absent FFNs are of zeros, and the bias of a linear attention takes a row of its own."""
    _, child = save_child("none+none", "kv4+none", "linear+w48", "none+w16", attention_bias=True)
    found = fields(export_gguf(child, tmp_path / "model.gguf"))
    assert found["deci.attention.head_count"] == [4, 4, 0, 0]
    assert found["deci.attention.head_count_kv"] == [4, 0, 0, 0]
    assert found["deci.feed_forward_length"] == [32, 32, 48, 16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram"}}, "is Unigram and not byte-level BPE"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "is BPE and not byte-level BPE"),
        ({"normalizer": {"type": "Lowercase"}}, "normalises text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text by .*Whitespace"),
        ({"added_tokens": ADDED_TOKENS}, "has the token 260, the model only 260"),
    ],
)
def test_tokenizers_that_llama_cpp_would_read_otherwise(
    save_child: SaveChild, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _, child = save_child("kv4+w48")
    edit_json(child / "tokenizer.json", change)
    with pytest.raises(PuzzleError, match=message):
        export_gguf(child, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_every_token_that_ends_a_generation_has_a_place_or_is_named(save_child: SaveChild, tmp_path: Path) -> None:
    _, child = save_child("kv4+w48")
    (child / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7, 9]}))
    found = fields(export_gguf(child, tmp_path / "m"))
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [0, 7, 9]
    (child / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7, 9, 11]}))
    with pytest.raises(PuzzleError, match=r"more eos_token_id than the format has places for; .* \(left over: 11\)"):
        export_gguf(child, tmp_path / "n")


def test_a_begin_of_text_that_the_tokenizer_adds(save_child: SaveChild, tmp_path: Path) -> None:
    _, child = save_child("kv4+w48")
    text, more = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    begin = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    tokens = {"<eos>": {"id": "<eos>", "ids": [0], "tokens": ["<eos>"]}}
    added = {"type": "TemplateProcessing", "single": [begin, text], "pair": [text, more], "special_tokens": tokens}
    edit_json(child / "tokenizer.json", {"post_processor": added})
    edit_json(child / "tokenizer_config.json", {"bos_token": "<eos>"})
    found = fields(export_gguf(child, tmp_path / "m"))
    names = ("add_bos_token", "add_eos_token", "bos_token_id")
    assert [found[f"tokenizer.ggml.{name}"] for name in names] == [True, False, 0]
