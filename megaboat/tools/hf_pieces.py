"""A sentencepiece model as a Hugging Face tokenizer, read by sentencepiece itself. Exports carry this file as it stands
where no fast tokenizer gives the same ids.
"""

import itertools
from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


class SeqBoatTokenizer(SentencePieceBackend):
    """The ids of the training: text is cut after each newline, and each line is encoded alone.

    Symbols such as `</s>` are plain text when they stand in a text, and decode to nothing.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        *whole, rest = text.split("\n")
        lines = [line + "\n" for line in whole] + [rest] * bool(rest)
        return list(itertools.chain.from_iterable(self.sp_model.encode(lines, out_type=str)))

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        text: str = self.sp_model.decode(ids)
        return text
