"""The demo's parent: a Llama of 2M parameters, trained once on this machine and kept in the user's cache folder."""

import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from puzzle.cache import cache_folder
from puzzle.data import TokenData, prepare_data
from puzzle.demo.corpus import read_corpus, write_corpus
from puzzle.device import autocast, multiplies_bfloat16
from puzzle.parents import open_parent
from puzzle.recipe import DataSettings, Recipe
from puzzle.runs import StageFolder, create_folder, open_run, progress, read_json, write_json
from puzzle.stages import Stage
from puzzle.training import Part, adamw, remove_states, train

PRETRAIN = Stage(name="pretrain", help="Train the demo's parent.", inputs=("parent", "data"))

_VERSION = 2
_NAME = "llama-2m-stdlib"
_VOCAB_SIZE = 2048
_BATCH_SIZE = 4
_SEQUENCE_LENGTH = 256
_MUON_RATE = 0.02
_ADAMW_RATE = 3e-3
_WARMUP = 0.03
_TIMED_STEPS = 6
_OPTIMIZER_FACTOR = 1.3
"""What Muon and AdamW add to the time of a step (measured at these sizes, 2 cores, 2026-11)."""


def demo_data(corpus: Path) -> DataSettings:
    """How the corpus is cut; the parent trains on the same training range that the child is distilled on."""
    shares = {"calibration": 0.05, "validation": 0.04, "scoring": 0.04, "test": 0.05}
    return DataSettings(source=str(corpus), sequence_length=_SEQUENCE_LENGTH, **shares)


def demo_parent(seconds: float) -> tuple[Path, Path, float]:
    """Folder of the trained parent, its text, and the speed of its training in tokens per second.

    Args:
        seconds: how long to train it if it is not there; more steps than that allows are not planned.
    """
    disable_progress_bar()  # transformers' own
    folder = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    corpus, start = folder / "corpus.jsonl", folder / "start"
    if not corpus.exists():
        write_corpus(corpus)
    if not (start / "model.safetensors").exists():
        _save_start(start, corpus)
    run_folder = folder / "pretraining"
    create_folder(run_folder, Recipe(parent=str(start), data=demo_data(corpus)))
    with open_run(run_folder) as run:
        parent = open_parent(str(start))
        data = prepare_data(run, parent)
        stage = run.open(PRETRAIN, parent=parent, data=data)
        if not stage.done:
            _pretrain(stage, start, data, seconds)
        return stage.path / _NAME, corpus, float(stage.facts["tokens_per_second"])


def _cache_folder() -> Path:
    return cache_folder() / f"demo-{_VERSION}-python-{platform.python_version()}"


def _save_start(folder: Path, corpus: Path) -> None:
    """The untrained model with its tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_corpus(corpus)[::4], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _pretrain(folder: StageFolder, start: Path, data: TokenData, seconds: float) -> None:
    """Muon on the layers' matrices, AdamW on the rest; how many steps is decided once, by timing the first.

    After 0.5M tokens the test loss is 4.75, and 5.83 with AdamW alone; in batches of 4 instead of 8 sequences, 4.59.
    """
    model = LlamaForCausalLM.from_pretrained(start)
    parameters = dict(model.named_parameters())
    matrices = {name: value for name, value in parameters.items() if value.ndim == 2 and ".layers." in name}
    others = [value for name, value in parameters.items() if name not in matrices]
    muon = torch.optim.Muon(matrices.values(), lr=_MUON_RATE, weight_decay=0.0)
    plan_file = folder.path / "plan.json"
    if not plan_file.exists():
        write_json(plan_file, _plan(model, data, seconds))
    plan = read_json(plan_file)

    def gradients(step: int) -> dict[str, Tensor]:
        loss = _loss(model, data, step)
        loss.backward()
        return {"loss": loss.detach()}

    with progress("train the parent", plan["steps"]) as bar:
        train(
            [Part("parent", parameters, [muon, adamw(others, _ADAMW_RATE)])],
            gradients,
            steps=plan["steps"],
            warmup=_WARMUP,
            max_grad_norm=1.0,
            folder=folder.path,
            bar=bar,
        )
    model.save_pretrained(folder.path / _NAME)
    PreTrainedTokenizerFast.from_pretrained(start).save_pretrained(folder.path / _NAME)
    folder.commit(**plan)
    remove_states(folder.path)


def _plan(model: LlamaForCausalLM, data: TokenData, seconds: float) -> dict[str, float]:
    """Steps that fit in the time, by the fastest of a few that are thrown away: the machine's own speed."""
    times = []
    for step in range(_TIMED_STEPS):
        began = time.perf_counter()
        _loss(model, data, step).backward()
        model.zero_grad()
        times.append(time.perf_counter() - began)
    step_seconds = _OPTIMIZER_FACTOR * min(times)
    return {
        "steps": max(1, math.floor(seconds / step_seconds)),
        "tokens_per_second": _BATCH_SIZE * _SEQUENCE_LENGTH / step_seconds,
    }


def _loss(model: LlamaForCausalLM, data: TokenData, step: int) -> Tensor:
    tokens_BT = data.training_batch(step, _BATCH_SIZE, seed=0)
    with autocast(model.device, torch.bfloat16 if multiplies_bfloat16() else torch.float32):
        logits_BTV = model(tokens_BT[:, :-1], use_cache=False).logits
    return cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten())
