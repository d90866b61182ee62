"""What DeepSpeed is told, and what it asks."""

from typing import Any

from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.model.memory import BUCKET, BUCKET_3


class Mesh:
    """What DeepSpeed asks a model-parallel unit (`mpu`): ZeRO works among replicas, norms add up the parts."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def get_model_parallel_rank(self) -> int:
        return self._ranks.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._ranks.tensor

    def get_model_parallel_group(self) -> Any:
        return self._ranks.tensor_group

    def get_data_parallel_rank(self) -> int:
        return self._ranks.replica

    def get_data_parallel_world_size(self) -> int:
        return self._ranks.replicas

    def get_data_parallel_group(self) -> Any:
        return self._ranks.replica_group


def engine_settings(config: RunConfig, micro_steps: int, stage: int) -> dict[str, Any]:
    """Its JSON, as a dictionary: `stage` may be less than `parallel.zero`, `micro_steps` is the accumulation."""
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": config.optim.clip if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET if stage < 3 else BUCKET_3,
            # It would put a slower product in the place of torch's, for the whole process.
            "memory_efficient_linear": False,
            "offload_optimizer": {
                "device": "cpu" if config.parallel.offload == "optimizer" else "none",
                "pin_memory": True,
            },
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
        # Its stopwatch would hold the host until the device is idle, before each micro-batch and after it.
        "timers": {"throughput": {"enabled": False}},
        "torch_autocast": {
            "enabled": config.train.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [
                "torch.nn.Linear",
                "megaboat.layers.linear.Linear",
                "megaboat.parallel.tensor.RowParallelLinear",
            ],
        },
    }
