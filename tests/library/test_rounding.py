"""Twins: which there are, what they take, and that they compute what a GGUF file holds."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tests.conftest import pico_puzzle
from tests.engines.readers import required
from torch import Tensor

from puzzle.child import realise, rounded
from puzzle.data import TokenData
from puzzle.engines.environments import python_of
from puzzle.errors import PuzzleError
from puzzle.export import export_gguf
from puzzle.library import Library, Statistics, decode, encode
from puzzle.parents import Parent
from puzzle.runs import Run, read_tensors
from puzzle.scores import score
from puzzle.variants import BlockVariant, LayerSpace, Space, derive_space, parse_variant

SIMPLE = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""Types that the package gguf can write as well."""


def matrix(rows: int = 24, columns: int = 512) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_a_twin_is_told_by_its_name() -> None:
    config = pico_puzzle("kv4+w48").config
    twin = parse_variant("ffn", "w64@q4_0")
    assert (twin.name, twin.size, twin.untyped.name) == ("w64@q4_0", 64, "w64")
    assert twin.entry() == {"kind": "gated", "type": "q4_0", "intermediate_size": 64}
    assert BlockVariant.parse("kv2@q8_0+w64@q4_0").untyped.name == "kv2+w64"
    assert twin.num_params(config) == twin.untyped.num_params(config)
    for wrong in ("w64@q4", "w64@", "none@", "w@q4_0"):
        with pytest.raises(PuzzleError, match="unknown"):
            parse_variant("ffn", wrong)


def test_a_twin_needs_rows_of_whole_blocks() -> None:
    """Rows of 48, those of the output projection, are one and a half blocks; nothing is rounded in another type."""
    config = pico_puzzle("kv4+w48").config
    found = {name: parse_variant("ffn", name).typed(config, "q8_0") for name in ("w64", "w48", "none", "linear")}
    assert [name for name, twin in found.items() if twin] == ["w64", "linear"]
    assert parse_variant("ffn", "w64").typed(config, "q4_K") is None
    space = derive_space(
        config, kv_heads=[2], ffn_widths=[32], attention=["linear"], ffn=["none"], types=["q8_0", "q4_0"]
    )
    layer = space.layers[0]
    assert [each.name for each in layer.attention] == ["kv4", "kv2", "linear", "linear@q8_0", "linear@q4_0"]
    assert [each.name for each in layer.ffn] == ["w48", "w32", "none", "w32@q8_0", "w32@q4_0"]
    assert space.untyped.layers[0].ffn == layer.ffn[:3]
    assert len(layer.scored()) == 9  # the parent's own have no twins


@pytest.mark.parametrize("type", SIMPLE)
def test_llama_cpps_own_rounding(type: str) -> None:
    required(lambda: python_of("llama.cpp"))
    values_OI, even_I = matrix(), torch.ones(512)
    own = encode(values_OI, type)
    assert own.nbytes == np.prod(gguf.quant_shape_to_byte_shape((24, 512), gguf.GGMLQuantizationType[type.upper()]))
    error = float((decode(own, type) - values_OI).square().mean())
    assert error < 1e-2
    # Searched scales are no worse than those of the largest value.
    assert float((decode(encode(values_OI, type, even_I), type) - values_OI).square().mean()) <= error * 1.001


@pytest.mark.parametrize("type", ["q6_K", "q5_0", "q4_K", "iq4_nl", "q4_0"])
def test_errors_are_weighed_by_importance(type: str) -> None:
    required(lambda: python_of("llama.cpp"))
    values_OI, importance_I = matrix(), torch.linspace(0.01, 1, 512)[torch.randperm(512)] ** 3

    def error(importance: Tensor | None) -> float:
        difference_OI = decode(encode(values_OI, type, importance), type) - values_OI
        return float((importance_I * difference_OI.square()).sum())

    assert error(importance_I) < 0.95 * error(None)


@pytest.fixture
def twins(pico_run: Run, pico_library: Library, tmp_path: Path) -> tuple[Run, Library, Space]:
    """Without importance, for which llama.cpp would be needed."""
    names = ("w64", "w32", "none", "w64@q4_0", "w32@q4_0", "w64@q8_0")
    ffn, attention = (tuple(parse_variant("ffn", name) for name in names), (parse_variant("attention", "kv4"),))
    space = pico_run.recipe.space.model_copy(update={"importance": False})
    run = replace(pico_run, path=tmp_path, recipe=pico_run.recipe.model_copy(update={"space": space}), used=[])
    return run, replace(pico_library, statistics=None), Space((LayerSpace(attention, ffn),) * 4)


def test_scores_of_types_add_to_those_of_shapes(
    twins: tuple[Run, Library, Space], pico_parent: Parent, pico_data: TokenData
) -> None:
    run, library, space = twins
    rows = {(row.layer, row.block): row for row in score(run, pico_parent, pico_data, library, space).rows}
    for layer in range(4):
        narrow, coarse, fine = (rows[layer, f"kv4+{name}"] for name in ("w32", "w64@q4_0", "w64@q8_0"))
        both, parent = rows[layer, "kv4+w32@q4_0"], rows[layer, "kv4+w64"]
        assert 0 < fine.kl < coarse.kl
        assert both.kl == pytest.approx(narrow.kl + coarse.kl)
        assert both.lm_loss == pytest.approx(narrow.lm_loss + coarse.lm_loss - parent.lm_loss)
        assert both.kl_se > max(narrow.kl_se, coarse.kl_se)
    # Measured as any block: with the values that the file will hold.
    state = library.state(1, parse_variant("ffn", "w64@q4_0"))
    own = library.state(1, parse_variant("ffn", "w64"))
    assert torch.equal(state["mlp.up_proj.weight"], decode(encode(own["mlp.up_proj.weight"], "q4_0"), "q4_0"))
    assert torch.equal(state["post_attention_layernorm.weight"], own["post_attention_layernorm.weight"])


def test_the_file_has_the_bytes_that_were_counted_and_the_values_that_were_scored(
    twins: tuple[Run, Library, Space], pico_parent: Parent, pico_statistics: Statistics, tmp_path: Path
) -> None:
    run, library, _ = twins
    update = run.recipe.space.model_copy(update={"outer": "q8_0"})
    run = replace(run, recipe=run.recipe.model_copy(update={"space": update}))
    config = pico_parent.config
    config.outer_type = "q8_0"
    blocks = ("kv4+w64@q4_0", "none+w32@q8_0", "linear@q5_0+w64", "kv4+none")
    before = realise(run, pico_parent, library, blocks)
    del config.outer_type
    child = rounded(run, before, pico_statistics)
    assert rounded(run, before, pico_statistics) == child != before
    found = {each.name: each for each in gguf.GGUFReader(export_gguf(child.path, tmp_path / "m", dtype="f16")).tensors}
    weights = read_tensors(child.path / "model.safetensors")
    places = {"token_embd": ("model.embed_tokens", "Q8_0"), "blk.0.ffn_up": ("model.layers.0.mlp.up_proj", "Q4_0")}
    places |= {"blk.1.ffn_down": ("model.layers.1.mlp.down_proj", "Q8_0")}
    places |= {"blk.2.attn_output": ("model.layers.2.self_attn.linear_attn", "Q5_0")}
    for place, (name, type) in places.items():
        tensor = found[f"{place}.weight"]
        assert tensor.tensor_type.name == type
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values, weights[f"{name}.weight"].numpy())
    ffn = parse_variant("ffn", "w64@q4_0")
    held = sum(each.n_bytes for name, each in found.items() if name.startswith("blk.0.ffn"))
    assert ffn.weight_bytes(config, torch.float16) == held
    assert found["blk.2.ffn_up.weight"].tensor_type.name == "F16"


def test_a_child_without_types_is_itself(pico_run: Run, pico_library: Library, pico_statistics: Statistics) -> None:
    child = realise(pico_run, pico_library.parent, pico_library, ("kv4+w64",) * 4)
    assert rounded(pico_run, child, pico_statistics) == child
