"""The linear map of every layer but the configurator's, which stays in fp32 whatever the precision of training."""

from torch import Tensor, nn

from megaboat import kernels
from megaboat.layers.precision import to_compute_dtype


class Linear(nn.Linear):
    """`nn.Linear` with the gradients of its parameters in fp32. (..., D) -> (..., E)."""

    def forward(self, input: Tensor) -> Tensor:
        return kernels.linear(to_compute_dtype(input), self.weight, self.bias)
