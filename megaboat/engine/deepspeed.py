"""The door to DeepSpeed: no other file imports it.

Parameters are fp32 whatever the precision of training; bf16 is DeepSpeed's `torch_autocast`, since its bf16 mode would
cast EMA and configurator parameters too. Optimizer states are read and written as full named tensors, so that a
checkpoint does not depend on the ZeRO stage, the tensor parallelism or the number of ranks that wrote it.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

# DeepSpeed looks for accelerators when it is imported, and warns on every CPU that it found none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.runtime import compiler, zero
from deepspeed.runtime.utils import combine_grad_norm_groups, is_model_parallel_parameter
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from torch import Tensor, nn

from megaboat.engine.deepspeed_settings import Mesh, engine_settings
from megaboat.engine.optim import parameter_groups
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig, effective_stage
from megaboat.engine.start import Fill
from megaboat.imports import load
from megaboat.kernels import NarrowCopies
from megaboat.layers.linear import Linear
from megaboat.model.block import SeqBoatBlock
from megaboat.model.build import LanguageModel, give_memory, pieces
from megaboat.model.seqboat import SeqBoat
from megaboat.parallel import exchange, sequence, tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    """One flat tensor of which `tensors` become parts: DeepSpeed's own goes through the host, 25 GB of a 12 B model."""
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=tensors[0].dtype, device=tensors[0].device)
    for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True):
        t.data = part.copy_(t)
    if flat.is_cuda:
        torch.cuda.empty_cache()  # of whole parameters and their parts: small blocks, and large ones will be asked for
    return flat


zero.stage3.defragment = _side_by_side
# It makes lists of all parameters for each one: seconds for 7,000. `parameter_groups` names each once.
deepspeed.DeepSpeedEngine._check_for_duplicates = lambda *_: None
# Muon, which nothing here uses, comes with every ZeRO engine, compiled when imported: a second of inductor's imports.
compiler.compile = lambda: lambda function: function


def preload() -> None:
    """Import now what the first optimizer imports: torch's compiler, a second of it."""
    load("torch._dynamo")


def connect(ranks: Ranks, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Start the process group: NCCL on GPUs, gloo on CPUs. Addresses come from the environment (`engine.ranks`)."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's, at each call
    # Or DeepSpeed would compile a shared-memory all-reduce for CPUs: a minute of C++, and no compiler may be there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    if ranks.device.type == "cuda":  # DeepSpeed takes the GPU's index from it; a scheduler may show each rank only one
        os.environ["LOCAL_RANK"] = str(ranks.device.index)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


class Engine:
    """A model under DeepSpeed with AdamW: forward, backward, step, and its state as full named tensors.

    Takes a whole model, or an outline of one and what fills it; with tensor parallelism it keeps this rank's part.
    """

    def __init__(self, model: LanguageModel, config: RunConfig, ranks: Ranks, fill: Fill | None = None) -> None:
        micro_steps = config.train.global_batch // (config.train.micro_batch * ranks.data_size)
        self._outlines = {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()}
        self._ranks, self._group = ranks, ranks.tensor_group
        self._offloads = config.parallel.offload == "optimizer"
        self.stage = effective_stage(config.parallel.zero, ranks.replicas, self._offloads)
        settings = engine_settings(config, micro_steps, self.stage)
        self._cut: dict[str, int] = {}
        self._assemble(model, settings, fill)
        if ranks.sequence_group is not None:
            assert isinstance(model, SeqBoat), "as it does sequence parallelism"
            sequence.join(model, ranks.sequence_group, ranks.tensor)
        if config.balance.exchange > 1:
            assert isinstance(model, SeqBoat), "and an exchange of rows"
            exchange.join(model, ranks.neighbours(config.balance.exchange))
        if config.parallel.zero == 3 and isinstance(model, SeqBoat):
            # Hooks around each of a block's modules cost the host more than launching all of its kernels.
            set_z3_leaf_modules(model, [SeqBoatBlock])
        groups = parameter_groups(model, self._outlines, config.optim.weight_decay)
        fused = ranks.device.type == "cuda" or self._offloads
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.optim.betas, eps=config.optim.eps, fused=fused)
        self._clip = config.optim.clip
        self.names = dict(model.named_parameters())
        self._norm: Tensor | None = None  # of the gradients as they are, once it was asked for
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=settings,
            mpu=Mesh(ranks) if self._group is not None else None,
            dist_init_required=False,
        )
        if self.stage == 0 and ranks.replicas == 1:
            self._engine.enable_backward_allreduce = False  # it would copy all gradients twice to add up nothing
        if self.stage in (1, 2) and not self._offloads:
            self._optimizer.scaled_global_norm = self._norm_of_partitions
        if self.stage == 3 and not self._offloads:
            self._optimizer._get_norm_groups = lambda: [self._norm_of_groups()]
        if self.stage == 3:
            # Each would be gathered by itself after a step; not gathered there, they come with the rest of their block.
            self._optimizer.persistent_parameters = []
        self._create_states()
        self._copies = None
        self._copies_are_old = True
        kept = self.stage == 0 and not config.train.checkpoint_activations  # all at once, by the backward pass
        if kept and ranks.device.type == "cuda" and config.train.precision == "bf16":
            self._copies = _narrow_copies(model)

    def _assemble(self, model: LanguageModel, settings: dict[str, Any], fill: Fill | None) -> None:
        """Piece by piece: this rank's part, under ZeRO-3 its slices of that, before the next piece takes memory."""
        self.parameters = 0
        for name, piece in pieces(model).items():
            if fill is not None:
                give_memory(model, piece, self._ranks.device)
                fill(name, piece)
            if self._group is not None:
                assert isinstance(model, SeqBoat), "check_world refuses tensor parallelism for others"
                self._cut |= tensor.shard(model, self._group, name)
            self.parameters += sum(parameter.numel() for parameter in piece.parameters())
            if self.stage == 3:
                deepspeed.zero.Init(piece, self._ranks.replica_group, config_dict_or_path=settings, dtype=torch.float32)

    @property
    def module(self) -> nn.Module:
        """The model. Under ZeRO-3 its parameters are whole only while a forward pass of the engine uses them."""
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._copies is None:
            return self._engine(*args, **kwargs)
        if self._copies_are_old:
            self._copies.refresh()
            self._copies_are_old = False
        with self._copies.used():
            return self._engine(*args, **kwargs)

    def train(self, on: bool = True) -> None:
        self._copies_are_old = True
        self._engine.train(on)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`; DeepSpeed averages over ranks, and nothing else scales it."""
        self._norm = None
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradient_norm(self) -> float:
        """The gradient's norm over all ranks after the last micro-batch; -1, inf or nan where it is not finite."""
        if self.stage == 0:
            self._norm = self._norm_without_zero()
            return float(self._norm)
        if self.stage == 3:
            return float(combine_grad_norm_groups(self._optimizer._get_norm_groups()))
        self._norm = self._optimizer.scaled_global_norm()
        return float(self._norm)

    def step(self, lr: float) -> None:
        """After the last micro-batch of a step: clip, update, clear."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0 and self._clip:
            # DeepSpeed would take the norm of each tensor by itself, a thousand launches.
            gradients = [p for p in self.names.values() if p.grad is not None]
            norm = self._norm_without_zero() if self._norm is None else self._norm
            nn.utils.clip_grads_with_norm_(gradients, self._clip, norm)
        self._engine.step()
        self._copies_are_old = True

    def skip(self) -> None:
        """After the last micro-batch of a step: drop the gradients; weights and moments stay as they are.

        ZeRO drops gradients that are not finite and clears whatever its stage keeps of them: so they are made that.
        """
        if self.stage == 0:
            self._engine.zero_grad()
            self._engine.set_gradient_accumulation_boundary(False)
            self._engine.step()
            self._engine.set_gradient_accumulation_boundary(None)
            return
        if self._offloads:  # there it is a norm that ZeRO looks at
            norms = self._optimizer.norm_for_param_grads
            norms |= dict.fromkeys(norms, torch.tensor(torch.inf))
            self._engine.step()
            return
        gradients = [part for parts in self._optimizer.averaged_gradients.values() for part in parts or []]
        for part in gradients:
            part.fill_(torch.inf)
        self._norm = None
        self._engine.step()
        for part in gradients:
            part.zero_()  # ZeRO-3 keeps these buffers, and writes over all but their padding

    def next_micro_batch(self) -> None:
        """After a micro-batch that is not the last one of its step: DeepSpeed counts them in `step`."""
        self._engine.step()

    def close(self) -> None:
        """Let go of the model, so that another engine can follow in this process; the model stays usable."""
        self._engine.destroy()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The full gradient of each parameter after the last micro-batch, before `step`. For tests."""
        for name, parameter in self.names.items():
            yield name, self._whole(name, safe_get_full_grad(parameter))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter in full, fp32. All ranks take part, one parameter after the other."""
        for name, parameter in self.names.items():
            # Parameters are fp32 themselves: below stage 3 they are what AdamW's parts were copied to, on every rank.
            mine = parameter.detach() if self.stage < 3 else safe_get_full_fp32_param(parameter)
            yield name, self._whole(name, mine)

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's two moments in full, under `exp_avg.NAME` and `exp_avg_sq.NAME`. All ranks take part."""
        for name, parameter in self.names.items():
            for key in MOMENTS:
                if self.stage == 0:
                    mine = self._optimizer.state[parameter][key]
                else:
                    mine = safe_get_full_optimizer_state(parameter, key)
                yield f"{key}.{name}", self._whole(name, mine)

    def outlines(self) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        """What `weights` and `moments` give, in the same order, without data; nothing is gathered."""
        moments = [(f"{key}.{name}", outline) for name, outline in self._outlines.items() for key in MOMENTS]
        return list(self._outlines.items()), moments

    @torch.no_grad()
    def set_weights(self, full: Any) -> None:
        """Take parameters and buffers from `full[name]`. All ranks take part."""
        self._copies_are_old = True
        for name, parameter in self.names.items():
            value = self._part(name, full[name]).to(self._engine.device)
            if self.stage == 3:
                safe_set_local_fp32_param(parameter, _own_slice(parameter, value))
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.copy_(value)
            else:
                parameter.copy_(value)
                if self.stage:
                    safe_set_full_fp32_param(parameter, value)
        for name, buffer in self.module.named_buffers():
            buffer.copy_(full[name])

    def set_moments(self, full: Any, updates: int) -> None:
        """Take the moments from `full[name]` (tensors as `moments` gives them) after `updates` steps of AdamW."""
        for state in self._states():
            state["step"].fill_(updates)
        for name, parameter in self.names.items():
            for key in MOMENTS:
                self._set_moment(parameter, key, self._part(name, full[f"{key}.{name}"]))

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.stage == 0:
            self._optimizer.state[parameter][key].copy_(value)
        elif self.stage == 3:
            safe_set_local_optimizer_state(parameter, _own_slice(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _create_states(self) -> None:
        """Make AdamW's state, as its first step would: too late to load one, and DeepSpeed 0.19.8 links the state of
        all groups after the step of the first."""
        inner = self._inner()
        if self.stage == 0:
            holders = list(self.names.values())
        elif self.stage == 3:
            holders = self._optimizer.fp32_partitioned_groups_flat
        else:
            holders = self._optimizer.single_partition_of_fp32_groups
        for holder in holders:
            step = torch.tensor(0.0, device=holder.device if inner.defaults["fused"] else "cpu")
            inner.state[holder] = {"step": step} | {key: torch.zeros_like(holder) for key in MOMENTS}
        if self.stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _inner(self) -> torch.optim.Optimizer:
        return self._optimizer if self.stage == 0 else self._optimizer.optimizer

    def _states(self) -> list[dict[str, Tensor]]:
        """AdamW's own states: of parameters, or of this rank's flat partitions."""
        return list(self._inner().state.values())

    def _norm_without_zero(self) -> Tensor:
        gradients = {name: p.grad for name, p in self.names.items() if p.grad is not None}
        norm = nn.utils.get_total_norm([gradient for name, gradient in gradients.items() if name not in self._cut])
        if self._group is None:
            return norm
        parts = nn.utils.get_total_norm([gradient for name, gradient in gradients.items() if name in self._cut])
        return torch.linalg.vector_norm(torch.cat([tensor.whole(parts[None], 0, self._group), norm[None]]))

    def _norm_of_partitions(self) -> Tensor:
        """Of all groups, under ZeRO-1 and 2: their own copies every tensor to fp64, and is taken again in each step."""
        if self._norm is None:
            gradients: list[Tensor] = []
            parameters: list[nn.Parameter] = []
            for i, mine in enumerate(self._optimizer.params_in_partition):
                parts = [g for g in self._optimizer.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]
                gradients += parts[: len(mine)]  # a partition without parameters has zeros for a gradient
                parameters += mine
            self._norm = self._norm_of_slices(gradients, parameters)
        return self._norm

    def _norm_of_groups(self) -> Tensor:
        """Of all groups, under ZeRO-3: its own takes three launches a tensor, and is taken again in each step."""
        if self._norm is None:
            optimizer = self._optimizer
            gradients = [part for i in range(len(optimizer.fp16_groups)) for part in optimizer.averaged_gradients[i]]
            self._norm = self._norm_of_slices(gradients, [p for group in optimizer.fp16_groups for p in group])
        return self._norm

    def _norm_of_slices(self, gradients: list[Tensor], parameters: list[nn.Parameter]) -> Tensor:
        """Over all ranks, -1 where it is not finite."""
        pairs = zip(gradients, parameters, strict=True)
        counted = [  # what tensor ranks hold alike counts once
            gradient for gradient, p in pairs if self._ranks.tensor_rank == 0 or is_model_parallel_parameter(p)
        ]
        square = nn.utils.get_total_norm(counted).to(self._engine.device).square()
        self._ranks.sum(square)
        if self._group is not None:
            torch.distributed.all_reduce(square, group=self._group)
        return torch.where(square.isfinite(), square.sqrt(), -1.0)

    def _whole(self, name: str, mine: Tensor) -> Tensor:
        if self._group is None or name not in self._cut:
            return mine
        return tensor.whole(mine, self._cut[name], self._group)

    def _part(self, name: str, whole: Tensor) -> Tensor:
        if self._group is None or name not in self._cut:
            return whole
        return tensor.part(whole, self._cut[name], self._group).contiguous()


def _narrow_copies(model: nn.Module) -> NarrowCopies | None:
    """Of all that megaboat's linear maps multiply by; None for a model without them."""
    maps = [module for module in model.modules() if isinstance(module, Linear)]
    wide = [parameter for module in maps for parameter in module.parameters(recurse=False)]
    return NarrowCopies(wide, torch.bfloat16) if wide else None


def _own_slice(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's part of a tensor under ZeRO-3: equal slices of the flattened tensor, zeros past its end."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    rank = torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    mine = value.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(mine, (0, size - len(mine))).to(parameter.ds_tensor.device)  # type: ignore[attr-defined]
