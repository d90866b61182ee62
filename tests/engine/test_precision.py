"""bf16 training keeps fp32 parameters and follows fp32 training as closely as its products allow."""

from pathlib import Path

import pytest
import torch

from megaboat.engine.build import open_run
from megaboat.engine.deepspeed import Engine
from megaboat.engine.ranks import Ranks, be_deterministic
from megaboat.engine.run_config import RunConfig
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from tests.distributed import run_on_ranks
from tests.engine.conftest import tiny_config, tiny_tree
from tests.engine.runs import losses

LLAMA = {"family": "llama", "layers": 2, "width": 32, "heads": 4}


def train(ranks: Ranks, config: RunConfig) -> set[str]:
    """Train and return the dtypes of parameters, buffers and moments."""
    trainer = open_run(config, ranks)
    trainer.fit()
    engine = trainer.engine
    tensors = [*engine.weights(), *engine.moments(), *engine.module.named_buffers()]
    return {str(tensor.dtype) for _, tensor in tensors}


@pytest.mark.parametrize("family", ["seqboat", "llama"])
@pytest.mark.parametrize("zero", [1, 3])
def test_bf16_follows_fp32(dataset_folder: Path, tmp_path: Path, family: str, zero: int) -> None:
    curves = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        changes = {"train__precision": precision, "train__micro_batch": 1, "parallel__zero": zero, "train__steps": 8}
        config = tiny_config(dataset_folder, out, **changes)
        if family == "llama":
            tree = tiny_tree(dataset_folder, out, **changes) | {"model": LLAMA}
            config = RunConfig.model_validate(tree)
        assert run_on_ranks(train, 2, config) == [{"torch.float32"}] * 2
        curves[precision] = torch.tensor(losses(out))
    torch.testing.assert_close(curves["bf16"][:1], curves["fp32"][:1], rtol=2e-3, atol=0)
    torch.testing.assert_close(curves["bf16"], curves["fp32"], rtol=3e-2, atol=0)
    assert not torch.equal(curves["bf16"], curves["fp32"]), "bf16 was not on"


def gradients(ranks: Ranks, config: RunConfig, copies: bool) -> list[torch.Tensor]:
    """Of the last of three steps, the engine's weights in bf16 kept through a step or cast by each map."""
    be_deterministic()
    with ranks.device:
        engine = Engine(build_model(config.model, seed=0), config, ranks)
    assert engine._copies is not None
    engine._copies = engine._copies if copies else None
    docs = Documents.whole(4, 64, ranks.device)
    tokens_BT = torch.arange(4 * 64, device=ranks.device).view(4, 64) * 7 % 64
    for _ in range(3):
        engine.backward(engine(tokens_BT, docs, tokens_BT).nll)
        found = [gradient.cpu().clone() for _, gradient in engine.gradients()]
        engine.step(1e-3)
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_weights_in_bf16_follow_the_steps(dataset_folder: Path, tmp_path: Path) -> None:
    changes = {"train__precision": "bf16", "train__micro_batch": 4, "train__global_batch": 4, "model__vocab_size": 64}
    config = tiny_config(dataset_folder, tmp_path / "run", **changes)
    (kept,), (cast,) = (run_on_ranks(gradients, 1, config, copies) for copies in (True, False))
    assert all(map(torch.equal, kept, cast))
