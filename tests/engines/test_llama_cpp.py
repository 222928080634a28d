"""Law 7 for llama.cpp: a child as a GGUF file gives the logits that it gives in torch."""

from itertools import product
from pathlib import Path

import gguf
import pytest
import torch
from tests.conftest import EOS
from tests.engines.parity import MIXED, ROUNDING, TOKENS, difference, logits_of, save
from tests.engines.readers import Ask
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from puzzle.costs.process_engines import check_llama_cpp
from puzzle.errors import PuzzleError
from puzzle.export import GGUFType, export_gguf

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bytes_alone])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {
    "gpt-2": (GPT2, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), False),
    "llama-bpe": (split(LLAMA3), True),
    "smaug-bpe": (split(LLAMA3), False),
    "qwen2": (split(LLAMA3.replace("{1,3}", "")), False),
}
"""By llama.cpp's name, how the parent's tokenizer splits text, and whether it takes whole words without merging."""


def test_every_block_in_every_position(llama_cpp: Ask, tmp_path: Path) -> None:
    blocks = map("+".join, product(("kv4", "kv2", "linear", "none"), ("w48", "w16", "none")))
    full = ["kv4+w48"] * 4
    stacks = {(*full[:position], block, *full[position + 1 :]) for block, position in product(blocks, (0, 1, 3))}
    cases = {stack: save(tmp_path / " ".join(stack), *stack) for stack in stacks}
    answers = llama_cpp(
        [export_gguf(child, child.with_name("gguf"), dtype="f32") for _, child in cases.values()], TOKENS
    )
    for answer, (stack, (model, _)) in zip(answers, cases.items(), strict=True):
        assert difference(answer.logits_TV, logits_of(model, TOKENS)) < ROUNDING, stack


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 500000.0,
}


def test_scaled_rotary_embeddings_and_no_attention_at_all(llama_cpp: Ask, tmp_path: Path) -> None:
    blocks, cases = ("kv4+w48", "kv2q2+w16", "none+w48"), []
    for rope in (LINEAR, LLAMA_3 | {"original_max_position_embeddings": 32}):
        cases.append(save(tmp_path / str(len(cases)), *blocks, rope_parameters=rope))
        unscaled, _ = save(tmp_path / f"unscaled {len(cases)}", *blocks)
        assert difference(logits_of(unscaled, TOKENS), logits_of(cases[-1][0], TOKENS)) > 100 * ROUNDING
    cases.append(save(tmp_path / "no attention", "none+w48", "linear+w16", "none+none"))
    answers = llama_cpp([export_gguf(child, child.with_name("gguf"), dtype="f32") for _, child in cases], TOKENS)
    for answer, (model, _) in zip(answers, cases, strict=True):
        assert difference(answer.logits_TV, logits_of(model, TOKENS)) < ROUNDING


def test_smaller_types_are_off_by_their_rounding(llama_cpp: Ask, tmp_path: Path) -> None:
    """Of weights, as in torch; llama.cpp rounds what they are multiplied with as well."""
    types: tuple[GGUFType, ...] = ("f16", "bf16", "q8_0")
    model, child = save(tmp_path / "folder", *MIXED[1])
    answers = llama_cpp([export_gguf(child, tmp_path / dtype, dtype=dtype) for dtype in types], TOKENS)
    expected = logits_of(model, TOKENS)
    for dtype, answer in zip(types, answers, strict=True):
        model, _ = save(tmp_path / f"rounded {dtype}", *MIXED[1])
        for matrix in (parameter.data for parameter in model.parameters() if parameter.ndim == 2):
            kind = gguf.GGMLQuantizationType["F16" if dtype == "q8_0" and matrix.shape[1] % 32 else dtype.upper()]
            rounded = gguf.quants.dequantize(gguf.quants.quantize(matrix.contiguous().numpy(), kind), kind)
            matrix.copy_(torch.from_numpy(rounded.copy()).view(matrix.shape))
        rounding = difference(logits_of(model, TOKENS), expected)
        assert 1e-6 < difference(answer.logits_TV, expected) < 3 * rounding


def test_text_is_split_as_by_the_parents_tokenizer(llama_cpp: Ask, tmp_path: Path) -> None:
    text = "Numbers: 3 33 333 3333.3, I've WE'LL  two spaces\r\n\n and a line,\tété, 漢字,🚀!!!\n  ?<eos>  "
    expected, files = {}, []
    for name, (pre_tokenizer, ignore_merges) in SPLITS.items():
        _, child = save(tmp_path / name, "kv4+w48", vocab_size=400)
        tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        tokenizer.pre_tokenizer = pre_tokenizer
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=[EOS], initial_alphabet=alphabet)
        tokenizer.train_from_iterator([text] * 3 + Path(__file__).read_text().splitlines(), trainer)
        tokenizer.save(str(child / "tokenizer.json"))
        expected[name] = tokenizer.encode(text).ids
        files.append(export_gguf(child, tmp_path / f"{name}.gguf"))
    answers = llama_cpp(files, TOKENS, text=text)
    assert {name: answer.text for name, answer in zip(SPLITS, answers, strict=True)} == expected
    assert len(set(map(tuple, expected.values()))) > 3, "the text does not tell ways of splitting apart"


def test_logits_are_sensitive_to_every_layer(tmp_path: Path) -> None:
    """What the tolerance is good for: leaving out any subblock changes logits by far more."""
    model, _ = save(tmp_path / "folder", *MIXED[1])
    expected = logits_of(model, TOKENS)
    for parameter in (parameter for name, parameter in model.named_parameters() if "norm" in name):
        kept = parameter.detach().clone()
        torch.nn.init.zeros_(parameter)
        assert difference(logits_of(model, TOKENS), expected) > 100 * ROUNDING
        with torch.no_grad():
            parameter.copy_(kept)


def test_the_check_of_a_fresh_installation(llama_cpp: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that dies in its first product of quantised weights is found."""
    check_llama_cpp()
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nread line; kill -ILL $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr("puzzle.costs.process_engines.python_of", lambda engine: dying)
    with pytest.raises(PuzzleError, match=r"llama.cpp's process ended with -4"):
        check_llama_cpp()
