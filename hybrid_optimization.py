"""Hybrid optimisation: a guided trust-region step for any PyTorch model. One file, drop it in.

One idea runs through the file. A step of length zero is always safe and a long one is only worth
its risk while the local model of the loss can be trusted; so every step solves

    min_d  L(Theta + d)   subject to   ||d_c||_2 <= mu_c ||Theta_c||_2   for each cluster c

of parameters, where the shape of d is the minimiser of the linear model in a norm learned from
gradients (a matrix a side for weight matrices, whose entries are then evened out; a diagonal for
the rest), its length is set by a learning rate, and a small auxiliary network, trained while the
run goes on, predicts how much longer or shorter than planned the step should be and how wide the
region is.

    from hybrid_optimization import HybridOptimizer

    optimizer = HybridOptimizer(model, max_steps=1000)  # any torch.nn.Module
    loss.backward()
    optimizer.step()

`HybridOptimizer` is for any loop or trainer. `HybridOptimizationManager` adds clusters of data and
a record of every step; `ConstrainedOptimizer` is the step alone.

Needs torch, numpy and scikit-learn only. ``HYBRID_OPTIMIZATION_GUIDE.md`` is the manual.
"""

from __future__ import annotations

import copy
import io
import math
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "AuxiliaryNeuralNetwork",
    "ConstrainedOptimizer",
    "ConstrainedUpdateInfo",
    "HybridOptimizationManager",
    "HybridOptimizer",
    "HybridTrainingConfig",
    "KMeansClustering",
    "TrainingState",
    "create_hybrid_optimizer",
    "get_default_config",
]

MULTIPLIER_RANGE = (0.1, 10.0)
RADIUS_RANGE = (1e-3, 1.0)
MANY_SAMPLES = 20_000  # of more, clusters are found on a sample or in small batches
GRAM_BUCKETS = 4096  # of hashed n-grams
HISTORY = 10_000  # newest steps that a manager keeps the numbers of
GRAM_ROWS = 2048  # windows whose n-grams are held as a list at a time

# ------------------------------------------------------------------------------ configuration


@dataclass
class TrainingState:
    """What the auxiliary network sees of a step. All fields are plain floats or ints.

    loss_trend: fast minus slow running mean of the loss (negative: the loss is falling).
    gradient_variance: squared running mean of how far the gradient's norm is from its mean.
    """

    current_loss: float
    gradient_magnitude: float
    cluster_id: int
    loss_trend: float
    gradient_variance: float
    step_number: int

    def to_features(self) -> np.ndarray:
        """The six fields, in order of declaration, as float32 of shape (1, 6)."""
        with np.errstate(over="ignore"):  # beyond float32: inf
            return np.array([[getattr(self, f.name) for f in fields(self)]], dtype=np.float32)


def _number(low: float, high: float, *, open_low: bool = False) -> Callable[[Any], bool]:
    def check(x: Any) -> bool:
        if isinstance(x, bool) or not isinstance(x, (int, float, np.integer, np.floating)):
            return False
        above = low < x if open_low else low <= x
        return bool(above and x <= high and math.isfinite(x))

    return check


def _integer(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    def check(x: Any) -> bool:
        whole = isinstance(x, (int, np.integer)) and not isinstance(x, bool)
        return whole and bool(low <= x <= high)

    return check


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda x: not isinstance(x, bool) and any(x == value for value in values)


def _flag(x: Any) -> bool:
    return isinstance(x, (bool, np.bool_))


_POSITIVE = (_number(0, math.inf, open_low=True), "a finite number above 0")
_COUNT = (_integer(1), "an integer of at least 1")
_BOOLEAN = (_flag, "True or False")
_AT_LEAST_0 = (_number(0, math.inf), "a finite number of at least 0")
_DECAY = (_number(0, 0.9999), "a number in [0, 0.9999]")
_RADIUS = (_number(0, 1, open_low=True), "a fraction of the weights' norm in (0, 1]")
_KINDS = ("embedding", "head", "matrix", "vector")

#: A test of a value and what it expects, in words.
_Rule = tuple[Callable[[Any], bool], str]
#: For each field of the configuration.
_RULES: dict[str, _Rule] = {
    "use_quantization": _BOOLEAN,
    "quantizer_scale": _POSITIVE,
    "target_bits": (_one_of(1, 1.58), "1 or 1.58 bits a weight"),
    "use_clustering": _BOOLEAN,
    "data_clusters": _COUNT,
    "parameter_clusters": _COUNT,
    "use_auxiliary_nn": _BOOLEAN,
    "auxiliary_nn_hidden_size": _COUNT,
    "auxiliary_nn_learning_rate": _POSITIVE,
    "use_trust_region": _BOOLEAN,
    "initial_trust_radius": _RADIUS,
    "trust_radius_adaptation": _BOOLEAN,
    "base_learning_rate": _POSITIVE,
    "max_steps": _COUNT,
    "batch_size": _COUNT,
    "momentum": _DECAY,
    "weight_decay": _AT_LEAST_0,
    "log_interval": _COUNT,
    "eval_interval": _COUNT,
    "step_length": _POSITIVE,
    "shrink_below": (_number(-math.inf, 0), "a finite number of at most 0"),
    "warmup_fraction": (_number(0, 0.5), "a fraction of max_steps in [0, 0.5]"),
    "lr_schedule": (
        _one_of("linear", "cosine", "wsd", "constant"),
        "'linear', 'cosine', 'wsd' or 'constant'",
    ),
    "decay_fraction": (_number(0, 1), "a fraction of max_steps in [0, 1]"),
    "use_matrix_geometry": _BOOLEAN,
    "clustering_warmup_steps": (_integer(0), "an integer of at least 0"),
    "seed": (_integer(0, 2**32 - 1), "an integer from 0 to 4294967295"),
}
#: For the options of a group of `ConstrainedOptimizer`'s parameters.
_GROUP_RULES: dict[str, _Rule] = {
    "lr": _AT_LEAST_0,
    "momentum": _DECAY,
    "metric_decay": _DECAY,
    "matrix_metric_decay": _DECAY,
    "weight_decay": _AT_LEAST_0,
    "initial_radius": _RADIUS,
    "adapt_radius": _BOOLEAN,
    "use_trust_region": _BOOLEAN,
    "use_matrix_geometry": _BOOLEAN,
    "refresh_every": _COUNT,
    "damping": _AT_LEAST_0,
    "largest_block": _COUNT,
    "product_dtype": (
        lambda x: x is None or (isinstance(x, torch.dtype) and x.is_floating_point),
        "None or a floating-point torch.dtype",
    ),
    "active_share": (_number(0, 1), "a share in [0, 1]"),
    "least_share": (_number(0, 1), "a share in [0, 1]"),
    "spike_limit": (lambda x: x == math.inf or _POSITIVE[0](x), "above 0"),
    "compensated": _BOOLEAN,
    "kind": (lambda x: x is None or x in _KINDS, f"None or one of {', '.join(_KINDS)}"),
}


def _check(name: str, value: Any, rule: _Rule | None) -> None:
    if rule is not None and not rule[0](value):
        raise ValueError(f"{name} must be {rule[1]}, not {value!r}")


def _plain(loss: Any) -> float:
    """A loss, a tensor or not, as a number."""
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


def _check_option(name: str, value: Any) -> None:
    """Of a group of parameters; a rate may be a tensor of one number, as in torch's optimisers."""
    number = name == "lr" and isinstance(value, Tensor) and value.numel() == 1
    _check(name, float(value) if number else value, _GROUP_RULES.get(name))


@dataclass
class HybridTrainingConfig:
    """Settings of `HybridOptimizationManager`. A nonsensical value raises ValueError, at
    construction and when a field is set later.

    Units: max_steps, log_interval, eval_interval and clustering_warmup_steps in steps;
    initial_trust_radius in fractions of ||Theta_c||_2 a step; step_length in fractions of a
    weight's root mean square, what a step at the schedule's peak would be if all gradients agreed
    (momentum leaves a tenth to a third of it); decay_fraction, of 'wsd' alone, in shares of
    max_steps; shrink_below as kappa (see `Guidance`); target_bits in bits a weight. Centres of
    regions that adapt are kept in [0.001, 1], whatever initial_trust_radius is.
    use_quantization, quantizer_scale, target_bits, batch_size, log_interval and eval_interval are
    for the caller's loop: the manager does not read them.
    """

    use_quantization: bool = True
    quantizer_scale: float = 1.0
    target_bits: float = 1.58
    use_clustering: bool = True  # rates of data clusters
    data_clusters: int = 8
    parameter_clusters: int = 4  # each with a region of its own
    use_auxiliary_nn: bool = True  # False: the multiplier is 1, the radius not shifted
    auxiliary_nn_hidden_size: int = 16
    auxiliary_nn_learning_rate: float = 1e-3  # of the network's own Adam
    use_trust_region: bool = True
    initial_trust_radius: float = 0.01
    trust_radius_adaptation: bool = True
    base_learning_rate: float = 1e-3  # at the schedule's peak, before the multiplier
    max_steps: int = 1000
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 1e-5  # decoupled, of matrices and heads only
    log_interval: int = 10
    eval_interval: int = 50
    step_length: float = 0.02
    shrink_below: float = -0.8
    warmup_fraction: float = 0.05  # of max_steps
    lr_schedule: str = "linear"  # a kind of `schedule_factor`
    decay_fraction: float = 0.2
    use_matrix_geometry: bool = True  # whitened steps of weight matrices
    clustering_warmup_steps: int = 0  # in which all data clusters have the same rate
    seed: int = 0

    def __setattr__(self, name: str, value: Any) -> None:
        _check(name, value, _RULES.get(name))
        object.__setattr__(self, name, value)


def schedule_factor(
    step: int, max_steps: int, warmup_fraction: float, kind: str, decay_fraction: float = 0.2
) -> float:
    """Share of the peak learning rate at a step (from 0): linear warm-up, then ``kind``.

    'linear' and 'cosine' fall towards 0 at max_steps, 'linear' to 1 / (max_steps - warm-up) at the
    last step. 'wsd' (warm-up, stable, decay) stays at the peak and falls so over the last
    decay_fraction of max_steps; 'constant' stays. Beyond max_steps all keep the last value. An
    unknown kind is not noticed here.
    """
    warmup = max(1, round(warmup_fraction * max_steps))
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    remaining = max(max_steps - step, 1)
    if kind == "wsd":
        return min(remaining / max(1, round(decay_fraction * max_steps)), 1.0)
    left = min(remaining / max(1, max_steps - warmup), 1.0)
    return left if kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


# -------------------------------------------------------------------------- auxiliary network


class AuxiliaryNeuralNetwork(nn.Module):
    """Predicts a learning-rate multiplier and a trust radius, and learns from what follows.

    input_size, hidden_size: of the two layers; `predict` needs 6 features. ValueError where
    output_size is not 2.

    Raw features go through sign(x) log(1 + |x|) and running z-scores clipped to +-3, so nothing
    saturates. The output layer starts at zero: the multiplier starts at exactly 1, the radius at
    ``radius_center``. Two ways of teaching it, both online with Adam:

    `learn`                 targets are known (the manager derives them from gradients);
    `update_with_feedback`  only the improvement of the loss is known; a recursive quadratic fit
                            of relative improvement against the multiplier gives the target.
    """

    feature_mean: Tensor
    feature_square: Tensor
    feature_count: Tensor
    fit_a: Tensor
    fit_b: Tensor

    def __init__(
        self,
        input_size: int = 6,
        hidden_size: int = 16,
        output_size: int = 2,
        *,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if output_size != 2:
            raise ValueError(f"output_size must be 2 (multiplier, radius), not {output_size}")
        # Whatever torch.set_default_dtype and torch.set_default_device say.
        plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        # Without a draw from the caller's random numbers.
        self.hidden = nn.utils.skip_init(nn.Linear, input_size, hidden_size, **plain)
        self.output = nn.utils.skip_init(nn.Linear, hidden_size, output_size, **plain)
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            self.hidden.weight.copy_(
                torch.randn(hidden_size, input_size, generator=generator, **plain)
                * input_size**-0.5
            )
            self.hidden.bias.zero_()
            self.output.weight.zero_()
            self.output.bias.zero_()
        self.register_buffer("feature_mean", torch.zeros(input_size, **plain))
        self.register_buffer("feature_square", torch.zeros(input_size, **plain))
        self.register_buffer("feature_count", torch.zeros((), **plain))
        # Normal equations of improvement ~ 1, m, m^2, forgotten at 0.98 a call.
        self.register_buffer("fit_a", torch.zeros(3, 3, dtype=torch.float64, device="cpu"))
        self.register_buffer("fit_b", torch.zeros(3, dtype=torch.float64, device="cpu"))
        self.radius_center = 0.01
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        self._last: Tensor | None = None  # features of the newest prediction, (1, 6)
        self.fallbacks = 0  # predictions that were not finite

    def normalize(self, features: Tensor) -> Tensor:
        """Raw features (B, input_size) -> z-scores in [-3, 3]; not-a-number becomes 0."""
        x = torch.nan_to_num(features, nan=0.0, posinf=1e30, neginf=-1e30)
        x = torch.sign(x) * torch.log1p(x.abs())
        if self.feature_count == 0:
            return torch.zeros_like(x)
        std = (self.feature_square - self.feature_mean**2).clamp_min(1e-6).sqrt()
        return ((x - self.feature_mean) / std).clamp(-3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Raw features (B, input_size) -> (B, 2), both in [-1, 1]: log10 of the multiplier, and
        twice the decades by which the radius is shifted."""
        return torch.tanh(self.output(torch.tanh(self.hidden(self.normalize(x)))))

    @torch.no_grad()
    def predict(self, state: TrainingState) -> tuple[float, float]:
        """(multiplier, decades by which to shift the radius, in [-0.5, 0.5]).

        Call it once a step: it updates the running statistics, and `learn` is about its newest
        prediction. So do the two below, which call it.
        """
        features = torch.from_numpy(state.to_features())
        x = torch.nan_to_num(features, nan=0.0, posinf=1e30, neginf=-1e30)
        x = (torch.sign(x) * torch.log1p(x.abs()))[0]
        self.feature_count += 1
        rate = max(0.02, 1 / float(self.feature_count))
        self.feature_mean.lerp_(x, rate)
        self.feature_square.lerp_(x * x, rate)
        self._last = features
        out = self(features)[0]
        if not bool(torch.isfinite(out).all()):
            self.fallbacks += 1
            return 1.0, 0.0  # a broken network gives way to the plain rule
        low, high = MULTIPLIER_RANGE
        return min(max(10.0 ** float(out[0]), low), high), 0.5 * float(out[1])

    def predict_learning_rate(self, state: TrainingState) -> float:
        """Learning-rate multiplier in [0.1, 10]; 1 before anything was learned."""
        return self.predict(state)[0]

    def predict_trust_region(self, state: TrainingState) -> float:
        """Trust radius in [0.001, 1], as a fraction of the weights' norm."""
        low, high = RADIUS_RANGE
        return min(max(self.radius_center * 10.0 ** self.predict(state)[1], low), high)

    def learn(self, log10_multiplier: float | None, radius_residual: float | None = None) -> None:
        """One step on the newest prediction towards known targets.

        log10_multiplier: what log10 of the multiplier should have been (Huber loss).
        radius_residual: log10 of the proposed step's length over the radius that was used, without
        the region's own factor, clipped to +-0.5. Its 0.7-quantile becomes the next shift by the
        pinball loss (Koenker and Bassett 1978), so that about 30 % of the steps are cut. The radius
        holds the shift before, so a gap that stays is halved by the shift.
        """
        if self._last is None:
            return
        with torch.enable_grad():
            out = self(self._last)[0]
            loss = out.sum() * 0.0
            if log10_multiplier is not None and math.isfinite(log10_multiplier):
                target = out.new_tensor(min(max(log10_multiplier, -1.0), 1.0))
                loss = loss + F.huber_loss(out[0], target, delta=0.3)
            if radius_residual is not None and math.isfinite(radius_residual):
                error = min(max(radius_residual, -0.5), 0.5) - 0.5 * out[1]
                loss = loss + torch.maximum(0.7 * error, -0.3 * error)
            self.optimizer.zero_grad()
            loss.backward()
        if all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in self.parameters()):
            self.optimizer.step()

    def update_with_feedback(self, lr_multiplier: float, loss_improvement: float) -> None:
        """Learn from the outcome of the newest prediction.

        lr_multiplier: the multiplier that was used. loss_improvement: loss before minus after.

        Along a fixed direction a quadratic loss improves by b m + c m^2, best at m = -b / 2c. The
        improvement relative to the loss is fitted on (1, m, m^2) with forgetting; while the
        multipliers seen do not tell curvature, the target moves 10 % up after an improvement and
        30 % down after a loss. Feedback that is not finite is ignored.
        """
        if self._last is None or not math.isfinite(loss_improvement) or not lr_multiplier > 0:
            return
        loss = abs(float(self._last[0, 0]))
        y = min(max(loss_improvement / max(loss, 1e-30), -4.0), 4.0)
        m = float(lr_multiplier)
        row = self.fit_b.new_tensor([1.0, m, m * m])
        self.fit_a.mul_(0.98).add_(torch.outer(row, row))
        self.fit_b.mul_(0.98).add_(row * y)
        best = m * (1.1 if y > 0 else 0.7)
        scale = self.fit_a.diagonal().sqrt().clamp_min(1e-12)
        normal = self.fit_a / torch.outer(scale, scale)
        if float(torch.linalg.eigvalsh(normal)[0]) > 1e-7:
            _, b, c = (torch.linalg.solve(normal, self.fit_b / scale) / scale).tolist()
            if c < 0 < b:
                best = min(max(-b / (2 * c), m / 2), m * 2)
        low, high = MULTIPLIER_RANGE
        self.learn(math.log10(min(max(best, low), high)))

    def training_state(self) -> dict:
        """Weights, running statistics and optimiser: what resuming needs."""
        return {
            "model": self.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "radius_center": self.radius_center,
            "last": self._last,
            "fallbacks": self.fallbacks,
        }

    def load_training_state(self, state: dict) -> None:
        self.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.radius_center = state["radius_center"]
        self._last = state["last"]
        self.fallbacks = state["fallbacks"]


# --------------------------------------------------------------------------------- clustering


class KMeansClustering:
    """K-means (scikit-learn), made to survive duplicates, empty input columns and small samples.

    With fewer distinct samples than clusters the spare clusters are empty: their centroids repeat
    the last one and nothing is assigned to them. Fitted: ``labels`` (n,), ``centroids``
    (n_clusters, n_features), ``inertia``.
    """

    labels: np.ndarray
    centroids: np.ndarray
    inertia: float

    def __init__(
        self, n_clusters: int = 8, max_iter: int = 100, tolerance: float = 1e-4, *, seed: int = 0
    ) -> None:
        self.n_clusters, self.max_iter, self.tolerance = n_clusters, max_iter, tolerance
        self.seed = seed

    def fit(self, X: Any) -> KMeansClustering:
        """X: (n_samples, n_features), array or tensor. Raises ValueError if empty, not finite."""
        from sklearn.cluster import KMeans, MiniBatchKMeans

        _check("n_clusters", self.n_clusters, _COUNT)
        X = _as_matrix(X)
        distinct = len(np.unique(X, axis=0)) if len(X) <= 4 * self.n_clusters else self.n_clusters
        k = min(self.n_clusters, len(X), distinct)
        with warnings.catch_warnings():  # duplicates beyond the first 4k rows: fewer clusters
            warnings.simplefilter("ignore")
            common = dict(max_iter=self.max_iter, n_init=1, random_state=self.seed)
            if len(X) > MANY_SAMPLES:  # Sculley, Web-scale k-means clustering, 2010
                middle = X.mean(0)  # KMeans takes it away by itself
                model = MiniBatchKMeans(k, batch_size=4096, **common).fit(X - middle)
                model.cluster_centers_ += middle
            else:
                model = KMeans(k, tol=self.tolerance, **common).fit(X)
        self.labels = model.labels_.astype(np.int64)
        spare = np.repeat(model.cluster_centers_[-1:], self.n_clusters - k, axis=0)
        self.centroids = np.concatenate([model.cluster_centers_, spare])
        self.inertia = float(model.inertia_)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Nearest centroid of each row: (n_samples,) integers."""
        if not hasattr(self, "centroids"):
            raise ValueError("KMeansClustering: call fit before predict")
        X = _as_matrix(X)
        if X.shape[1] != self.centroids.shape[1]:
            raise ValueError(f"{X.shape[1]} features; fitted with {self.centroids.shape[1]}")
        middle = self.centroids.mean(0)  # squares of a large offset would leave no digits
        X, centroids = X - middle, self.centroids - middle
        return np.argmin((centroids**2).sum(1) - 2 * X @ centroids.T, axis=1)

    def get_cluster_info(self, X: Any) -> dict[int, dict[str, Any]]:
        """For each cluster: size, centroid, and mean and std of the rows of X that fall in it."""
        X = _as_matrix(X)
        labels = self.predict(X)
        info: dict[int, dict[str, Any]] = {}
        for k in range(self.n_clusters):
            rows = X[labels == k]
            empty = np.zeros(X.shape[1])
            info[k] = {
                "size": len(rows),
                "centroid": self.centroids[k],
                "mean": rows.mean(0) if len(rows) else empty,
                "std": rows.std(0) if len(rows) else empty,
            }
        return info


def _as_array(X: Any) -> np.ndarray:
    """Tensors, also of types that numpy has not, and whatever numpy takes."""
    if isinstance(X, Tensor):
        X = X.detach().cpu()
        X = (X.float() if X.dtype == torch.bfloat16 else X).numpy()
    return np.asarray(X)


def _as_matrix(X: Any) -> np.ndarray:
    X = _as_array(X).astype(np.float64, copy=False)
    X = X.reshape(len(X), -1) if X.ndim != 2 and X.size else X
    if X.ndim != 2 or X.size == 0:
        raise ValueError(f"clustering needs samples x features, got shape {X.shape}")
    if not np.isfinite(X).all():
        raise ValueError("clustering needs finite features")
    return X


def text_features(ids: np.ndarray, *, components: int = 32, seed: int = 0) -> np.ndarray:
    """Token windows (n, length) -> dense features (n, <= components) of unit length.

    Hashed n-grams (n = 1, 2, 3) of the ids, TF-IDF, truncated SVD (latent semantic analysis,
    Deerwester et al. 1990). Ids are symbols: distances between them are never used. Of more than
    MANY_SAMPLES windows frequencies and axes come from so many, drawn by the seed, and features
    are made of as many at a time.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.preprocessing import normalize

    ids = np.asarray(ids).reshape(len(ids), -1)
    n = len(ids)
    several = n > MANY_SAMPLES
    fitted = ids
    if several:
        fitted = ids[np.sort(np.random.default_rng(seed).choice(n, MANY_SAMPLES, replace=False))]
    tfidf = TfidfTransformer(sublinear_tf=True)
    counts = tfidf.fit_transform(_gram_counts(fitted))
    size = min(components, n - 1, GRAM_BUCKETS - 1)
    if size < 1:
        return np.zeros((n, 1))
    svd = TruncatedSVD(size, n_iter=2, random_state=seed)
    with np.errstate(invalid="ignore", divide="ignore"):  # identical rows: zero total variance
        found = svd.fit_transform(counts)
        if several:
            parts = (ids[i : i + MANY_SAMPLES] for i in range(0, n, MANY_SAMPLES))
            found = np.concatenate([svd.transform(tfidf.transform(_gram_counts(p))) for p in parts])
        return normalize(np.nan_to_num(found))


def _gram_counts(ids: np.ndarray) -> Any:
    """Token windows (n, length) -> counts of hashed n-grams, sparse (n, GRAM_BUCKETS)."""
    from scipy.sparse import vstack

    parts = [_grams_counted(ids[i : i + GRAM_ROWS]) for i in range(0, len(ids), GRAM_ROWS)]
    return parts[0] if len(parts) == 1 else vstack(parts, format="csr")


def _grams_counted(ids: np.ndarray) -> Any:
    """`_gram_counts` of a few windows."""
    from scipy.sparse import csr_matrix

    ids = ids.astype(np.uint64)
    n, length = ids.shape
    grams = []
    for width in range(1, min(3, length) + 1):
        h = np.full((n, length - width + 1), np.uint64(width), dtype=np.uint64)
        for i in range(width):
            h = (h ^ ids[:, i : length - width + 1 + i]) * np.uint64(0x9E3779B97F4A7C15)
            h ^= h >> np.uint64(29)
        grams.append(h % np.uint64(GRAM_BUCKETS))
    columns = np.concatenate(grams, axis=1).astype(np.int32)
    rows = np.repeat(np.arange(n, dtype=np.int32), columns.shape[1])
    return csr_matrix(
        (np.ones(columns.size, np.float32), (rows, columns.ravel())), shape=(n, GRAM_BUCKETS)
    )


# ----------------------------------------------------------------------- the constrained step


@dataclass
class ConstrainedUpdateInfo:
    """One step, in numbers. update_magnitude: ||dTheta||_2. constraint_active: the step of some
    cluster was shortened, by its region or, where regions are used, by guidance.
    constraint_radius: the largest region as it was used (schedule and network included), a
    fraction of ||Theta_c||. quantization_error: not used. efficiency: length taken / length
    proposed."""

    update_magnitude: float
    constraint_active: bool
    constraint_radius: float
    quantization_error: float = 0.0
    efficiency: float = 1.0


def native_bfloat16(device: torch.device) -> bool:
    """Whether this processor has instructions that multiply matrices in bfloat16. False on a GPU,
    where torch.set_float32_matmul_precision rules."""
    if device.type != "cpu":
        return False
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # recent torch
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def inverse_square_root(gram: Tensor, damping: float) -> Tensor:
    """(A + damping mean(eig) I)^(-1/2) of symmetric positive semi-definite A (..., m, m).

    By eigenvalues on the CPU, by products alone elsewhere, where eigenvalues are slow and make
    the host wait. Zeros give zeros: 1 / sqrt(tiny) would multiply the first gradient that is not.
    """
    tiny = torch.finfo(gram.dtype).tiny
    if gram.size(-1) == 1:
        root = (gram * (1 + damping) + tiny).rsqrt()
    elif gram.device.type != "cpu":
        root = newton_inverse_square_root(gram, damping)
    else:
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp_min(0)
        values = values + damping * values.mean(-1, keepdim=True) + tiny
        root = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    known = gram.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
    return root * known[..., None, None]


def newton_inverse_square_root(gram: Tensor, damping: float, iterations: int = 24) -> Tensor:
    """`inverse_square_root` by the coupled Newton-Schulz iteration (Higham, Functions of
    Matrices, 2008, eq. 6.35). Converges where damping is above 0 only: an eigenvalue of 1e-5 of
    the norm takes 20 iterations."""
    eye = torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    a = gram + (damping * mean + torch.finfo(gram.dtype).tiny) * eye
    norm = torch.linalg.matrix_norm(a, math.inf, keepdim=True)  # at least the largest eigenvalue
    y, z = a / norm, eye.expand_as(a)
    for _ in range(iterations):
        t = 1.5 * eye - 0.5 * (z @ y)
        y, z = y @ t, t @ z
    return z / norm.sqrt()


@lru_cache
def equal_blocks(side: int, at_most: int) -> int:
    """The smallest number of equal blocks of ``side`` entries of which none has more than
    ``at_most``."""
    n = -(-side // at_most)
    while side % n:
        n += 1
    return n


def _norms(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """2-norms, each 0-dimensional; of half precision in float32, where squares fit."""
    half = [x.dtype in _HALF for x in tensors]
    if dtype is None and any(half) and not all(half):
        types = [torch.float32 if h else None for h in half]
        return [torch.linalg.vector_norm(x, dtype=t) for x, t in zip(tensors, types, strict=True)]
    dtype = torch.float32 if dtype is None and all(half) else dtype
    return list(torch._foreach_norm(list(tensors), 2, dtype))


def _require_dense(grads: Iterable[Tensor]) -> None:
    """Of gradients, or of the parameters that will have them."""
    grads = list(grads)
    # DTensors, and what FSDP1 makes of parameters: flat shards, also where they keep their names.
    if any(hasattr(g, "device_mesh") or hasattr(g, "_fsdp_flattened") for g in grads):
        raise RuntimeError(
            "ConstrainedOptimizer cannot step sharded tensors (FSDP, DTensor); use "
            "DistributedDataParallel"
        )
    if any(g.is_sparse or g.is_complex() for g in grads):
        raise RuntimeError(
            "ConstrainedOptimizer needs dense, real gradients (embeddings: sparse=False)"
        )


def parameter_kind(name: str, p: Tensor, embeddings: set[int], head: int | None) -> str:
    """'embedding', 'head', 'matrix' or 'vector'."""
    if id(p) in embeddings:
        return "embedding"
    if p.ndim < 2 or not p.numel() or min(p.shape[0], p[0].numel()) == 1:
        return "vector"
    return "head" if id(p) == head or re.search(r"(^|\.)(lm_)?head\.", name) else "matrix"


def named_kinds(model: nn.Module, *, frozen: bool = False) -> list[tuple[str, nn.Parameter, str]]:
    """Every trainable parameter (with ``frozen`` the others, too) with its name and kind. A head is
    what is named so and, in a model without embeddings, the last of several linear layers."""
    embeddings = {
        id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))
    }
    linears = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    head = None if len(linears) < 2 or embeddings else id(linears[-1])
    return [
        (n, p, parameter_kind(n, p, embeddings, head))
        for n, p in model.named_parameters()
        if p.requires_grad or frozen
    ]


_HALF = (torch.float16, torch.bfloat16)


def _scaled(g: Tensor, factor: Tensor | float) -> Tensor:
    """g times a factor, in float32; of float64 before it is cast."""
    return (g * factor).float() if g.dtype == torch.float64 else g.float() * factor


#: A parameter that a step moves: itself, its cluster, its kind, its group.
_Live = tuple[Tensor, int, str, dict[str, Any]]


class _Layout:
    """Of the parameters that a step moves, in order: vectors (n,), which of them are vectors;
    sizes (n,), root of the number of entries; floors (n,), a tenth of the root mean square of a
    usual start; index (n,), the cluster; gains (n,), the length at a rate of 1. Of the clusters:
    members (C, n); least (C,), the norm that stands in where ||Theta_c|| is smaller."""

    def __init__(self, live: Sequence[_Live], key: Any, gains: Sequence[float], count: int) -> None:
        device = live[0][0].device
        vectors = [kind == "vector" for _, _, kind, _ in live]
        floors = [
            0.1 if vector else 0.1 / math.sqrt(p[0].numel())
            for (p, *_), vector in zip(live, vectors, strict=True)
        ]
        self.key = key
        self.vectors = torch.tensor(vectors, device=device)
        self.sizes = torch.tensor([p.numel() for p, *_ in live], device=device).sqrt()
        self.floors = torch.tensor(floors, device=device)
        self.index = torch.tensor([cluster for _, cluster, _, _ in live], device=device)
        self.members = self.index == torch.arange(count, device=device)[:, None]
        self.gains = torch.tensor(gains, device=device)
        self.least = self.over_clusters(self.floors * self.sizes)

    @staticmethod
    def times(x: Tensor, factors: Sequence[float]) -> Tensor:
        """x (n,) times a number for each parameter. Runs of equal numbers are one operation each,
        and no number is copied to a device, which would wait."""
        parts = []
        start = 0
        for i in range(1, len(factors) + 1):
            if i == len(factors) or factors[i] != factors[start]:
                parts.append(x[start:i] * factors[start])
                start = i
        return torch.cat(parts)

    def over_clusters(self, x: Tensor) -> Tensor:
        """Root of the sum of squares in each cluster, (n,) -> (C,). Not index_add: its order of
        summation varies on a GPU, and a resumed run would not be the same to the bit."""
        return torch.where(self.members, x**2, 0).sum(1).sqrt()


def _one_tensor(parts: Sequence[Tensor]) -> Tensor | None:
    """Contiguous tensors of one shape that lie one after another in one storage, as a view of it
    (k, *shape); None if they don't."""
    first = parts[0]
    size = first.numel() * first.element_size()
    start, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for i, x in enumerate(parts):
        if x.data_ptr() != start + i * size or x.untyped_storage().data_ptr() != storage:
            return None
        if not x.is_contiguous() or x.dtype != first.dtype:
            return None
    return first.as_strided((len(parts), *first.shape), (first.numel(), *first.stride()))


class _Bucket:
    """Parameters that step together: ``count`` of one shape as one tensor (count, *shape); on the
    CPU every parameter alone, with no first dimension, because there what counts is that a matrix
    stays in the cache, not how many operations are launched."""

    def __init__(self, live: Sequence[_Live], states: Sequence[dict[str, Any]]) -> None:
        self.params = [p for p, *_ in live]
        _, _, self.kind, self.group = live[0]
        self.states = states
        self.alone = len(live) == 1
        self.shape = self.params[0].shape

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0] if self.alone else torch.stack(list(tensors))

    def parts(self, x: Tensor) -> list[Tensor]:
        return [x] if self.alone else list(x.unbind())

    def column(self, x: Tensor) -> Tensor:
        """(count,) -> something that multiplies a tensor of the bucket."""
        return x.reshape(() if self.alone else (-1, *[1] * len(self.shape)))

    def norm(self, x: Tensor) -> Tensor:
        """(count,): the 2-norm of each."""
        if self.alone:
            return torch.linalg.vector_norm(x, dtype=torch.float32).reshape(1)
        return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1, dtype=torch.float32)

    def move(self, d: Tensor, factor: Tensor, bound: Tensor, keep_step: bool) -> None:
        """Add factor x d, whose norm must not pass the bound (count,), to the parameters; with
        ``keep_step`` it stays in the states, for the slope along it. May destroy d."""
        if self.params[0].dtype in _HALF:
            self.move_half(d.mul_(factor), bound)
        elif self.alone and not keep_step:  # one pass over both
            p = self.params[0]
            p.addcmul_(d.to(p.dtype), factor.to(p.dtype))
        else:
            each = self.parts(d.mul_(factor))
            steps = [x.to(p.dtype) for x, p in zip(each, self.params, strict=True)]
            torch._foreach_add_(self.params, steps)
        if keep_step:
            self["taken"] = d
        else:
            for state in self.states:
                state.pop("taken", None)

    def move_half(self, d: Tensor, bound: Tensor) -> None:
        """Weights of half precision by d, which is float32, but by no more than bound (count,) in
        2-norm: to the nearest where that is inside, else rounded towards where they are."""
        old = self.gather(self.params).float()
        dtype = self.params[0].dtype
        if self.group["compensated"]:
            if "lost" not in self:
                self["lost"] = torch.zeros_like(d, dtype=torch.bfloat16)
            wanted = d + self["lost"]
            new = (old + wanted).to(dtype)
            self["lost"].copy_(wanted - (new.float() - old))
        else:
            new = (old + d).to(dtype)
            inside = self.norm(new.float() - old) <= bound.to(d.device)
            # To the nearest of what is half a unit in the last place closer is towards the old.
            info = torch.finfo(dtype)
            unit = torch.maximum(old.abs(), (old + d).abs()) * (0.51 * info.eps)
            unit += info.eps * info.tiny
            closer = (old + (d - d.clamp(-unit, unit))).to(dtype)
            new = torch.where(self.column(inside), new, closer)
        torch._foreach_copy_(self.params, self.parts(new))

    def follow(self, name: str, x: Tensor, rate: float, keep: Tensor | None) -> Tensor:
        """The running mean that the states hold under this name, now that x has joined it; keep: 0
        where it must not."""
        if name not in self:
            self[name] = torch.zeros_like(x)
        mean = self[name]
        mean.lerp_(x, rate if keep is None else rate * keep)
        return mean

    def __contains__(self, name: str) -> bool:
        return all(name in state for state in self.states)

    def __getitem__(self, name: str) -> Tensor:
        """What the states hold under this name; in-place changes reach them."""
        parts = [state[name] for state in self.states]
        if self.alone:
            return parts[0]
        whole = _one_tensor(parts)
        if whole is None:  # loaded, copied or met for the first time
            whole = torch.stack(parts)
            self[name] = whole
        return whole

    def __setitem__(self, name: str, value: Tensor) -> None:
        for state, part in zip(self.states, self.parts(value), strict=True):
            state[name] = part


class ConstrainedOptimizer(torch.optim.Optimizer):
    """The trust-region step, alone: a PyTorch optimiser for all parameters of a model.

    Direction. Momentum M: the bias-corrected mean of gradients, with Nesterov's look-ahead. For a
    weight matrix (out, in) the linear model <M, D> is minimised in the metric learned from
    gradients: D = -L^(-1/2) M R^(-1/2) with R = E[G^T G] and L = E[G R^(-1) G^T], R on the smaller
    side. One side alone is ASGO's step (arXiv 2503.20762); both together whiten the gradient, as
    Shampoo (Gupta et al., arXiv 1802.09568) does with roots of one joint estimate; of a square
    matrix, without noise and damping, that is Muon's -polar(M). L is kept in blocks of at most
    OUTER_BLOCK rows and of at most the smaller side's, R of at most largest_block. Each entry of D
    is then divided by its root mean square over the steps, as in AdaMuon (arXiv 2507.11005). Other
    parameters use the diagonal metric, which is Adam (arXiv 1412.6980) with look-ahead (Dozat
    2016).

    Length. Matrices and embeddings move by a share of their own size: at lr 1e-3 the root mean
    square of the proposed entries is up to 2 % of the weights' in the diagonal metric, and in a
    matrix's 0.75 sqrt(a) as much, a = larger side / smaller side, at most 4. With least_share a
    matrix's step has at least that share of this, as long as its gradient has its usual size.
    Vectors move as in Adam at 3 lr.

    Region. For each parameter cluster c the proposal d_c, decay included, is cut to
    ||d_c||_2 <= mu_c ||Theta_c||_2 (||Theta_c|| at least a tenth of a usual start's, so that
    weights that start at zero can leave it). A cluster whose step was cut shrinks its region, one
    whose step was not grows it; around that a slow recentring follows the length of proposals, so
    that about ``active_share`` of the steps are cut. Weights of half precision are rounded to the
    nearest where that stays inside, else towards where they were, so the bound holds for them as
    they are stored. With compensated what rounding lost is kept (2 bytes a weight) and joins later
    steps: short ones add up, and the bound holds for weights with what is kept.

    Scale. Only the course of gradients matters, not their size: norms outside ORDINARY are brought
    to about 1 by a power of two (on a GPU where `step` is told the norm as a number).

    Spikes. A gradient r times as long as the running mean of those before is, where r is above
    ``spike_limit`` (inf: never), cut to spike_limit^2 / r times that mean: the longer, the less it
    is trusted, so that one bad batch spoils neither momentum nor metric. This is the reciprocal
    clipping of ZClip (arXiv 2504.02507) with a ratio in place of a z-score.

    params: an nn.Module (kinds recognised), parameters, or groups; None where groups are added
    later. Group options: lr, momentum, metric_decay (of entries' squares), matrix_metric_decay,
    weight_decay (decoupled, of all that the group holds; below 6e-8 of a weight a step it waits
    until it adds up to 2e-6), initial_radius (a fraction of ||Theta_c||), compensated,
    use_matrix_geometry, refresh_every (steps between roots, in the end: at step t at most 2 + t /
    SETTLED), damping (of the mean eigenvalue), least_share, largest_block, product_dtype (of the
    metric's products; None: bfloat16 where `native_bfloat16`, else float32), kind ("matrix":
    whitened, convolutions as (out, rest); "embedding" and "head": the diagonal metric; "vector";
    None: by shape alone), clusters (one integer a parameter). What regions do (use_trust_region,
    adapt_radius, active_share) and spike_limit are read from the first group that has a gradient. A
    parameter that was resized in place starts anew. Raises ValueError for options that make no
    sense, RuntimeError for sparse or complex gradients and sharded parameters.
    """

    GROW, SHRINK, RELAX = 0.06, 0.14, 0.8  # natural logs a step, and the pull back to the centre
    RECENTRE = 0.1
    RELATIVE_GAIN = 20.0  # lr 1e-3 -> 2 % of the weights' root mean square
    VECTOR_GAIN = 3.0  # entries of vectors move by at most 3 lr
    WHITENED_GAIN = 0.75  # of a square matrix's step, against one of the diagonal metric
    OUTER_BLOCK = 128  # rows of the metric of a matrix's larger side
    SETTLED = 16  # roots are at most 2 + t / SETTLED steps old at step t
    SPIKELESS = 10  # steps before a gradient can be too long
    ORDINARY = (2.0**-20, 2.0**40)  # norms of gradients that are taken as they are
    SCALED = (("mean", 1), ("square", 2), ("inner", 2), ("inner_root", -1))  # with which power

    # On the class, because a copy of an optimiser has its groups and states only.
    never_wait = False  # as on a GPU, and in its buckets: for tests on the CPU
    _stats: Tensor | tuple[float, ...] = (0.0, 0.0, 0.0, RADIUS_RANGE[0], 0.0)
    _cached: _Layout | None = None

    def __init__(
        self,
        params: nn.Module | Iterable[Any] | None = None,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        metric_decay: float = 0.95,
        matrix_metric_decay: float = 0.9,
        weight_decay: float = 0.0,
        initial_radius: float = 0.01,
        adapt_radius: bool = True,
        use_trust_region: bool = True,
        use_matrix_geometry: bool = True,
        refresh_every: int = 20,
        damping: float = 0.1,
        largest_block: int = 1024,
        product_dtype: torch.dtype | None = None,
        active_share: float = 0.3,
        spike_limit: float = 3.0,
        least_share: float = 0.0,
        compensated: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            metric_decay=metric_decay,
            matrix_metric_decay=matrix_metric_decay,
            weight_decay=weight_decay,
            initial_radius=initial_radius,
            adapt_radius=adapt_radius,
            use_trust_region=use_trust_region,
            use_matrix_geometry=use_matrix_geometry,
            refresh_every=refresh_every,
            damping=damping,
            largest_block=largest_block,
            product_dtype=product_dtype,
            active_share=active_share,
            spike_limit=spike_limit,
            least_share=least_share,
            compensated=compensated,
            kind=None,
            clusters=None,
        )
        _check("lr", float(lr) if isinstance(lr, Tensor) else lr, _POSITIVE)
        for name, value in defaults.items():
            _check_option(name, value)
        if isinstance(params, nn.Module):
            groups: dict[str, list[Tensor]] = {}
            trains = any(p.requires_grad for p in params.parameters())
            for _, p, kind in named_kinds(params, frozen=True) if trains else ():
                groups.setdefault(kind, []).append(p)  # the frozen may be thawed
            params = [{"params": ps, "kind": kind} for kind, ps in groups.items()]
        given = [] if params is None else list(params)
        if params is not None and not given:
            raise ValueError("params: nothing to train (an empty list, or a frozen model)")
        super().__init__(given or [{"params": []}], defaults)
        if params is None:
            self.param_groups.clear()  # groups are added when a model arrives
        self._stats = (0.0, 0.0, 0.0, initial_radius, 0.0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Clusters that no other group has get a region of their own."""
        group = dict(param_group)
        for name, value in group.items():
            _check_option(name, value)
        params = group["params"]
        if not isinstance(params, (Tensor, set)):  # a set has no order: torch refuses it
            params = group["params"] = list(params)
        if group.get("clusters") is not None:
            count = 1 if isinstance(params, Tensor) else len(params)
            clusters = list(group["clusters"])
            if len(clusters) != count or not all(map(_integer(0), clusters)):
                raise ValueError(
                    f"clusters must be an integer of at least 0 for each of the {count} "
                    f"parameters, not {group['clusters']!r}"
                )
            group["clusters"] = [int(k) for k in clusters]
        super().add_param_group(group)
        _require_dense(self.param_groups[-1]["params"])
        self._region_of_new_clusters()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but what is float32 stays float32, whatever the parameters are; the state
        is copied. ValueError for the state of another optimiser or of other parameters."""
        self._refuse_others(state_dict)
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, Tensor):
                        self.state[p][name] = value.to(p.device, copy=True)

    def _refuse_others(self, state_dict: dict[str, Any]) -> None:
        """Where sizes of groups differ, torch says so."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if "matrix_metric_decay" not in saved:
                raise ValueError("load_state_dict: this is the state of another optimiser")
            for i, (p, key) in enumerate(zip(group["params"], saved["params"], strict=False)):
                state = state_dict["state"].get(key)
                if not state:
                    continue
                if state["mean"].shape != p.shape:
                    names = group.get("param_names") or [f"parameter {i} of its group"]
                    raise ValueError(
                        f"load_state_dict: {names[i % len(names)]} has shape {tuple(p.shape)}, its "
                        f"state {tuple(state['mean'].shape)}"
                    )

    @staticmethod
    def apply_constraint(update: Any, constraint_radius: float) -> tuple[Any, bool]:
        """Project an update (array or tensor) on the L2 ball of an absolute radius.

        Returns (update with 2-norm <= radius, whether it was cut). The norm is taken in float64;
        an update that is not finite becomes zero. Raises ValueError for a radius below 0.
        """
        if not constraint_radius >= 0:
            raise ValueError(f"constraint_radius must be at least 0, not {constraint_radius!r}")
        array = torch.as_tensor(update)
        if not array.numel():
            return update, False
        if not bool(torch.isfinite(array).all()):
            return update.clone().zero_() if isinstance(update, Tensor) else update * 0, True
        peak = float(array.abs().max())
        if peak == 0:
            return update, False
        norm = peak * float(torch.linalg.vector_norm(array.double() / peak))
        if norm <= constraint_radius:
            return update, False
        # A few units in the last place inside, so that rounding cannot leave the ball.
        eps = torch.finfo(array.dtype).eps if array.is_floating_point() else 1e-7
        return update * (constraint_radius / norm * (1 - 4 * eps)), True

    def gradient_norm(self, dtype: torch.dtype | None = None) -> Tensor:
        """||g||_2 over all parameters that have a gradient, as a 0-dimensional tensor. dtype: that
        squares are summed in (None: the gradients', or float32 for half precision)."""
        grads = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        if not grads:
            return torch.zeros(())
        _require_dense(grads)
        norms = _norms(grads, dtype)
        return torch.linalg.vector_norm(torch.stack([x.to(norms[0].device) for x in norms]))

    def _known_norm(self) -> float:
        """`gradient_norm` as a number, which waits for a GPU; right also where squares leave
        float32."""
        norm = self.gradient_norm()
        if not 1e-15 < float(norm) < 1e15 and norm.device.type != "mps":
            norm = self.gradient_norm(torch.float64)
        return float(norm)

    def slope(self) -> Tensor:
        """<g, s>: this gradient along the newest step taken, as a 0-dimensional tensor."""
        products = []
        scale = self._gradient_scale()
        for group in self.param_groups:
            for p in group["params"]:
                taken = self.state[p].get("taken") if p in self.state else None
                if p.grad is not None and taken is not None and taken.shape == p.shape:
                    g = p.grad.float() if scale == 1 else _scaled(p.grad, scale)
                    products.append(torch.dot(g.reshape(-1), taken.reshape(-1)))
        if not products:
            return torch.zeros(())
        total = torch.stack([x.to(products[0].device) for x in products]).sum()
        return total if scale == 1 else total.double() / scale

    def radii(self) -> Tensor:
        """mu_c for each cluster (C,), fractions of ||Theta_c||_2."""
        return self._region["centre"] * torch.exp(self._region["log_factor"])

    def scale_regions(self, factor: float) -> None:
        """Multiply the centre of every region (a fraction of ||Theta_c||)."""
        centre = self._region["centre"]
        centre.copy_((centre * factor).clamp(*RADIUS_RANGE))

    def _first_radii(self) -> list[float]:
        """Where each cluster's region starts: what the first group with that cluster asks for."""
        groups = self.param_groups
        count = 1 + max((max(self._clusters(g), default=0) for g in groups), default=0)
        return [
            next((g["initial_radius"] for g in groups if c in self._clusters(g)), 0.01)
            for c in range(count)
        ]

    def _region_of_new_clusters(self) -> None:
        if "region" not in self.param_groups[0]:
            return
        region, radii = self._region, self._first_radii()
        new = radii[len(region["centre"]) :]
        if new:
            centre, factor = region["centre"], region["log_factor"]
            region["centre"] = torch.cat([centre, centre.new_tensor(new)])
            region["log_factor"] = torch.cat([factor, factor.new_zeros(len(new))])

    @property
    def _region(self) -> dict[str, Tensor]:
        groups = self.param_groups
        device = next((p.device for g in groups for p in g["params"]), torch.device("cpu"))
        # In a group it is part of every state dict, torch.distributed.checkpoint's included.
        held = groups[0] if groups else {}
        if "region" not in held:
            radii = torch.tensor(self._first_radii(), device=device)
            held["region"] = {
                "centre": radii,
                "log_factor": torch.zeros_like(radii),
                "norm": torch.zeros((), device=device),
                "seen": torch.zeros((), device=device),
            }
            held["gradient_scale"] = 1.0
        region = held["region"]
        if region["centre"].device != device:
            # load_state_dict moves what belongs to a parameter only
            region.update({name: x.to(device) for name, x in region.items()})
        return region

    def _clusters(self, group: dict[str, Any]) -> list[int]:
        return group["clusters"] or [0] * len(group["params"])

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        lr_scale: float = 1.0,
        radius_scale: float = 1.0,
        cap: float = 1.0,
        keep_step: bool = False,
        gradient_norm: Tensor | float | None = None,
    ) -> float | None:
        """One step. lr_scale multiplies every group's rate, and radius_scale every region, for this
        step (a schedule's share of the learning rate belongs into both); cap, in (0, 1], cuts every
        proposal, decay included, to that share before its region is asked; keep_step remembers the
        step for `slope`; gradient_norm spares its computation where the caller knows it (as a
        number the host knows it, too).

        A gradient that is not finite skips the step and leaves weights and running means alone.
        On a GPU the host never waits, so that only the count of steps, which the means are
        corrected by, goes on; reading `info` waits.
        """
        return self._take(closure, lr_scale, radius_scale, cap, keep_step, gradient_norm)

    @torch.no_grad()
    def _take(
        self,
        closure: Callable[[], float] | None,
        lr_scale: float,
        radius_scale: float,
        cap: float,
        keep_step: bool,
        gradient_norm: Tensor | float | None,
    ) -> float | None:
        """`step`, without the hooks that torch puts around a method of this name."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        live: list[_Live] = [
            (p, cluster, group["kind"] or parameter_kind("", p, set(), None), group)
            for group in self.param_groups
            for p, cluster in zip(group["params"], self._clusters(group), strict=True)
            if p.grad is not None and p.numel()
        ]
        if not live:
            return self._no_step(loss)
        _require_dense([p.grad for p, *_ in live if p.grad is not None])
        for p, *_ in live:
            if p in self.state and self.state[p]["mean"].shape != p.shape:
                self.state[p].clear()  # resized in place, as transformers does
        device = live[0][0].device
        waits = device.type == "cpu" and not self.never_wait
        if gradient_norm is None or closure is not None:
            gradient_norm = self._known_norm() if waits else self.gradient_norm()
        norm, unit = self._in_range(gradient_norm, device, waits)
        finite = torch.isfinite(norm)
        if waits and not bool(finite):
            return self._no_step(loss)
        # Elsewhere the host does not wait for the answer: a step that must not happen has weight
        # zero in everything that it would touch.
        keep = None if waits else finite.float()
        share = self._spike_share(norm, finite, live[0][-1]["spike_limit"])
        left = None if waits and float(share) == 1 and unit == 1 else share * unit

        buckets = self._buckets(live)
        live = [live[i] for indices in buckets for i in indices]
        layout = self._layout(live)
        params = [p for p, *_ in live]
        rates = [lr_scale * float(group["lr"]) for *_, group in live]
        decays = [
            cap * rate * self._mixture(group)[1]
            for rate, (*_, group) in zip(rates, live, strict=True)
        ]
        moves: list[tuple[_Bucket, slice, Tensor, Tensor]] = []
        sizes = []
        start = 0
        for indices in buckets:
            mine = slice(start, start := start + len(indices))
            bucket = _Bucket(live[mine], [self.state[p] for p in params[mine]])
            d, scale, size = self._direction(bucket, indices[0], keep, left)
            moves.append((bucket, mine, d, scale))
            sizes.append(size)

        norms = torch.stack([n.to(device) for n in _norms(params)]).float()
        own = torch.maximum(norms / layout.sizes, layout.floors)
        length = layout.times(layout.gains, rates) * torch.where(layout.vectors, 1.0, own) * cap
        decays = self._decays_due(params, decays)
        if max(decays) > 0:
            share = layout.times(1 / length.clamp_min(1e-30), decays)
            for i, (bucket, mine, d, scale) in enumerate(moves):
                if bucket.kind != "matrix" and not any(decays[mine]):
                    continue
                weights = bucket.gather(params[mine]).to(d.dtype)
                part = share[mine].to(d.device) / scale
                d.addcmul_(weights, bucket.column(part))
                sizes[i] = bucket.norm(d) * scale
        proposed = torch.cat([n.to(device) for n in sizes])

        region = self._region
        total = layout.over_clusters(proposed * length)
        # ||Theta_c||; a cluster that starts at zero could never move, so the floor stands in.
        weight = torch.maximum(layout.over_clusters(norms), layout.least)
        moving = total > 0
        cut = torch.ones_like(total)
        active = torch.zeros_like(moving)
        radii = (self.radii() * radius_scale).clamp(max=RADIUS_RANGE[1])
        allowed = torch.full_like(total, math.inf)
        first = live[0][-1]
        if first["use_trust_region"]:
            # Rounding Theta + d to float32 moves Theta by up to 1e-7 of itself, and a proposal's
            # length is known to 1e-6 of itself.
            allowed = (radii * (1 - 2e-6) - 1.2e-7).clamp_min(0) * weight
            active = total > allowed
            cut = torch.where(active, allowed / total.clamp_min(1e-30), cut)
            if first["adapt_radius"]:
                self._adapt(region, active, moving, first["active_share"], finite)
            active = active | (cap < 1)
        if keep is not None:
            cut = cut * keep
        factor = -length * cut[layout.index]
        bounds = proposed * length * (allowed / total.clamp_min(1e-30))[layout.index]
        for bucket, mine, d, scale in moves:
            f = bucket.column(factor[mine].to(d.device) * scale)
            bucket.move(d, f, bounds[mine], keep_step)

        asked = total / (region["centre"] * radius_scale * weight).clamp_min(1e-30)
        asked = torch.log10(asked.clamp(1e-6, 1e6)) * moving
        count = moving.sum().clamp_min(1)
        self._stats = torch.stack(
            [
                torch.linalg.vector_norm(total * cut),
                torch.linalg.vector_norm(total) / cap,
                (active & moving).sum() / count,
                radii.max(),
                asked.sum() / count,
            ]
        )
        return loss

    def _no_step(self, loss: float | None) -> float | None:
        *_, radius, ratio = self._newest()
        self._stats = (0.0, 0.0, 0.0, radius, ratio)
        return loss

    def _newest(self) -> tuple[float, ...]:
        """Of the newest step: length taken, length proposed, share of the clusters cut, largest
        radius, log10 of the proposal over the regions' centre. Reading it waits for the device."""
        if isinstance(self._stats, Tensor):
            self._stats = tuple(self._stats.tolist())
        return self._stats

    @property
    def info(self) -> ConstrainedUpdateInfo:
        """The newest step, in numbers."""
        taken, proposed, share, radius, _ = self._newest()
        return ConstrainedUpdateInfo(
            taken, share > 0, radius, efficiency=taken / proposed if proposed else 1.0
        )

    @property
    def active_share(self) -> float:
        """Share of the clusters whose newest step was shortened: see `ConstrainedUpdateInfo`."""
        return self._newest()[2]

    @property
    def proposal_log10(self) -> float:
        """log10 of the newest proposal's length over its region's centre, mean over clusters."""
        return self._newest()[4]

    def _layout(self, live: Sequence[_Live]) -> _Layout:
        """What stays while the same parameters have gradients: on the device, copied once."""
        count = len(self._region["centre"])
        key = (count, [(id(p), p.shape, cluster, kind) for p, cluster, kind, _ in live])
        if self._cached is None or self._cached.key != key:
            gains = [
                self.VECTOR_GAIN if kind == "vector" else self.RELATIVE_GAIN
                for _, _, kind, _ in live
            ]
            self._cached = _Layout(live, key, gains, count)
        return self._cached

    def _in_range(
        self, norm: Tensor | float, device: torch.device, waits: bool
    ) -> tuple[Tensor, float]:
        """The gradient's norm as it is once gradients were multiplied by what `_gradient_scale`
        says, and that. waits: the host may read it."""
        if isinstance(norm, Tensor):
            unit = self._gradient_scale(float(norm) if waits else None)
            return (norm * unit if unit != 1 else norm), unit
        unit = self._gradient_scale(norm)
        if math.isfinite(norm):
            norm = min(norm * unit, torch.finfo(torch.float32).max)
        return torch.tensor(norm, dtype=torch.float32, device=device), unit

    def _gradient_scale(self, norm: float | None = None) -> float:
        """What gradients are multiplied by before they are squared: 1 for ordinary ones, else a
        power of two, which changes nothing else. norm: this gradient's, where the host knows it;
        if gradients have left the range for good, or at the start, the scale follows."""
        group = self.param_groups[0] if self.param_groups else {}
        scale = group.get("gradient_scale", 1.0)
        low, high = self.ORDINARY
        if not norm or not math.isfinite(norm) or low <= norm * scale <= high:
            return scale
        region = self._region
        level = float(region["norm"])
        if float(region["seen"]) < self.SPIKELESS or group["spike_limit"] == math.inf or not level:
            level = max(level, norm * scale)
        found = min(max(scale * 2.0 ** -round(math.log2(level)), 2.0**-120), 2.0**120)
        if low <= level <= high or found == scale:
            return scale
        ratio = found / scale
        for state in self.state.values():
            for name, power in self.SCALED:
                for _ in range(abs(power) if name in state else 0):
                    state[name].mul_(ratio if power > 0 else 1 / ratio).clamp_(-1e38, 1e38)
        region["norm"].mul_(ratio)
        group["gradient_scale"] = found
        return found

    def _decays_due(self, params: Sequence[Tensor], decays: list[float]) -> list[float]:
        """Of the shares of weights that are to decay: those, or, where all are less than float32
        rounds away, what they add up to once that is more than its rounding."""
        eps = torch.finfo(torch.float32).eps
        if max(decays) > eps / 2 or not any(decays):
            return decays
        due = []
        for p, decay in zip(params, decays, strict=True):
            state = self.state[p]
            waiting = state.get("decay", 0.0) + decay
            due.append(waiting if waiting > 16 * eps else 0.0)
            state["decay"] = waiting - due[-1]
        return due

    def _spike_share(self, norm: Tensor, finite: Tensor, limit: float) -> Tensor:
        """What is left of a gradient of this norm: 1, or less if it is too long. It joins the
        running mean as at most limit times the mean: enough to follow a lasting change.
        """
        region = self._region
        mean, seen = region["norm"], region["seen"]
        norm, finite = norm.to(mean), finite.to(mean.device)
        usual = ~finite | (seen < self.SPIKELESS) | (mean == 0)
        share = torch.where(usual, 1.0, (limit * mean / norm).clamp(max=1))
        rate = (1 / (seen + 1)).clamp(min=0.05)
        mean.copy_(torch.where(finite, mean + rate * (norm * share - mean), mean))
        seen.add_(finite)
        return share.square()  # of norm: limit^2 / r times the mean

    def _adapt(
        self,
        region: dict[str, Tensor],
        active: Tensor,
        moving: Tensor,
        share: float,
        finite: Tensor,
    ) -> None:
        """Cut: the region shrinks. Not cut: it grows. The centre follows the proposals' length,
        slowly (Robbins-Monro on their quantile), so that a share of the steps is cut.

        A region of fixed centre is cut where SHRINK and GROW balance, in 30 % of the steps; the
        centre makes up for other shares.
        """
        live = moving & finite
        factor, move = region["log_factor"], torch.where(active, -self.SHRINK, self.GROW)
        factor.copy_(torch.where(finite, self.RELAX * factor + move * live, factor))
        centre = region["centre"] * torch.exp(self.RECENTRE * (active.float() - share) * live)
        region["centre"].copy_(centre.clamp(*RADIUS_RANGE))

    def _buckets(self, live: Sequence[_Live]) -> list[list[int]]:
        """Indices of ``live`` by what may be computed together, in order of the first of each."""
        found: dict[Any, list[int]] = {}
        for i, (p, _, kind, group) in enumerate(live):
            key: Any = i
            if p.device.type != "cpu" or self.never_wait:
                age = self.state[p].get("step", 0) if p in self.state else 0
                key = (id(group), kind, p.shape, p.dtype, p.device, age)
            found.setdefault(key, []).append(i)
        return list(found.values())

    def _mixture(self, group: dict[str, Any]) -> tuple[float, float]:
        """A group's momentum and weight decay for the step to come."""
        return float(group["momentum"]), float(group["weight_decay"])

    def _direction(
        self, bucket: _Bucket, order: int, keep: Tensor | None, left: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(d, scale, size): the unit-scale direction of a bucket is d x scale (weights move
        against it), d of the bucket's shape; scale and size, the 2-norm of that, are
        (count,). Their product is left to the final update, which reads d anyway. order: of the
        bucket among others, by which they take turns. keep: 0 where the step must leave no trace,
        1 otherwise; left: the share of the gradient that is trusted, times its scale (None: 1, and
        no time lost on it)."""
        group = bucket.group
        g = bucket.gather([p.grad for p in bucket.params if p.grad is not None])
        if keep is not None:
            keep = keep.to(g.device)
            g = torch.where(keep > 0, g, 0.0)
        g = g.float() if left is None else _scaled(g, left.to(g.device))
        for state in bucket.states:
            state["step"] = state.get("step", 0) + 1
        t, beta = bucket.states[0]["step"], self._mixture(group)[0]
        mean = bucket.follow("mean", g, 1 - beta, keep)
        # Nesterov's look-ahead beta mean / (1 - beta^t) + (1 - beta) g, up to its factor.
        factor = beta / (1 - beta**t)
        if factor > 0:
            ahead = torch.add(mean, g, alpha=(1 - beta) / factor)
        else:
            ahead, factor = g.clone(), 1.0
        if bucket.kind == "matrix" and group["use_matrix_geometry"]:
            return self._whitened(bucket, order, keep, g, ahead, factor)
        bias = 1 - group["metric_decay"] ** t
        square = bucket.follow("square", g * g, 1 - group["metric_decay"], keep)
        divisor = square.sqrt().mul_(1 / math.sqrt(bias)).add_(1e-12)
        d = ahead.div_(divisor.mul_(1 / factor))
        size = bucket.norm(d)
        return d, torch.ones_like(size), size

    def _whitened(
        self,
        bucket: _Bucket,
        order: int,
        keep: Tensor | None,
        g: Tensor,
        ahead: Tensor,
        factor: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`_direction` of weight matrices in the metric of both sides, from the gradient g and the
        momentum factor x ahead, both of the bucket's shape."""
        group, t = bucket.group, bucket.states[0]["step"]
        decay = group["matrix_metric_decay"]
        # Half the precision is no loss: these are statistics of a few noisy gradients.
        dtype = group["product_dtype"]
        if dtype is None:
            dtype = torch.bfloat16 if native_bfloat16(g.device) else torch.float32
        norm = bucket.norm(g) if group["least_share"] > 0 else None
        lead = () if bucket.alone else (len(bucket.params),)
        g, ahead = (x.reshape(*lead, len(bucket.params[0]), -1).to(dtype) for x in (g, ahead))
        wide = g.shape[-2] < g.shape[-1]
        if wide:
            g, ahead = g.mT, ahead.mT
        large, small = g.shape[-2:]
        inner = equal_blocks(small, group["largest_block"])
        outer = equal_blocks(large, min(small, self.OUTER_BLOCK))
        due = self._roots_due(bucket, order)

        def root(name: str, product: Tensor) -> Tensor:
            """Of the running mean of products (..., m, m): its inverse square root."""
            gram = bucket.follow(name, product.float(), 1 - decay, keep)
            if due:
                found = inverse_square_root(gram / (1 - decay**t), group["damping"])
                bucket[f"{name}_root"] = found.to(dtype)
            return bucket[f"{name}_root"].to(dtype)

        # The smaller side (of a square matrix the inputs' side), then the other of what is left.
        if inner > 1:
            g, ahead = (x.reshape(*lead, large, inner, -1).transpose(-3, -2) for x in (g, ahead))
        whiten = root("inner", g.mT @ g)
        g, ahead = g @ whiten, ahead @ whiten
        if inner > 1:
            g, ahead = (x.transpose(-3, -2) for x in (g, ahead))
        g, ahead = (x.reshape(*lead, outer, -1, small) for x in (g, ahead))
        d = (root("outer", g @ g.mT) @ ahead).float().view(*lead, large, small)
        # Rows and columns are even now; entries need not be.
        entries = bucket.follow("whitened_square", d * d, 1 - group["metric_decay"], keep)
        d.div_(entries.sqrt().add_(1e-12))
        # Of the length of the first side's step, which is short where gradients disagree; of the
        # size of Adam's entries, times WHITENED_GAIN and the root of the aspect ratio: wide
        # matrices bear longer steps than square ones (EXPERIMENTS.md).
        gain = self.WHITENED_GAIN * math.sqrt(large * min(large / small, 4.0))
        length = bucket.norm(ahead) * (factor * gain)
        if norm is not None:
            # Gradients of low rank leave most of a damped metric empty, and such a step is short.
            # The trace is the running mean of ||G||^2: a gradient that fades takes its step along.
            trace = bucket["inner"].diagonal(dim1=-2, dim2=-1).reshape(*lead, -1).sum(-1)
            usual = (trace.reshape(-1) / (1 - decay**t)).sqrt().clamp_min(1e-30)
            least = group["least_share"] * gain * math.sqrt(small)
            length = length.clamp_min((norm / usual).clamp(max=1) * least)
        scale = torch.where(length > 0, length / bucket.norm(d).clamp_min(1e-30), 1.0)
        return (d.mT if wide else d).reshape(*lead, *bucket.shape), scale, length

    def _roots_due(self, bucket: _Bucket, order: int) -> bool:
        """Whether the metric's roots are to be made anew in this step.

        The metric changes fast at first: roots that are a few steps old cost steps there, and only
        there (EXPERIMENTS.md). Matrices take turns; who lost its turn because the interval grew
        does not wait for the next.
        """
        t, longest = bucket.states[0]["step"], bucket.group["refresh_every"]
        every = min(longest, max(2, t // self.SETTLED))
        oldest = min(longest, 2 + t // self.SETTLED)
        age = t - min(state.get("rooted", 0) for state in bucket.states)
        due = t in (1, 2, 4) or (t + order) % every == 0 or age >= oldest
        if due:
            for state in bucket.states:
                state["rooted"] = t
        return due


# -------------------------------------------------------------------------------- the manager


class _Running:
    """Exponential mean of a number whose spikes are clipped, so that one cannot poison it."""

    def __init__(self, rate: float) -> None:
        self.rate, self.mean, self.deviation, self.count = rate, 0.0, 0.0, 0

    def update(self, x: float) -> float:
        self.count += 1
        if self.count == 1:
            self.mean = x
            return x
        delta = x - self.mean
        if self.count > 10 and self.deviation > 0:
            delta = min(max(delta, -5 * self.deviation), 5 * self.deviation)
        rate = max(self.rate, 1 / self.count)
        self.mean += rate * delta
        self.deviation += rate * (abs(delta) - self.deviation)
        return self.mean


class Guidance:
    """How long the next step should be, and how wide its region, from what the last one showed.

    With s the last step, a = <g_before, s> and b = <g_after, s> (running means), kappa = b/a says
    how much of the promised descent is still there after the step: 1 for a tiny step, 0 at the
    minimum along it, negative beyond; (1 + kappa)/2 is the trust-region ratio of actual to
    predicted reduction on a quadratic. Above GROW_ABOVE the wanted length of a step grows, below
    shrink_below it shrinks; between them it stays, and the schedule anneals. Where gradients have
    little noise, steps of a good length swing across the steep directions, and kappa is about -0.5;
    at -1 a step gains nothing. Where the loss is concave kappa stays near 1 however long the step,
    hence LONGEST; where a few steps swing wildly it may be far below -1 for a while, and nothing
    would lengthen steps again, hence SHORTEST. The network learns to foresee that correction.
    A slow mean of kappa tells whether steps do nothing but swing (`swing`).

    The multiplier is what brings the base rate to the wanted length, so the base rate itself
    hardly matters; what a multiplier of 0.1 leaves too long, a cap cuts.

    network: None for the plain rule, a multiplier of 1. step_length, shrink_below: as the
    configuration's.
    """

    KAPPA_RATE = 0.2  # of the running means whose ratio is kappa
    GROW_ABOVE = 0.3  # kappa; see EXPERIMENTS.md
    GAIN = 0.4  # decades an observation, for each unit of kappa beyond the two limits
    SWINGS = (-0.4, -0.7)  # mean kappa where steps begin to swing, and where they do nothing else
    SWING_RATE = 0.05  # of that mean: a few wild steps are no swings
    LONGEST = 0.14  # kappa grows no wanted length beyond this (or a longer step_length)
    SHORTEST = 0.2  # of step_length: below it kappa shrinks no wanted length
    GUIDED = 0.3  # share of the run after which the length is left to the schedule
    SETTLE = 0.05  # share of the run in which regions are fitted to the proposals at once
    EVERY = 2  # steps from one observation to the next

    def __init__(
        self,
        network: AuxiliaryNeuralNetwork | None,
        step_length: float,
        shrink_below: float = HybridTrainingConfig.shrink_below,
    ) -> None:
        self.network, self.step_length, self.shrink_below = network, step_length, shrink_below
        self.fast, self.slow, self.norm = _Running(0.3), _Running(0.05), _Running(0.05)
        self.descent, self.curved = _Running(self.KAPPA_RATE), _Running(self.KAPPA_RATE)
        self.promised: float | None = None  # <g_t, s_t> of the newest step
        self.proposal: float | None = None  # log10 of its length over the region's centre
        self.kappa, self.usual = 0.0, _Running(self.SWING_RATE)
        self.length = math.log10(step_length)  # wanted, at the schedule's peak
        self.peak = 0.0  # the largest base rate seen
        self.share = 1.0  # of the peak rate, by the schedule, at the newest step

    def observed(self, before: float, after: float) -> tuple[float, float]:
        """Running means of the slope before a step and after it, whose ratio is kappa."""
        return self.descent.update(before), self.curved.update(after)

    @property
    def swing(self) -> float:
        """How far steps swing across valleys, by mean kappa: 0 where noise hides it, to 1."""
        first, last = self.SWINGS
        return min(max((self.usual.mean - first) / (last - first), 0.0), 1.0)

    def describe(self, loss: float, norm: float, cluster_id: int, step: int) -> TrainingState:
        """A step in numbers, which join the running means where they are finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.fast.update(loss)
            self.slow.update(loss)
            self.norm.update(norm)
        return TrainingState(
            current_loss=loss,
            gradient_magnitude=norm,
            cluster_id=int(cluster_id),
            loss_trend=self.fast.mean - self.slow.mean,
            gradient_variance=self.norm.deviation**2,
            step_number=int(step),
        )

    def advise(self, state: TrainingState) -> tuple[float, float]:
        """(multiplier, decades by which to shift the radius) of the network alone."""
        if self.network is None or not self.peak:
            return 1.0, 0.0
        return self.network.predict(state)

    def lead(
        self, optimizer: ConstrainedOptimizer, state: TrainingState, left: float
    ) -> tuple[float, float, float]:
        """(multiplier, decades by which to shift the radius, cap) for the step to come, whose
        gradients are there. left: how much guidance still counts, 1 at the start, 0 at its end."""
        if self.network is None or not self.peak:
            return 1.0, 0.0, 1.0
        wish = None
        if self.promised is not None:
            a, b = self.observed(self.promised, float(optimizer.slope()))
            self.promised = None
            if a < 0:
                self.kappa = b / a
                self.usual.update(min(max(self.kappa, -1.0), 1.0))
                excess = max(self.kappa - self.GROW_ABOVE, 0.0)
                excess += min(self.kappa - self.shrink_below, 0.0)
                excess = min(max(excess, -0.5), 0.5)
                wish = self.GAIN * excess * self.share * max(left, 0.0)
                longest = math.log10(max(self.LONGEST, self.step_length))
                wish = min(wish, max(longest - self.length, 0.0))
                shortest = math.log10(self.SHORTEST * self.step_length)
                wish = max(wish, min(shortest - self.length, 0.0))
                self.length += wish
        if self.proposal is not None:
            self.network.learn(wish, self.proposal)
            self.proposal = None
        foreseen, shift = self.network.predict(state)
        nominal = optimizer.RELATIVE_GAIN * self.peak
        wanted = self.length + math.log10(foreseen) - math.log10(nominal)
        low, high = (math.log10(x) for x in MULTIPLIER_RANGE)
        clipped = min(max(wanted, low), high)
        return 10.0**clipped, shift, 10.0 ** min(wanted - clipped, 0.0)

    def learn_from(
        self, optimizer: ConstrainedOptimizer, *, measured: bool, proposed: bool, settles: bool
    ) -> None:
        """After a step. measured: it was kept, for its slope; proposed: the network learns its
        proposal's length; settles: regions are fitted to the proposals at once."""
        if measured:
            self.promised = float(optimizer.slope())
        if proposed:
            self.proposal = optimizer.proposal_log10
        if settles:
            excess = min(max(optimizer.proposal_log10 + 0.1, -0.5), 0.5)
            optimizer.scale_regions(10.0 ** (0.5 * excess))

    _PLAIN = ("promised", "proposal", "kappa", "length", "peak", "share")
    _AVERAGES = ("fast", "slow", "norm", "descent", "curved", "usual")

    def state_dict(self) -> dict[str, Any]:
        """In plain types and tensors."""
        return {
            **{k: getattr(self, k) for k in self._PLAIN},
            **{k: dict(vars(getattr(self, k))) for k in self._AVERAGES},
            "network": self.network.training_state() if self.network else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for k in self._PLAIN:
            setattr(self, k, state[k])
        for k in self._AVERAGES:
            vars(getattr(self, k)).update(state[k])
        if self.network is not None and state["network"] is not None:
            self.network.load_training_state(copy.deepcopy(state["network"]))


class FineTuningGuidance(Guidance):
    """Steers kappa to one value, and looks at every step while it does.

    Where gradients are mostly noise, a is mostly that noise against itself, and kappa is near 0 for
    steps that are three times too long or too short. Its sign still tells one from the other, for b
    is of fresh samples. The value is just beyond the best length for a single step.
    """

    GROW_ABOVE, GAIN, SHORTEST, EVERY = -0.03, 0.7, 0.1, 1
    CLIP = 0.2  # one step's kappa counts as no more

    def __init__(self, network: AuxiliaryNeuralNetwork | None, step_length: float) -> None:
        super().__init__(network, step_length, self.GROW_ABOVE)

    def observed(self, before: float, after: float) -> tuple[float, float]:
        # Of ratios: while steps shrink, means of slopes would be those of the long ones.
        ratio = min(max(after / (abs(before) or 1.0), -self.CLIP), self.CLIP)
        return super().observed(math.copysign(1.0, before), ratio)


#: What `HybridOptimizer` starts from, by where the weights come from (EXPERIMENTS.md).
_FROM_SCRATCH = {
    "lr": 6e-3,
    "momentum": 0.8,
    "weight_decay": 0.5,
    "use_matrix_geometry": True,
    "least_share": 0.3,
}
_PRETRAINED = {"lr": 1e-4, "momentum": 0.6, "weight_decay": 1e-5, "use_matrix_geometry": False}
#: What is near a start that is worth keeping is not to be left by long steps.
SHRINK_BELOW_PRETRAINED = -0.4


class HybridOptimizer(ConstrainedOptimizer):
    """`ConstrainedOptimizer` with its guidance and schedule inside, for any loop or trainer.

        optimizer = HybridOptimizer(model, max_steps=1000)
        ...
        loss.backward()
        optimizer.step()

    params: an nn.Module (best: embeddings and heads are recognised), ``named_parameters()``,
    parameters, or groups. pretrained: the weights are to be changed, not made (adapters are made);
    steps are then short, and guidance is `FineTuningGuidance`. Defaults: lr 6e-3, momentum
    0.8, weight_decay 0.5, least_share 0.3 and whitened matrices; with pretrained lr 1e-4, momentum
    0.6, weight_decay 1e-5 and none whitened. Any of them, and any other option of
    `ConstrainedOptimizer`, may be given. weight_decay is of matrices and heads, not of embeddings
    and vectors; a group of the caller's without one has it unless it holds vectors.
    step_length (a share of the weights, as the configuration's) is where guidance starts, at most
    Guidance.LONGEST; guided=False leaves it there. seed: of the auxiliary network.

    Schedule. With max_steps the rate rises over `warmup_fraction` of them, at most LONGEST_WARMUP
    steps, and falls to 0 at their end; after that it goes on at half the rate, falling as
    1/sqrt(t). Without max_steps it falls as 1/t from step ANNEAL on, and never ends; `end_in`
    brings it to 0. schedule=False keeps it. A schedule of the caller's replaces all that: an
    LRScheduler's (whose initial_lr or max_lr is its peak), or one that writes group["lr"] from the
    first step on (whose peak is lr). Rates that are written later are factors of the schedule.

    Average. Steps that stay long leave the weights shaking around a better place, which their mean
    is nearer to. `eval` puts the mean of about the last ninth of the steps into the model, `train`
    puts the weights back that steps go on from, as in schedule-free optimisers (arXiv 2405.15682);
    transformers' Trainer calls both where it evaluates. The window shrinks with the rate: where
    that falls to 0 the mean ends at the weights. average: True or False; None, the default, is True
    without max_steps. It takes the bytes of the weights in float32 (float64 if they are).
    Statistics of BatchNorm are not averaged: `torch.optim.swa_utils.update_bn` after `eval` makes
    them anew.

    Swings. Where gradients have little noise, steps of a good length swing across the valleys of
    the loss. The more they do (`Guidance.swing`), the nearer momentum comes to STEADY, in which
    swings cancel, and the less weights decay, down to a fifth. Each only where it was not given,
    from scratch and guided.

    Guidance is `Guidance`: it needs no loss, but is shown one by a closure or by `observe`. Its
    multiplier is of step_length, so the size of lr does not matter: its course does, and how rates
    of groups compare. What was used is group["guided_lr"]; group["lr"] is never written.

    Reading slopes and norms waits for a GPU. A loaded state brings its max_steps along (set the
    attribute to extend a run), and whether it averages. Raises ValueError for options that make no
    sense, TypeError for params that are none.
    """

    ANNEAL = 100  # steps before a rate without a horizon begins to fall
    WARMUP = 20  # its steps of warm-up
    WINDOW = 9  # the mean is of about 1 / WINDOW of the steps
    LONGEST_WARMUP = 100  # steps
    OVERTIME = 0.5  # of the rate, just after max_steps
    STEADY = 0.95  # momentum where steps do nothing but swing
    LIGHT = 0.2  # share of the weight decay that is left there

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        max_steps: int | None = None,
        *,
        pretrained: bool = False,
        schedule: bool = True,
        warmup_fraction: float = 0.05,
        step_length: float | None = None,
        guided: bool = True,
        average: bool | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if average is not None:
            _check("average", average, _BOOLEAN)
        if max_steps is not None:
            _check("max_steps", max_steps, _COUNT)
        if step_length is not None:
            _check("step_length", step_length, _POSITIVE)
        _check("warmup_fraction", warmup_fraction, _RULES["warmup_fraction"])
        _check("seed", seed, _RULES["seed"])
        start: dict[str, Any] = {**(_PRETRAINED if pretrained else _FROM_SCRATCH)}
        nominal = self.RELATIVE_GAIN * start["lr"]
        start |= options
        super().__init__(_grouped(params, start["weight_decay"]), **start)
        network = AuxiliaryNeuralNetwork(seed=seed) if guided else None
        if network is not None:
            network.radius_center = self.defaults["initial_radius"]
        self.max_steps, self.warmup_fraction = max_steps, warmup_fraction
        longest = Guidance.LONGEST if guided else math.inf
        if pretrained and _has_adapters(params):
            warnings.warn(
                "HybridOptimizer: low-rank adapters are made, not changed; they end at a lower "
                "loss without pretrained=True",
                stacklevel=2,
            )
        kind = FineTuningGuidance if pretrained else Guidance
        self.guidance = kind(network, min(step_length or nominal, longest))
        self._eased = () if pretrained else tuple({"momentum", "weight_decay"} - options.keys())
        self.steps = 0  # taken or skipped
        self._moved = 0  # of them those that moved something
        self._ending: tuple[int, int] | None = None  # from which step, over how many
        self._loss = 0.0
        self._known_lr = max(float(g["lr"]) for g in self.param_groups)
        self._peak = self._known_lr
        self._outer = False  # somebody else's schedule is at work
        self._scheduled = schedule
        self._by_length = guided or step_length is not None  # not by the size of lr
        self._average = max_steps is None if average is None else bool(average)
        self._averaged = False  # the model holds the mean

    # An optimiser is copied and pickled by what torch names, plus this.
    _OWN = ("max_steps", "warmup_fraction", "guidance", "steps", "_moved", "_ending", "_loss",
            "_known_lr", "_peak", "_outer", "_scheduled", "_by_length", "_average",
            "_averaged", "_eased")  # fmt: skip
    _known_lr, steps = 0.0, 0  # before there are any
    _STATE_BYTES = 1 << 16  # always as many: a checkpoint is read into what a fresh optimiser holds

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{k: getattr(self, k) for k in self._OWN}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, at any time. Where the group says no weight_decay it is the usual one, or 0
        if it holds vectors, too."""
        super().add_param_group(_with_decay(param_group, self.defaults["weight_decay"]))
        self._known_lr = max(self._known_lr, float(self.param_groups[-1]["lr"]))
        if not self.steps:
            self._peak = self._known_lr

    def observe(self, loss: Any) -> None:
        """Show the loss of the step to come; guidance works without. Where several processes train
        it is not used: theirs differ, and their steps must not."""
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return
        value = _plain(loss)
        self._loss = value if math.isfinite(value) else self._loss

    def end_in(self, steps: int) -> None:
        """From now on multiply the rate by a line that falls to 0 over so many steps. ValueError
        where a schedule of the caller's is at work."""
        _check("steps", steps, _COUNT)
        if self._outer:
            raise ValueError("end_in: a schedule of the caller's rules the rate; let that end")
        self._ending = (self.steps, steps)

    def schedule(self, step: int) -> float:
        """Share of the peak rate at a step (from 0), where no schedule of the caller's rules."""
        share = 1.0
        if not self._scheduled:
            pass
        elif self.max_steps is None:
            share = min((step + 1) / self.WARMUP, 1.0) * min(self.ANNEAL / max(step, 1), 1.0)
        elif step < self.max_steps:
            # A horizon that is far too long should not mean a warm-up that is.
            warmup = min(self.warmup_fraction, self.LONGEST_WARMUP / self.max_steps)
            share = schedule_factor(step, self.max_steps, warmup, "linear")
        else:
            share = self.OVERTIME * math.sqrt(self.max_steps / step)
        if self._ending is not None:
            begin, steps = self._ending
            share *= max(0.0, 1 - (step - begin) / steps)
        return share

    def _course(self) -> tuple[float, float]:
        """For the step to come: the rate as a share of its peak, and what groups' rates are to be
        multiplied by for it."""
        lr = max(float(g["lr"]) for g in self.param_groups)
        if lr == 0:
            return 0.0, 0.0
        peaks = [float(g[k]) for g in self.param_groups for k in ("initial_lr", "max_lr") if k in g]
        if peaks and not self._outer:
            self._outer, self._peak = True, 0.0  # what lr was before the scheduler is forgotten
        elif not self.steps and lr != self._known_lr:
            self._outer = True
        if self._outer:
            self._peak = max([self._peak, lr, *peaks])
            return lr / self._peak, 1.0
        share = self.schedule(self.steps)
        return share * lr / self._known_lr, share

    def _mixture(self, group: dict[str, Any]) -> tuple[float, float]:
        momentum, decay = super()._mixture(group)
        swing = self.guidance.swing
        if "momentum" in self._eased and momentum == self.defaults["momentum"]:
            momentum += (self.STEADY - momentum) * swing
        if "weight_decay" in self._eased and decay == self.defaults["weight_decay"]:
            decay *= 1 - (1 - self.LIGHT) * swing
        return momentum, decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns what the closure does. A gradient that is not finite, or nothing but
        zeros, moves no weight and leaves guidance alone; the schedule goes on. RuntimeError between
        `eval` and `train`."""
        if self._averaged:
            raise RuntimeError(
                "step: the model holds averaged weights; call the optimiser's train() after eval()"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is not None:
                self.observe(loss)
        magnitude = self._known_norm()
        share, course = self._course()
        step, guidance = self.steps, self.guidance
        self.steps += 1
        if not math.isfinite(magnitude) or not magnitude:
            self._take(None, 0.0, 1.0, 1.0, False, magnitude)
            self._join_average(step, share)
            return loss
        state = guidance.describe(self._loss, magnitude, 0, step)
        # Without a horizon guidance fades as the rate does.
        left = self.ANNEAL / (self.ANNEAL + step)
        settling = self.WARMUP
        if self.max_steps:
            left = 1 - step / (guidance.GUIDED * self.max_steps)
            settling = max(settling, int(guidance.SETTLE * self.max_steps))
        guidance.peak = guidance.step_length / self.RELATIVE_GAIN
        multiplier, shift, cap = guidance.lead(self, state, left)
        guidance.share = share
        factor = course * multiplier * (guidance.peak / self._peak if self._by_length else 1.0)
        for group in self.param_groups:
            group["guided_lr"] = factor * cap * float(group["lr"])
        every = guidance.EVERY if left > 0 else Guidance.EVERY
        learns = guidance.network is not None and share > 0 and step % every == 0
        measured = learns and left > 0
        self._take(None, factor, share * 10.0**shift, cap, measured, magnitude)
        self._moved += share > 0
        self._join_average(step, share)
        guidance.learn_from(
            self,
            measured=measured,
            proposed=learns,
            settles=share > 0 and self._moved <= settling and self.param_groups[0]["adapt_radius"],
        )
        return loss

    def _join_average(self, step: int, share: float) -> None:
        """After a step: its weights join their mean. Its window shrinks with the rate, and is no
        longer than what is left until the rate is 0, where that is known."""
        if not self._average:
            return
        taken, left, ahead = self._moved, 1.0, math.inf
        if self._outer:
            left = share
        elif self._scheduled and self.max_steps is not None:
            if step < self.max_steps:
                left = (self.max_steps - step) / self.max_steps
            else:
                taken = step - self.max_steps  # a new mean, of what comes after
        if self._ending is not None:
            begin, steps = self._ending
            ahead = max(begin + steps - step, 1)
        joining: dict[float, tuple[list[Tensor], list[Tensor]]] = {}  # by the weight of the newest
        for p, state in self.state.items():
            if "mean" not in state:
                continue
            if "average" not in state or state["average"].shape != p.shape:
                dtype = torch.float32 if p.dtype in _HALF else p.dtype
                state["average"] = p.detach().to(dtype, copy=True)
                continue
            count = max(1, min(taken, state["step"]))  # fewer steps of what was thawed
            rate = self.WINDOW / (count + self.WINDOW - 1) / max(left, 1e-30)
            rate = min(max(rate, self.WINDOW / (ahead + self.WINDOW - 1)), 1.0)
            means, weights = joining.setdefault(rate, ([], []))
            means.append(state["average"])
            weights.append(p.detach().to(state["average"].dtype))
        for rate, (means, weights) in joining.items():
            torch._foreach_lerp_(means, weights, rate)

    @torch.no_grad()
    def eval(self) -> None:
        """Put the averaged weights into the model, to evaluate, save or talk to it; `train` before
        the next forward pass of training. Until then the weights that were trained are kept, too.
        Nothing happens where nothing is averaged."""
        if self._averaged or not self._average or not self.steps:
            return
        self._averaged = True
        for p, state in self.state.items():
            if "average" in state and state["average"].shape == p.shape:
                state["trained"] = p.detach().clone()
                p.copy_(state["average"])

    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Put back the weights that steps go on from, whatever is in the model since `eval`; with
        mode False `eval`."""
        if not mode:
            return self.eval()
        if self._averaged:
            for p, state in self.state.items():
                trained = state.pop("trained", None)
                if trained is not None and trained.shape == p.shape:
                    p.copy_(trained)
            self._averaged = False

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the first group holds the rest, as bytes."""
        state = super().state_dict()
        own = {k: getattr(self, k) for k in self._OWN if k != "guidance"}
        file = io.BytesIO()
        torch.save({**own, "guidance": self.guidance.state_dict()}, file)
        packed = torch.zeros(self._STATE_BYTES, dtype=torch.uint8)
        packed[: len(file.getvalue())] = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        state["param_groups"][0] = {**state["param_groups"][0], "hybrid": packed}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the state is copied. ValueError for another optimiser's."""
        groups = state_dict["param_groups"]
        packed = groups[0].get("hybrid") if groups else None
        if packed is None:
            raise ValueError("load_state_dict: this is not the state of a HybridOptimizer")
        # Zeros after the end of a zip archive are read over.
        raw = bytes(packed.cpu().numpy()).rstrip(b"\0") + bytes(32)
        own = torch.load(io.BytesIO(raw), weights_only=True)
        if own["_averaged"] and not any("trained" in s for s in state_dict["state"].values()):
            raise ValueError(
                "load_state_dict: this was saved between eval() and train(), and the weights that "
                "were trained are not in it; save after train()"
            )
        plain = [{k: v for k, v in group.items() if k != "hybrid"} for group in groups]
        super().load_state_dict({**state_dict, "param_groups": plain})
        for k in self._OWN:
            if k != "guidance":
                setattr(self, k, own[k])
        self.guidance.load_state_dict(own["guidance"])
        if not any("taken" in state for state in self.state.values()):
            self.guidance.promised = None


def _grouped(params: nn.Module | Iterable[Any], decay: float) -> list[dict[str, Any]]:
    """Groups by kind, with decay for matrices and heads; what the caller grouped stays."""
    if isinstance(params, nn.Module):
        named = named_kinds(params, frozen=True)  # which may be thawed
    else:
        if isinstance(params, Tensor):
            raise TypeError("params: give a list of tensors, or a module, not one tensor")
        given = list(params)
        if given and isinstance(given[0], dict):
            return given
        if given and isinstance(given[0], Tensor):
            given = [("", p) for p in given]
        if not all(isinstance(x, tuple) and isinstance(x[-1], Tensor) for x in given):
            raise TypeError("params: give a module, tensors, pairs of name and tensor, or groups")
        named = [(n, p, _kind_by_name(n, p)) for n, p in given]
    if not any(p.requires_grad for _, p, _ in named):
        raise ValueError("params: nothing to train (an empty list, or a frozen model)")
    groups: dict[str, dict[str, Any]] = {}
    for _, p, kind in named:
        usual = decay if kind in ("matrix", "head") else 0.0
        group = groups.setdefault(kind, {"params": [], "kind": kind, "weight_decay": usual})
        group["params"].append(p)
    return list(groups.values())


def _has_adapters(params: Any) -> bool:
    """Whether a module trains low-rank adapters under their usual names (peft's)."""
    named = params.named_parameters() if isinstance(params, nn.Module) else ()
    return any("lora_" in name and p.requires_grad for name, p in named)


def _with_decay(group: dict[str, Any], decay: float) -> dict[str, Any]:
    """The caller's group; with the usual decay where it says none, unless it holds vectors, too."""
    params = group["params"]
    if isinstance(params, set):  # which torch refuses
        return group
    params = [params] if isinstance(params, Tensor) else list(params)
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]  # of named parameters
    usual = decay if all(p.ndim > 1 for p in tensors) else 0.0
    return {"weight_decay": usual, **group, "params": params}


def _kind_by_name(name: str, p: Tensor) -> str:
    """`parameter_kind` where there is no module to ask: embeddings go by their usual names."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    known = r"(\w+_)?(embed(ding)?s?|emb)|embed_tokens|wte|wpe"
    embedding = p.ndim == 2 and re.fullmatch(known, module)
    return parameter_kind(name, p, {id(p)} if embedding else set(), None)


class HybridOptimizationManager:
    """The three parts together: clusters of data, the auxiliary network, the constrained step.

    Two calling habits, told apart by what ``gradients`` is:

    - the gradients of all parameters, or of all trainable ones, as one flat vector in
      ``model.parameters()`` order, which takes the place of ``p.grad``; or None, to use ``p.grad``:
      the manager updates every trainable parameter of the model;
    - one number, the gradient norm (of a model with a single trainable weight: a Python number):
      the manager observes and advises, the model is not touched.

    A loss or a gradient that is not finite skips the step: it is recorded, and weights and running
    means stay.

    The processes of a DistributedDataParallel model (pass it, not what it wraps) take the same
    step: the mean of their losses and, in logarithms, of their multipliers and cluster rates.
    """

    def __init__(self, config: HybridTrainingConfig | None = None) -> None:
        self.config = c = config if config is not None else HybridTrainingConfig()
        self.auxiliary_nn = AuxiliaryNeuralNetwork(
            hidden_size=c.auxiliary_nn_hidden_size,
            learning_rate=c.auxiliary_nn_learning_rate,
            seed=c.seed,
        )
        self.auxiliary_nn.radius_center = c.initial_trust_radius
        self.guidance = Guidance(self.auxiliary_nn, c.step_length, c.shrink_below)
        self.data_clusterer = KMeansClustering(c.data_clusters, seed=c.seed)
        self.param_clusterer = KMeansClustering(c.parameter_clusters, seed=c.seed)
        # Its groups are made at the first step.
        self.constrained_opt = ConstrainedOptimizer(initial_radius=c.initial_trust_radius)
        self.trust_radius = c.initial_trust_radius
        self.data_labels: np.ndarray | None = None
        self.parameter_labels: dict[str, int] = {}
        self.metrics_history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self.taken_steps = 0
        self.skipped_steps = 0
        self.consecutive_skips = 0
        self._last_loss = float("nan")  # of the newest step taken
        self._multipliers = self._active = 0.0  # sums over the steps taken
        self._model: nn.Module | None = None
        self._cluster_loss: dict[int, _Running] = {}
        self._rng = np.random.default_rng(c.seed)
        self._orders: dict[int, np.ndarray] = {}

    # ------------------------------------------------------------------------ clusters of data

    def setup_data_clustering(self, data: Any) -> np.ndarray:
        """Cluster samples (first axis): token ids (integers) or features (floats) -> labels (n,).

        Ids become hashed n-gram features (`text_features`); features are standardised.
        """
        array = _as_array(data)
        if not len(array):
            raise ValueError("setup_data_clustering: no samples")
        if np.issubdtype(array.dtype, np.integer):
            features = text_features(array, seed=self.config.seed)
        else:
            features = _as_matrix(array)
            features = (features - features.mean(0)) / np.maximum(features.std(0), 1e-12)
        self.data_clusterer = KMeansClustering(self.config.data_clusters, seed=self.config.seed)
        self.data_labels = self.data_clusterer.fit(features).labels
        self._orders.clear()
        return self.data_labels

    def get_cluster_batch(
        self, data: Any, batch_size: int, cluster_idx: int, *, return_indices: bool = False
    ) -> Any:
        """batch_size samples of one cluster, walked in random order without replacement (and
        again from the start when the cluster is used up). With return_indices: (batch, indices
        into data), so that labels can follow. An empty cluster gives samples of any cluster."""
        if self.data_labels is None:
            raise ValueError("get_cluster_batch: call setup_data_clustering first")
        if len(data) != len(self.data_labels):
            raise ValueError(f"{len(data)} samples; clustered {len(self.data_labels)}")
        if not _integer(1)(batch_size):
            raise ValueError(f"batch_size must be at least 1, not {batch_size!r}")
        members = np.flatnonzero(self.data_labels == cluster_idx)
        if not len(members):
            members = np.arange(len(data))
        order = self._orders.get(cluster_idx, np.empty(0, int))
        while len(order) < batch_size:
            order = np.concatenate([order, self._rng.permutation(members)])
        indices, self._orders[cluster_idx] = order[:batch_size], order[batch_size:]
        picked = torch.from_numpy(indices).to(data.device) if isinstance(data, Tensor) else indices
        batch = (
            data[picked] if isinstance(data, (Tensor, np.ndarray)) else [data[i] for i in picked]
        )
        return (batch, indices) if return_indices else batch

    def observe_clusters(self, clusters: Iterable[int], losses: Iterable[float]) -> None:
        """Tell which cluster each sample came from and what it lost (reducible loss is best: with
        a teacher, the KL divergence)."""
        for k, x in zip(clusters, losses, strict=True):
            if math.isfinite(x):
                self._cluster_loss.setdefault(int(k), _Running(0.05)).update(float(x))

    def cluster_rates(self, step: int) -> np.ndarray:
        """Learning-rate factor of each cluster (data_clusters,), in [1/2, 2].

        sqrt(cluster's running loss / mean over clusters), shrunk to 1 while few samples were
        seen and annealed to 1 towards max_steps, so the objective ends unweighted.
        """
        rates = np.ones(self.config.data_clusters)
        seen = {k: r for k, r in self._cluster_loss.items() if 0 <= k < len(rates)}
        if not self.config.use_clustering or len(seen) < 2:
            return rates
        if step < self.config.clustering_warmup_steps:
            return rates
        mean = sum(r.mean for r in seen.values()) / len(seen)
        left = max(0.0, 1 - step / self.config.max_steps)
        for k, r in seen.items():
            trust = r.count / (r.count + 20)
            rates[k] = (max(r.mean, 1e-12) / max(mean, 1e-12)) ** (0.5 * trust * left)
        return np.clip(rates / rates[list(seen)].mean(), 0.5, 2.0)

    # -------------------------------------------------------------------- observing and stepping

    def compute_training_state(
        self, loss: Any, gradients: Any, cluster_id: int, step: int
    ) -> TrainingState:
        """Update the running statistics with one step and describe it.

        gradients: a flat vector, or one number (its norm), or None (0). Values that are not
        finite are reported but leave the statistics alone.
        """
        value = _plain(loss)
        if gradients is None:
            norm = 0.0
        else:
            norm = float(torch.linalg.vector_norm(torch.as_tensor(gradients).detach().double()))
        return self.guidance.describe(value, norm, cluster_id, step)

    def schedule(self, step: int) -> float:
        """`schedule_factor` with this configuration's values."""
        c = self.config
        return schedule_factor(
            step, c.max_steps, c.warmup_fraction, c.lr_schedule, c.decay_fraction
        )

    def optimization_step(
        self,
        model: nn.Module,
        loss: Any,
        gradients: Any,
        cluster_id: int = 0,
        step: int | None = None,
        base_lr: float | None = None,
    ) -> dict[str, Any]:
        """One step, or one piece of advice (see the class).

        cluster_id: of the batch's data, for `cluster_rates`; -1: of several. step: its number, from
        0, by which schedule and guidance go; None: as many as were taken or skipped before. base_lr
        replaces the configured rate *and* its schedule. The largest one so far counts as its peak,
        so guidance undoes a warm-up of the caller's; at 0 only the running means move.

        Returns loss, learning_rate (base, multiplier and cluster's rate; 0 of a skipped step),
        lr_multiplier, trust_radius, constraint_active, efficiency and update_magnitude as
        `ConstrainedUpdateInfo` has them, gradient_magnitude, skipped, active_share (share of the
        parameter clusters whose step was shortened), and cluster_rate.

        Raises ValueError for another model than the one before, for a parameter that is to be
        trained and was frozen or not there at the first step, where no parameter has a gradient,
        and for a flat gradient of another length; RuntimeError for sparse, complex or sharded
        gradients.
        """
        step = self.taken_steps + self.skipped_steps if step is None else step
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        if base_lr is not None:
            _check("base_lr", base_lr, _AT_LEAST_0)
        advise = gradients is not None and torch.as_tensor(gradients).numel() == 1
        trainable = [p for p in model.parameters() if p.requires_grad]
        if advise and sum(p.numel() for p in trainable) == 1:
            advise = isinstance(gradients, (int, float))
        if not advise:
            if gradients is not None:
                self._scatter(model, torch.as_tensor(gradients))
            elif trainable and all(p.grad is None for p in trainable):
                raise ValueError("no parameter has a gradient; call loss.backward() first")
            self.bind(model)
            magnitude = self.constrained_opt._known_norm()
        else:
            magnitude = float(torch.as_tensor(gradients))
        value = _plain(loss)
        several = isinstance(model, nn.parallel.DistributedDataParallel) and not advise
        if several:  # skip everywhere or nowhere
            (value,) = self._mean_over_ranks(model, [value])
        if not math.isfinite(value) or not math.isfinite(magnitude):
            self.consecutive_skips += 1
            return self._record(value, 0.0, 1.0, 0.0, False, magnitude, 0.0, 1.0, skipped=True)
        self.consecutive_skips = 0

        c = self.config
        state = self.compute_training_state(value, magnitude, cluster_id, step)
        base = base_lr if base_lr is not None else c.base_learning_rate * self.schedule(step)
        guidance = self.guidance
        guidance.network = self.auxiliary_nn if c.use_auxiliary_nn else None
        guidance.peak = max(guidance.peak, base if base_lr is not None else c.base_learning_rate)
        cap = 1.0
        if advise:
            multiplier, shift = guidance.advise(state)
        else:
            left = 1 - step / (guidance.GUIDED * c.max_steps)
            multiplier, shift, cap = guidance.lead(self.constrained_opt, state, left)
        guidance.share = base / guidance.peak if base else 0.0
        rates = self.cluster_rates(step)
        rate = float(rates[cluster_id]) if 0 <= cluster_id < len(rates) else 1.0
        if several:  # clusters, networks differ
            logs = [math.log10(multiplier), shift, math.log10(cap), math.log10(rate)]
            logs = self._mean_over_ranks(model, logs)
            shift = logs.pop(1)
            multiplier, cap, rate = (10.0**x for x in logs)
        lr = base * multiplier * rate
        if advise:
            return self._record(value, lr, multiplier, 0.0, False, magnitude, 0.0, rate)

        for group in self.constrained_opt.param_groups:
            group["lr"] = lr
        learns = c.use_auxiliary_nn and base > 0  # from a step that was taken
        every_second = learns and (self.taken_steps + self.skipped_steps) % 2 == 0
        measure = every_second and step < guidance.GUIDED * c.max_steps
        self.constrained_opt.step(
            radius_scale=guidance.share * 10.0**shift,
            cap=cap,
            keep_step=measure,
            gradient_norm=magnitude,
        )
        guidance.learn_from(
            self.constrained_opt,
            measured=measure,
            proposed=every_second,
            settles=learns and c.trust_radius_adaptation and step < guidance.SETTLE * c.max_steps,
        )
        info = self.constrained_opt.info
        self.trust_radius = info.constraint_radius
        return self._record(
            value,
            lr,
            multiplier,
            info.update_magnitude,
            info.constraint_active,
            magnitude,
            self.constrained_opt.active_share,
            rate,
            efficiency=info.efficiency,
        )

    @staticmethod
    def _mean_over_ranks(model: Any, values: Sequence[float]) -> list[float]:
        """Of numbers that differ: what all processes of a DistributedDataParallel model's group
        then go on with."""
        group = model.process_group
        x = torch.tensor(values, dtype=torch.float64, device=next(model.parameters()).device)
        torch.distributed.all_reduce(x, group=group)
        return (x / torch.distributed.get_world_size(group)).tolist()

    def _record(
        self,
        loss: float,
        lr: float,
        multiplier: float,
        update: float,
        active: bool,
        magnitude: float,
        share: float,
        rate: float,
        *,
        efficiency: float = 1.0,
        skipped: bool = False,
    ) -> dict[str, Any]:
        result = {
            "loss": loss,
            "learning_rate": lr,
            "lr_multiplier": multiplier,
            "trust_radius": self.trust_radius,
            "update_magnitude": update,
            "efficiency": efficiency,
            "constraint_active": active,
            "gradient_magnitude": magnitude,
            "active_share": share,
            "cluster_rate": rate,
            "skipped": skipped,
        }
        self.metrics_history.append(result)
        if skipped:
            self.skipped_steps += 1
        else:
            self.taken_steps += 1
            self._last_loss = loss
            self._multipliers += multiplier
            self._active += share
        return result

    # ------------------------------------------------------------------- parameters and clusters

    def bind(self, model: nn.Module) -> None:
        """Cluster the model's parameters and fill the optimiser's groups now. The first step does
        so by itself; what reads groups before it needs this, such as `GradScaler.unscale_`, which
        is given ``constrained_opt``. Where gradients are at hand they are clustered by, too.

        ValueError for another model than the one before, and for one without trainable parameters.
        """
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        opt = self.constrained_opt
        if self._model is model:
            known = {id(p) for group in opt.param_groups for p in group["params"]}
            for name, p in model.named_parameters():
                if p.requires_grad and id(p) not in known:
                    raise ValueError(
                        f"{name} was frozen, or not there, at this manager's first step; make a "
                        "new manager, or freeze only after the first step"
                    )
            return
        if self._model is not None:
            raise ValueError("this manager already steps another model; make a new manager")
        c = self.config
        named = named_kinds(model)
        if not named:
            raise ValueError("the model has no trainable parameters")
        _require_dense(p.grad for _, p, _ in named if p.grad is not None)
        labels = [int(k) for k in self._cluster_parameters(named)]
        self.parameter_labels = {n: k for (n, _, _), k in zip(named, labels, strict=True)}
        # Not a new optimiser: the caller may hold this one.
        opt.defaults.update(
            lr=c.base_learning_rate,
            momentum=c.momentum,
            initial_radius=c.initial_trust_radius,
            adapt_radius=c.trust_radius_adaptation,
            use_trust_region=c.use_trust_region,
            use_matrix_geometry=c.use_matrix_geometry,
        )
        for kind in dict.fromkeys(k for _, _, k in named):
            mine = [(p, x) for (_, p, k), x in zip(named, labels, strict=True) if k == kind]
            opt.add_param_group(
                {
                    "params": [p for p, _ in mine],
                    "clusters": [x for _, x in mine],
                    "kind": kind,
                    "weight_decay": c.weight_decay if kind in ("matrix", "head") else 0.0,
                }
            )
        self._model = model

    def _cluster_parameters(self, named: Sequence[tuple[str, nn.Parameter, str]]) -> np.ndarray:
        """Labels (tensors,) from kind, size, aspect, weight scale, gradient scale, sensitivity."""
        count = self.config.parameter_clusters
        if count == 1:
            return np.zeros(len(named), int)
        self.param_clusterer = KMeansClustering(count, seed=self.config.seed)
        rows = []
        for _, p, kind in named:
            if not p.numel():
                rows.append([4.0 * (kind == k) for k in _KINDS] + [0.0] * 5)
                continue
            height = p.shape[0] if p.ndim else 1
            w = p.detach().double()
            g = torch.zeros_like(w) if p.grad is None else p.grad.detach().double()
            logs = [
                float(w.square().mean().sqrt()),
                float(g.square().mean().sqrt()),
                float((w * g).sum().abs()),
            ]
            rows.append(
                [4.0 * (kind == k) for k in _KINDS]
                + [math.log10(p.numel()), math.log10(height / (p.numel() / height))]
                + [math.log10(max(x, 1e-6)) if math.isfinite(x) else 0.0 for x in logs]
            )
        features = np.array(rows)
        scale = features[:, len(_KINDS) :].std(0)
        features[:, len(_KINDS) :] /= np.where(scale > 0, scale, 1)
        return self.param_clusterer.fit(features).labels

    @staticmethod
    def _scatter(model: nn.Module, flat: Tensor) -> None:
        """Flat gradient, in model.parameters() order, -> p.grad of each trainable parameter."""
        every = list(model.parameters())
        params = [p for p in every if p.requires_grad]
        count = sum(p.numel() for p in params)
        flat = flat.detach().reshape(-1)
        if flat.numel() != count:
            params, count = every, sum(p.numel() for p in every)
        if flat.numel() != count:
            raise ValueError(f"gradients has {flat.numel()} entries; the model has {count}")
        offset = 0
        for p in params:
            part = flat[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()
            if p.requires_grad:
                p.grad = part.to(device=p.device, dtype=p.dtype, copy=True)

    # --------------------------------------------------------------------------- summary and state

    def get_summary(self) -> dict[str, Any]:
        """final_loss, metrics_history (of the newest HISTORY steps), trust_radius, total_steps,
        skipped_steps, avg_lr_multiplier, constraint_activation_rate (share of cluster-steps that
        were shortened), fallback_steps (where the network's output was not finite)."""
        n = max(1, self.taken_steps)
        return {
            "final_loss": self._last_loss,
            "metrics_history": list(self.metrics_history),
            "trust_radius": self.trust_radius,
            "total_steps": self.taken_steps,
            "skipped_steps": self.skipped_steps,
            "avg_lr_multiplier": self._multipliers / n if self.taken_steps else 1.0,
            "constraint_activation_rate": self._active / n,
            "fallback_steps": self.auxiliary_nn.fallbacks,
        }

    def back_off(self, factor: float) -> None:
        """Shorten the wanted step and shrink every region by a factor in (0, 1], and forget skips:
        after a return to an earlier state, from which the same steps would lead to the same end."""
        _check("factor", factor, (_number(0, 1, open_low=True), "a number in (0, 1]"))
        self.guidance.length += math.log10(factor)
        self.consecutive_skips = 0
        if self._model is not None:
            self.constrained_opt.scale_regions(factor)

    _PLAIN = (
        "trust_radius",
        "parameter_labels",
        "taken_steps",
        "skipped_steps",
        "consecutive_skips",
        "_last_loss",
        "_multipliers",
        "_active",
    )

    @property
    def kappa(self) -> float:
        """Of `Guidance`."""
        return self.guidance.kappa

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, in plain types and tensors: torch.load reads it with
        weights_only=True. As torch.optim's it holds the tensors themselves: copy.deepcopy it if
        it is to stay in memory while training goes on."""
        data = None
        if self.data_labels is not None:
            data = {
                "labels": torch.from_numpy(self.data_labels.copy()),
                "centroids": torch.from_numpy(self.data_clusterer.centroids.copy()),
                "inertia": self.data_clusterer.inertia,
            }
        return {
            "plain": {k: copy.deepcopy(getattr(self, k)) for k in self._PLAIN},
            "history": copy.deepcopy(list(self.metrics_history)),
            "data": data,
            "orders": {k: torch.from_numpy(order.copy()) for k, order in self._orders.items()},
            "cluster_loss": {k: dict(vars(r)) for k, r in self._cluster_loss.items()},
            "rng": copy.deepcopy(self._rng.bit_generator.state),
            "guidance": self.guidance.state_dict(),
            "optimizer": self.constrained_opt.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], model: nn.Module | None = None) -> None:
        """Restore `state_dict`, which is copied. model: what the steps before saving moved; may be
        left out where this manager has stepped it already. Raises ValueError where it is missing.
        """
        model = self._model if model is None else model
        if state["plain"]["parameter_labels"]:
            if model is None:
                raise ValueError("load_state_dict: steps were taken before saving; pass the model")
            self.bind(model)
            self.constrained_opt.load_state_dict(state["optimizer"])
        elif self._model is not None:  # of before the first step
            self._model, opt = None, self.constrained_opt
            opt.param_groups.clear()
            opt.state.clear()
            opt._cached = None
        for k, v in state["plain"].items():
            setattr(self, k, copy.deepcopy(v))
        self.metrics_history = deque(copy.deepcopy(state["history"]), maxlen=HISTORY)
        self.data_labels = None
        if (data := state["data"]) is not None:
            self.data_labels = self.data_clusterer.labels = data["labels"].numpy().copy()
            self.data_clusterer.centroids = data["centroids"].numpy().copy()
            self.data_clusterer.inertia = data["inertia"]
        self._orders = {k: order.numpy().copy() for k, order in state["orders"].items()}
        self._cluster_loss = {k: _Running(0.05) for k in state["cluster_loss"]}
        for k, v in state["cluster_loss"].items():
            vars(self._cluster_loss[k]).update(v)
        self._rng.bit_generator.state = state["rng"]
        self.guidance.load_state_dict(state["guidance"])


def create_hybrid_optimizer(
    config: HybridTrainingConfig | None = None,
) -> HybridOptimizationManager:
    """A manager with this configuration (the default one if None)."""
    return HybridOptimizationManager(config)


def get_default_config() -> HybridTrainingConfig:
    """A configuration with every default."""
    return HybridTrainingConfig()
