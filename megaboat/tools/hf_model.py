"""SeqBoat as a Hugging Face causal language model: a wrapper around the one implementation in `model/seqboat.py`.

An export holds this file and everything it needs of the package in one module (`hf_source`), so that torch and
transformers are enough to run it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.modeling_outputs import CausalLMOutputWithPast

from megaboat.layers.documents import Documents
from megaboat.model.seqboat import DecodingState, Head, SeqBoat, initialize_module
from megaboat.tools.hf_config import SeqBoatConfig

# transformers 5.24 calls `cache` what was `past_key_values` before.
CACHE_NAME = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"


class SeqBoatCache:
    """What `generate` hands from call to call: the decoding state, whose size never changes.

    The first forward pass sets `state`.
    """

    is_compileable = False
    is_croppable = False
    is_linear = [False]  # transformers: what was read is cut off the prompt

    def __init__(self) -> None:
        self.state: DecodingState | None = None
        self.tokens_read = 0
        self.all_started = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.tokens_read

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i goes on from the memory of sequence beam_idx[i]."""
        assert self.state is not None, "nothing was read yet"
        self.state.select(beam_idx.to(self.state.position_B.device))


@dataclass
class SeqBoatOutput(CausalLMOutputWithPast):
    """`decisions`, bool (layers, B, T, modules): which tokens activated which unit; only if asked for."""

    decisions: Tensor | None = None


class SeqBoatForCausalLM(PreTrainedModel, GenerationMixin):
    """A SeqBoat decoder. Padding belongs on the left, or on the right where no cache is kept."""

    config_class = SeqBoatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SeqBoat"]  # decoding keeps the state of all layers on one device
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}
    _keep_in_fp32_modules_strict = {"ema", "configurator", "norm", "ffn_norm"}
    _is_stateful = True

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__(config)
        self.model = SeqBoat(config)
        self.gradient_checkpointing = False  # transformers switches it
        for name, module in self.named_modules():
            if name.rpartition(".")[2] in self._keep_in_fp32_modules_strict and self.dtype.itemsize < 4:
                module.float()  # `from_pretrained` does it by itself, `from_config` does not
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: SeqBoatCache | None = None,
        past_key_values: SeqBoatCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_decisions: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SeqBoatOutput | tuple[Any, ...]:
        """Logits (B, T, V), or of the last `logits_to_keep` tokens; the loss with `labels` (-100: not scored).

        `attention_mask` (B, T), or with the tokens read before in front: zeros at the start of a row are padding.
        `position_ids` (B, T) that start again at 0 mark documents packed in a row, without mask and cache.
        `cache` and `past_key_values` are two names of one thing. Hidden states are what enters each layer, and last
        what the logits are made of.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        B, T = given.shape[:2]
        cache = cache or past_key_values
        cache = SeqBoatCache() if cache is None and use_cache else cache
        if cache is not None and cache.state is None:
            cache.state = self.model.new_state(B)
        state = cache.state if cache is not None else None
        self.model.checkpoint_activations = self.gradient_checkpointing
        watched = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden: tuple[Tensor, ...] | None = None
        if cache is not None and state is not None and cache.all_started and T == 1 and not watched:
            logits_BV, routings = self.model.step(given[:, 0], state)
            logits = logits_BV[:, None]
        else:
            docs = self._documents(given, attention_mask, position_ids, state)
            with self._seen(watched) as seen:
                output = self.model(given, docs, state=state)
            hidden = (*seen[:-1], output.hidden_BTD) if watched else None
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits, routings = self.model.head(output.hidden_BTD[:, kept]), output.routings
        if cache is not None and state is not None:
            cache.tokens_read += T
            cache.all_started = cache.all_started or bool((state.position_B > 0).all())
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        decisions = None
        if output_decisions:
            decisions = torch.stack([routing.active_XM.unflatten(0, (B, T)) for routing in routings])
        result = SeqBoatOutput(loss, logits, cache, hidden, decisions=decisions)
        return result.to_tuple() if return_dict is False else result

    @contextmanager
    def _seen(self, wanted: bool) -> Iterator[list[Tensor]]:
        """What enters the first block and leaves each."""
        seen: list[Tensor] = []
        handles = []
        if wanted:
            blocks = self.model.blocks
            handles = [block.register_forward_hook(lambda _, __, out: seen.append(out[0])) for block in blocks]
            handles.append(blocks[0].register_forward_pre_hook(lambda _, entering: seen.append(entering[0])))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _documents(
        self,
        given: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        state: DecodingState | None,
    ) -> Documents:
        B, T = given.shape[:2]
        if position_ids is not None and attention_mask is None and state is None:
            starts_BT = position_ids.expand(B, T) == 0
            starts_BT[:, 0] = True
            cu_seqlens = torch.nn.functional.pad(starts_BT.flatten().nonzero()[:, 0], (0, 1), value=B * T)
            return Documents.packed(position_ids.expand(B, T), cu_seqlens.int())
        start_B = state.position_B if state else torch.zeros(B, dtype=torch.int64, device=given.device)
        if attention_mask is None:
            return Documents.whole(B, T, given.device, start_B)
        if attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; SeqBoat takes (batch, tokens)")
        mask_BT = attention_mask[:, -T:].to(given.device)
        pads_B = torch.where(start_B > 0, 0, (mask_BT.cumsum(1) == 0).sum(1))
        return Documents.left_padded(pads_B, T, start_B)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: Head) -> None:
        self.model.head.weight = value.weight

    def _init_weights(self, module: nn.Module) -> None:
        """A model without weights is drawn as training draws it; loaded parameters are left alone."""
        own = module.parameters(recurse=False)
        if not any(getattr(parameter, "_is_hf_initialized", False) for parameter in own):
            initialize_module(module, self.config)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *_: Any, **__: Any) -> None:
        if generation_config.use_cache is not False and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = SeqBoatCache()
