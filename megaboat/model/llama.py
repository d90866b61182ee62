"""The dense baseline: Hugging Face's Llama behind the same interface. The only file that builds it.

Its attention goes through the same door to flash attention as SeqBoat's, over packed documents. Left to itself,
transformers masks packed rows by a matrix of T x T: correct, several times slower, and no fair peer.

Its embedding is SeqBoat's: drawn from N(0, 1/width) and multiplied by sqrt(width) on its way in, so that the residual
stream starts at unit scale, as in Gemma; its other matrices start at the same deviation. With transformers' own 0.02
everywhere, that of width 2,500, 37M parameters reach 1.645 bits per byte on test after 31.5M tokens at the best rate
(2.4e-3, three seeds); with a unit embedding 1.549 (1.2e-3, one seed); with all of this 1.431 (3.6e-3, three).
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaboat import kernels
from megaboat.layers.documents import Documents
from megaboat.layers.precision import to_compute_dtype
from megaboat.model.config import LlamaConfig
from megaboat.model.seqboat import Head, ModelOutput

if TYPE_CHECKING:
    from transformers import LlamaModel

PACKED = "megaboat_packed"


class _Sealed:
    """Hides the documents from torch.compile, which would guard on the fields of a dataclass and compile each layer
    again for every number of documents, until it gives up."""

    def __init__(self, docs: Documents) -> None:
        self.docs = docs


def _packed_attention(
    module: nn.Module,
    q_BHTd: Tensor,
    k_BhTd: Tensor,
    v_BhTd: Tensor,
    attention_mask: None,
    scaling: float,
    docs: _Sealed,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, in the form that transformers asks for: (B, T, H, d)."""
    B, H, T, d = q_BHTd.shape

    def rows(x: Tensor) -> Tensor:
        return x.repeat_interleave(H // x.shape[1], dim=1).transpose(1, 2).reshape(B * T, H, d)

    q, k, v = (rows(x).to(v_BhTd.dtype) for x in (q_BHTd, k_BhTd, v_BhTd))
    o_XE = kernels.windowed_attention(q, k, v.flatten(1), docs.docs.cu_seqlens, None, T, scaling, T)
    return o_XE.view(B, T, H, d), None


def _body(config: LlamaConfig) -> "LlamaModel":
    """Hugging Face's layers. Importing them takes longer than torch itself, and no other family needs them."""
    from transformers import AttentionInterface, AttentionMaskInterface, LlamaModel
    from transformers import LlamaConfig as HFLlamaConfig

    AttentionInterface.register(PACKED, torch.compiler.disable(_packed_attention))
    AttentionMaskInterface.register(PACKED, lambda *_, **__: None)
    return LlamaModel(
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
        )
    )


class Llama(nn.Module):
    """Llama with a tied head. The embedding is out of transformers' hands: `body` takes what `embed` gives."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary is known once the token shards are open"
        self.config = config
        body = _body(config)
        self.embedding = body.embed_tokens
        del body.embed_tokens
        self.body = body
        self.head = Head(self.embedding.weight)

    @property
    def checkpoint_activations(self) -> bool:
        return self.body.is_gradient_checkpointing

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        if on:
            self.body.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.body.gradient_checkpointing_disable()

    def compile_layers(self) -> None:
        """Let torch compile a layer, once for all of them, as a user of Llama on a GPU would."""
        for layer in self.body.layers:
            layer.compile(dynamic=False)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), of unit scale at the start."""
        return to_compute_dtype(self.embedding(tokens_BT) * self.config.width**0.5)

    def forward(
        self, tokens_BT: Tensor, docs: Documents, targets_BT: Tensor | None = None, per_token: bool = False
    ) -> ModelOutput:
        """Read B x T tokens of packed documents."""
        x_BTD = self.embed(tokens_BT)
        if self.body.config._attn_implementation != PACKED:  # generation, which has a cache, sets another
            self.body.set_attn_implementation(PACKED)
        h_BTD = self.body(inputs_embeds=x_BTD, position_ids=docs.positions_BT, docs=_Sealed(docs)).last_hidden_state
        nll = None if targets_BT is None else self.head(h_BTD, targets_BT, per_token)
        return ModelOutput(nll, h_BTD, [])


@torch.no_grad()
def initialize(piece: nn.Module, config: LlamaConfig, generator: torch.Generator) -> None:
    """N(0, 1/width) for all matrices, 1 for norms."""
    for parameter in piece.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, config.width**-0.5, generator=generator)
        else:
            parameter.fill_(1)
