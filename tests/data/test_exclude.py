"""Going on past damaged blocks: from a window on nothing touches them, before it nothing changes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megaboat.data.config import DataConfig, Phase
from megaboat.data.dataset import Dataset, open_dataset
from megaboat.data.ledger import step_crc
from megaboat.data.loader import Loader
from megaboat.data.order import CYCLE
from megaboat.data.plan import excluded_blocks, make_order
from megaboat.data.prepare import Request, prepare
from megaboat.data.spill import PrepareOptions
from megaboat.errors import BadInput, DamagedData
from tests.corpus import real_texts, write_jsonl

GLOBAL_BATCH, SEQ_LEN = 12, 64
BLOCK = "train/lib-00001.tar:1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exclude")
    corpus = write_jsonl(folder / "lib.jsonl", real_texts(120, 3000))
    options = PrepareOptions(block_tokens=20_000, blocks_per_shard=2, val_per_10k=0)
    prepare(Request({"train": [corpus]}, "bytes+eos", folder / "out", options))
    return folder / "out"


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """The dataset with one byte of BLOCK flipped."""
    copy = Path(shutil.copytree(folder, tmp_path / "damaged"))
    blocks = np.load(copy / "blocks-train-lib.npy")
    offset = int(blocks[blocks["shard"] == 1][1]["offset"]) + 100
    with (copy / "train/lib-00001.tar").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    return copy


def config_of(*phases: Phase, shuffle: str = "full") -> DataConfig:
    return DataConfig(seq_len=SEQ_LEN, phases=list(phases), shuffle=shuffle, group_blocks=1)


def without(*blocks: str, start: int = 600) -> Phase:
    return Phase(from_window=start, exclude_blocks=list(blocks))


def places(config: DataConfig, dataset: Dataset, count: int = 2 * CYCLE) -> tuple[np.ndarray, np.ndarray]:
    return make_order(config, dataset, GLOBAL_BATCH).locate(np.arange(count))


def touching(dataset: Dataset, block: str, source: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Which windows read a token of the block, their last target included."""
    name = block.removeprefix("train/").rpartition("-")[0]
    found = dataset.source("train", name).find_block(block)
    assert found is not None
    mine = source == dataset.splits["train"].index(name)
    return mine & (start < found[1]) & (start + SEQ_LEN >= found[0])


@pytest.mark.parametrize("shuffle", ["full", "grouped"])
def test_from_the_window_on_nothing_touches_the_blocks_and_all_else_stays(folder: Path, shuffle: str) -> None:
    dataset = open_dataset(folder)
    blocks = [BLOCK, "train/other-x-00000.tar:0"]
    whole = places(config_of(shuffle=shuffle), dataset)
    source, start = places(config_of(without(*blocks), shuffle=shuffle), dataset)
    assert np.array_equal(source, whole[0]), "the mixture is the same"
    affected = touching(dataset, blocks[0], *whole) | touching(dataset, blocks[1], *whole)
    affected[:600] = False
    assert 1000 < affected.sum() < 2 * CYCLE / 3
    assert np.array_equal(start[~affected], whole[1][~affected])
    for block in blocks:
        assert not touching(dataset, block, source, start)[600:].any()
        assert touching(dataset, block, source, start)[:600].any()
    for k in (0, 1):
        tokens = dataset.source("train", dataset.splits["train"][k]).n_tokens
        assert start[source == k].min() >= 0
        assert start[source == k].max() + SEQ_LEN + 1 <= tokens


def test_what_is_read_instead_is_of_the_same_epoch_and_evenly_spread(folder: Path) -> None:
    dataset = open_dataset(folder)
    whole, (source, start) = places(config_of(), dataset), places(config_of(without(BLOCK)), dataset)
    moved = start != whole[1]
    assert np.array_equal(start[moved] % SEQ_LEN, whole[1][moved] % SEQ_LEN), "an epoch has its own window borders"
    k = dataset.splits["train"].index("lib")
    tenths = np.histogram(start[moved & (source == k)], bins=10, range=(0, dataset.source("train", "lib").n_tokens))[0]
    free = tenths[tenths > tenths.max() / 3]
    assert len(free) >= 7
    assert free.max() < 1.5 * free.min()


def test_the_plan_before_the_window_is_the_old_plan(folder: Path) -> None:
    dataset = open_dataset(folder)
    plain, changed = (make_order(config, dataset, GLOBAL_BATCH) for config in (config_of(), config_of(without(BLOCK))))
    assert plain.plan_id(600) == changed.plan_id(600)
    assert plain.plan_id(601) != changed.plan_id(601)
    assert plain.drawn(5000) == changed.drawn(5000)
    assert plain.plan_id(0) != make_order(config_of(without(BLOCK, start=0)), dataset, GLOBAL_BATCH).plan_id(0)
    twice = [without(BLOCK), without("train/lib-00000.tar:0"), without("train/other-x-00000.tar:0", start=12)]
    orders = [make_order(config_of(*phases), dataset, GLOBAL_BATCH) for phases in (twice, twice[::-1])]
    assert orders[0].plan_id(601) == orders[1].plan_id(601), "exclusions may be added in any order"
    later = config_of(without(BLOCK), Phase(from_window=CYCLE, weights={"lib": 1}))
    assert make_order(later, dataset, GLOBAL_BATCH).plan_id(CYCLE) == changed.plan_id(CYCLE)


@pytest.mark.parametrize("size", [1, 3])
def test_following_the_message_goes_on_past_the_damage(folder: Path, damaged: Path, size: int) -> None:
    """On every rank: up to the damage the old batches, then the batch that it stopped, read elsewhere."""
    whole = Loader(config_of(), open_dataset(folder), GLOBAL_BATCH)
    before, message = [], ""
    loaders = [Loader(config_of(), open_dataset(damaged), GLOBAL_BATCH, rank, size) for rank in range(size)]
    while not message:
        try:
            before.append([next(loader) for loader in loaders])
        except DamagedData as error:
            message = str(error)
    for loader in loaders:
        loader.close()
    assert before, "the damage is not in the first batch"
    assert f"{damaged}/train/lib-00001.tar: block 1: wrong crc" in message
    assert "byte offset" in message
    phase = Phase.model_validate(yaml.safe_load(message.partition("add to data.phases: ")[2]))
    assert phase == without(BLOCK, start=len(before) * GLOBAL_BATCH)
    assert torch.equal(torch.cat([part.tokens_BT for part in before[-1]]), [next(whole) for _ in before][-1].tokens_BT)
    state = whole.state(len(before), 0)
    whole.close()
    sound = Loader(config_of(phase), open_dataset(folder), GLOBAL_BATCH, consumed_windows=state["consumed_windows"])
    assert sound.state(len(before), 0) == state, "the checkpoint before the damage can be resumed"
    resumed = [
        Loader(config_of(phase), open_dataset(damaged), GLOBAL_BATCH, rank, size, state["consumed_windows"])
        for rank in range(size)
    ]
    for _ in range(300):
        parts = torch.cat([next(loader).tokens_BT for loader in resumed])
        assert torch.equal(parts, next(sound).tokens_BT)
    for loader in (sound, *resumed):
        loader.close()


def test_damage_in_the_batch_before_a_checkpoint_can_be_passed(folder: Path, damaged: Path) -> None:
    """A resume reads that batch again, and takes what is excluded by then for compared."""
    sound = open_dataset(folder)
    step = int(touching(sound, BLOCK, *places(config_of(), sound)).argmax()) // GLOBAL_BATCH + 1
    loader = Loader(config_of(), sound, GLOBAL_BATCH)
    last = [next(loader) for _ in range(step)][-1]
    state = loader.state(step, step_crc(last.crcs))
    loader.close()
    with pytest.raises(DamagedData, match="block 1: wrong crc.*add to data.phases: ") as refusal:
        resume(config_of(), damaged, state)
    phase = Phase.model_validate(yaml.safe_load(str(refusal.value).partition("add to data.phases: ")[2]))
    assert phase == without(BLOCK, start=step * GLOBAL_BATCH)
    resume(config_of(phase), damaged, state)
    resume(config_of(), folder, state)
    with pytest.raises(DamagedData, match="read again have crc"):
        resume(config_of(phase), folder, state | {"last_batch_crc32": 0})


def resume(config: DataConfig, folder: Path, state: dict[str, Any]) -> None:
    loader = Loader(config, open_dataset(folder), GLOBAL_BATCH, consumed_windows=state["consumed_windows"])
    try:
        loader.check_resume(state)
    finally:
        loader.close()


def test_a_full_check_passes_over_excluded_blocks_only(damaged: Path) -> None:
    with pytest.raises(DamagedData, match="block 1: wrong crc"):
        open_dataset(damaged, "full")
    open_dataset(damaged, "full", excluded_blocks(config_of(without(BLOCK))))
    with pytest.raises(DamagedData, match="block 1: wrong crc"):
        open_dataset(damaged, "full", excluded_blocks(config_of(without("train/lib-00001.tar:0"))))


def test_contiguous_rows_have_no_way_round(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "x.jsonl", real_texts(30), ("enwik8",))
    prepare(Request({"train": [corpus]}, "bytes", tmp_path / "out", PrepareOptions(val_per_10k=0)))
    with (tmp_path / "out/train/enwik8-00000.tar").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    loader = Loader(config_of(shuffle="contiguous"), open_dataset(tmp_path / "out"), GLOBAL_BATCH)
    with pytest.raises(DamagedData, match="put the shard back as it was$"):
        next(loader)
    with pytest.raises(BadInput, match="takes one source and no phases"):
        make_order(config_of(without("x"), shuffle="contiguous"), loader.dataset, GLOBAL_BATCH)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([without("train/lib-00001.tar:2")], "has no such training block; one is written as train/lib-00000.tar:0"),
        ([without("train/lib-00099.tar:0")], "'train/lib-00099.tar:0': .* has no such training block"),
        ([without("lib-00001.tar: block 1")], "has no such training block"),
        ([Phase(from_window=0, weights={"lib": 1})], "from_window 0 must be a multiple of 65,536 and ascend"),
        ([Phase(from_window=600, exclude_blocks=[BLOCK], row_len=32)], "must be a multiple of 65,536"),
        (
            [without(*(f"train/lib-0000{shard}.tar:{block}" for shard in (0, 1, 2) for block in (0, 1)))],
            "excluded blocks of 'lib' leave less than half of its windows; leave 'lib' out of data.weights",
        ),
    ],
)
def test_what_cannot_be_excluded_is_refused_at_the_start(folder: Path, phases: list[Phase], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_order(config_of(*phases), open_dataset(folder), GLOBAL_BATCH)
