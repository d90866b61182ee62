"""What a refusal tells the user to do instead can be done."""

import re
from itertools import product

from megaboat.model.config import SeqBoatConfig
from megaboat.parallel.obstacles import ranks_obstacle, sequence_obstacle


def test_other_ranks_or_a_smaller_cut_serve() -> None:
    remedy = re.compile(r"; start (\d+) ranks, for example, or set parallel.tensor=(\d+) parallel.sequence=(\d+)$")
    for ranks, tensor, sequence in product(range(1, 14), (1, 2, 3, 4), (1, 2, 4, 6)):
        refused = ranks_obstacle(ranks, tensor, sequence)
        assert (refused is None) == (ranks % (tensor * sequence) == 0)
        if refused is not None:
            found = remedy.search(refused)
            assert found, refused
            more, fewer, shorter = map(int, found.groups())
            assert more > ranks, refused
            assert ranks_obstacle(more, tensor, sequence) is None, refused
            assert ranks_obstacle(ranks, fewer, shorter) is None, refused
            assert tensor % fewer == 0, "or the heads cannot be dealt"
            assert sequence % shorter == 0, "or the rows cannot be cut"


def test_another_length_or_fewer_pieces_serve() -> None:
    remedy = re.compile(r"; set data.seq_len .* to (\d+), for example, or parallel.sequence=(\d+)$")
    for lengths, sequence in product(({127}, {50}, {50, 100}, {6, 9}), (2, 4, 8)):
        refused = sequence_obstacle(SeqBoatConfig(), lengths, sequence)
        if refused is None:
            assert all(length % sequence == 0 for length in lengths)
            continue
        found = remedy.search(refused)
        assert found, refused
        length, pieces = map(int, found.groups())
        assert sequence_obstacle(SeqBoatConfig(), {length}, sequence) is None, refused
        assert sequence_obstacle(SeqBoatConfig(), lengths, pieces) is None, refused
