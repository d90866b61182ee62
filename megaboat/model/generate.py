"""Generation: read a prompt in chunks, then one token of every sequence at a time, in memory that does not grow.

A batch of ragged prompts is padded on the left; a sequence's tokens do not depend on its batch mates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from megaboat.layers.documents import Documents
from megaboat.model.build import LanguageModel
from megaboat.model.llama import Llama
from megaboat.model.seqboat import DecodingState, SeqBoat

CHUNK = 2048  # tokens of a prompt that are read at once: the memory of a prefill does not grow with the prompt


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the penalty first, then temperature, top-k, top-p, as Hugging Face orders them."""

    temperature: float = 1.0
    """0: the most probable token, whatever the options below say."""
    top_k: int = 0
    """Draw from this many most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens that were read or written are divided by it (multiplied where negative)."""
    seed: int = 0
    """Sequence i of a batch draws from seed + i."""

    def __post_init__(self) -> None:
        known = self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and self.repetition_penalty > 0
        if not known:  # a number that is none, too
            given = ", ".join(f"{name} {value:g}" for name, value in vars(self).items() if name != "seed")
            raise ValueError(f"{given}: temperature and top_k from 0, top_p in (0, 1], repetition_penalty above 0")


class Reader(Protocol):
    """A model with its memory of B sequences. Both methods return the logits (B, V) of the next token."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read B prompts, none of them empty."""

    def decode_one(self, tokens_B: Tensor) -> Tensor:
        """Read one more token of each sequence."""


def open_reader(model: LanguageModel, chunk: int = CHUNK) -> Reader:
    """A reader that has read nothing."""
    return LlamaReader(model) if isinstance(model, Llama) else SeqBoatReader(model, chunk)


class SeqBoatReader:
    """Reads through the working memory: constant time and memory a token, whatever was read before."""

    def __init__(self, model: SeqBoat, chunk: int = CHUNK) -> None:
        self.model, self.chunk = model, chunk

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        tokens_BT, pads_B = left_pad(prompts, self.model.embedding.weight.device)
        self.state = self.model.new_state(len(prompts))
        for tokens_BC in tokens_BT.split(self.chunk, dim=1):
            C = tokens_BC.shape[1]
            docs = Documents.left_padded(pads_B.clamp_max(C), C, self.state.position_B)
            hidden_BCD = self.model(tokens_BC, docs, state=self.state).hidden_BTD
            pads_B = (pads_B - C).clamp_min(0)
        self._step = FixedStep(self.model, self.state)
        return self.model.head(hidden_BCD[:, -1])

    def decode_one(self, tokens_B: Tensor) -> Tensor:
        return self._step(tokens_B)


class FixedStep:
    """`model.step` at fixed addresses. On a GPU it is one CUDA graph: launched kernel by kernel, a step of a small
    model would be waiting for the host most of the time.

    `state` goes on with each call; the logits are valid until the next one.
    """

    def __init__(self, model: SeqBoat, state: DecodingState, capture: bool = True) -> None:
        self.model, self.state = model, state
        self.tokens_B = torch.zeros_like(state.position_B)
        self.graph: torch.cuda.CUDAGraph | None = None
        if capture and state.position_B.is_cuda:
            self._capture()

    @torch.no_grad()
    def __call__(self, tokens_B: Tensor) -> Tensor:
        """Tokens (B,) to logits (B, V)."""
        self.tokens_B.copy_(tokens_B)
        if self.graph is None:
            return self.model.step(self.tokens_B, self.state)[0]
        self.graph.replay()
        return self.logits_BV

    @torch.no_grad()
    def _capture(self) -> None:
        """Warm up on another stream, as CUDA graphs want it, and give the state back what it held."""
        held = [tensor.clone() for tensor in self.state.tensors()]
        with torch.cuda.device(self.tokens_B.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.model.step(self.tokens_B, self.state)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits_BV = self.model.step(self.tokens_B, self.state)[0]
        for tensor, value in zip(self.state.tensors(), held, strict=True):
            tensor.copy_(value)


class LlamaReader:
    """Reads through a cache of all keys and values, which grows: the dense baseline has no other memory."""

    def __init__(self, model: Llama) -> None:
        from transformers import DynamicCache  # here, since it takes longer to import than torch itself

        self.model, self._new_cache = model, DynamicCache
        model.body.set_attn_implementation("sdpa")  # training's attention takes packed rows and no cache

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        tokens_BT, pads_B = left_pad(prompts, self.model.head.weight.device)
        place_T = torch.arange(tokens_BT.shape[1], device=pads_B.device)
        self.mask_BT = (place_T >= pads_B[:, None]).long()
        self.position_B1 = tokens_BT.shape[1] - pads_B[:, None]
        self.cache = self._new_cache()
        return self._read(tokens_BT, (place_T - pads_B[:, None]).clamp_min(0))

    @torch.no_grad()
    def decode_one(self, tokens_B: Tensor) -> Tensor:
        self.mask_BT = F.pad(self.mask_BT, (0, 1), value=1)
        logits_BV = self._read(tokens_B[:, None], self.position_B1)
        self.position_B1 = self.position_B1 + 1
        return logits_BV

    def _read(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        output = self.model.body(
            inputs_embeds=self.model.embed(tokens_BT),
            attention_mask=self.mask_BT,
            position_ids=positions_BT,
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.model.head(output.last_hidden_state[:, -1])


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) with zeros in front of the shorter prompts, and how many zeros (B,). ValueError for empty ones."""
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens; a model starts from at least one")
    longest = max(len(prompt) for prompt in prompts)
    pads = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + [int(token) for token in prompt] for pad, prompt in zip(pads, prompts, strict=True)]
    return torch.tensor(rows, device=device), torch.tensor(pads, device=device)


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | None = None,
    stop_id: int | None = None,
    chunk: int = CHUNK,
) -> Iterator[Tensor]:
    """Up to `max_tokens` times the next token of each sequence, (B,) int64.

    A sequence that has said `stop_id` goes on with it; the iterator ends when all have. Raises ValueError for an
    empty prompt.
    """
    reader = open_reader(model, chunk)
    logits_BV = reader.prefill(prompts)
    chooser = _Chooser(sampling or Sampling(), prompts, logits_BV)
    stopped_B = torch.zeros(len(prompts), dtype=torch.bool, device=logits_BV.device)
    for count in range(1, max_tokens + 1):
        tokens_B = chooser.choose(logits_BV)
        if stop_id is not None:
            tokens_B = tokens_B.masked_fill(stopped_B, stop_id)
            stopped_B |= tokens_B == stop_id
        yield tokens_B
        if count == max_tokens or (stop_id is not None and stopped_B.all()):
            return
        logits_BV = reader.decode_one(tokens_B)


class _Chooser:
    """Draws tokens; each sequence has its own random numbers."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], like_BV: Tensor) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(prompts))]
        self.seen_BV = torch.zeros_like(like_BV, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            self.seen_BV[i, [int(token) for token in prompt]] = True

    def choose(self, logits_BV: Tensor) -> Tensor:
        """(B, V) -> (B,)."""
        penalty = self.sampling.repetition_penalty
        scores_BV = logits_BV.float()
        if penalty != 1:
            punished_BV = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
            scores_BV = torch.where(self.seen_BV, punished_BV, scores_BV)
        tokens_B = scores_BV.argmax(-1) if self.sampling.temperature == 0 else self._draw(scores_BV)
        self.seen_BV.scatter_(1, tokens_B[:, None], True)
        return tokens_B

    def _draw(self, scores_BV: Tensor) -> Tensor:
        probability_BV, token_BV = (
            (scores_BV / self.sampling.temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
        )
        if self.sampling.top_k:
            probability_BV[:, self.sampling.top_k :] = 0
        probability_BV /= probability_BV.sum(-1, keepdim=True)
        before_BV = probability_BV.cumsum(-1) - probability_BV
        probability_BV[:, 1:].masked_fill_(before_BV[:, 1:] >= self.sampling.top_p, 0)
        upto_BV = probability_BV.cumsum(-1)
        drawn_B1 = torch.stack([torch.rand(1, generator=generator) for generator in self.generators])
        place_B1 = torch.searchsorted(upto_BV, drawn_B1.to(upto_BV.device) * upto_BV[:, -1:], right=True)
        last_B1 = (probability_BV > 0).sum(-1, keepdim=True) - 1  # rounding may put the draw past the end
        return token_BV.gather(1, torch.minimum(place_B1, last_B1))[:, 0]
