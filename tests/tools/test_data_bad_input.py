"""What `megaboat data prepare` does with bad input, case by case: message, exit code, what is kept."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import zstandard

from megaboat.cli import main
from megaboat.data.reader import read_lines
from tests.corpus import real_texts

Run = Callable[..., tuple[int, str]]
SOUND = 40


def line_of(text: Any, **extra: Any) -> bytes:
    return json.dumps({"text": text, "meta": {"pile_set_name": "Lib"}, **extra}).encode() + b"\n"


@pytest.fixture(scope="module")
def sound() -> bytes:
    """Lines of sound documents."""
    return b"".join(line_of(text) for text in real_texts(SOUND, max_chars=20_000))


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Write bytes to a file, prepare it as a byte corpus in `tmp_path/out`; (exit code, what was printed)."""

    def run(data: bytes, *options: str, name: str = "corpus.jsonl") -> tuple[int, str]:
        (tmp_path / name).write_bytes(data)
        command = ["data", "prepare", "--input", str(tmp_path / name), "--tokenizer", "bytes", "--workers", "1"]
        code = main([*command, "--out", str(tmp_path / "out"), "--val-per-10k", "0", *options])
        streams = capsys.readouterr()
        assert "Traceback" not in streams.err
        return code, streams.out + streams.err

    return run


def index_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "index.json").read_text())


def documents(tmp_path: Path) -> int:
    return sum(entry["n_docs"] for entry in index_of(tmp_path)["splits"]["train"].values())


def refused(tmp_path: Path) -> bool:
    """Whether there is no dataset, so that a rerun cannot mistake the remains for one."""
    return not (tmp_path / "out" / "index.json").exists()


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def damage(kind: str, packed: bytes) -> bytes:
    if kind == "bit":
        middle = len(packed) // 2
        return packed[:middle] + bytes([packed[middle] ^ 4]) + packed[middle + 1 :]
    return {"cut": packed[: len(packed) * 6 // 10], "last bytes": packed[:-3], "junk": packed + b"junk at the end"}[
        kind
    ]


@pytest.mark.parametrize("kind", ["cut", "last bytes", "bit", "junk"])
@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_damaged_streams_fail_and_commit_nothing(
    prepare: Run, tmp_path: Path, sound: bytes, suffix: str, kind: str
) -> None:
    packed = zst(sound) if suffix == "zst" else gzip.compress(sound)
    code, said = prepare(damage(kind, packed), name=f"corpus.jsonl.{suffix}")
    assert code == 2
    assert f"corpus.jsonl.{suffix}: " in said
    assert "truncated" in said if kind in ("cut", "last bytes") else "damaged or not" in said
    assert "nothing of its" in said
    assert "at byte" in said
    assert refused(tmp_path)
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_the_message_of_a_truncated_file(prepare: Run, tmp_path: Path, sound: bytes) -> None:
    packed = zst(sound)
    code, said = prepare(packed[:-3], name="corpus.jsonl.zst")
    assert said.strip().splitlines()[-1] == (
        f"megaboat data: {tmp_path}/corpus.jsonl.zst: truncated: the zstd stream stops before the end of its frame "
        f"at byte {len(packed) - 3:,}; nothing of its {SOUND} readable documents is kept"
    )
    assert code == 2


def test_not_zstandard_at_all(prepare: Run, tmp_path: Path, sound: bytes) -> None:
    code, said = prepare(sound, name="corpus.jsonl.zst")
    assert (code, refused(tmp_path)) == (2, True)
    assert "damaged or not zstd" in said


def test_salvage_keeps_whole_lines_before_a_cut_and_says_so(prepare: Run, tmp_path: Path, sound: bytes) -> None:
    packed = zst(sound)
    code, _ = prepare(packed[: len(packed) * 6 // 10], "--salvage", name="corpus.jsonl.zst")
    assert code == 0
    assert 0 < documents(tmp_path) < SOUND
    (entry,) = index_of(tmp_path)["inputs"]
    assert entry["documents"] == documents(tmp_path)
    assert "truncated" in entry["salvaged"]["reason"]
    assert entry["salvaged"]["compressed_offset"] == len(packed) * 6 // 10


def test_salvage_after_a_wrong_checksum_trusts_only_the_frames_before(prepare: Run, tmp_path: Path) -> None:
    texts = real_texts(SOUND, max_chars=20_000)
    frames = [zst(b"".join(map(line_of, texts[first : first + 10]))) for first in range(0, SOUND, 10)]
    frames[2] = frames[2][:-1] + bytes([frames[2][-1] ^ 1])  # its checksum
    code, _ = prepare(b"".join(frames), "--salvage", name="corpus.jsonl.zst")
    assert code == 0
    assert documents(tmp_path) == 20


def test_every_damaged_file_is_named(tmp_path: Path, sound: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl.zst").write_bytes(zst(sound)[: -3 if number else None])
    command = [
        "data",
        "prepare",
        "--input",
        str(tmp_path / "*.zst"),
        "--tokenizer",
        "bytes",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "1.jsonl.zst: truncated" in said
    assert "2.jsonl.zst: truncated" in said
    assert "(2 of 3 files failed)" in said


@pytest.mark.parametrize("data", [b"", b"\n\n", zst(b"")])
def test_files_without_documents_fail_unless_allowed(prepare: Run, tmp_path: Path, sound: bytes, data: bytes) -> None:
    name = "corpus.jsonl.zst" if data.startswith(b"\x28\xb5") else "corpus.jsonl"
    code, said = prepare(data, name=name)
    assert (code, refused(tmp_path)) == (2, True)
    assert f"{name}: no document in it; --allow-empty-files" in said
    code, said = prepare(data, "--allow-empty-files", name=name)
    assert (code, refused(tmp_path)) == (2, True)
    assert "no document in 1 input file(s)" in said


def test_an_allowed_empty_file_beside_a_full_one(tmp_path: Path, sound: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(sound)
    command = [
        "data",
        "prepare",
        "--input",
        str(tmp_path / "*.jsonl"),
        "--tokenizer",
        "bytes",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--allow-empty-files", "--val-per-10k", "0"]) == 0
    assert documents(tmp_path) == SOUND


def test_several_frames_and_long_windows_are_read(prepare: Run, tmp_path: Path) -> None:
    texts = real_texts(SOUND, max_chars=20_000)
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    frames = [zstandard.ZstdCompressor(compression_params=parameters).compress(line_of(text)) for text in texts]
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # what pzstd writes between frames
    code, _ = prepare(skippable.join(frames), name="corpus.jsonl.zst")
    assert code == 0
    assert documents(tmp_path) == SOUND


BAD_LINES = {
    "invalid UTF-8": b'{"text": "caf\xe9", "meta": {"pile_set_name": "Lib"}}\n',
    "not JSON": b'{"text": "abc", "meta"\n',
    "not an object": b'["text"]\n',
    "no 'text'": b'{"meta": {"pile_set_name": "Lib"}}\n',
    "'text' is not a string": line_of(17),
    "NaN or Infinity": line_of(float("nan")),
    "lone surrogate": line_of("\ud800 alone"),
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_bad_lines_are_set_aside_and_listed(prepare: Run, tmp_path: Path, sound: bytes, reason: str) -> None:
    code, said = prepare(sound + BAD_LINES[reason] + line_of("the end"))
    assert code == 0
    assert documents(tmp_path) == SOUND + 1
    assert f"1 lines set aside, named in {tmp_path}/out/quarantine.jsonl: 1 lines {reason}" in said
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert listed == [{"file": "corpus.jsonl", "line": SOUND + 1, "offset": len(sound), "reason": reason}]
    assert index_of(tmp_path)["inputs"][0]["bad"] == {reason: 1}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_bad_lines_can_stop_the_run(prepare: Run, tmp_path: Path, sound: bytes, reason: str) -> None:
    code, said = prepare(sound + BAD_LINES[reason], "--bad-lines", "fail")
    assert (code, refused(tmp_path)) == (2, True)
    assert f"corpus.jsonl:{SOUND + 1}:{len(sound)}: {reason}" in said


def test_lone_surrogates_can_be_replaced(prepare: Run, tmp_path: Path) -> None:
    code, _ = prepare(line_of("a \ud800 b \U0001f600"), "--surrogates", "replace")
    assert code == 0
    tar = (tmp_path / "out" / "train" / "lib-00000.tar").read_bytes()
    assert "a \ufffd b \U0001f600".encode() in tar


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_empty_texts_are_dropped_and_counted_apart(prepare: Run, tmp_path: Path, sound: bytes, text: str) -> None:
    code, _ = prepare(sound + line_of(text))
    assert code == 0
    (entry,) = index_of(tmp_path)["inputs"]
    assert (entry["empty"], entry["bad"], documents(tmp_path)) == (1, {}, SOUND)


def test_white_space_can_be_kept(prepare: Run, tmp_path: Path, sound: bytes) -> None:
    assert prepare(sound + line_of(" \n\t "), "--empty", "keep")[0] == 0
    assert documents(tmp_path) == SOUND + 1


def test_a_text_that_the_tokenizer_makes_nothing_of_is_empty(prepare: Run, tmp_path: Path, sound: bytes) -> None:
    """sentencepiece's usual normalisation drops a zero-width space, and here no symbol ends a document."""
    lines = [line for text in real_texts(4) for line in text.splitlines() if line]
    with (tmp_path / "own.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=400, eos_id=-1, minloglevel=2
        )
    data = sound + json.dumps({"text": "\u200b", "meta": {"pile_set_name": "Other"}}).encode()
    assert prepare(data, "--tokenizer", str(tmp_path / "own.model"))[0] == 0
    (entry,) = index_of(tmp_path)["inputs"]
    assert (entry["empty"], documents(tmp_path)) == (1, SOUND)


def test_a_source_for_each_document_is_refused(prepare: Run) -> None:
    lines = [b'{"text": "a", "meta": {"pile_set_name": "%d"}}\n' % number for number in range((1 << 16) + 1)]
    code, said = prepare(b"".join(lines))
    assert code == 2
    assert "corpus.jsonl:65537: over 65,535 sources; 'meta.pile_set_name' is no kind of text" in said


def test_lines_are_documents_whatever_the_name_says_before(prepare: Run, tmp_path: Path, sound: bytes) -> None:
    assert prepare(sound, name="pile.txt.jsonl")[0] == 0
    assert documents(tmp_path) == SOUND


def test_the_last_of_two_equal_keys_wins(prepare: Run, tmp_path: Path) -> None:
    assert prepare(b'{"text": "first", "text": "second", "meta": {"pile_set_name": "Lib"}}\n')[0] == 0
    tar = (tmp_path / "out" / "train" / "lib-00000.tar").read_bytes()
    assert b"second" in tar
    assert b"first\0" not in tar


def test_lines_beyond_the_limit_are_set_aside_without_being_held(prepare: Run, tmp_path: Path, sound: bytes) -> None:
    code, said = prepare(line_of("x" * 300_000) + sound + line_of("y" * 300_000), "--max-line-bytes", "250000")
    assert code == 0
    assert "2 lines line too long" in said
    assert documents(tmp_path) == SOUND
    lines = list(read_lines(tmp_path / "corpus.jsonl", 250_000))
    assert [line.number for line in lines if line.data is None] == [1, SOUND + 2]
    assert lines[1].offset == len(line_of("x" * 300_000))


@pytest.mark.parametrize("line", [b'{"text": "abc"}\n', b'{"text": "abc", "meta": {"pile_set_name": null}}\n'])
def test_a_missing_source_stops_the_run_unless_one_is_given(
    prepare: Run, tmp_path: Path, sound: bytes, line: bytes
) -> None:
    code, said = prepare(sound + line)
    assert (code, refused(tmp_path)) == (2, True)
    assert f"corpus.jsonl:{SOUND + 1}:{len(sound)}: no 'meta.pile_set_name'; --default-source NAME" in said
    code, _ = prepare(sound + line, "--default-source", "Rest")
    assert code == 0
    assert index_of(tmp_path)["splits"]["train"]["rest"]["n_docs"] == 1


def test_too_many_bad_lines_stop_the_run_with_a_table(prepare: Run, tmp_path: Path, sound: bytes) -> None:
    early = BAD_LINES["not JSON"] * 90 + BAD_LINES["invalid UTF-8"] * 20
    code, said = prepare(early + sound)
    assert (code, refused(tmp_path)) == (2, True)
    assert "90 lines not JSON, 11 lines invalid UTF-8 among the first 101 lines; is this jsonl?" in said


def test_bad_lines_over_all_files_are_counted_together(
    tmp_path: Path, sound: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_bytes(sound + BAD_LINES["not an object"] * 60)
    command = [
        "data",
        "prepare",
        "--input",
        str(tmp_path / "*.jsonl"),
        "--tokenizer",
        "bytes",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    assert "120 lines not an object: 120 bad lines, 100 allowed; each is named in" in capsys.readouterr().err
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 120
    assert refused(tmp_path)
    assert main([*command, "--max-bad-per-million", "900000"]) == 0, "and the work done so far is still good"


def test_two_sources_with_one_file_name_are_refused(prepare: Run, tmp_path: Path) -> None:
    lines = [line_of("a" * 99, meta={"pile_set_name": name}) for name in ("Pile-CC", "Pile CC")]
    code, said = prepare(b"".join(lines))
    assert (code, refused(tmp_path)) == (2, True)
    assert "sources 'Pile CC' and 'Pile-CC' would share the file name 'pile-cc'" in said


def test_nothing_matches_and_unreadable_folders(prepare: Run, tmp_path: Path, sound: bytes) -> None:
    command = ["data", "prepare", "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    assert main([*command, "--input", str(tmp_path / "*.absent")]) == 2
    (tmp_path / "file").write_text("in the way")
    code, said = prepare(sound, "--out", str(tmp_path / "file"))
    assert code == 2
    assert "Not a directory" in said
    assert (tmp_path / "file").read_text() == "in the way"
    assert prepare(sound, "--workers", "0")[0] == 2
    assert prepare(sound, "--tokenizer", str(tmp_path / "absent.model"))[0] == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["corpus.arrow", "corpus.jsonl.xz", "corpus.jsonl.bz2"])
def test_formats_that_are_not_read_are_said_so(prepare: Run, tmp_path: Path, sound: bytes, name: str) -> None:
    code, said = prepare(sound, name=name)
    assert (code, refused(tmp_path)) == (2, True)
    assert "files are not read; jsonl, jsonl.zst" in said
