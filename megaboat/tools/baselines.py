"""What a model has to beat: token unigrams, token bigrams and zlib -9 on the same held-out text, in bits per byte."""

import math
import zlib

import numpy as np

from megaboat.data.dataset import Dataset

DISCOUNT = 0.75  # absolute discounting of Kneser and Ney (1995), their usual value


class Unigram:
    """Token frequencies of the training split, each count raised by one."""

    def __init__(self, counts_V: np.ndarray) -> None:
        self.log_p_V = np.log((counts_V + 1.0) / (counts_V.sum() + len(counts_V)))

    def nll(self, tokens: np.ndarray) -> float:
        """Nats of all tokens but the first."""
        return -float(self.log_p_V[tokens[1:]].sum())


class Bigram:
    """p(b | a) = max(count(ab) - D, 0) / count(a) + D distinct(a) / count(a) p(b), with the unigram p(b)."""

    def __init__(self, pairs: np.ndarray, counts: np.ndarray, unigram: Unigram) -> None:
        vocabulary = len(unigram.log_p_V)
        self._pairs, self._counts, self._unigram = pairs, counts, unigram
        self._after_V = np.bincount(pairs // vocabulary, counts, vocabulary)
        self._distinct_V = np.bincount(pairs // vocabulary, minlength=vocabulary)

    def nll(self, tokens: np.ndarray) -> float:
        """Nats of all tokens but the first."""
        vocabulary = len(self._unigram.log_p_V)
        before, here = tokens[:-1], tokens[1:]
        wanted = before * vocabulary + here
        place = np.searchsorted(self._pairs, wanted).clip(max=len(self._pairs) - 1)
        count = np.where(self._pairs[place] == wanted, self._counts[place], 0)
        after = np.maximum(self._after_V[before], 1)
        backoff = np.where(self._after_V[before] > 0, DISCOUNT * self._distinct_V[before] / after, 1.0)
        p = np.maximum(count - DISCOUNT, 0) / after + backoff * np.exp(self._unigram.log_p_V[here])
        return -float(np.log(p).sum())


def fit(dataset: Dataset) -> tuple[Unigram, Bigram]:
    """Count the training split."""
    vocabulary = dataset.vocab_size
    counts_V = np.zeros(vocabulary, np.int64)
    pairs: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    for name in dataset.splits["train"]:
        tokens = _tokens(dataset, "train", name)
        counts_V += np.bincount(tokens, minlength=vocabulary)
        found, number = np.unique(tokens[:-1] * vocabulary + tokens[1:], return_counts=True)
        pairs.append(found)
        numbers.append(number)
    merged, place = np.unique(np.concatenate(pairs), return_inverse=True)
    unigram = Unigram(counts_V)
    return unigram, Bigram(merged, np.bincount(place, np.concatenate(numbers)), unigram)


def baselines(dataset: Dataset, split: str = "val") -> dict[str, dict[str, float]]:
    """`{"unigram" | "bigram" | "zlib": {source: bits per byte, ..., "overall": bits per byte}}`."""
    unigram, bigram = fit(dataset)
    models: dict[str, Unigram | Bigram] = {"unigram": unigram, "bigram": bigram}
    table: dict[str, dict[str, float]] = {"unigram": {}, "bigram": {}, "zlib": {}}
    total_bits = dict.fromkeys(table, 0.0)
    total_bytes = 0.0
    for name in dataset.splits[split]:
        source = dataset.source(split, name)
        tokens = _tokens(dataset, split, name)
        scored = source.n_text_bytes * (len(tokens) - 1) / len(tokens)  # the first token is nobody's target
        bits = {kind: model.nll(tokens) / math.log(2) for kind, model in models.items()}
        text = dataset.tokenizer.decode(tokens[tokens != dataset.eos_id]).encode()
        bits["zlib"] = 8 * len(zlib.compress(text, 9)) * scored / source.n_text_bytes
        for kind, value in bits.items():
            table[kind][name] = value / scored
            total_bits[kind] += value
        total_bytes += scored
    return {kind: row | {"overall": total_bits[kind] / total_bytes} for kind, row in table.items()}


def _tokens(dataset: Dataset, split: str, name: str) -> np.ndarray:
    source = dataset.source(split, name)
    return source.read(0, source.n_tokens).astype(np.int64)
