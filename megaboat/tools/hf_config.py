"""The configuration of a SeqBoat model as Hugging Face knows it. Exports carry this file as it stands."""

from typing import Any

from transformers import PretrainedConfig


class SeqBoatConfig(PretrainedConfig):
    """Sizes of a SeqBoat decoder; the names and meanings are those of megaboat's `model` section."""

    model_type = "seqboat"
    attribute_map = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
    keys_to_ignore_at_inference = ["past_key_values", "decisions"]

    def __init__(
        self,
        vocab_size: int = 256,
        layers: int = 2,
        width: int = 32,
        qk_dim: int = 16,
        qk_maps: int = 1,
        value_dim: int = 32,
        heads: int = 1,
        ffn_dim: int = 0,
        ssm: str = "ema",
        ema_order: int = 16,
        window: int = 1024,
        modules: int = 1,
        configurator: str = "tempered",
        temperature_scale: float = 1.0,
        rope_base: float = 10000.0,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.layers, self.width = vocab_size, layers, width
        self.qk_dim, self.qk_maps, self.value_dim = qk_dim, qk_maps, value_dim
        self.heads, self.ffn_dim = heads, ffn_dim
        self.ema_order, self.window, self.modules = ema_order, window, modules
        self.configurator, self.ssm = configurator, ssm
        self.temperature_scale, self.rope_base, self.dropout = temperature_scale, rope_base, dropout
        super().__init__(**({"tie_word_embeddings": True} | kwargs))
