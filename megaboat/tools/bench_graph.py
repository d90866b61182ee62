"""Forward and backward of a micro-batch as one CUDA graph: the host launches it once, not each of its kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megaboat.errors import MegaboatError
from megaboat.layers.documents import Documents
from megaboat.model.seqboat import SeqBoat

ALLOWED = 1e-2  # relative, of the loss and of all gradients together: flash attention adds its own up in any order


class Captured:
    """Loss and gradients of `model` on rows of one shape, in a graph that adds to the parameters' gradients.

    Parameters stay where `model` has them, so that an optimizer may change them between replays. Only shapes that the
    host knows can be captured: `SeqBoat.capacity` must be set. Before `capture` the same is done kernel by kernel.
    """

    def __init__(self, model: SeqBoat, docs: Documents, scale: float, bf16: bool = True) -> None:
        assert model.capacity is not None, "the shapes of exact mode are data"
        assert model.config.vocab_size is not None, "as in every model"
        self._model, self._docs, self._scale, self._bf16 = model, docs, scale, bf16
        self.module = _on_the_memory_of(model)
        self._gradients = [torch.zeros_like(parameter) for parameter in self.module.parameters()]
        for parameter, gradient in zip(self.module.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        B, T = docs.shape
        self._text_BT = torch.randint(model.config.vocab_size, (B, T + 1), device=docs.first_BT.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Raises what a kernel raises that cannot be captured, and MegaboatError where the graph is not the model's.

        What it should give is worked out before and waits on the host: beside the graph there may be no room for it.
        """
        truth = self.figures(self._model)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries find their workspace before
            self._run(self.module)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Not "global", which the thread that watches over NCCL would break.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._nll = self._run(self.module)
        self._graph = graph
        self.check(*truth)

    def figures(self, module: SeqBoat) -> tuple[float, list[Tensor]]:
        """On the text at hand, the loss and the gradient of each parameter, on the host."""
        self.begin()
        return float(self._run(module)), [gradient.cpu() for gradient in self._gradients]

    def check(self, true_nll: float, truth: Sequence[Tensor]) -> None:
        """MegaboatError where what runs here gives another loss, or gradients that differ from `truth` altogether."""
        self.begin()
        nll = float(self._run(self.module))
        names = [name for name, _ in self.module.named_parameters()]
        parts = [torch.stack([(mine - true.to(mine.device)).norm(), true.norm().to(mine.device)])
                 for mine, true in zip(self._gradients, truth, strict=True)]  # fmt: skip
        off_P, norm_P = torch.stack(parts).double().cpu().unbind(1)
        errors = abs(nll / true_nll - 1), float(off_P.norm() / norm_P.norm())
        if not all(error <= ALLOWED for error in errors):
            worst = int(off_P.nan_to_num(torch.inf).argmax())
            raise MegaboatError(
                f"the graph is wrong: loss off by {errors[0]:.1e}, gradients by {errors[1]:.1e}, most of it in "
                f"{names[worst]}: {float(off_P[worst]):.1e} where the norm is {float(norm_P[worst]):.1e}"
            )

    def begin(self) -> None:
        """Before the first micro-batch of a step: the gradients are zero, and those of the model's parameters."""
        for parameter, gradient in zip(self._model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        torch._foreach_zero_(self._gradients)

    def __call__(self, text_BT: Tensor) -> Tensor:
        """The sum of negative log-likelihoods on T + 1 tokens a row; its gradient times `scale` is added."""
        self._text_BT.copy_(text_BT)
        return self._run(self.module)

    def _run(self, module: SeqBoat) -> Tensor:
        """Replay the graph, or go through `module` where there is none yet."""
        if self._graph is not None:
            self._graph.replay()
            return self._nll
        tokens_BT, targets_BT = self._text_BT[:, :-1], self._text_BT[:, 1:].contiguous()
        with torch.autocast(self._text_BT.device.type, torch.bfloat16, enabled=self._bf16, cache_enabled=False):
            nll = module(tokens_BT, self._docs, targets_BT).nll
        (nll * self._scale).backward()
        return nll.detach()


def _on_the_memory_of(model: SeqBoat) -> SeqBoat:
    """The same parameters and buffers in a module of its own: the hooks that an engine put on `model` stay outside."""
    with torch.device("meta"):
        module = SeqBoat(model.config)
    module.load_state_dict(model.state_dict(), assign=True)
    module.embedding.weight = module.head.weight  # one parameter again
    for choice in ("capacity", "checkpoint_activations", "recompute_elementwise"):
        setattr(module, choice, getattr(model, choice))
    return module.train(model.training)
