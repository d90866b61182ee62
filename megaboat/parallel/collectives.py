"""What tensor and sequence parallelism ask of a group of ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


def stack_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks (equal shapes), stacked in the order of ranks. Not differentiable."""
    x = x.contiguous()  # `empty_like` would keep another layout, which no backend gathers into
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.stack(parts)


def add_up(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, in a tensor of its own. Not differentiable."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
