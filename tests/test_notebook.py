"""The notebook in examples/ runs, cell by cell, on a tiny teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_text
from families import tiny_folder

NOTEBOOK = Path(__file__).parent.parent / "examples" / "own_teacher.ipynb"


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    for package in ("transformers", "gguf", "matplotlib"):
        pytest.importorskip(package)
    import matplotlib

    before = matplotlib.get_backend()
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    settings, *rest = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    text = tmp_path / "text.txt"
    text.write_text(make_text(40_000), encoding="utf-8")
    small = "--epochs 2 --seq_len 32 --batch_size 4 --samples_per_epoch 12 --calibration_tokens 512"
    names: dict = {}
    exec(settings, names)
    names |= {
        "TEACHER": str(tiny_folder(tmp_path / "llama", "llama")),
        "TEXT": [str(text)],
        "OUTPUT": str(tmp_path / "student"),
        "EXTRA": small.split(),
    }
    for cell in rest:
        exec(cell, names)
    assert list((tmp_path / "student").glob("*.gguf"))
    assert matplotlib.get_backend() == before
    import matplotlib.pyplot as plt

    assert len(plt.gca().lines) == 2
    plt.close("all")
    assert "Low-bit weights are" in capsys.readouterr().out
