"""A tokenizer in a GGUF file: byte-level BPE whose way of splitting text has a name in llama.cpp.

Merges, special tokens and the chat template are read by the package `gguf`; the name of the split
(`tokenizer.ggml.pre`), which decides whether llama.cpp splits text as the parent does, is found here.
"""

import json
from pathlib import Path
from typing import Any

import gguf
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


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write a checkpoint's tokenizer, padded to the model's `vocab_size`.

    A `PuzzleError` if llama.cpp would split text in another way.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise PuzzleError(f"export to gguf: {folder} has no tokenizer.json, which is the only tokenizer it can hold")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(read_json(path)))
    tokenizer = Tokenizer.from_file(str(path))
    tokens = {index: text for text, index in tokenizer.get_vocab().items()}
    if max(tokens) >= vocab_size:
        raise PuzzleError(f"export to gguf: the tokenizer has the token {max(tokens)}, the model only {vocab_size}")
    types = dict.fromkeys(range(vocab_size), gguf.TokenType.UNUSED) | dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        types[index] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in types])
    writer.add_token_types([*types.values()])
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    # Of single bytes: the list may not be empty, and an entry without a space merges nothing.
    special.merges = list(special.merges) or ["none"]
    ids = special.special_token_ids
    # Every token that ends a generation shall end it in llama.cpp too, which knows by itself those of common names.
    defaults = folder / "generation_config.json"
    ends = read_json(defaults).get("eos_token_id") if defaults.exists() else None
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, ids.get("eos"))]
    places = [name for name in ("eos", "eot", "eom") if name not in ids]
    if left := others[len(places) :]:
        found = f"{defaults.name} has more eos_token_id than the format has places for; shorten it"
        raise PuzzleError(f"export to gguf: {found} (left over: {', '.join(map(str, left))})")
    ids.update(zip(places, others, strict=False))
    around = tokenizer.encode("").ids
    bos, eos = [ids.get("bos")], [ids.get("eos")]
    adds_bos = around[:1] == bos
    adds_eos = around[adds_bos:] == eos
    if around != bos * adds_bos + eos * adds_eos:
        raise PuzzleError(f"export to gguf: the tokenizer adds the tokens {around} to every text; llama.cpp cannot")
    special.add_special_token = {"bos": adds_bos, "eos": adds_eos}
    special.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits text; a `PuzzleError` if it has none."""
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer")
    entry = tokenizer.get("pre_tokenizer") or {"type": "none"}
    splits = tuple(map(_split, entry["pretokenizers"] if entry["type"] == "Sequence" else [entry]))
    name = _PRE_TOKENIZERS.get((splits, bool(model.get("ignore_merges"))))
    if model["type"] != "BPE" or model.get("byte_fallback"):
        problem = f"is {model['type']} and not byte-level BPE, which alone is supported"
    elif normalizer is not None:
        problem = f"normalises text ({normalizer['type']}), llama.cpp does not"
    elif name is None:
        known = ", ".join(_PRE_TOKENIZERS.values())
        problem = f"splits text by {' then '.join(splits)}, which has no name here; known are {known}"
    else:
        return name
    raise PuzzleError(f"export to gguf: the tokenizer {problem}")


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
