"""The documents agree with the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from hybrid_optimization import HybridTrainingConfig
from lowbit import __version__
from lowbit.files.packed import load_packed, save_packed
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.quantization.layers import edge_layers, hold, quantize_model
from lowbit.text.tokenizers import ByteTokenizer

ROOT = Path(__file__).parent.parent
PAGES = sorted(p.name for p in ROOT.glob("*.md"))
RESULTS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("benchmarks/**/*.md"))


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


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site (mkdocs.yml) make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.S | re.M)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.M):
        plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w -]", "", plain).replace(" ", "-")
        assert anchor not in found, f"two headings {heading!r} in {path.name}"
        found.add(anchor)
    return found


@pytest.mark.parametrize("page", PAGES + RESULTS)
def test_links_and_named_files_exist(page):
    text = (ROOT / page).read_text("utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not re.match(r"https?:", link):
            name, _, anchor = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    if page in PAGES:
        for name in re.findall(r"`((?:lowbit|studies|benchmarks|tests)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), name


def test_a_broken_anchor_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A [link](x.md), `code_too`: b\n```\n# no heading\n```\n## 2. That\n")
    assert anchors(page) == {"a-link-code_too-b", "2-that"}


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """Strictly: every page is in its navigation, every link and anchor leads somewhere."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in PAGES + RESULTS:
        at = Path(page)
        folder = at.parent if at.name == "README.md" else at.with_suffix("")
        html = (tmp_path / "site" / folder / "index.html").read_text("utf-8")
        assert anchors(ROOT / page) <= set(re.findall(r'<h\d id="([^"]+)"', html))
        assert not re.search(r"<(?:link|script|img)[^>]+(?:src|href)=.?https?:", html), page


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## ([\d.]+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert newest[1] == __version__
    assert f"\nversion: {newest[1]}\ndate-released: {newest[2]}\n" in citation


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
        quantize_model(model, mode, more=edge_layers(model, 1))
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
