"""Time of a step of GKD: ours, TRL's trainer, and a plain loop over Hugging Face models; same models, text and loss.

    pip install trl && python benchmarks/trl_step.py PARENT TEXT FOLDER

Forward KL alone, since TRL has no cosine; TRL's GKDTrainer with `lmbda=0` (the text's own tokens) and `beta=0`.
Processor time of one thread, all in one process, in turns: a step is the slope between trainings of 8 and 40 steps, so
that start-up, saving and the held-out points of ours count nothing.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from ablations import BASE
from datasets import Dataset
from setting import CHILD, opened, recipe
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDConfig, GKDTrainer

from puzzle import Child, Pipeline, distil, realise

Way = Callable[[Pipeline, Child, int, int, Path], None]

SHORT, LONG, ROUNDS = 8, 40, 3
BATCH, RATE = 8, 1e-4


def main(parent: str, text: str, folder: str) -> None:
    """Print milliseconds a step of each way, and their ratios."""
    torch.set_num_threads(1)
    root = Path(folder)
    settings = {"learning_rate": RATE, "batch_size": BATCH, "cosine_weight": 0, "documents": False}
    chosen = recipe(parent, text, **BASE, distil={**settings, "tokens": BATCH * 256, "validation_tokens": 256})
    with opened(root / "run", chosen) as method:
        child = realise(method.run, method.parent, method.library, CHILD)
        ways = {"ours": ours, "TRL": trl, "plain loop": plain}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for index in range(ROUNDS):
            for name, way in ways.items():
                short, long = (timed(way, method, child, steps, index, root) for steps in (SHORT, LONG))
                seconds[name].append((long - short) / (LONG - SHORT))
                print(f"{name}: {1e3 * seconds[name][-1]:.0f} ms a step", flush=True)
    for name, values in seconds.items():
        ratio = median(values) / median(seconds["ours"])
        low, high = 1e3 * min(values), 1e3 * max(values)
        print(f"| {name} | {1e3 * median(values):.0f} ms | {ratio:.2f} | {low:.0f} to {high:.0f} ms |")


def timed(way: Way, method: Pipeline, child: Child, steps: int, index: int, root: Path) -> float:
    began = time.process_time()
    way(method, child, steps, index, root)
    return time.process_time() - began


def ours(method: Pipeline, child: Child, steps: int, index: int, root: Path) -> None:
    """The stage itself; another seed each time, so that it is not found done."""
    settings = method.run.recipe.distil.model_copy(update={"tokens": steps * BATCH * method.data.sequence_length})
    changed = method.run.recipe.model_copy(update={"distil": settings, "seed": 1000 + index})
    distil(replace(method.run, recipe=changed), method.parent, child, method.data)


def trl(method: Pipeline, child: Child, steps: int, index: int, root: Path) -> None:
    """The trainer of TRL on packed text."""
    rows = [row for batch in batches(method, steps) for row in batch.tolist()]
    arguments = GKDConfig(
        output_dir=str(root / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=RATE,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    GKDTrainer(
        model=load(child.path),
        teacher_model=load(method.parent.path),
        args=arguments,
        data_collator=collate,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=method.parent.tokenizer(),
    ).train()


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    tokens_BT = torch.tensor([row["input_ids"] for row in rows])
    return {
        "input_ids": tokens_BT,
        "attention_mask": torch.ones_like(tokens_BT),
        "labels": tokens_BT,
        "prompts": tokens_BT[:, :1],
        "prompt_attention_mask": torch.ones_like(tokens_BT[:, :1]),
    }


def plain(method: Pipeline, child: Child, steps: int, index: int, root: Path) -> None:
    """What one writes by hand: both models' logits, their KL, AdamW."""
    teacher, student = load(method.parent.path).eval(), load(child.path).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    for tokens_BT in batches(method, steps):
        with torch.no_grad():
            expected = log_softmax(teacher(tokens_BT).logits[:, :-1], dim=-1)
        found = log_softmax(student(tokens_BT).logits[:, :-1], dim=-1)
        loss = kl_div(found.flatten(0, 1), expected.flatten(0, 1), reduction="batchmean", log_target=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def load(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def batches(method: Pipeline, steps: int) -> Iterator[Tensor]:
    for step in range(steps):
        yield method.data.training_batch(step, BATCH, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
