from pathlib import Path

import pytest

from megaboat.data.ledger import Ledger, step_crc
from megaboat.errors import DamagedData


def test_entries_last_and_repeats_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "run" / "data_ledger.jsonl"
    ledger = Ledger(path)
    assert ledger.last() is None
    for step in range(1, 6):
        ledger.append(step, 8 * (step - 1), 1000 + step)
    ledger.close()
    again = Ledger(path)
    last = again.last()
    assert last is not None
    assert (last.step, last.first_window, last.crc) == (5, 32, 1005)
    before = path.read_bytes()
    again.append(4, 24, 1004)  # a repeated step, after going back to a checkpoint
    assert path.read_bytes() == before
    again.append(6, 40, 1006)
    assert again.entry(6) == Ledger(path).entry(6)
    with pytest.raises(DamagedData, match="step 5 used window 32 with crc 000003ed, repeated it is window 32"):
        again.append(5, 32, 7)
    with pytest.raises(DamagedData, match="repeated it is window 33.*data.accept_change=true"):
        again.append(5, 33, 1005)


def test_half_a_line_from_a_killed_writer_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "data_ledger.jsonl"
    ledger = Ledger(path)
    ledger.append(1, 0, 11)
    ledger.append(2, 8, 12)
    ledger.close()
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:cut])
        again = Ledger(path)
        again.append(2, 8, 12)
        again.close()
        assert path.read_bytes() == whole


def test_a_broken_line_inside_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "data_ledger.jsonl"
    path.write_bytes(
        b'{"step": 1, "first_window": 0, "crc": 1}\n{"step": 2, "fi\n{"step": 3, "first_window": 8, "crc": 1}\n'
    )
    with pytest.raises(DamagedData, match="data_ledger.jsonl:2: not a ledger line"):
        Ledger(path)


def test_step_crc_depends_on_the_order_of_windows() -> None:
    assert step_crc([1, 2, 3]) != step_crc([1, 3, 2])
    assert step_crc((0xFFFFFFFF,)) == 0xFFFFFFFF
