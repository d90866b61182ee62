"""Where documents begin inside packed rows: what every layer must respect so that nothing leaks between them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Borders and positions of the documents of a micro-batch of B rows and T tokens."""

    first_BT: Tensor
    """bool: the token starts from an empty state. False at a row's start means that the row continues."""
    positions_BT: Tensor
    """int64: position in the document, for rotary embeddings."""
    cu_seqlens: Tensor
    """int32 (S + 1,): borders of the pieces on the flattened B * T axis; a row border is always one."""

    @property
    def shape(self) -> torch.Size:
        return self.first_BT.shape

    @staticmethod
    def packed(positions_BT: Tensor, cu_seqlens: Tensor) -> "Documents":
        """Rows of packed documents, each piece starting from an empty state."""
        first_X = torch.zeros(positions_BT.numel(), dtype=torch.bool, device=positions_BT.device)
        first_X[cu_seqlens[:-1].long()] = True
        return Documents(first_X.view(positions_BT.shape), positions_BT, cu_seqlens)

    @staticmethod
    def whole(rows: int, length: int, device: torch.device | str = "cpu", start_B: Tensor | None = None) -> "Documents":
        """Each row is one document, or with `start_B` (int64) the continuation of one at that position."""
        positions_BT = torch.arange(length, device=device).expand(rows, length)
        first_BT = torch.zeros(rows, length, dtype=torch.bool, device=device)
        if start_B is None:
            first_BT[:, 0] = True
        else:
            positions_BT = positions_BT + start_B[:, None]
            first_BT[:, 0] = start_B == 0
        cu_seqlens = torch.arange(rows + 1, device=device, dtype=torch.int32) * length
        return Documents(first_BT, positions_BT, cu_seqlens)

    @staticmethod
    def left_padded(pads_B: Tensor, length: int, start_B: Tensor) -> "Documents":
        """Rows that begin with `pads_B` tokens of padding, at positions below 0, and go on at position `start_B`.

        Padding is a document of its own: the text behind it does not see it. A row that continues has none.
        """
        B, device = pads_B.shape[0], pads_B.device
        positions_BT = torch.arange(length, device=device) + (start_B - pads_B)[:, None]
        first_BT = positions_BT == 0
        first_BT[:, 0] |= start_B == 0
        opening_B = torch.arange(B, device=device) * length
        borders = torch.cat([torch.stack([opening_B, opening_B + pads_B], 1).flatten(), opening_B[-1:] + length])
        return Documents(first_BT, positions_BT, borders.unique_consecutive().int())
