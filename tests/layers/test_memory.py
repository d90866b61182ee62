"""The working memory against a Python list that forgets all but its last W + 1 entries."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaboat.kernels import plan_rows
from megaboat.layers.documents import Documents
from megaboat.layers.memory import WorkingMemory
from tests.model.building import pack

WINDOW = 3
active_rows = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=14)


def new_memory() -> WorkingMemory:
    return WorkingMemory(2, WINDOW, 2, 3, torch.zeros(0))


def row_of(token: Tensor) -> tuple[Tensor, Tensor]:
    """z (X, 2) and v (X, 3) that name the token they come from."""
    return token[:, None] + torch.tensor([0.25, 0.5]), token[:, None] - torch.tensor([0.1, 0.2, 0.3])


def remembered(memory: WorkingMemory, row: int) -> list[int]:
    """The tokens in the ring, oldest first; checks that z, v and position tell of the same token."""
    z, v, positions = (x[row, memory.filled()[row]] for x in (memory.z_BSZ, memory.v_BSE, memory.positions_BS))
    expected_z, expected_v = row_of(positions.float())
    torch.testing.assert_close((z, v), (expected_z, expected_v))
    return sorted(positions.tolist())


def push(memory: WorkingMemory, active: tuple[bool, bool], position: int) -> None:
    positions_B = torch.full((2,), position)
    memory.push(torch.tensor(active), *row_of(positions_B.float()), positions_B)


def extend(memory: WorkingMemory, active: list[tuple[bool, bool]], start: int) -> list[list[int]]:
    """Read len(active) tokens of both rows at once; the positions of the keys that each row's queries may see."""
    docs = Documents.whole(2, len(active), start_B=torch.full((2,), start))
    rows = plan_rows(torch.tensor(active).T.flatten(), docs.cu_seqlens)
    positions_R = docs.positions_BT.flatten()[rows.token_R]
    keys = memory.extend(*row_of(positions_R.float()), positions_R, rows, docs)
    torch.testing.assert_close((keys.z_KZ, keys.v_KE), row_of(keys.positions_K.float()))
    return [part.tolist() for part in keys.positions_K.split(keys.cu_seqlens.diff().tolist())]


@settings(max_examples=60)
@given(active=active_rows)
def test_push_keeps_the_last_rows_of_each_sequence(active: list[tuple[bool, bool]]) -> None:
    memory, lists = new_memory(), ([], [])
    for position, decided in enumerate(active):
        push(memory, decided, position)
        for row in (0, 1):
            lists[row].extend([position] * decided[row])
            assert remembered(memory, row) == lists[row][-(WINDOW + 1) :]


@settings(max_examples=60)
@given(pieces=st.lists(st.tuples(st.booleans(), active_rows.filter(len)), min_size=1, max_size=4))
def test_extend_puts_the_memory_in_front_and_remembers_the_last_rows(pieces: list) -> None:
    """In any mixture with pushes: keys are what the list holds, then the new rows, in order."""
    memory, lists, position = new_memory(), ([], []), 0
    for at_once, active in pieces:
        before = [rows[-(WINDOW + 1) :] for rows in lists]
        new = [[position + t for t, decided in enumerate(active) if decided[row]] for row in (0, 1)]
        if at_once:
            assert extend(memory, active, position) == [before[row] + new[row] for row in (0, 1)]
        else:
            for t, decided in enumerate(active):
                push(memory, decided, position + t)
        position += len(active)
        for row in (0, 1):
            lists[row].extend(new[row])
            assert remembered(memory, row) == lists[row][-(WINDOW + 1) :]


def test_a_document_that_begins_does_not_see_the_memory_and_replaces_it() -> None:
    memory = new_memory()
    push(memory, (True, True), 0)
    docs = pack([[2, 4], [6]])
    rows = plan_rows(torch.tensor([True, True, True, False, False, True] + [False] * 6), docs.cu_seqlens)
    positions_R = docs.positions_BT.flatten()[rows.token_R]
    keys = memory.extend(*row_of(positions_R.float()), positions_R, rows, docs)
    assert keys.cu_seqlens.tolist() == rows.cu_seqlens.tolist() == [0, 2, 4, 4]
    assert remembered(memory, 0) == [0, 3], "the last document's rows, not those of the one before"
    assert remembered(memory, 1) == []


def test_memory_holds_no_graph() -> None:
    """A carried memory would otherwise keep every forward pass alive."""
    memory, docs = new_memory(), Documents.whole(2, 3)
    rows = plan_rows(torch.ones(6, dtype=torch.bool), docs.cu_seqlens)
    z_RZ, v_RE = row_of(torch.arange(6.0))
    memory.extend(z_RZ.requires_grad_(), v_RE.requires_grad_(), torch.arange(6), rows, docs)
    assert not memory.z_BSZ.requires_grad
    assert not memory.v_BSE.requires_grad
