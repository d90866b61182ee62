import copy
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaboat.data.batch import IGNORE, Batch
from megaboat.data.config import DataConfig, Phase
from megaboat.data.dataset import Dataset, open_dataset
from megaboat.data.evaluation import evaluation_batches
from megaboat.data.ledger import step_crc
from megaboat.data.loader import Loader, WindowReader
from megaboat.data.order import CYCLE
from megaboat.data.plan import make_order
from megaboat.data.prepare import Request, prepare
from megaboat.data.shards import TAR_RECORD
from megaboat.data.spill import PrepareOptions
from megaboat.errors import BadInput, DamagedData
from megaboat.log import get_logger
from tests.corpus import real_texts, write_jsonl

GLOBAL_BATCH = 48
SEQ_LEN = 64


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    corpus = write_jsonl(folder / "lib.jsonl", real_texts(120, 3000), ("Lib", "Docs", "Tests"))
    options = PrepareOptions(block_tokens=10_000, blocks_per_shard=4, val_per_10k=1000)
    prepare(Request({"train": [corpus]}, str(tokenizer_file), folder / "out", options))
    return folder / "out"


@pytest.fixture
def dataset(dataset_folder: Path) -> Dataset:
    return open_dataset(dataset_folder)


def config_of(**options: Any) -> DataConfig:
    return DataConfig(**{"seq_len": SEQ_LEN, "weights": {"lib": 2, "docs": 1, "tests": 1}, **options})


def take(dataset: Dataset, config: DataConfig, steps: int, rank: int = 0, size: int = 1, start: int = 0) -> list[Batch]:
    loader = Loader(config, dataset, GLOBAL_BATCH, rank, size, consumed_windows=start)
    batches = [next(loader) for _ in range(steps)]
    loader.close()
    return batches


@pytest.mark.parametrize(
    ("size", "shuffle"), [*((size, "full") for size in (2, 3, 4, 6, 8, 16)), (5, "grouped"), (7, "grouped")]
)
def test_ranks_together_read_the_global_batches(dataset: Dataset, size: int, shuffle: str) -> None:
    config = config_of(shuffle=shuffle, mask_first_target=True)
    whole = take(dataset, config, 14)
    for step in (0, 1, 2, 5, 8, 13):  # resume points
        ranks = [take(dataset, config, 1, rank, size, start=step * GLOBAL_BATCH)[0] for rank in range(size)]
        for name in ("tokens_BT", "targets_BT", "positions_BT", "sources_B"):
            parts = torch.cat([getattr(batch, name) for batch in ranks])
            assert torch.equal(parts, getattr(whole[step], name))
        assert sum((batch.crcs for batch in ranks), ()) == whole[step].crcs
        assert [batch.first_window for batch in ranks] == [
            step * GLOBAL_BATCH + GLOBAL_BATCH * rank // size for rank in range(size)
        ]


def test_a_batch_is_what_the_shards_hold(dataset: Dataset) -> None:
    """Tokens, targets, positions and borders, token by token, from the concatenated documents."""
    config = config_of()
    order = make_order(config, dataset, GLOBAL_BATCH)
    for batch in take(dataset, config, 3):
        windows = np.arange(batch.first_window, batch.first_window + GLOBAL_BATCH)
        borders = []
        for row, (k, start) in enumerate(zip(*order.locate(windows), strict=True)):
            source = dataset.source("train", dataset.splits["train"][k])
            stream = source.read(start, SEQ_LEN + 1)
            assert batch.tokens_BT[row].tolist() == stream[:-1].tolist()
            assert batch.targets_BT[row].tolist() == stream[1:].tolist()
            assert batch.crcs[row] == zlib.crc32(stream.tobytes())
            assert batch.sources_B[row] == k
            position = -1
            for t, token in enumerate(stream[:-1]):
                fresh = t == 0 or stream[t - 1] == dataset.eos_id
                position = 0 if fresh else position + 1
                assert batch.positions_BT[row, t] == position
                assert token < dataset.vocab_size
                if fresh:
                    borders.append(row * SEQ_LEN + t)
        assert batch.cu_seqlens.tolist() == [*borders, GLOBAL_BATCH * SEQ_LEN]
        assert batch.cu_seqlens.dtype == torch.int32


def test_reading_across_blocks_equals_the_documents(dataset: Dataset) -> None:
    source = dataset.source("train", "lib")
    whole = source.read(0, source.n_tokens)
    assert source.document_lengths().sum() == source.n_tokens == len(whole)
    assert len(source.document_lengths()) == source.n_docs == np.sum(whole == dataset.eos_id)
    random = np.random.default_rng(0)
    for _ in range(200):
        start = int(random.integers(source.n_tokens - 1))
        count = int(random.integers(1, source.n_tokens - start + 1))
        assert np.array_equal(source.read(start, count), whole[start : start + count])
    with pytest.raises(IndexError):
        source.read(source.n_tokens - 5, 6)


def test_first_targets_of_documents_can_be_left_out(dataset: Dataset) -> None:
    (plain,), (masked,) = (take(dataset, config_of(mask_first_target=mask), 1) for mask in (False, True))
    after_eos = plain.tokens_BT == dataset.eos_id
    assert after_eos.any()
    assert torch.equal(masked.targets_BT, plain.targets_BT.masked_fill(after_eos, IGNORE))


def test_micro_batches_hold_the_rows_and_borders_of_the_batch(dataset: Dataset) -> None:
    (batch,) = take(dataset, config_of(), 1)
    parts = batch.micro_batches(10)
    assert [part.rows for part in parts] == [10, 10, 10, 10, 8]
    assert torch.equal(torch.cat([part.tokens_BT for part in parts]), batch.tokens_BT)
    assert sum((part.crcs for part in parts), ()) == batch.crcs
    assert [part.first_window for part in parts] == [0, 10, 20, 30, 40]
    borders = torch.cat([part.cu_seqlens[:-1] + 10 * i * SEQ_LEN for i, part in enumerate(parts)])
    assert torch.equal(borders, batch.cu_seqlens[:-1])
    assert all(part.cu_seqlens[-1] == part.rows * SEQ_LEN for part in parts)


def test_rows_shorter_than_windows_cut_the_same_windows(dataset: Dataset) -> None:
    (whole,), (cut,) = take(dataset, config_of(), 1), take(dataset, config_of(row_len=16), 1)
    assert cut.tokens_BT.shape == (4 * GLOBAL_BATCH, 16)
    assert torch.equal(cut.tokens_BT.flatten(), whole.tokens_BT.flatten())
    assert torch.equal(cut.targets_BT.flatten(), whole.targets_BT.flatten())
    assert torch.equal(cut.sources_B, whole.sources_B.repeat_interleave(4))
    assert torch.all(cut.positions_BT[:, 0] == 0)
    assert set(range(0, GLOBAL_BATCH * SEQ_LEN + 1, 16)) <= set(cut.cu_seqlens.tolist())
    assert cut.crcs == whole.crcs
    assert cut.micro_batches(4)[1].crcs == whole.crcs[1:2]


def test_phases_change_weights_and_rows_and_may_be_added_ahead(dataset: Dataset) -> None:
    later = Phase(from_window=CYCLE, weights={"docs": 1}, row_len=32)
    before, after = config_of(), config_of(phases=[later])
    n = CYCLE - CYCLE % GLOBAL_BATCH + GLOBAL_BATCH  # the first step that begins in the phase
    (batch,) = take(dataset, after, 1, start=n)
    assert batch.tokens_BT.shape == (2 * GLOBAL_BATCH, 32)
    assert set(batch.sources_B.tolist()) == {dataset.splits["train"].index("docs")}
    resumed, crc = resume_point(dataset, before, steps=2)
    Loader(after, dataset, GLOBAL_BATCH, consumed_windows=resumed["consumed_windows"]).check_resume(resumed)
    behind = config_of(phases=[Phase(from_window=CYCLE, weights={"lib": 1})])
    loader = Loader(after, dataset, GLOBAL_BATCH, consumed_windows=n + GLOBAL_BATCH)
    with pytest.raises(BadInput, match="a phase behind the cursor changed"):
        Loader(behind, dataset, GLOBAL_BATCH, consumed_windows=n + GLOBAL_BATCH).check_resume(loader.state(1, crc))


def test_contiguous_rows_go_on_where_they_stopped(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "x.jsonl", real_texts(30), ("enwik8",))
    prepare(Request({"train": [corpus]}, "bytes", tmp_path / "out", PrepareOptions(val_per_10k=0)))
    dataset = open_dataset(tmp_path / "out")
    config = DataConfig(seq_len=SEQ_LEN, shuffle="contiguous")
    batches = take(dataset, config, 6)
    for now, after in zip(batches, batches[1:], strict=False):
        assert torch.equal(now.targets_BT[:, -1], after.tokens_BT[:, 0])
    halves = [take(dataset, config, 6, rank, 2) for rank in (0, 1)]
    for step, batch in enumerate(batches):
        assert torch.equal(torch.cat([half[step].tokens_BT for half in halves]), batch.tokens_BT)
    state = Loader(config, dataset, GLOBAL_BATCH).state(0, 0)
    with pytest.raises(BadInput, match="plan_id"):
        Loader(config, dataset, GLOBAL_BATCH // 2).check_resume(state)


def resume_point(dataset: Dataset, config: DataConfig, steps: int) -> tuple[dict[str, Any], int]:
    loader = Loader(config, dataset, GLOBAL_BATCH)
    crc = [step_crc(next(loader).crcs) for _ in range(steps)][-1]
    loader.close()
    return json.loads(json.dumps(loader.state(steps, crc))), crc


def test_state_counts_what_was_handed_out_not_what_was_read_ahead(dataset: Dataset) -> None:
    state, _ = resume_point(dataset, config_of(), steps=3)
    assert state["consumed_windows"] == 3 * GLOBAL_BATCH
    assert state["consumed_tokens"] == 3 * GLOBAL_BATCH * SEQ_LEN
    drawn = np.bincount(torch.cat([batch.sources_B for batch in take(dataset, config_of(), 3)]).numpy())
    assert list(state["source_ordinals"].values()) == drawn.tolist()


def test_resume_goes_on_with_the_same_windows_at_another_world_size(dataset: Dataset) -> None:
    whole = take(dataset, config_of(), 6)
    state, _ = resume_point(dataset, config_of(), steps=4)
    for rank in range(3):
        loader = Loader(config_of(), dataset, GLOBAL_BATCH, rank, 3, state["consumed_windows"])
        loader.check_resume(state)
        assert torch.equal(next(loader).tokens_BT, whole[4].tokens_BT[rank * 16 : rank * 16 + 16])
        loader.close()


def test_resume_is_refused_when_anything_differs(dataset: Dataset, dataset_folder: Path, tmp_path: Path) -> None:
    state, crc = resume_point(dataset, config_of(), steps=4)
    n = state["consumed_windows"]

    def resume(config: DataConfig | None = None, at: int = n, **changes: Any) -> None:
        loader = Loader(config or config_of(), dataset, GLOBAL_BATCH, consumed_windows=at)
        loader.close()
        loader.check_resume({**copy.deepcopy(state), **changes})

    resume()
    for config in (
        config_of(seed=1),
        config_of(weights={"lib": 1}),
        config_of(seq_len=32),
        config_of(shuffle="grouped"),
    ):
        with pytest.raises(BadInput, match="plan_id"):
            resume(config)
    with pytest.raises(BadInput, match="not the dataset it was trained on"):
        resume(dataset_id="0" * 64)
    with pytest.raises(BadInput, match="of another version"):
        resume(format="megaboat-data/0")
    with pytest.raises(BadInput, match="stands at window 192, the loader at 48"):
        resume(at=48)
    with pytest.raises(DamagedData, match="its order gives"):
        resume(source_ordinals={"docs": 1, "lib": 2, "tests": 3})
    with pytest.raises(DamagedData, match="read again have crc"):
        resume(last_batch_crc32=crc ^ 1)


def test_a_change_of_data_can_be_accepted_and_is_said(
    dataset: Dataset, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)  # setup_logging, perhaps called by other tests, ends it
    state, _ = resume_point(dataset, config_of(), steps=2)
    n = state["consumed_windows"]
    config = config_of(seed=5, accept_change=True)
    loader = Loader(config, dataset, GLOBAL_BATCH, consumed_windows=n)
    with caplog.at_level("WARNING", logger="megaboat"):
        loader.check_resume(state)
    assert "other data from window 96 on: data.weights, seq_len, seed" in caplog.text
    assert torch.equal(next(loader).tokens_BT, take(dataset, config, 3)[2].tokens_BT)
    loader.close()
    with pytest.raises(BadInput, match="of another version"):
        loader.check_resume({**state, "format": "megaboat-data/0"})


def test_a_flipped_byte_stops_the_run_naming_shard_block_and_offset(dataset_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(dataset_folder, folder)
    shard = sorted((folder / "train").glob("lib-*.tar"))[1]
    offset = int(np.load(folder / "blocks-train-lib.npy")["offset"][4]) + 100
    data = bytearray(shard.read_bytes())
    data[offset] ^= 1
    shard.write_bytes(data)
    loader = Loader(config_of(weights={"lib": 1}), open_dataset(folder), GLOBAL_BATCH)
    with pytest.raises(DamagedData, match=r"lib-00001.tar: block 0: wrong crc, .* byte offset") as caught:
        _read_steps(loader, 50)
    assert caught.value.exit_code == 3
    with pytest.raises(DamagedData):
        next(loader)
    with pytest.raises(DamagedData, match="wrong crc"):
        open_dataset(folder, verify="full")
    take(open_dataset(folder, verify="off"), config_of(), 5)


def test_a_damaged_tar_header_harms_no_read(dataset: Dataset, dataset_folder: Path, tmp_path: Path) -> None:
    """Headers are not read by mapping; `data verify` finds them, see test_verify."""
    folder = tmp_path / "damaged"
    shutil.copytree(dataset_folder, folder)
    for shard in folder.rglob("*.tar"):
        shard.write_bytes(b"\xff" * TAR_RECORD + shard.read_bytes()[TAR_RECORD:])
    for left, right in zip(take(open_dataset(folder), config_of(), 20), take(dataset, config_of(), 20), strict=True):
        assert torch.equal(left.tokens_BT, right.tokens_BT)
        assert torch.equal(left.cu_seqlens, right.cu_seqlens)


def _read_steps(loader: Loader, steps: int) -> None:
    for _ in range(steps):
        next(loader)


def test_damaged_document_lengths_are_noticed(dataset_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(dataset_folder, folder)
    shard = folder / "train" / "lib-00000.tar"
    data = shard.read_bytes()
    member = data.index(b"lib-00000-00000.doclens.npy")
    shard.write_bytes(data[: member + 640] + bytes([data[member + 640] ^ 1]) + data[member + 641 :])
    with pytest.raises(DamagedData, match="do not sum"):
        open_dataset(folder).source("train", "lib").read(0, 10)


def test_what_is_missing_or_changed_is_named_at_the_start(dataset_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no dataset in .*megaboat data prepare --input"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(BadInput, match="data.path is not set"):
        open_dataset(None)

    def damaged(name: str, change: bytes | None) -> Path:
        folder = tmp_path / f"{name.replace('/', '-')}-{change is None}"
        shutil.copytree(dataset_folder, folder)
        if change is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes((folder / name).read_bytes() + change)
        return folder

    with pytest.raises(DamagedData, match="lib-00000.tar: shard is missing"):
        open_dataset(damaged("train/lib-00000.tar", None))
    with pytest.raises(DamagedData, match="lib-00000.tar: .* bytes, but index.json says"):
        open_dataset(damaged("train/lib-00000.tar", b"\0"))
    with pytest.raises(DamagedData, match="crc-train-lib.npy: not the file"):
        open_dataset(damaged("crc-train-lib.npy", b"\0")).source("train", "lib")
    with pytest.raises(DamagedData, match="blocks-train-lib.npy: missing"):
        open_dataset(damaged("blocks-train-lib.npy", None)).source("train", "lib")
    with pytest.raises(DamagedData, match="not JSON"):
        open_dataset(damaged("index.json", b"}"))
    with pytest.raises(BadInput, match="no source train/absent; it has"):
        open_dataset(dataset_folder).source("train", "absent")


def test_another_tokenizer_is_refused(dataset: Dataset, dataset_folder: Path, tmp_path: Path) -> None:
    assert dataset.tokenizer.vocab_size == dataset.vocab_size
    with pytest.raises(BadInput, match="my model has tokenizer abc, but .* was made with"):
        dataset.check_tokenizer("abc", "my model")
    shutil.copytree(dataset_folder, tmp_path / "swapped")
    (tmp_path / "swapped" / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(BadInput, match="not a sentencepiece model"):
        _ = open_dataset(tmp_path / "swapped").tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"lb": 1}}, "no source 'lb'; did you mean 'lib'"),
        ({"weights": {"lib": -1}}, "negative weight -1"),
        ({"weights": {"lib": 0}}, "all weights are zero"),
        ({"row_len": 48}, "data.row_len 48 does not divide data.seq_len 64; set row_len to 32, for example"),
        (
            {"phases": [Phase(from_window=65_536, row_len=100)]},
            "data.phases: row_len 100 does not .*; set row_len to 64",
        ),
        ({"phases": [Phase(from_window=100)]}, "must be a multiple of 65,536"),
        ({"shuffle": "contiguous"}, "takes one source and no phases; .* has 3"),
        ({"seq_len": 1 << 20}, "fewer than two windows of 1,048,576; shorten data.seq_len"),
    ],
)
def test_bad_options_are_refused_at_the_start(dataset: Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Loader(config_of(**options), dataset, GLOBAL_BATCH)


def test_too_many_epochs_are_refused_when_the_run_starts(dataset: Dataset) -> None:
    config = config_of(max_epochs=2)
    epoch = Loader(config, dataset, GLOBAL_BATCH).order.windows_per_epoch()
    Loader(config, dataset, GLOBAL_BATCH, total_windows=min(epoch)).close()
    with pytest.raises(BadInput, match=r"would be read \d+\.\d+ times .* data.max_epochs is 2"):
        Loader(config, dataset, GLOBAL_BATCH, total_windows=20 * max(epoch))


def test_a_batch_too_small_for_the_ranks_is_refused(dataset: Dataset) -> None:
    with pytest.raises(BadInput, match="global batch of 2 windows leaves some of 3 ranks"):
        Loader(config_of(), dataset, 2, 0, 3)


def test_realised_shares_approach_the_weights(dataset: Dataset) -> None:
    loader = Loader(config_of(), dataset, GLOBAL_BATCH, consumed_windows=CYCLE)
    assert loader.shares() == pytest.approx({"docs": 0.25, "lib": 0.5, "tests": 0.25}, abs=1e-4)
    loader.close()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_evaluation_scores_every_token_once_at_any_world_size(dataset: Dataset, size: int) -> None:
    source = dataset.source("val", "lib")
    stream = source.read(0, source.n_tokens)
    ranks = [list(evaluation_batches(config_of(), dataset, "val", "lib", 3, rank, size)) for rank in range(size)]
    assert len({len(batches) for batches in ranks}) == 1, "ranks that differ in batches would hang"
    targets = torch.cat([batch.targets_BT.flatten() for step in zip(*ranks, strict=True) for batch in step])
    assert targets[targets != IGNORE].tolist() == stream[1:].tolist()
    for batches in ranks:
        for batch in batches:
            assert batch.tokens_BT.shape == (3, SEQ_LEN)
            assert batch.cu_seqlens[-1] == 3 * SEQ_LEN


@pytest.mark.parametrize("context", [1, 20, SEQ_LEN - 1])
def test_overlapping_windows_score_every_token_once_after_its_context(dataset: Dataset, context: int) -> None:
    source = dataset.source("val", "lib")
    stream = torch.tensor(source.read(0, source.n_tokens).astype(np.int64))
    ranks = [list(evaluation_batches(config_of(), dataset, "val", "lib", 3, i, 2, context=context)) for i in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    batches = [batch for step in zip(*ranks, strict=True) for batch in step]
    rows = [row for batch in batches for row in zip(batch.tokens_BT, batch.targets_BT, strict=True)]
    scored = 0
    for tokens_T, targets_T in rows:
        places = (targets_T != IGNORE).nonzero().flatten()
        if not len(places):
            continue
        assert places[0] == (context if scored else 0)
        assert torch.equal(targets_T[places], stream[scored + 1 : scored + 1 + len(places)])
        before = stream[scored + 1 - places[0] - 1 : scored + 1]
        assert torch.equal(tokens_T[: len(before)], before)
        scored += len(places)
    assert scored == len(stream) - 1


def test_evaluation_can_stop_early(dataset: Dataset) -> None:
    batches = evaluation_batches(config_of(), dataset, "val", "lib", 4, max_tokens=100)
    assert sum(int((batch.targets_BT != IGNORE).sum()) for batch in batches) == 100


def test_reading_far_ahead_changes_nothing(dataset: Dataset) -> None:
    """Places are looked up by the thousand; asking out of order must not matter."""
    config = config_of()
    reader = WindowReader(config, dataset, make_order(config, dataset, GLOBAL_BATCH).locate)
    far, near = reader.read(50_000, 50_010), reader.read(100, 110)
    fresh = WindowReader(config, dataset, make_order(config, dataset, GLOBAL_BATCH).locate)
    assert torch.equal(near.tokens_BT, fresh.read(100, 110).tokens_BT)
    assert torch.equal(far.tokens_BT, fresh.read(50_000, 50_010).tokens_BT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_pinned_batches_reach_the_gpu_without_a_wait(dataset: Dataset) -> None:
    loader = Loader(config_of(), dataset, GLOBAL_BATCH, pinned=True)
    batch, (same,) = next(loader), take(dataset, config_of(), 1)
    loader.close()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = batch.to("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.tokens_BT.cpu(), same.tokens_BT)
    assert torch.equal(there.cu_seqlens.cpu(), same.cu_seqlens)
