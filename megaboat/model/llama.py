"""The dense baseline: Hugging Face's Llama behind the same interface. The only file that builds it."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig as HFLlamaConfig
from transformers import LlamaModel

from megaboat.layers.documents import Documents
from megaboat.layers.precision import to_compute_dtype
from megaboat.model.config import LlamaConfig
from megaboat.model.seqboat import Head, ModelOutput


class Llama(nn.Module):
    """Llama with a tied head. Documents are told apart by their positions, which start again at 0."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary is known once the token shards are open"
        self.config = config
        self.body = LlamaModel(
            HFLlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads or config.heads,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
                max_position_embeddings=1 << 20,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
        self.head = Head(self.body.embed_tokens.weight)

    @property
    def checkpoint_activations(self) -> bool:
        return self.body.is_gradient_checkpointing

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        if on:
            self.body.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.body.gradient_checkpointing_disable()

    def forward(
        self, tokens_BT: Tensor, docs: Documents, targets_BT: Tensor | None = None, per_token: bool = False
    ) -> ModelOutput:
        """Read B x T tokens of packed documents."""
        x_BTD = to_compute_dtype(self.body.embed_tokens(tokens_BT))
        h_BTD = self.body(inputs_embeds=x_BTD, position_ids=docs.positions_BT).last_hidden_state
        nll = None if targets_BT is None else self.head(h_BTD, targets_BT, per_token)
        return ModelOutput(nll, h_BTD, [])


@torch.no_grad()
def initialize(model: Llama, seed: int) -> None:
    """N(0, 0.02) for matrices, 1 for norms, as Hugging Face does, from our own generator."""
    generator = torch.Generator(device=model.head.weight.device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(1)
