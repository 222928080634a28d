"""The demo's parent: a Llama of 2M parameters, trained once on this machine and kept in the user's cache folder."""

import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from puzzle.cache import cache_folder
from puzzle.data import TokenData, prepare_data
from puzzle.demo.corpus import read_corpus, write_corpus
from puzzle.parents import open_parent
from puzzle.recipe import DataSettings, Recipe
from puzzle.runs import Run, StageFolder, create_folder, open_run, progress, read_json, write_json
from puzzle.training import BETAS, TrainingState, autocast, learning_rate, set_learning_rate

_VERSION = 1
_NAME = "llama-2m-stdlib"
_VOCAB_SIZE = 2048
_BATCH_SIZE = 8
_SEQUENCE_LENGTH = 256
_MUON_RATE = 0.02
_ADAMW_RATE = 3e-3
_WARMUP = 0.03
_TIMED_STEPS = 6
_OPTIMISER_FACTOR = 1.2
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
        stage = run.stage("pretrain", version=_VERSION, settings={}, inputs=(parent.address, data.address))
        if not stage.done:
            _pretrain(run, stage, start, data, seconds)
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


def _pretrain(run: Run, stage: StageFolder, start: Path, data: TokenData, seconds: float) -> None:
    """Muon on the layers' matrices, AdamW on the rest; how many steps is decided once, by timing the first."""
    model = LlamaForCausalLM.from_pretrained(start)
    parameters = dict(model.named_parameters())
    matrices = [value for name, value in parameters.items() if value.ndim == 2 and ".layers." in name]
    others = [value for value in parameters.values() if not any(value is matrix for matrix in matrices)]
    muon: Optimizer = torch.optim.Muon(matrices, lr=_MUON_RATE, weight_decay=0.0)
    adamw: Optimizer = torch.optim.AdamW(others, lr=_ADAMW_RATE, betas=BETAS, weight_decay=0.0, fused=True)
    plan_file = stage.path / "plan.json"
    if not plan_file.exists():
        write_json(plan_file, _plan(model, data, seconds))
    plan = read_json(plan_file)
    steps: int = plan["steps"]
    state = TrainingState(stage.path / "training.safetensors", parameters, muon, adamw)
    first = state.restore()
    with progress("train the parent", steps, first) as bar:
        for step in range(first, steps):
            for optimizer, peak in ((muon, _MUON_RATE), (adamw, _ADAMW_RATE)):
                set_learning_rate(optimizer, learning_rate(step, steps=steps, peak=peak, warmup=_WARMUP))
            loss = _loss(model, data, step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in (muon, adamw):
                optimizer.step()
                optimizer.zero_grad()
            state.save_if_due(step + 1)
            bar.advance(loss=float(loss.detach()))
    model.save_pretrained(stage.path / _NAME)
    PreTrainedTokenizerFast.from_pretrained(start).save_pretrained(stage.path / _NAME)
    (stage.path / "training.safetensors").unlink(missing_ok=True)
    stage.commit(**plan)


def _plan(model: LlamaForCausalLM, data: TokenData, seconds: float) -> dict[str, float]:
    """Steps that fit in the time, by the fastest of a few that are thrown away: the machine's own speed."""
    times = []
    for step in range(_TIMED_STEPS):
        began = time.perf_counter()
        _loss(model, data, step).backward()
        model.zero_grad()
        times.append(time.perf_counter() - began)
    step_seconds = _OPTIMISER_FACTOR * min(times)
    return {
        "steps": max(1, math.floor(seconds / step_seconds)),
        "tokens_per_second": _BATCH_SIZE * _SEQUENCE_LENGTH / step_seconds,
    }


def _loss(model: LlamaForCausalLM, data: TokenData, step: int) -> Tensor:
    tokens_BT = data.training_batch(step, _BATCH_SIZE, seed=0)
    with autocast(model.device, _precision()):
        logits_BTV = model(tokens_BT[:, :-1], use_cache=False).logits
    return cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten())


def _precision() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively."""
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32
