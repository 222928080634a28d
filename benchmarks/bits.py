"""Types chosen layer by layer against llama-quantize's presets: bytes, and KL to f16 by llama.cpp's own logits.

    python benchmarks/bits.py RUN TEXT [CHUNKS]

RUN is a run folder with `space.types` whose scores and costs are there (`puzzle run RECIPE --until score`, `--until
cost`). TEXT is held-out text, of which CHUNKS of 512 tokens are read. A child is made at the bytes of each preset.
Files and what llama.cpp said lie in RUN/bits; what is there is not done again. Results: bits.md.
"""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from gguf import GGUFReader

from puzzle import open_run, realise, solve
from puzzle.child import rounded
from puzzle.engines.environments import python_of
from puzzle.export import export_gguf
from puzzle.pipeline import Pipeline
from puzzle.recipe import TargetSettings

PRESETS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q5_0", "Q3_K_M", "IQ4_NL", "Q4_0")


def main(path: Path, text: Path, chunks: str = "12") -> None:
    """Print a row a file."""
    with open_run(path) as run:
        method, folder = Pipeline(run), path / "bits"
        folder.mkdir(exist_ok=True)
        whole = folder / "f16.gguf"
        if not whole.exists():
            export_gguf(method.parent.path, whole, dtype="f16")
        options = ["-c", "512", "--chunks", chunks, "-t", "1", "--kl-divergence-base", str(folder / "base.kld")]
        if not (folder / "base.kld").exists():
            ask("llama-perplexity", "-m", whole, "-f", text, *options)
        print("| file | MB | KL | same top-1 | summed scores |\n|---|---:|---:|---:|---:|", flush=True)
        for preset in PRESETS:
            file = folder / f"{preset}.gguf"
            if not file.exists():
                ask("llama-quantize", whole, file, preset, "1")
            row(preset, file, options)
        for preset in PRESETS:
            allowed = sum(tensor.n_bytes for tensor in GGUFReader(folder / f"{preset}.gguf").tensors)
            target = TargetSettings.model_validate({"disk": f"{allowed}B"})
            solution = solve(replace(method.tables, target=target))
            file = folder / f"at-{preset}.gguf"
            if not file.exists():
                child = rounded(run, realise(run, method.parent, method.library, solution.blocks), method.statistics)
                export_gguf(child.path, file, dtype="f16")
            row(f"chosen, at {preset}'s bytes", file, options, f"{solution.score:.4f}")


def row(name: str, file: Path, options: list[str], predicted: str = "") -> None:
    log = file.with_suffix(".log")
    if not log.exists():
        log.write_text(ask("llama-perplexity", "-m", file, "--kl-divergence", *options))
    found = log.read_text()
    (kl,), (top,) = re.findall(r"Mean +KLD: +([0-9.]+)", found), re.findall(r"Same top p: +([0-9.]+)", found)
    print(f"| {name} | {file.stat().st_size / 1e6:.1f} | {float(kl):.4f} | {top} % | {predicted} |", flush=True)


def ask(program: str, *arguments: object) -> str:
    """What a program of the engine's environment prints."""
    (found,) = python_of("llama.cpp").parent.parent.glob(f"lib/python*/site-packages/bin/{program}")
    command = [str(found), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
