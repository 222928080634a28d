"""Configuration of a DeciLM model, a Llama whose layers differ; it travels inside checkpoints without puzzle."""

from typing import Any

from transformers import LlamaConfig


class Part(dict[str, Any]):  # a dictionary, so that it is written to JSON as one
    """Entries that are attributes too: `block.attention.n_heads_in_group`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama's configuration with `block_configs`, one `{"attention": {...}, "ffn": {...}}` a layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            Part(attention=Part(block["attention"]), ffn=Part(block["ffn"])) for block in block_configs or []
        ]
