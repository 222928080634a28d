"""Law 7 for llama.cpp: a child as a GGUF file gives the logits that it gives in torch."""

from itertools import product
from pathlib import Path

import pytest
import torch
from tests.engines.parity import (
    ATTENTIONS,
    FFNS,
    MIXED,
    POSITIONS,
    ROUNDING,
    TOKENS,
    difference,
    greedy,
    in_position,
    logits_of,
    save,
)
from tests.engines.readers import LlamaCpp
from transformers import AutoTokenizer

from puzzle.export import export_gguf


def test_every_alternative_in_every_position(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    cases = [f"{a}+{f} {position}" for a, f, position in product(ATTENTIONS, FFNS, POSITIONS)]
    expected, files = [], []
    for case in cases:
        block, position = case.split()
        model, child = save(tmp_path / case, *in_position(*block.split("+"), position))
        expected.append(logits_of(model, TOKENS))
        files.append(export_gguf(child, tmp_path / f"{case}.gguf", dtype="f32"))
    answers = llama_cpp(files, TOKENS)
    errors = {
        case: difference(answer.logits_TV, logits)
        for case, answer, logits in zip(cases, answers, expected, strict=True)
    }
    assert {case: error for case, error in errors.items() if not error < ROUNDING} == {}


@pytest.mark.parametrize("sizes", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}])
def test_mixed_stacks_and_64_greedy_tokens(llama_cpp: LlamaCpp, tmp_path: Path, sizes: dict[str, bool]) -> None:
    saved = [save(tmp_path / str(index), *blocks, **sizes) for index, blocks in enumerate(MIXED)]
    files = [export_gguf(child, child.with_suffix(".gguf"), dtype="f32") for _, child in saved]
    answers = llama_cpp(files, TOKENS, greedy=64)
    for (model, _), answer in zip(saved, answers, strict=True):
        assert difference(answer.logits_TV, logits_of(model, TOKENS)) < ROUNDING
        assert answer.greedy == greedy(model, TOKENS, 64)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 500000.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_scaling(llama_cpp: LlamaCpp, tmp_path: Path, rope: dict[str, object]) -> None:
    model, child = save(tmp_path / "scaled", "kv4+w48", "kv2+w16", "none+w48", rope_parameters=rope)
    unscaled, _ = save(tmp_path / "unscaled", "kv4+w48", "kv2+w16", "none+w48")
    [answer] = llama_cpp([export_gguf(child, tmp_path / "model.gguf", dtype="f32")], TOKENS)
    expected = logits_of(model, TOKENS)
    assert difference(answer.logits_TV, expected) < ROUNDING
    assert difference(logits_of(unscaled, TOKENS), expected) > 100 * ROUNDING


def test_a_child_without_any_attention(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    model, child = save(tmp_path / "folder", "none+w48", "linear+linear", "none+none")
    [answer] = llama_cpp([export_gguf(child, tmp_path / "model.gguf", dtype="f32")], TOKENS)
    assert difference(answer.logits_TV, logits_of(model, TOKENS)) < ROUNDING


@pytest.mark.parametrize(("dtype", "share"), [("f16", 5e-3), ("bf16", 5e-2), ("q8_0", 0.1)])
def test_smaller_types_are_off_by_their_rounding(llama_cpp: LlamaCpp, tmp_path: Path, dtype: str, share: float) -> None:
    model, child = save(tmp_path / "folder", *MIXED[0])
    [answer] = llama_cpp([export_gguf(child, tmp_path / "model.gguf", dtype=dtype)], TOKENS)
    expected = logits_of(model, TOKENS)
    error = difference(answer.logits_TV, expected)
    assert 1e-6 < error < share * float(expected.abs().max())


def test_text_is_split_as_by_the_parents_tokenizer(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    _, child = save(tmp_path / "folder", "kv4+w48")
    text = "Numbers: 3 33 3.3, I've  two spaces\nand a line, été, 🚀.<eos>"
    [answer] = llama_cpp([export_gguf(child, tmp_path / "model.gguf")], TOKENS, text=text)
    assert answer.text == AutoTokenizer.from_pretrained(child)(text).input_ids


def test_logits_are_sensitive_to_every_layer(tmp_path: Path) -> None:
    """What the tolerance is good for: leaving out any subblock changes logits by far more."""
    model, _ = save(tmp_path / "folder", *MIXED[0])
    expected = logits_of(model, TOKENS)
    for parameter in (parameter for name, parameter in model.named_parameters() if "norm" in name):
        kept = parameter.detach().clone()
        torch.nn.init.zeros_(parameter)
        assert difference(logits_of(model, TOKENS), expected) > 100 * ROUNDING
        with torch.no_grad():
            parameter.copy_(kept)
