"""What a cluster of texts is about, in a few words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lowbit.text.corpus import evenly
from lowbit.text.tokenizers import UNCOUNTED, Tokenizer

TEXTS = 200  # of a cluster that are read
WORD = re.compile(r"[^\W\d_]+")
SHORTEST = 3  # letters


def typical_words(texts: Sequence[Sequence[str]], count: int = 2) -> list[list[str]]:
    """texts: of each cluster. The words, ``count`` at most, that the cluster's texts have more
    often than the others': the share p of them in which a word is, times log(p / q), q being its
    share of all other texts, which is the word's part of the divergence between the two."""
    found = [Counter(w for text in cluster for w in words_of(text)) for cluster in texts]
    everywhere = sum(found, Counter())
    total = sum(map(len, texts))
    names = []
    for cluster, counts in zip(texts, found, strict=True):
        scores = {}
        for word, n in counts.items():
            p = n / len(cluster)
            q = (everywhere[word] - n + 1) / (total - len(cluster) + 1)
            scores[word] = p * math.log(p / q)
        best = sorted(scores, key=lambda w: (-scores[w], w))[:count]
        names.append([w for w in best if scores[w] > 0])
    return names


def words_of(text: str) -> set[str]:
    """Words of a window of text, in small letters; the first and the last, which may be cut, are
    left out."""
    return {w.lower() for w in WORD.findall(text)[1:-1] if len(w) >= SHORTEST}


def cluster_words(
    windows: np.ndarray, labels: np.ndarray, clusters: int, tokenizer: Tokenizer
) -> list[str]:
    """Of token windows (n, length) with a cluster each (n,): each cluster's typical words, "" of
    one that has none."""
    texts = []
    for k in range(clusters):
        ids = windows[evenly(np.flatnonzero(labels == k), TEXTS)] % UNCOUNTED
        texts.append([tokenizer.decode(row.tolist()) for row in ids])
    return [", ".join(words) for words in typical_words(texts)]
