"""Law 7 for llama.cpp: a child as a GGUF file gives the logits that it gives in torch."""

from itertools import product
from pathlib import Path

import gguf
import pytest
import torch
from tests.conftest import EOS
from tests.engines.parity import MIXED, ROUNDING, TOKENS, difference, logits_of, save
from tests.engines.readers import LlamaCpp
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

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


def test_every_block_in_every_position(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    blocks = map("+".join, product(("kv4", "kv2", "linear", "none"), ("w48", "w16", "none")))
    expected, files = {}, []
    for block, position in product(blocks, (0, 1, 3)):
        stack = ["kv4+w48"] * 4
        stack[position] = block
        case = " ".join(stack)
        if case not in expected:
            model, child = save(tmp_path / case, *stack)
            expected[case] = logits_of(model, TOKENS)
            files.append(export_gguf(child, tmp_path / f"{case}.gguf", dtype="f32"))
    answers = llama_cpp(files, TOKENS)
    errors = {
        case: difference(answer.logits_TV, logits)
        for answer, (case, logits) in zip(answers, expected.items(), strict=True)
    }
    assert {case: error for case, error in errors.items() if not error < ROUNDING} == {}


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
    model, child = save(tmp_path / "folder", "none+w48", "linear+w16", "none+none")
    [answer] = llama_cpp([export_gguf(child, tmp_path / "model.gguf", dtype="f32")], TOKENS)
    assert difference(answer.logits_TV, logits_of(model, TOKENS)) < ROUNDING


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_smaller_types_are_off_by_their_rounding(llama_cpp: LlamaCpp, tmp_path: Path, dtype: GGUFType) -> None:
    """Of weights, as in torch; llama.cpp rounds what they are multiplied with as well."""
    model, child = save(tmp_path / "folder", *MIXED[1])
    [answer] = llama_cpp([export_gguf(child, tmp_path / "model.gguf", dtype=dtype)], TOKENS)
    expected = logits_of(model, TOKENS)
    for matrix in (parameter.data for parameter in model.parameters() if parameter.ndim == 2):
        name = "F16" if dtype == "q8_0" and matrix.shape[1] % 32 else dtype.upper()
        kind = gguf.GGMLQuantizationType[name]
        rounded = gguf.quants.dequantize(gguf.quants.quantize(matrix.contiguous().numpy(), kind), kind)
        matrix.copy_(torch.from_numpy(rounded.copy()).view(matrix.shape))
    rounding = difference(logits_of(model, TOKENS), expected)
    assert 1e-6 < difference(answer.logits_TV, expected) < 3 * rounding


def test_text_is_split_as_by_the_parents_tokenizer(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
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
