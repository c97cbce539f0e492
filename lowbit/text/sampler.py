"""Batches that hold every cluster's share."""

from __future__ import annotations

import numpy as np


class StratifiedSampler:
    """Batches in which every cluster has its share, without replacement, resumable.

    Each cluster is walked in its own random order. The places of a batch go to clusters in
    proportion to their sizes; what rounding takes from a cluster in one batch it gets in a later
    one (error diffusion), so the objective stays the plain mean over windows while the
    between-cluster variance of a batch is removed. A cluster that is used up is reshuffled.
    After n places each of K clusters has had its share of n, give or take 1 - 1 / (2K - 2): every
    place goes to the cluster that would soonest pass this bound (Tijdeman, The chairman
    assignment problem, 1980).

    labels: cluster of each window, shape (n,). One cluster for all is plain shuffling.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int) -> None:
        self.members = [np.flatnonzero(labels == k) for k in np.unique(labels)]
        self.share = np.array([len(m) for m in self.members]) / len(labels)
        self.batch_size = batch_size
        self.rng = np.random.default_rng(seed)
        self.credit = np.zeros(len(self.members))
        self.orders = [self.rng.permutation(m) for m in self.members]
        self.cursors = [0] * len(self.members)

    def next_batch(self, size: int | None = None) -> np.ndarray:
        """Indices of the next windows, shape (size,), the batch size by default."""
        size = self.batch_size if size is None else size
        slack = 1 / max(2, 2 * len(self.members) - 2)
        counts = np.zeros(len(self.members), int)
        for _ in range(size):
            self.credit += self.share
            time_left = (1 - slack - self.credit) / self.share
            k = np.argmin(np.where(self.credit >= slack - 1e-9, time_left, np.inf))
            self.credit[k] -= 1
            counts[k] += 1
        batch = np.concatenate([self._take(k, n) for k, n in enumerate(counts)])
        return self.rng.permutation(batch)

    def _take(self, k: int, n: int) -> np.ndarray:
        parts = []
        while n:
            part = self.orders[k][self.cursors[k] : self.cursors[k] + n]
            parts.append(part)
            n -= len(part)
            self.cursors[k] += len(part)
            if self.cursors[k] == len(self.orders[k]):
                self.orders[k] = self.rng.permutation(self.members[k])
                self.cursors[k] = 0
        return np.concatenate(parts) if parts else np.empty(0, int)

    def state_dict(self) -> dict:
        return {
            "rng": self.rng.bit_generator.state,
            "credit": self.credit.tolist(),
            "orders": [o.tolist() for o in self.orders],
            "cursors": list(self.cursors),
        }

    def load_state_dict(self, state: dict) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.credit = np.array(state["credit"])
        self.orders = [np.array(o, int) for o in state["orders"]]
        self.cursors = list(state["cursors"])
