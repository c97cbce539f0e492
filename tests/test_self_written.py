"""Text that the teacher writes: sampled from it, ended where it ends, resumed where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import tiny_folder

import distillation
from lowbit import UserError
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.models.teacher import load_teacher
from lowbit.options import parse_options
from lowbit.text import self_written
from lowbit.text.documents import find_files, read_documents
from lowbit.text.self_written import written_by
from lowbit.text.tokenizers import ByteTokenizer

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(self_written, "BATCH", 3)
    monkeypatch.setattr(self_written, "LENGTH", 24)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("chat"), "llama")
    model, tokenizer = load_teacher(str(folder))
    # The end of a turn is a token that this model often says.
    tokenizer.wrapped.chat_template = (
        "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>bot {% endif %}"
    )
    return model, tokenizer


def test_a_chat_is_a_question_and_an_answer(chat):
    """Opened by the template, the answer's header put in after the user's turn."""
    model, tokenizer = chat
    with torch.no_grad():
        model.net.lm_head.weight[1] += 0.3 * model.net.lm_head.weight.std()
    path = written_by(model, tokenizer, 200, seed=0)
    records = [json.loads(x) for x in path.read_text().splitlines()]
    texts = [r["text"] for r in records]
    assert all(t.startswith("<s>user ") for t in texts)
    asked = [t for t in texts if t.count("</s>") >= 1 and not t.endswith("</s>")]
    answered = [t for t in texts if t.count("</s>") == 2]
    for text in [*asked, *answered]:
        assert text.split("</s>")[1].startswith("<s>bot "[: len(text.split("</s>")[1])])
    assert sum({r["batch"]: r["tokens"] for r in records}.values()) >= 200


def test_interrupted_and_uninterrupted_write_the_same(chat):
    model, tokenizer = chat
    whole = written_by(model, tokenizer, 300, seed=1).read_text()
    lines = whole.splitlines(keepends=True)
    path = self_written.cached_path(model, 1)
    path.write_text("".join(lines[:4]) + lines[4][: len(lines[4]) // 2])  # killed in mid-batch
    told = []
    assert written_by(model, tokenizer, 300, 1, told.append).read_text() == whole
    assert sum(told) >= 300
    before = path.stat().st_mtime_ns
    written_by(model, tokenizer, 300, seed=1)
    assert path.stat().st_mtime_ns == before  # nothing was left to write
    assert written_by(model, tokenizer, 300, seed=2).read_text() != whole


@pytest.mark.parametrize("kind", ["transformers", "plain"])
def test_dropping_finished_documents_changes_none(kind, chat, monkeypatch):
    if kind == "plain":
        config = ModelConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                             max_position_embeddings=64, tie_word_embeddings=False)  # fmt: skip
        model, tokenizer = CausalLM(config).initialise(0), ByteTokenizer()
        ends = list(b"aeinost \n")
        monkeypatch.setattr(self_written, "end_ids", lambda _: ends)
        with torch.no_grad():
            model.lm_head.weight *= 3  # what comes next depends on what came before
    else:
        model, tokenizer = chat
    monkeypatch.setattr(self_written, "BATCH", 12)

    def written(share: float) -> tuple[list[str], int, int]:
        monkeypatch.setattr(self_written, "DROP_AT", share)
        kinds, calls = type(model), []

        def seen(cache, rows):
            calls.append(len(rows))
            return kinds.rows_of(model, cache, rows)

        monkeypatch.setattr(model, "rows_of", seen)
        texts, tokens = self_written.write_batch(model, tokenizer, torch.Generator().manual_seed(3))
        return texts, tokens, len(calls)

    *never, none = written(0.0)
    *always, dropped = written(1.0)
    assert always == never
    assert none == 0
    assert dropped > 3


def test_a_model_of_bytes_writes_too():
    config = ModelConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         max_position_embeddings=32)  # fmt: skip
    path = written_by(CausalLM(config).initialise(0), ByteTokenizer(), 100, seed=0)
    assert (
        len(list(read_documents(find_files([str(path)]))))
        == len(path.read_text().splitlines())
        >= 5
    )


def test_texts_follow_the_models_distribution(monkeypatch):
    """A model that can only alternate two bytes writes nothing else."""
    monkeypatch.setattr(self_written, "LENGTH", 12)
    config = ModelConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         max_position_embeddings=32)  # fmt: skip
    model = CausalLM(config).initialise(0)

    def head(x: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*x.shape[:-1], 256), -1e9)
        logits[..., [97, 98]] = 0.0
        return logits

    monkeypatch.setattr(model, "head", head)
    path = written_by(model, ByteTokenizer(), 1000, seed=0)
    text = "".join(d[1:] for _, d in read_documents(find_files([str(path)])))
    letters = [c for c in text if c in "ab"]
    assert len(letters) > 0.9 * len(text)  # the first byte is random
    assert 0.4 < letters.count("a") / len(letters) < 0.6


def test_the_run_on_its_own_text(chat, tmp_path, capsys):
    folder = tiny_folder(tmp_path / "teacher", "llama")
    words = (
        f"--hybrid --ternary --qat --teacher {folder} --data self --self_tokens 3000 --epochs 1 \
        --samples_per_epoch 4 --seq_len 16 --data_clusters 2 --device cpu \
        --output_dir {tmp_path / 'out'}"
    )
    assert distillation.main(words.split()) == 0
    assert "trained on no chats" not in capsys.readouterr().out


def test_a_cache_that_cannot_be_written(chat, tmp_path, monkeypatch):
    """The text is then kept for the process."""
    kept = written_by(*chat, 100, seed=0).read_text()
    Path(tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = written_by(*chat, 100, seed=0)
    assert path.read_text() == kept
    assert tmp_path not in path.parents


def test_how_much_is_written_is_asked_with_it():
    with pytest.raises(UserError, match="--self_tokens needs --data self"):
        parse_options(["--self_tokens", "100"])
