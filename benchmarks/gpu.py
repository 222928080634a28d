"""What a GPU must show, in one table and under eight minutes: what a step takes, how far predictions are off, how fast
training and scoring are, and how exact scores can be.

    python benchmarks/gpu.py [DEVICE] [SIZE]

DEVICE is `cuda`, or `cpu` to try the script. SIZE is `full`, the shapes of a Llama of 1B parameters and of
SmolLM2-135M, or `tiny`. Weights are random and the text is this Python's standard library, so nothing is downloaded. A
part that fails says so, and the others go on. Results: gpu.md.
"""

import json
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from setting import opened, recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from puzzle.artefacts import CostTable
from puzzle.costs import ENGINES, scenario_of, summarise
from puzzle.costs.table import cost_rows, stacks_of
from puzzle.costs.timing import Samples, measure_in_turns
from puzzle.costs.torch_engine import fixed_step
from puzzle.distill.teacher import Batch, Distillation
from puzzle.distributed.state import TrainingState
from puzzle.metrics import compare
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.recipe import DistilSettings, ScenarioSettings
from puzzle.training import adamw
from puzzle.variants import Architecture, BlockVariant, derive_space

Lines = Iterator[tuple[str, str]]
"""What was measured, and its value."""

_NAMES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
SHAPES = {
    "full": {"1B": (128_256, 2048, 8192, 16, 32, 8), "135M": (49_152, 576, 1536, 30, 9, 3)},
    "tiny": {"1B": (2048, 128, 512, 4, 8, 4), "135M": (1024, 64, 192, 4, 4, 2)},
}
BATCHES = {"full": (1, 16, 64), "tiny": (1, 2)}
PROMPT = {"full": 512, "tiny": 32}
TOKENS = {"full": (8, 2048), "tiny": (2, 64)}
"""Sequences and tokens of a step of GKD."""
STEPS, WARM_UP = 10, 3


def main(device_name: str = "cuda", size: str = "full") -> None:
    """Print the table, part by part."""
    device, began = torch.device(device_name), time.monotonic()
    parts: list[Callable[[torch.device, str], Lines]] = [environment, laws, decode, predictions, gkd, noise, stages]
    for part in parts:
        try:
            for name, value in part(device, size):
                print(f"| {name} | {value} |", flush=True)
        except Exception as error:  # the other parts say something too
            print(f"| {part.__name__} | failed: {type(error).__name__}: {' '.join(str(error).split())[:200]} |")
            traceback.print_exc(file=sys.stderr)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"| all of it | {time.monotonic() - began:.0f} s |")


def environment(device: torch.device, size: str) -> Lines:
    """Versions and the card."""
    yield "torch, transformers", f"{torch.__version__}, {transformers.__version__}, Python {sys.version.split()[0]}"
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        yield "nvidia-smi", subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


@torch.no_grad()
def laws(device: torch.device, size: str) -> Lines:
    """Largest differences of logits that are 0 on a CPU, or rounding: in float32, of small models."""
    sizes = dict(zip(_NAMES, SHAPES["tiny"]["1B"], strict=True))
    torch.manual_seed(0)
    original = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa")).to(device).eval()
    config = PuzzleConfig(**sizes)
    model = PuzzleForCausalLM(config).to(device).eval()
    model.load_state_dict(original.state_dict())
    tokens_BT = torch.randint(config.vocab_size, (2, 48), device=device)
    own_BTV = model(tokens_BT).logits
    yield "law 1: to transformers' Llama", f"{float((own_BTV - original(tokens_BT).logits).abs().max()):.1e}"
    again_BTV = torch.cat([model(row_BT).logits for row_BT in tokens_BT.split(1)])
    yield "another batch shape", f"{float((own_BTV - again_BTV).abs().max()):.1e}"
    blocks = ["none+w512", "kv4+none", "kv2win16s4+w128", "linear+linear"]
    child = PuzzleForCausalLM(Architecture.parse(blocks).configure(config)).to(device).eval()
    whole_BTV, cache, steps = child(tokens_BT).logits, DynamicCache(config=child.config), []
    for token_B1 in tokens_BT.split(1, dim=1):
        steps.append(child(token_B1, past_key_values=cache, use_cache=True).logits)
    difference = float((whole_BTV - torch.cat(steps, dim=1)).abs().max())
    yield f"law 6: with a cache, of {' '.join(blocks)}", f"{difference:.1e}"
    cache = DynamicCache(config=child.config)
    child(tokens_BT[:, :-1], past_key_values=cache, use_cache=True)
    last_B1 = tokens_BT[:, -1:].clone()
    fixed_B1V = fixed_step(child, cache, last_B1, position=tokens_BT.shape[1] - 1)()
    yield "a decode step over a fixed cache", f"{float((whole_BTV[:, -1:] - fixed_B1V).abs().max()):.1e}"


def decode(device: torch.device, size: str) -> Lines:
    """Prefill and decode step of the parent, of a quarter of its widths, and of half its depth."""
    config, engine = shape(size, "1B"), ENGINES["torch"](scenario(device, size))
    yield "engine", engine.version
    layers, ffn = config.num_layers, config.intermediate_size // 4
    own = f"kv{config.num_key_value_heads}+w{config.intermediate_size}"
    named = {
        f"{own} x{layers}": [own] * layers,
        f"kv1+w{ffn} x{layers}": [f"kv1+w{ffn}"] * layers,
        f"{own} x{layers // 2}": [own] * (layers // 2) + ["none+none"] * (layers - layers // 2),
    }
    configs = {name: Architecture.parse(blocks).configure(config) for name, blocks in named.items()}
    samples: Samples = {(name, batch): [] for batch in BATCHES[size] for name in configs}
    with engine.conditions():
        measure_in_turns(engine, configs, samples, 3, lambda: True, "decode")
    for (name, batch), each in samples.items():
        times = summarise(each)
        yield f"{name}, batch {batch}: prefill, decode", f"{times.prefill_ms:.2f} ms, {times.decode_ms:.3f} ms"


def predictions(device: torch.device, size: str) -> Lines:
    """Errors of the cost table's sums for ten random architectures, timed in turns with the stacks."""
    config, told, chooser = shape(size, "1B"), scenario(device, size), random.Random(0)
    width, heads = config.intermediate_size, config.num_key_value_heads
    space = derive_space(config, kv_heads=[heads // 2, 1], ffn_widths=[width // 2, width // 4])
    architectures = {
        str(index): tuple(BlockVariant(chooser.choice(s.attention), chooser.choice(s.ffn)) for s in space.layers)
        for index in range(10)
    }
    engine, stacks = ENGINES["torch"](told), stacks_of(space, config)
    configs = {name: Architecture(blocks).configure(config) for name, blocks in (stacks | architectures).items()}
    for batch in BATCHES[size]:
        samples: Samples = {(name, batch): [] for name in configs}
        with engine.conditions():
            measure_in_turns(engine, configs, samples, 3, lambda: True, f"predictions at batch {batch}")
        measured = {name: each for (name, _), each in samples.items()}
        rows = tuple(cost_rows(config, space, told, batch, {name: measured[name] for name in stacks}))
        table = CostTable(scenario=told, batch_sizes=(batch,), rows=rows)
        for quantity in ("prefill_ms", "decode_ms"):
            errors = []
            for name, blocks in architectures.items():
                predicted = getattr(table.totals([block.name for block in blocks], batch).cost, quantity)
                errors.append(abs(predicted / getattr(summarise(measured[name]), quantity) - 1))
            mean, worst = statistics.mean(errors), max(errors)
            yield f"prediction error of {quantity}, batch {batch}: mean, worst", f"{mean:.1%}, {worst:.1%}"


def gkd(device: torch.device, size: str) -> Lines:
    """Steps of GKD: cosine and KL, forward of both models and backward of the child; and what a save makes it wait."""
    config, (sequences, length) = shape(size, "1B"), TOKENS[size]
    blocks = [f"kv{config.num_key_value_heads // 2}+w{config.intermediate_size // 2}"] * config.num_layers
    child_config = Architecture.parse(blocks).configure(config)
    with device:
        teacher = PuzzleForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
        student = PuzzleForCausalLM(child_config).eval()
    model = Distillation(student, teacher, None, DistilSettings(), torch.bfloat16)
    optimizer = adamw(student.parameters(), 1e-4)
    tokens_BT = torch.randint(config.vocab_size, (sequences, length + 1), device=device)
    half_T = torch.arange(length // 2, device=device)
    halves_BT = torch.cat([half_T, half_T]).expand(sequences, -1)

    def step(positions_BT: torch.Tensor | None = None) -> None:
        model(Batch("", tokens_BT[:, :-1], tokens_BT[:, 1:], positions_BT)).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(device, step)
    head = 2 * config.vocab_size * config.hidden_size
    forwards = [
        head + sum(v.operations(c, length, length) / length for b in Architecture.of(c).blocks for v in b.subblocks)
        for c in (config, child_config)
    ]
    tokens = sequences * length
    yield "GKD: a step, tokens/s", f"{1e3 * seconds:.0f} ms, {tokens / seconds:,.0f}"
    yield "GKD: TFLOP/s", f"{tokens * (forwards[0] + 3 * forwards[1]) / seconds / 1e12:.1f}"
    if device.type == "cuda":
        yield "GKD: peak memory", f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    yield "GKD: a step of two documents a sequence", f"{1e3 * timed(device, lambda: step(halves_BT)):.0f} ms"
    with tempfile.TemporaryDirectory() as folder:
        with TrainingState(Path(folder), dict(student.named_parameters()), [optimizer]) as state:
            waited = []
            for number in range(2):  # the first pins memory
                state.wait()
                began = time.perf_counter()
                state.save(number)
                waited.append(time.perf_counter() - began)
        written = time.perf_counter() - began
        size_gb = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / 1e9
    yield (
        f"saving {size_gb:.1f} GB: waited at first, then; until written",
        (f"{waited[0]:.2f} s, {waited[1]:.2f} s; {written:.2f} s"),
    )


@torch.no_grad()
def noise(device: torch.device, size: str) -> Lines:
    """KL of a bfloat16 parent to itself, where another batch shape has its products summed in another order."""
    config, (sequences, length) = shape(size, "135M"), TOKENS[size]
    with device:
        model = PuzzleForCausalLM(config).to(torch.bfloat16).eval()
    tokens_BT = torch.randint(config.vocab_size, (sequences, length + 1), device=device)

    def finals(at_once: int) -> torch.Tensor:
        states = []
        for part_BT in tokens_BT[:, :-1].split(at_once):
            hidden_BTD = model.embed(part_BT)
            context = model.model.context(hidden_BTD)
            for layer in model.model.layers:
                hidden_BTD = layer(hidden_BTD, **context)
            states.append(hidden_BTD.flatten(0, 1))
        return torch.cat(states)

    targets_N = tokens_BT[:, 1:].flatten()
    metrics = compare(model, model, finals(sequences), finals(1).unsqueeze(0), targets_N)
    yield "noise floor: KL of the parent to itself, batch 1", f"{float(metrics.kl.mean()):.2e} nats"


def stages(device: torch.device, size: str) -> Lines:
    """A run's stages: tokens a second of BLD for all variants, and of scores for all blocks."""
    folder = Path(tempfile.mkdtemp())
    parent, text = folder / "parent", folder / "text.jsonl"
    save_parent(parent, text, size)
    library, score = (1_500_000, 32_768) if size == "full" else (8192, 2048)
    chosen = recipe(
        str(parent),
        str(text),
        data={"sequence_length": 512 if size == "full" else 64, "max_tokens": "8M" if size == "full" else "2M"},
        calibration={"tokens": 500_000 if size == "full" else 8192},
        library={"tokens": library, "batch_size": 8},
        score={"tokens": score},
        execution={"device": str(device)},
    ).model_copy(update={"precision": "bfloat16"})
    with opened(folder / "run", chosen) as method:
        _, variants = method.statistics, len(method.library.index.rows)
        blocks, floor = len(method.scores.rows), method.scores.noise
        seconds = method.run.seconds()
    yield "calibration: tokens/s", f"{chosen.calibration.tokens / seconds['calibrate']:,.0f}"
    yield f"BLD of {variants} variants: tokens/s", f"{library / seconds['library']:,.0f}"
    yield f"scores of {blocks} blocks on {score} tokens", f"{seconds['score']:.0f} s"
    yield "noise floor of these scores", f"{floor:.1e} nats"


def shape(size: str, name: str) -> PuzzleConfig:
    """The parent's configuration."""
    return PuzzleConfig(**dict(zip(_NAMES, SHAPES[size][name], strict=True)), tie_word_embeddings=True)


def scenario(device: torch.device, size: str) -> Any:
    """What costs are measured in."""
    dtype = "bfloat16" if size == "full" else "float32"
    settings = ScenarioSettings(engine="torch", dtype=dtype, prompt_tokens=PROMPT[size], generated_tokens=64)
    return scenario_of(settings, device)


def timed(device: torch.device, step: Callable[[], None]) -> float:
    """Seconds of a step, after some that are not counted."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for count in (WARM_UP, STEPS):
        wait()
        began = time.perf_counter()
        for _ in range(count):
            step()
        wait()
    return (time.perf_counter() - began) / STEPS


def save_parent(path: Path, text: Path, size: str) -> None:
    """A Llama of random weights that reads bytes, and the standard library's source."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    lines = [json.dumps({"text": file.read_text(encoding="utf-8", errors="ignore")}) for file in files]
    text.write_text("\n".join(lines), encoding="utf-8")
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | {"<eos>": len(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    sizes = dict(zip(_NAMES, SHAPES[size]["135M"], strict=True))
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
