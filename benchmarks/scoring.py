"""What scores cost, what estimating composed blocks saves, and how far cheaper scores agree with replace-1-block KL.

    python benchmarks/scoring.py PARENT TEXT FOLDER [LAYERS]

Processor time of one thread, all in one process. Only `LAYERS` (such as `0,4,9`) have alternatives.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from setting import opened, recipe
from torch import Tensor

from puzzle import Library, Pipeline, ScoreTable, build_library, score
from puzzle.library import LayerBlocks
from puzzle.metrics import compare
from puzzle.modeling import PuzzleForCausalLM
from puzzle.scores.replace_one import SuffixScorer
from puzzle.scores.task import with_block
from puzzle.variants import BlockVariant, LayerSpace, Space, Variant

LAYERS = (0, 2, 5, 7, 9)
TOKENS, BATCH_SIZE = 16_384, 4
WAYS = {"all": {"composed_share": None}, "estimated": {"composed_share": 0.0625}}
TIMED_FORWARDS = 3
"""Candidates a layer that are timed by a forward of the whole model; the others are taken to need as long."""
FISHER_SEQUENCES, FISHER_SAMPLES = 32, 4
Scores = dict[tuple[int, str], float]


def main(parent: str, text: str, folder: str, layers: str = "") -> None:
    """Print the numbers of scoring.md."""
    torch.set_num_threads(1)
    chosen = [int(layer) for layer in layers.split(",")] if layers else list(LAYERS)
    path, tables, seconds = Path(folder) / "run", {}, {}
    for way, settings in WAYS.items():
        library = {"tokens": 32_768, "validation_tokens": 8192}
        with opened(path, recipe(parent, text, library=library, score={"tokens": TOKENS, **settings})) as method:
            space, library_ = prepared(method, chosen)
            with parts_timed() as parts:
                began = time.process_time()
                tables[way] = score(method.run, method.parent, method.data, library_, space)
                seconds[way] = time.process_time() - began
            shares = ", ".join(f"{name} {part / seconds[way]:.0%}" for name, part in parts.items())
            print(f"{way}: {seconds[way]:.1f} s; {shares}", flush=True)
            if way == "all":
                full = time_full_forwards(method, library_, space, chosen)
                print(f"full forwards: {full:.1f} s", flush=True)
                report_proxies(method, library_, space, chosen, tables[way], seconds[way])
    print(", ".join(f"{way} {full / taken:.1f} times cheaper" for way, taken in seconds.items()))
    report_estimate(space, tables)


def prepared(method: Pipeline, layers: Sequence[int]) -> tuple[Space, Library]:
    """The space with alternatives in `layers` alone, and its library."""
    space = Space(
        tuple(
            layer if index in layers else LayerSpace(layer.attention[:1], layer.ffn[:1])
            for index, layer in enumerate(method.space.layers)
        )
    )
    return space, build_library(method.run, method.parent, method.data, method.statistics, space)


@contextmanager
def parts_timed() -> Iterator[dict[str, float]]:
    """Processor time in the blocks themselves, the layers after them, and the head with the metrics."""
    parts: dict[str, float] = defaultdict(float)
    places = {
        "blocks": (LayerBlocks, "outputs"),
        "suffix": (SuffixScorer, "_through"),
        "head": (SuffixScorer, "_metrics"),
    }
    plain = {name: getattr(*place) for name, place in places.items()}

    def timed(name: str):  # type: ignore[no-untyped-def]
        def call(*args):  # type: ignore[no-untyped-def]
            began = time.process_time()
            result = plain[name](*args)
            parts[name] += time.process_time() - began
            return result

        return call

    for name, (owner, method) in places.items():
        setattr(owner, method, timed(name))
    try:
        yield parts
    finally:
        for name, (owner, method) in places.items():
            setattr(owner, method, plain[name])


@torch.no_grad()
def time_full_forwards(method: Pipeline, library: Library, space: Space, layers: Sequence[int]) -> float:
    """Every candidate as a whole model over all the text, metrics included; assembling is not counted."""
    model, total = method.parent.load(), 0.0
    batches = list(method.data.batches("scoring", BATCH_SIZE, TOKENS))
    finals = [last_hidden(model, sequences[:, :-1]) for sequences in batches]
    for layer in layers:
        blocks = space.layers[layer].blocks()[1:]
        step = max(1, len(blocks) // TIMED_FORWARDS)
        taken = []
        for block in blocks[step // 2 :: step]:
            child = with_block(model, layer, block, library)
            began = time.process_time()
            for sequences, final_ND in zip(batches, finals, strict=True):
                hidden_ND = last_hidden(child, sequences[:, :-1])
                compare(model, model, final_ND, hidden_ND.unsqueeze(0), sequences[:, 1:].flatten())
            taken.append(time.process_time() - began)
        total += len(blocks) * sum(taken) / len(taken)
    return total


def last_hidden(model: PuzzleForCausalLM, tokens_BT: Tensor) -> Tensor:
    hidden_BTD = model.embed(tokens_BT)
    context = model.model.context(hidden_BTD)
    for layer in model.model.layers:
        hidden_BTD = layer(hidden_BTD, **context)
    return hidden_BTD.flatten(0, 1)


def report_proxies(
    method: Pipeline, library: Library, space: Space, layers: Sequence[int], table: ScoreTable, kl_s: float
) -> None:
    """A line for each cheaper score: its cost, and Spearman against the KL over all blocks and within layers."""
    blocks = {(layer, block.name): block for layer in layers for block in space.layers[layer].blocks()[1:]}
    kl = {key: table.by_key[key].kl for key in blocks}
    subblocks = sum(
        len(subblock) - 1 for layer in layers for subblock in (space.layers[layer].attention, space.layers[layer].ffn)
    )
    began = time.process_time()
    fisher = fisher_scores(method, library, space, layers)
    fisher_s = time.process_time() - began
    proxies: dict[str, tuple[float, Scores]] = {
        # One number of candidates' share of the whole: each costs the same.
        "subblocks added": (kl_s * subblocks / len(blocks), {key: halves_added(space, table, *key) for key in blocks}),
        "block error": (0.0, {key: block_error(method, library, key[0], block) for key, block in blocks.items()}),
        "Fisher sketch": (fisher_s, fisher),
    }
    for name, (cost_s, scores) in proxies.items():
        within = [
            spearman([scores[k] for k in blocks if k[0] == i], [kl[k] for k in blocks if k[0] == i]) for i in layers
        ]
        overall = spearman([scores[key] for key in blocks], [kl[key] for key in blocks])
        print(f"{name}: {cost_s:.1f} s, Spearman {overall:.4f}; within layers {min(within):.4f} to {max(within):.4f}")


def halves_added(space: Space, table: ScoreTable, layer: int, block: str) -> float:
    """The KL of the attention beside the parent's FFN, plus that of the FFN beside the parent's attention."""
    own, (attention, ffn) = space.layers[layer].parent, block.split("+")
    return table.value(layer, f"{attention}+{own.ffn}") + table.value(layer, f"{own.attention}+{ffn}")


def block_error(method: Pipeline, library: Library, layer: int, block: BlockVariant) -> float:
    """The subblocks' held-out errors, as shares of the power of the block's output."""
    own = method.parent.architecture.blocks[layer]

    def error(variant: Variant) -> float:
        if variant == own.subblock(variant.subblock):
            return 0.0
        power = float(method.statistics.moments(layer, variant.subblock)["output_power"])
        return library.index.by_key[layer, variant.subblock, variant.name].loss * power

    return (error(block.attention) + error(block.ffn)) / float(method.statistics.moments(layer)["block_power"])


def fisher_scores(method: Pipeline, library: Library, space: Space, layers: Sequence[int]) -> Scores:
    """1/2 E(g . d)^2 a token: d what a block changes in its layer's output, g the gradient there of the log-likelihood
    of next tokens that the parent itself samples.
    """
    model = method.parent.load()
    modules = {layer: LayerBlocks(library, layer, space.layers[layer].blocks(), model) for layer in layers}
    scores: dict[tuple[int, str], float] = defaultdict(float)
    generator = torch.Generator().manual_seed(0)
    for sequences in method.data.sequences("scoring", slice(0, FISHER_SEQUENCES)).split(1):
        inputs, gradients = gradients_of_samples(model, sequences[:, :-1], layers, generator)
        for layer in layers:
            blocks = space.layers[layer].blocks()
            with torch.no_grad():
                outputs_ATD = modules[layer].outputs(blocks, inputs[layer])
                change_AK = torch.einsum("atd,ktd->ak", outputs_ATD[1:] - outputs_ATD[:1], gradients[layer])
            for block, change_K in zip(blocks[1:], change_AK, strict=True):
                scores[layer, block.name] += float(change_K.square().mean()) / 2
    return dict(scores)


def gradients_of_samples(
    model: PuzzleForCausalLM, tokens_BT: Tensor, layers: Sequence[int], generator: torch.Generator
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What enters each layer, [1, T, D], and the gradients at its output, [samples, T, D]."""
    hidden_BTD = model.embed(tokens_BT).requires_grad_()
    context = model.model.context(hidden_BTD)
    inputs, outputs = {}, {}
    for index, layer in enumerate(model.model.layers):
        inputs[index] = hidden_BTD.detach()
        hidden_BTD = outputs[index] = layer(hidden_BTD, **context)
    logits_TV = model.logits(hidden_BTD)[0]
    labels_TK = logits_TV.detach().softmax(-1).multinomial(FISHER_SAMPLES, replacement=True, generator=generator)
    kept = [outputs[layer] for layer in layers]
    gradients = [
        torch.autograd.grad(
            torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum"), kept, retain_graph=True
        )
        for labels_T in labels_TK.T
    ]
    return inputs, {layer: torch.cat(each) for layer, each in zip(layers, zip(*gradients, strict=True), strict=True)}


def report_estimate(space: Space, tables: dict[str, ScoreTable]) -> None:
    """How near estimated scores of composed blocks are to those of all the text, beside the latter's own errors."""
    pairs = []
    for row in tables["estimated"].rows:
        own, block = space.layers[row.layer].parent, BlockVariant.parse(row.block)
        if own.attention != block.attention and own.ffn != block.ffn:
            pairs.append((row, tables["all"].by_key[row.layer, row.block]))
    error = sum(abs(row.kl - true.kl) / true.kl for row, true in pairs) / len(pairs)
    own_error = sum(true.kl_se / true.kl for _, true in pairs) / len(pairs)
    print(
        f"estimated KL of composed blocks: off by {error:.2%} on average (standard error of all {own_error:.2%}), ",
        end="",
    )
    print(f"Spearman {spearman([row.kl for row, _ in pairs], [true.kl for _, true in pairs]):.4f}")


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    ranks = torch.stack([torch.tensor(each).argsort().argsort().double() for each in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    main(*sys.argv[1:])
