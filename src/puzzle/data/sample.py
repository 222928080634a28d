"""Text that the parent writes: conversations if it has a chat template, else documents from their first token on.

Tokens are drawn at temperature 1, so that they come as the parent gives them. Batch by batch they are appended to
`samples.jsonl`; `position.json` says how far it is valid, and a start that was cut off goes on there.

Shapes: B documents at once, T tokens.
"""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from puzzle.data.tokens import write_at
from puzzle.device import release_memory
from puzzle.modeling import PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.runs import Progress, Run, digest, progress, read_json, write_json
from puzzle.stages import SAMPLE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_SIZE = 64
_MARK = "PUZZLE"
"""Stands for a message's content in the template."""


def sample_text(run: Run, parent: Parent) -> Path | None:
    """The file of `data.sampled_tokens` tokens of the parent's text, if `data.source` names `parent`."""
    settings = run.recipe.data
    if "parent" not in settings.source:
        return None
    stage = run.open(SAMPLE, parent=parent)
    file, record = stage.path / "samples.jsonl", stage.path / "position.json"
    if stage.done:
        return file
    batches, tokens, size = read_json(record) if record.exists() else (0, 0, 0)
    model, tokenizer = parent.load(dtype=getattr(torch, run.recipe.precision), device=run.device), parent.tokenizer()
    with progress("sampling text", settings.sampled_tokens, tokens) as bar, torch.random.fork_rng():
        write = partial(_continued, model, tokenizer, bar)
        while tokens < settings.sampled_tokens:
            torch.manual_seed(int(digest([run.recipe.seed, batches])[:8], 16))  # 32 bits are all that count
            documents, count = _documents(write, tokenizer, settings.sequence_length)
            lines = "".join(json.dumps({settings.column: document}) + "\n" for document in documents).encode()
            write_at(file, size, lines)
            batches, tokens, size = batches + 1, tokens + count, size + len(lines)
            write_json(record, [batches, tokens, size])
    stage.commit(documents=batches * _BATCH_SIZE, tokens=tokens)
    del model, write
    release_memory()
    return file


def _documents(write: Any, tokenizer: "PreTrainedTokenizerBase", length: int) -> tuple[list[Any], int]:
    """A batch of texts or conversations of at most about `length` tokens, and how many tokens were drawn."""
    if not tokenizer.chat_template:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return write([[start]] * _BATCH_SIZE, length)
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    before = str(render([{"role": "user", "content": _MARK}])).partition(_MARK)[0]
    encode = partial(tokenizer, add_special_tokens=False)
    questions, asked = write(encode([before] * _BATCH_SIZE)["input_ids"], length // 2)
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = encode([render(chat, add_generation_prompt=True) for chat in chats])["input_ids"]
    answers, answered = write(prompts, length // 2)
    pairs = zip(chats, answers, strict=True)
    return [[*chat, {"role": "assistant", "content": answer}] for chat, answer in pairs], asked + answered


def _continued(
    model: PuzzleForCausalLM, tokenizer: "PreTrainedTokenizerBase", bar: Progress, prompts: list[list[int]], most: int
) -> tuple[list[str], int]:
    """What comes after each prompt, up to an end of text or `most` tokens, as text; and the number of tokens."""
    own = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own] if own is not None else [])]
    pad, longest = ends[0], max(map(len, prompts))
    ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    # Steps come as [B], the prompts before them as [B, T].
    shown = SimpleNamespace(put=lambda step: bar.advance(int((step != pad).sum()) * (step.ndim == 1)), end=lambda: None)
    how = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=most, eos_token_id=ends, pad_token_id=pad)
    found_BT = model.generate(ids_BT, attention_mask=mask_BT, generation_config=how, streamer=shown)[:, longest:]
    return tokenizer.batch_decode(found_BT, skip_special_tokens=True), int((found_BT != pad).sum())
