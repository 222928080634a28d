"""What streaming costs: a parent of random weights that stays in memory, against the same with two layers' room.

    python benchmarks/large_parent.py TOKENIZER TEXT [LAYERS] [HIDDEN]

TOKENIZER is a checkpoint's folder. Calibration, library and scores, each way in a process of its own; processor time of
one thread, and the most memory that the process has had by the end of the stage. The default is a parent of 330 MB.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from setting import opened, recipe
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

STAGES = ("data", "statistics", "subblock_library", "subblock_scores")


def main(tokenizer: str, text: str, layers: str = "8", hidden: str = "1024") -> None:
    """Print both ways' figures."""
    folder = Path(tempfile.mkdtemp())
    two_layers = save_parent(folder / "parent", tokenizer, int(layers), int(hidden))
    for way, memory in (("resident", "1TB"), ("streamed", f"{two_layers}B")):
        command = [sys.executable, __file__, "--measure", way, str(folder), text, memory]
        subprocess.run(command, check=True)


def save_parent(path: Path, tokenizer: str, layers: int, hidden: int) -> int:
    """Random weights, in many files as large parents are; the bytes of two layers and of what belongs to none."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(path, max_shard_size="50MB")
    words.save_pretrained(path)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    every = sum(parameter.nbytes for parameter in model.parameters())
    print(f"{every / 1e6:.0f} MB, a layer {layer / 1e6:.0f} MB", flush=True)
    return every - layers * layer + 2 * layer


def measure(way: str, folder: str, text: str, memory: str) -> None:
    """The stages one after another in this process."""
    torch.set_num_threads(1)
    parent = Path(folder, "parent")
    config = LlamaConfig.from_pretrained(parent)
    subblocks = {"kv_heads": [config.num_key_value_heads // 2], "ffn_widths": [config.intermediate_size // 2]}
    chosen = recipe(
        str(parent),
        text,
        space={**subblocks, "attention": [], "ffn": []},
        calibration={"tokens": 16_384},
        library={"tokens": 4096, "batch_size": 4, "validation_tokens": 2048},
        score={"tokens": 2048},
        execution={"memory": memory},
    )
    with opened(Path(folder, way), chosen) as method:
        for stage in STAGES:
            before = resource.getrusage(resource.RUSAGE_SELF)
            getattr(method, stage)
            after = resource.getrusage(resource.RUSAGE_SELF)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"{way:9} {stage:17} {seconds:7.1f} s {after.ru_maxrss / 1024:7.0f} MiB", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        measure(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
