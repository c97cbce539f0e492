"""The documents agree with the code."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from hybrid_optimization import HybridTrainingConfig
from lowbit.files.packed import load_packed, save_packed
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.quantization.layers import hold, quantize_model
from lowbit.text.tokenizers import ByteTokenizer

ROOT = Path(__file__).parent.parent
PAGES = sorted(p.name for p in ROOT.glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_run(page):
    text = (ROOT / page).read_text("utf-8")
    for code in re.findall(r"(?<!<!-- reader -->\n)```python\n(.*?)```", text, re.S):
        exec(compile(code, page, "exec"), {})


def test_configuration_reference_is_the_dataclass():
    text = (ROOT / "HYBRID_OPTIMIZATION_GUIDE.md").read_text("utf-8")
    section = text.split("\n## Configuration\n")[1].split("\n## ")[0]
    table = re.findall(r"^\| `(\w+)` \| (\S+) \|", section, re.M)
    assert table == [(f.name, str(f.default)) for f in fields(HybridTrainingConfig)]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page):
    text = (ROOT / page).read_text("utf-8")
    links = [x.partition("#")[0] for x in re.findall(r"\]\(([^)]+)\)", text)]
    named = re.findall(r"`((?:lowbit|studies|benchmarks|tests)/[\w./-]+)`", text)
    for target in [x for x in links + named if x and not x.startswith("http")]:
        assert (ROOT / target).exists(), target


def test_ci_runs_the_command_of_the_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"<!-- test command -->\n```bash\n(.+)\n```", text)
    assert len(blocks) == 1
    assert "python -m pytest" in blocks[0]


def test_studies_carry_their_provenance():
    """Raw runs under benchmarks/ have a summary and a README beside them."""
    folders = [p.parent for p in (ROOT / "benchmarks").rglob("runs.jsonl")]
    assert folders
    for folder in folders:
        runs = [json.loads(x) for x in (folder / "runs.jsonl").read_text("utf-8").splitlines()]
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        assert (folder / "README.md").exists()
        for record in [*runs, summary]:
            assert {"commit", "cpu", "torch", "python"} <= record.keys()


@pytest.mark.parametrize("mode", ["ternary", "1bit", "int4"])
def test_the_guides_reader_reads_a_packed_file(tmp_path, monkeypatch, mode):
    """The same weights as ours, from numpy alone."""
    text = (ROOT / "HYBRID_OPTIMIZATION_GUIDE.md").read_text("utf-8")
    code = re.findall(r"<!-- reader -->\n```python\n(.+?)\n```", text, re.S)
    assert len(code) == 1
    config = ModelConfig(hidden_size=32, intermediate_size=33, num_hidden_layers=2)
    model = CausalLM(config).initialise(0)
    if mode == "int4":
        hold(model.embedding, 4)
    else:
        quantize_model(model, mode, first=1)
    (tmp_path / "student").mkdir()
    path = tmp_path / "student" / "student_quantized_ternary_1.58bit_qat.npz"
    save_packed(path, model, ByteTokenizer().describe())
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code[0], found)
    expected = load_packed(path)[0].state_dict()
    for name, weight in found["weights"].items():
        assert torch.equal(torch.from_numpy(weight), expected[name]), name
    assert found["weights"].keys() <= expected.keys()
