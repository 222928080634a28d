"""A tokenizer in a GGUF file: byte-level BPE whose way of splitting text has a name in llama.cpp.

Merges, special tokens and the chat template are read by the package `gguf`; the name of the split
(`tokenizer.ggml.pre`), which decides whether llama.cpp splits text as the parent does, is found here.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from puzzle.errors import PuzzleError
from puzzle.runs import read_json

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_BYTES, _GPT2 = "bytes", "bytes as GPT-2 splits"
_PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    (("single digits", _GPT2), False): "smollm",
    ((_LLAMA3, _BYTES), True): "llama-bpe",
    ((_LLAMA3, _BYTES), False): "smaug-bpe",
    ((_QWEN2, _BYTES), False): "qwen2",
}
"""llama.cpp's name for a sequence of splits, and whether whole words in the vocabulary are taken without merging."""
_NO_MERGE = "none"
"""Of a tokenizer of single bytes: the list may not be empty, and an entry without a space merges nothing."""


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Write a checkpoint's tokenizer to a GGUFWriter; a `PuzzleError` if llama.cpp would split text in another way."""
    import gguf

    path = folder / "tokenizer.json"
    if not path.exists():
        raise PuzzleError(f"export to gguf: {folder} has no tokenizer.json, which is the only tokenizer it can hold")
    tokenizer = read_json(path)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    _add_tokens(writer, tokenizer, vocab_size)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    special.merges = list(special.merges) or [_NO_MERGE]
    _name_ends(special.special_token_ids, folder / "generation_config.json")
    special.add_special_token = _added_around(path, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    model = tokenizer["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece-like BPE" if model["type"] == "BPE" else model["type"]
        raise PuzzleError(f"export to gguf: the tokenizer is {kind}; only byte-level BPE is supported")
    if tokenizer.get("normalizer") is not None:
        raise PuzzleError(
            f"export to gguf: the tokenizer normalises text ({tokenizer['normalizer']['type']}), llama.cpp does not"
        )
    entry = tokenizer.get("pre_tokenizer") or {"type": "none"}
    splits = tuple(map(_split, entry["pretokenizers"] if entry["type"] == "Sequence" else [entry]))
    name = _PRE_TOKENIZERS.get((splits, bool(model.get("ignore_merges"))))
    if name is None:
        raise PuzzleError(
            f"export to gguf: the tokenizer splits text by {' then '.join(splits)}, which has no name here; "
            f"known are {', '.join(_PRE_TOKENIZERS.values())}"
        )
    return name


def _split(part: dict[str, Any]) -> str:
    """One step of splitting, in the words of `_PRE_TOKENIZERS`."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
            return _GPT2 if rest.get("use_regex", True) else _BYTES
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return regex
        case {"type": "Digits", "individual_digits": True}:
            return "single digits"
        case _:
            return json.dumps(part)


def _name_ends(special: dict[str, int], generation_config: Path) -> None:
    """Let every token that ends a generation end it in llama.cpp too, which knows by itself those of common names."""
    ends = read_json(generation_config).get("eos_token_id") if generation_config.exists() else None
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, special.get("eos"))]
    free = [name for name in ("eos", "eot", "eom") if name not in special]
    special.update(zip(free, others, strict=False))


def _added_around(path: Path, special: dict[str, int]) -> dict[str, bool]:
    """Whether the tokenizer begins every text with bos and ends it with eos."""
    around = Tokenizer.from_file(str(path)).encode("").ids
    bos, eos = [special.get("bos")], [special.get("eos")]
    adds_bos = around[:1] == bos
    adds_eos = around[adds_bos:] == eos
    if around != bos * adds_bos + eos * adds_eos:
        raise PuzzleError(f"export to gguf: the tokenizer adds the tokens {around} to every text; llama.cpp cannot")
    return {"bos": adds_bos, "eos": adds_eos}


def _add_tokens(writer: Any, tokenizer: dict[str, Any], vocab_size: int) -> None:
    """Every token with its type; rows of the embeddings that no token has are padding."""
    import gguf

    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    added: list[dict[str, Any]] = tokenizer.get("added_tokens") or []
    largest = max([*vocab.values(), *(token["id"] for token in added)])
    if largest >= vocab_size:
        raise PuzzleError(f"export to gguf: the tokenizer has the token {largest}, the model only {vocab_size} of them")
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for text, index in vocab.items():
        tokens[index], types[index] = text, gguf.TokenType.NORMAL
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(types)
