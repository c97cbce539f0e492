"""Typical words of clusters, and the picture of a run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib import image

from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.picture import Scenery, flip_columns, plot_metrics
from lowbit.quantization.layers import bits_of_blocks, quantize_model
from lowbit.text.tokenizers import UNCOUNTED, ByteTokenizer
from lowbit.text.typical import cluster_words, typical_words, words_of


def test_words_are_whole():
    assert words_of("ket opens a Socket_2 and the server's por") == {
        "opens",
        "socket",
        "and",
        "the",
        "server",
    }
    assert words_of("") == set()
    assert words_of("one two") == set()  # either may be cut


def test_typical_words_are_not_those_of_all():
    texts = [
        ["x the socket is open x", "x the socket and a server x"],
        ["x the parser is lost x"] * 3,
    ]
    assert typical_words(texts) == [["socket", "and"], ["lost", "parser"]]
    assert typical_words(texts, 1) == [["socket"], ["lost"]]


def test_a_cluster_with_no_word_of_its_own_has_none():
    assert typical_words([["x same words x"], ["x same words x"], []]) == [[], [], []]


@pytest.mark.parametrize("marked", [False, True])
def test_clusters_of_windows(marked):
    """Windows as a corpus has them, of a chat with marks in what is only read."""
    texts = [b"a socket waits z", b"a parser reads z", b"a parser sleeps "]
    windows = np.stack([np.frombuffer(t, np.uint8) for t in texts])
    if marked:
        windows = windows.astype(np.uint32) | UNCOUNTED
    words = cluster_words(windows, np.array([0, 1, 1]), 3, ByteTokenizer())
    assert words == ["socket, waits", "parser", ""]


def test_bits_of_blocks():
    config = ModelConfig(
        vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = quantize_model(CausalLM(config), "ternary", more=["1.mlp.up_proj"], high_bits=4)
    square, wide = 32 * 32, 32 * 64
    second = (1.58 * (4 * square + 2 * wide) + 4 * wide) / (4 * square + 3 * wide)
    assert bits_of_blocks(model) == pytest.approx([1.58, second])


def rows_of(epochs: int, blocks: int, *, hybrid: bool = True) -> list[dict]:
    rows = []
    for epoch in range(epochs):
        row = {
            "epoch": epoch,
            "train_ce": 3.0,
            "train_kl": 1.0,
            "val_loss_teacher": 2.5,
            "lr": 1e-3,
        }
        row |= {"val_loss_quantized": 3.0 - epoch / 10} if epoch % 2 else {}
        if hybrid:
            row |= {"lr_multiplier": 0.5, "step_asked": 2.0, "step_taken": 1.0}
            row |= {"kl_cluster_0": 1.0, "kl_cluster_1": "" if epoch else 2.0}
        rows.append(row | {f"code_flips_block_{i}": 0.01 * i for i in range(blocks)})
    return rows


@pytest.mark.parametrize(
    ("hybrid", "blocks", "bits", "panels"),
    [
        (True, 30, [1.58] * 29 + [4.0], 6),
        (True, 3, [1.58] * 3, 5),
        (False, 0, [], 3),
    ],
)
def test_a_panel_an_idea(tmp_path, monkeypatch, hybrid, blocks, bits, panels):
    drawn = []
    from matplotlib.figure import Figure

    kept = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), kept(figure, *a, **k))
    )
    rows = rows_of(4, blocks, hybrid=hybrid)
    assert len(flip_columns(rows)) == blocks
    about = Scenery("token", 4.0 if hybrid else math.nan, "calibrated", ["socket, server"], bits)
    path = plot_metrics(tmp_path / "a.png", rows, about)
    assert image.imread(path).shape[2] == 4
    axes = [ax for ax in drawn[0].axes if ax.get_visible()]
    assert len(axes) == panels
    labels = [t for ax in axes for t in ax.get_legend_handles_labels()[1]]
    assert ("before: calibrated" in labels) == hybrid
    assert ("socket, server" in labels) == hybrid
    assert ("cluster 1" in labels) == hybrid
