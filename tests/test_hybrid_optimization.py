"""The parts of the framework: configuration, k-means, the auxiliary network, the schedule."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_optimization
from hybrid_optimization import (
    AuxiliaryNeuralNetwork,
    HybridOptimizationManager,
    HybridTrainingConfig,
    KMeansClustering,
    TrainingState,
    create_hybrid_optimizer,
    get_default_config,
    schedule_factor,
)


def state(loss: float = 1.0, step: int = 0, norm: float = 1.0) -> TrainingState:
    return TrainingState(loss, norm, 0, 0.0, 0.0, step)


# ---------------------------------------------------------------------------- API contract


def test_training_state_features_are_in_order():
    s = TrainingState(1.0, 2.0, 3, 4.0, 5.0, 6)
    assert s.to_features().shape == (1, 6)
    assert s.to_features()[0].tolist() == [1, 2, 3, 4, 5, 6]


def test_config_defaults_are_the_documented_ones():
    want = dict(
        use_quantization=True,
        quantizer_scale=1.0,
        target_bits=1.58,
        use_clustering=True,
        data_clusters=8,
        parameter_clusters=4,
        use_auxiliary_nn=True,
        auxiliary_nn_hidden_size=16,
        auxiliary_nn_learning_rate=1e-3,
        use_trust_region=True,
        initial_trust_radius=0.01,
        trust_radius_adaptation=True,
        base_learning_rate=1e-3,
        max_steps=1000,
        batch_size=32,
        momentum=0.9,
        weight_decay=1e-5,
        log_interval=10,
        eval_interval=50,
    )
    config = get_default_config()
    assert {k: getattr(config, k) for k in want} == want


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data_clusters", -1),
        ("data_clusters", 2.5),
        ("parameter_clusters", 0),
        ("base_learning_rate", float("nan")),
        ("base_learning_rate", 0.0),
        ("initial_trust_radius", 0),
        ("initial_trust_radius", 2),
        ("target_bits", 3),
        ("target_bits", True),
        ("seed", 2**32),
        ("momentum", 1.0),
        ("weight_decay", -1e-9),
        ("weight_decay", float("inf")),
        ("max_steps", 0),
        ("use_trust_region", "yes"),
        ("lr_schedule", "zigzag"),
        ("quantizer_scale", -1.0),
        ("auxiliary_nn_hidden_size", True),
    ],
)
def test_config_refuses_nonsense_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        HybridTrainingConfig(**{field: value})
    config = HybridTrainingConfig()
    with pytest.raises(ValueError, match=field):
        setattr(config, field, value)
    assert getattr(config, field) == getattr(HybridTrainingConfig(), field)


def test_config_fields_can_be_set_later():
    config = HybridTrainingConfig()
    config.initial_trust_radius = 0.1
    assert create_hybrid_optimizer(config).trust_radius == 0.1


# --------------------------------------------------------------------------------- k-means


def test_kmeans_attributes_and_prediction():
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(m, 0.1, (30, 2)) for m in (0, 5, 10)])
    model = KMeansClustering(3).fit(X)
    assert model.centroids.shape == (3, 2)
    assert (model.predict(X) == model.labels).all()
    distance = ((X - model.centroids[model.labels]) ** 2).sum()
    assert model.inertia == pytest.approx(distance)
    info = model.get_cluster_info(X)
    assert sum(v["size"] for v in info.values()) == 90
    for k, v in info.items():
        np.testing.assert_allclose(v["mean"], X[model.labels == k].mean(0))
        np.testing.assert_allclose(v["std"], X[model.labels == k].std(0))


@pytest.mark.parametrize("X", [np.empty((0, 3)), np.array([[np.nan, 1.0]]), np.empty(0)])
def test_kmeans_refuses_empty_and_nan(X):
    with pytest.raises(ValueError, match="clustering needs"):
        KMeansClustering(2).fit(X)


@pytest.mark.parametrize("many", [False, True])
def test_features_with_a_large_offset(many, monkeypatch):
    """Timestamps: squares of 1.7e9 leave no digits for what tells samples apart."""
    if many:
        monkeypatch.setattr("hybrid_optimization.MANY_SAMPLES", 100)
    rng = np.random.default_rng(0)
    near = rng.normal(size=(400, 3)) + 20 * rng.integers(0, 3, (400, 1))
    far = near + np.array([1.7e9, 0, -4e8])
    model = KMeansClustering(3).fit(far)
    assert len(np.unique(model.labels)) == 3
    assert np.array_equal(model.predict(far), model.labels)
    same = KMeansClustering(3).fit(near).labels
    pairs = set(zip(same.tolist(), model.labels.tolist(), strict=True))
    assert len(pairs) == 3  # the same clusters under other numbers, or the same ones


def test_features_in_bfloat16():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = KMeansClustering(3).fit(x)
    assert np.array_equal(model.labels, KMeansClustering(3).fit(x.double().numpy()).labels)
    manager = HybridOptimizationManager(HybridTrainingConfig(data_clusters=3))
    assert len(manager.setup_data_clustering(x)) == 60


def test_kmeans_spare_clusters_are_empty():
    model = KMeansClustering(8).fit(np.array([[0.0], [1.0], [1.0]]))
    assert model.centroids.shape == (8, 1)
    assert sorted(v["size"] for v in model.get_cluster_info([[0.0], [1.0]]).values())[-2:] == [1, 1]


# ----------------------------------------------------------------------- auxiliary network


def test_network_starts_neutral():
    net = AuxiliaryNeuralNetwork()
    assert net.predict_learning_rate(state()) == 1.0
    assert net.predict_trust_region(state()) == pytest.approx(0.01)
    assert net(torch.zeros(5, 6)).shape == (5, 2)


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=5, max_size=5),
    st.integers(0, 10**9),
)
@settings(max_examples=50, deadline=None)
def test_predictions_stay_in_range(values, step):
    net = AuxiliaryNeuralNetwork()
    with torch.no_grad():
        net.output.weight.normal_(0, 100)
    s = TrainingState(values[0], values[1], 3, values[2], values[3], step)
    assert 0.1 <= net.predict_learning_rate(s) <= 10
    assert 0.001 <= net.predict_trust_region(s) <= 1


def test_broken_network_gives_way():
    net = AuxiliaryNeuralNetwork()
    with torch.no_grad():
        net.output.bias.fill_(float("nan"))
    assert net.predict_learning_rate(state()) == 1.0


@pytest.mark.parametrize("best", [0.3, 1.0, 4.0])
def test_feedback_learns_the_best_multiplier(best):
    """f = h x^2 / 2 and a base rate eta: the improvement of a step is largest at m = 1 / (eta h),
    whatever x is. The network must find it from losses alone."""
    h, eta, x = 2.0, 1 / (2.0 * best), 1.0
    net = AuxiliaryNeuralNetwork(learning_rate=0.01)
    for step in range(400):
        before = 0.5 * h * x * x
        m = net.predict_learning_rate(state(before, step, h * abs(x)))
        x -= m * eta * h * x
        after = 0.5 * h * x * x
        net.update_with_feedback(m, before - after)
        x = math.copysign(max(abs(x), 1e-3), x) if abs(x) < 100 else 1.0
    assert m == pytest.approx(best, rel=0.15)


def test_feedback_that_is_not_finite_changes_nothing():
    net = AuxiliaryNeuralNetwork()
    net.predict_learning_rate(state())
    before = copy.deepcopy(net.state_dict())
    net.update_with_feedback(1.0, float("nan"))
    net.update_with_feedback(1.0, float("-inf"))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_feedback_trains_the_weights():
    net = AuxiliaryNeuralNetwork()
    net.predict_learning_rate(state())
    before = copy.deepcopy(dict(net.named_parameters()))
    net.update_with_feedback(1.0, 0.5)
    assert any(not torch.equal(p, before[n]) for n, p in net.named_parameters())


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd", "constant"])
def test_schedule(kind):
    values = [schedule_factor(t, 100, 0.05, kind) for t in range(130)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in itertools.pairwise(values[4:]))
    assert all(v > 0 for v in values)
    if kind != "constant":
        assert values[99] <= 0.05


def test_many_samples_are_clustered_by_some_of_them(monkeypatch):
    """Four vocabularies of their own, windows beyond MANY_SAMPLES: the clusters are those of the
    vocabularies, as they are with all samples at once."""
    rng = np.random.default_rng(0)
    topic = np.arange(400) % 4
    ids = rng.integers(0, 30, (400, 40)) + 100 * topic[:, None]
    for many in (1000, 60):
        monkeypatch.setattr(hybrid_optimization, "MANY_SAMPLES", many)
        manager = HybridOptimizationManager(HybridTrainingConfig(data_clusters=4))
        labels = manager.setup_data_clustering(ids.astype(np.uint16))
        assert len(labels) == 400
        pairs = set(zip(topic.tolist(), labels.tolist(), strict=True))
        assert len(pairs) == 4
        again = HybridOptimizationManager(HybridTrainingConfig(data_clusters=4))
        assert np.array_equal(again.setup_data_clustering(ids), labels)
