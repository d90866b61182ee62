import shutil
from pathlib import Path

import pytest

from megaboat.cli import main
from megaboat.data.train_tokenizer import train_tokenizer
from tests.corpus import real_texts, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a tokenizer and the dataset `out` made of them by the command line."""
    folder = tmp_path_factory.mktemp("command")
    write_jsonl(folder / "lib.jsonl", real_texts(40, 4000))
    assert (
        main(
            [
                "tokenizer",
                "train",
                "--input",
                str(folder / "*.jsonl"),
                "--vocab-size",
                "700",
                "--out",
                str(folder / "t.model"),
            ]
        )
        == 0
    )
    command = ["data", "prepare", "--input", str(folder / "*.jsonl"), "--tokenizer", str(folder / "t.model")]
    assert main([*command, "--out", str(folder / "out"), "--workers", "1", "--val-per-10k", "1000"]) == 0
    return folder


def test_verify_says_sound_and_damage_ends_with_3(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(folder / "out", tmp_path / "copy"))
    assert main(["data", "verify", str(copy), "--workers", "1"]) == 0
    assert "sound; dataset" in capsys.readouterr().out
    shard = copy / "train" / "lib-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert main(["data", "verify", str(copy), "--workers", "1"]) == 3
    assert f"megaboat data: {shard}: " in capsys.readouterr().err
    assert main(["data", "verify", str(tmp_path / "absent")]) == 2


def test_stats_prints_a_table_and_draws_a_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "lengths.png"
    assert main(["data", "stats", str(folder / "out"), "--picture", str(picture)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("split  source")
    assert "bytes/token" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_prepare_again_leaves_a_finished_dataset_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stamp = (folder / "out" / "index.json").stat().st_mtime_ns
    command = [
        "data",
        "prepare",
        "--input",
        str(folder / "*.jsonl"),
        "--out",
        str(folder / "out"),
        "--val-per-10k",
        "1000",
    ]
    assert main([*command, "--tokenizer", str(folder / "t.model")]) == 0
    assert "is already prepared" in capsys.readouterr().err
    other = train_tokenizer([folder / "lib.jsonl"], 600, folder / "other.model")
    assert main([*command, "--tokenizer", other.name]) == 2
    assert "holds a dataset of other inputs or options" in capsys.readouterr().err
    assert (folder / "out" / "index.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "arguments", [["data", "--help"], ["data", "prepare", "--help"], ["tokenizer", "train", "--help"]]
)
def test_help_helps(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    assert len(capsys.readouterr().out) > 300
