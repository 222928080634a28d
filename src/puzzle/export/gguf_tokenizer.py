"""A tokenizer in llama.cpp's terms, out of `tokenizer.json`: byte-level BPE with a way of splitting that it knows."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.runs import read_json

TokenKind = Literal["normal", "control", "user_defined", "unused"]

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
_END_NAMES = {1: ("eos",), 2: ("eos", "eot"), 3: ("eos", "eom", "eot")}
"""What llama.cpp calls the tokens that end an answer, in the order of Llama 3.1's list."""

_NO_MERGE = "none"
"""Of a tokenizer of single bytes: the list may not be empty, and one without a space merges nothing."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer."""

    pre_tokenizer: str
    tokens: list[str]
    """Of every id, also of ids that only pad the embeddings."""
    kinds: list[TokenKind]
    merges: list[str]
    special: dict[str, int]
    """bos, eos, eot, eom, pad."""
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def read_vocabulary(folder: Path, config: PuzzleConfig) -> Vocabulary:
    """The tokenizer of a checkpoint; a `PuzzleError` if llama.cpp would split text in another way."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise PuzzleError(f"export to gguf: {folder} has no tokenizer.json, which is the only tokenizer it can hold")
    tokenizer = read_json(path)
    model = tokenizer["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece-like BPE" if model["type"] == "BPE" else model["type"]
        raise PuzzleError(f"export to gguf: the tokenizer is {kind}; only byte-level BPE is supported")
    tokens, kinds = _tokens(tokenizer, config.vocab_size)
    special = _special(folder, config, tokens)
    adds_bos, adds_eos = _added_around(path, special)
    return Vocabulary(
        pre_tokenizer=_pre_tokenizer(tokenizer),
        tokens=tokens,
        kinds=kinds,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]] or [_NO_MERGE],
        special=special,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        chat_template=_chat_template(folder),
    )


def _tokens(tokenizer: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenKind]]:
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    added: list[dict[str, Any]] = tokenizer.get("added_tokens") or []
    largest = max([*vocab.values(), *(token["id"] for token in added)])
    if largest >= vocab_size:
        raise PuzzleError(f"export to gguf: the tokenizer has the token {largest}, the model only {vocab_size} of them")
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds: list[TokenKind] = ["unused"] * vocab_size
    for text, index in vocab.items():
        tokens[index], kinds[index] = text, "normal"
    for token in added:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = "control" if token["special"] else "user_defined"
    return tokens, kinds


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    if tokenizer.get("normalizer") is not None:
        raise PuzzleError(
            f"export to gguf: the tokenizer normalises text ({tokenizer['normalizer']['type']}), llama.cpp does not"
        )
    entry = tokenizer.get("pre_tokenizer") or {"type": "none"}
    parts = entry["pretokenizers"] if entry["type"] == "Sequence" else [entry]
    splits = tuple(map(_split, parts))
    name = _PRE_TOKENIZERS.get((splits, bool(tokenizer["model"].get("ignore_merges"))))
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


def _special(folder: Path, config: PuzzleConfig, tokens: list[str]) -> dict[str, int]:
    """By llama.cpp's names; the tokenizer's own come first, then all that generation ends with."""
    generation, settings = (_settings(folder / name) for name in ("generation_config.json", "tokenizer_config.json"))
    special: dict[str, int] = {}
    for name in ("bos", "pad"):
        text = _text(settings.get(f"{name}_token"))
        if text in tokens:
            special[name] = tokens.index(text)
    ends = generation.get("eos_token_id", config.eos_token_id)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    own_end = _text(settings.get("eos_token"))
    if own_end in tokens and tokens.index(own_end) not in ends:
        ends = [tokens.index(own_end)]
    return special | dict(zip(_END_NAMES.get(len(ends), _END_NAMES[3]), ends, strict=False))


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _text(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _added_around(path: Path, special: dict[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer begins a text with bos and ends it with eos."""
    around = Tokenizer.from_file(str(path)).encode("").ids
    bos, eos = special.get("bos"), special.get("eos")
    adds_bos = bos is not None and around[:1] == [bos]
    rest = around[1:] if adds_bos else around
    adds_eos = eos is not None and rest == [eos]
    if rest and not adds_eos:
        raise PuzzleError(f"export to gguf: the tokenizer adds the tokens {around} to every text; llama.cpp cannot")
    return adds_bos, adds_eos


def _chat_template(folder: Path) -> str | None:
    """The default chat template, of its own file or in the tokenizer's configuration."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = _settings(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    return found
