"""This process among the ranks of a run, and what they ask of each other."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megaboat.engine.places import environment, gpu_of

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all, and its place in the mesh of data x sequence x tensor, the last one innermost.

    The ranks of a tensor group hold one copy of the model together, read the same data and draw the same dropout.
    The copies of a sequence group read the same rows, each its own piece of them. Before `in_mesh` every rank is a copy
    of its own.
    """

    rank: int
    size: int
    device: torch.device
    tensor: int = 1
    """How many ranks hold one copy of the model."""
    sequence: int = 1
    """How many copies share a row."""
    tensor_group: dist.ProcessGroup | None = None
    """This rank's copy of the model; None: it holds a whole one."""
    sequence_group: dist.ProcessGroup | None = None
    """The ranks that hold the same part of the model and other pieces of the same rows; None: this one alone."""
    replica_group: dist.ProcessGroup | None = None
    """The ranks that hold the same part as this one; None: all ranks."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def replica(self) -> int:
        """Which copy of the model this rank belongs to."""
        return self.rank // self.tensor

    @property
    def replicas(self) -> int:
        return self.size // self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def sequence_rank(self) -> int:
        return self.replica % self.sequence

    @property
    def data_rank(self) -> int:
        """Which rows this rank reads, of `data_size` shares."""
        return self.replica // self.sequence

    @property
    def data_size(self) -> int:
        return self.replicas // self.sequence

    def in_mesh(self, tensor: int, sequence: int = 1) -> "Ranks":
        """This rank in groups of `tensor` neighbours, and of `sequence` neighbouring copies. Once connected."""
        mesh = torch.arange(self.size).view(-1, sequence, tensor)
        return replace(
            self,
            tensor=tensor,
            sequence=sequence,
            tensor_group=_my_group(mesh.flatten(0, 1)) if tensor > 1 else None,
            sequence_group=_my_group(mesh.transpose(1, 2).flatten(0, 1)) if sequence > 1 else None,
            replica_group=_my_group(mesh.flatten(0, 1).T) if tensor > 1 else None,
        )

    def neighbours(self, count: int) -> dist.ProcessGroup:
        """The group of `count` neighbouring ranks that this one belongs to. All ranks take part."""
        return _my_group(torch.arange(self.size).view(-1, count))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over replicas, in place."""
        if self.replicas > 1:
            dist.all_reduce(values, group=self.replica_group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The tensors of all ranks (equal shapes), concatenated in the order of ranks; a tensor group's repeat."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.cat(parts)

    def gather_number(self, value: float) -> list[float]:
        """What each rank passes, in the order of ranks: one small collective."""
        return self.gather(torch.tensor([value], device=self.device)).tolist()

    def gather_objects(self, value: T) -> list[T]:
        """What each rank passes, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_first(self, action: Callable[[], T]) -> T | None:
        """What `action` returns on rank 0, None on the others; where it raises, all ranks raise."""
        result, failure = None, None
        if self.is_first:
            try:
                result = action()
            except Exception as error:
                failure = error
        failure = self.gather_objects(failure)[0]
        if failure is not None:
            raise failure
        return result

    def broadcast(self, values: Tensor) -> None:
        """Rank 0's values to all ranks, in place."""
        if self.size > 1:
            dist.broadcast(values, src=0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def _my_group(groups: Tensor) -> dist.ProcessGroup:
    """Make a process group of each line of ranks; every rank takes part. Returns this rank's."""
    return dist.new_subgroups_by_enumeration(groups.tolist())[0]


def this_process() -> Ranks:
    """Read the environment and choose the device: the local rank's GPU, or the CPU."""
    os.environ.update(environment(os.environ))
    if not torch.cuda.is_available():
        return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.device("cpu"))
    local_rank, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    device = torch.device("cuda", gpu_of(local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), visible))
    torch.cuda.set_device(device)
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)


def be_deterministic() -> None:
    """Only kernels that give the same bits each time, in torch and, as ours ask torch, in our own; an operation that
    has none raises RuntimeError when it is met."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
