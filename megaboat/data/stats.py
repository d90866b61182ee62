"""`megaboat data stats`: how much text of which kind a dataset holds, and how long its documents are."""

from dataclasses import dataclass

import numpy as np

from megaboat.data.dataset import Dataset

# Document lengths are counted by powers of two: bin b holds 2^b to 2^(b+1) - 1 tokens.
BINS = 24


@dataclass(frozen=True)
class SourceStats:
    """Counts of one source of one split; lengths in tokens, eos included."""

    split: str
    source: str
    name: str
    documents: int
    tokens: int
    text_bytes: int
    median: int
    p90: int
    longest: int
    histogram: tuple[int, ...]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token stands for."""
        return self.text_bytes / self.tokens


def dataset_stats(dataset: Dataset) -> list[SourceStats]:
    """Stats of every source, split by split, the largest source first."""
    found = []
    for split, sources in dataset.splits.items():
        for source in sources:
            tokens = dataset.source(split, source)
            lengths = tokens.document_lengths()
            bins = np.minimum(np.log2(np.maximum(lengths, 1)).astype(np.int64), BINS - 1)
            median, p90 = np.percentile(lengths, [50, 90], method="higher")
            found.append(
                SourceStats(
                    split=split,
                    source=source,
                    name=tokens.label,
                    documents=tokens.n_docs,
                    tokens=tokens.n_tokens,
                    text_bytes=tokens.n_text_bytes,
                    median=int(median),
                    p90=int(p90),
                    longest=int(lengths.max()),
                    histogram=tuple(np.bincount(bins, minlength=BINS).tolist()),
                )
            )
    order = {split: place for place, split in enumerate(("train", "val", "test"))}
    return sorted(found, key=lambda stats: (order[stats.split], -stats.tokens, stats.source))


def stats_table(stats: list[SourceStats]) -> str:
    """The stats as text, with a total for each split."""
    head = ("split", "source", "documents", "tokens", "share", "MB text", "bytes/token", "median", "p90", "longest")
    rows: list[tuple[str, ...]] = [head]
    for split in dict.fromkeys(entry.split for entry in stats):
        mine = [entry for entry in stats if entry.split == split]
        total = sum(entry.tokens for entry in mine)
        rows += [_row(entry, total) for entry in mine]
        documents, text = sum(entry.documents for entry in mine), sum(entry.text_bytes for entry in mine)
        rows.append(
            (split, "all", f"{documents:,}", f"{total:,}", "100.0%", f"{text / 1e6:,.2f}", f"{text / total:.3f}")
            + ("", "", "")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(entry: SourceStats, total: int) -> tuple[str, ...]:
    return (
        entry.split,
        entry.source,
        f"{entry.documents:,}",
        f"{entry.tokens:,}",
        f"{entry.tokens / total:.1%}",
        f"{entry.text_bytes / 1e6:,.2f}",
        f"{entry.bytes_per_token:.3f}",
        f"{entry.median:,}",
        f"{entry.p90:,}",
        f"{entry.longest:,}",
    )
