"""A model is built piece by piece: the same values at every layout, and never whole where ranks share it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaboat.config import build_config
from megaboat.data.batch import Batch
from megaboat.engine.deepspeed import Engine
from megaboat.engine.evaluate import documents
from megaboat.engine.ranks import Ranks, this_process
from megaboat.engine.run_config import RunConfig
from megaboat.engine.start import Drawn, Loaded, load_weights
from megaboat.errors import BadInput
from megaboat.model.build import build_model, give_memory, outline, pieces
from megaboat.model.config import SeqBoatConfig
from megaboat.model.seqboat import SeqBoat
from tests.distributed import run_on_ranks
from tests.engine.conftest import tiny_config, tiny_tree
from tests.engine.equality import LENGTH, VOCABULARY, Layout, batch_of, batches


def sample() -> Batch:
    return batch_of(batches(1)[0])


def llama_config(folder: Path, zero: int) -> RunConfig:
    tree = tiny_tree(folder, folder, parallel__zero=zero)
    tree["model"] = {"family": "llama", "vocab_size": VOCABULARY, "layers": 3, "width": 32, "heads": 4}
    return build_config(RunConfig, tree, "the test")


def start(ranks: Ranks, config: RunConfig, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every parameter and buffer after a start from an outline: drawn, then loaded from `tensors`."""
    ranks = ranks.in_mesh(config.parallel.tensor, config.parallel.sequence)
    found = []
    for drawn in (True, False):
        model = outline(config.model)
        calibrated = sample() if isinstance(config.model, SeqBoatConfig) else None
        fill = Drawn(model, config, ranks, calibrated) if drawn else Loaded(model, tensors, "the test")
        engine = Engine(model, config, ranks, fill)
        weights = {name: value.clone() for name, value in engine.weights()}
        found.append(weights | dict(engine.module.named_buffers()))
        engine.close()
    return found


def whole(config: RunConfig) -> dict[str, Tensor]:
    """What one process draws and calibrates at once, by name."""
    model = build_model(config.model, config.train.seed)
    if isinstance(model, SeqBoat):
        model.calibrate(sample().tokens_BT, documents(sample()))
    return {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, 1, 3),
        Layout(1, 2, 0),
        *(pytest.param(x, marks=pytest.mark.slow) for x in (Layout(2, 2, 3), Layout(4))),
    ],
    ids=str,
)
def test_every_layout_starts_with_the_bits_of_one_process(tmp_path: Path, layout: Layout) -> None:
    check_start(layout.config(tmp_path), layout.ranks)


def test_a_wide_model_is_calibrated_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ranks = Layout().config(tmp_path), this_process()
    monkeypatch.setattr("megaboat.engine.start.CALIBRATED", 3 * LENGTH * config.model.width)
    model = outline(config.model)
    drawn = Drawn(model, config, ranks, sample())
    sizes: list[int] = []
    model.blocks[1].register_forward_hook(lambda block, inputs, outputs: sizes.append(len(inputs[0])))
    for name, piece in pieces(model).items():
        give_memory(model, piece, ranks.device)
        drawn(name, piece)
    assert sizes == [3, 3, 2]
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    torch.testing.assert_close(found, whole(config), rtol=1e-4, atol=1e-6, check_device=False)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_so_does_llama(tmp_path: Path, zero: int) -> None:
    check_start(llama_config(tmp_path, zero), 2)


def check_start(config: RunConfig, ranks: int) -> None:
    expected = whole(config)
    others = {name: value + 1 for name, value in expected.items()}
    for drawn, loaded in run_on_ranks(start, ranks, config, others):
        torch.testing.assert_close(drawn, expected, rtol=0, atol=0)
        torch.testing.assert_close(loaded, others, rtol=0, atol=0)


class Live(TorchDispatchMode):
    """While it is on: the bytes of what was made in it and is still there, at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[StorageWeakRef, int] = {}
        self._held = 0  # as if nothing had been freed since `_sizes` was last swept, which only a new peak needs

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._sizes[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
                self._held += tensor.untyped_storage().nbytes()
        if self._held > self.peak:
            self._sizes = {storage: size for storage, size in self._sizes.items() if not storage.expired()}
            self._held = sum(self._sizes.values())
            self.peak = max(self.peak, self._held)
        return result


def building_bytes(ranks: Ranks, config: RunConfig) -> tuple[int, int, int]:
    """The most that was live when the last piece had been drawn; of that piece; of this rank's parts."""
    ranks = ranks.in_mesh(config.parallel.tensor, 1)
    found = 0
    with Live() as live:
        model = outline(config.model)
        drawn = Drawn(model, config, ranks)

        def fill(name: str, piece: torch.nn.Module) -> None:
            nonlocal found
            drawn(name, piece)
            found = live.peak

        engine = Engine(model, config, ranks, fill)
    block = list(engine.module.blocks.parameters())
    size = sum(p.ds_numel for p in block) // config.model.layers * config.parallel.tensor
    return found, 4 * size, 4 * sum(p.ds_tensor.numel() for p in engine.names.values())


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_holds_its_part_and_one_piece_while_a_model_is_built(tmp_path: Path, tensor: int) -> None:
    model = {"model__vocab_size": VOCABULARY, "model__layers": 8 * tensor, "model__width": 64}
    config = tiny_config(tmp_path, tmp_path, **model, parallel__zero=3, parallel__tensor=tensor)
    for peak, piece, part in run_on_ranks(building_bytes, 2 * tensor, config):
        assert peak < 1.1 * part + 1.5 * piece
        assert part > 3 * piece


def test_an_outline_takes_no_memory() -> None:
    config = Layout().config(Path())
    with Live() as live:
        model = outline(config.model)
    one = max(parameter.nbytes for parameter in model.parameters())
    assert live.peak < 2 * one + sum(buffer.nbytes for buffer in model.buffers())


@pytest.mark.parametrize("config", [Layout().config(Path()), llama_config(Path(), 0)], ids=["seqboat", "llama"])
def test_the_pieces_are_all_of_a_model(config: RunConfig) -> None:
    model = outline(config.model)
    names = [name for piece, module in pieces(model).items() for name, _ in module.named_parameters(prefix=piece)]
    assert names == [name for name, _ in model.named_parameters()]


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    config = Layout().config(tmp_path)
    tensors = whole(config)
    tensors["blocks.1.linear.weight"] = tensors["blocks.1.linear.weight"][1:]
    model = build_model(config.model, None)
    with pytest.raises(BadInput, match=r"the test: blocks\.1\.linear\.weight is .* in the checkpoint"):
        load_weights(model, tensors, "the test")
