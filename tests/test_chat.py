"""Talking to a student, in both engines."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import urllib.request
from pathlib import Path

import pytest
import torch
from families import tiny_net, tiny_tokenizer
from test_export import WIDE

from lowbit import chat, export
from lowbit.files.packed import save_packed
from lowbit.generate import generate, stream
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.models.transformers_lm import TransformersLM
from lowbit.quantization.layers import quantize_model
from lowbit.text.tokenizers import TeacherTokenizer

pytest.importorskip("transformers")
ENGINES = ["torch"] + (["llama.cpp"] if importlib.util.find_spec("xllamacpp") else [])
TURNS = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A student that says the same token again and again, as GGUF too."""
    path = tmp_path_factory.mktemp("student")
    net = tiny_net("llama", **{**WIDE, "vocab_size": 300}, tie_word_embeddings=False)
    tokenizer = tiny_tokenizer(300)
    tokenizer.chat_template = TURNS
    a = tokenizer("a")["input_ids"][0]
    with torch.no_grad():  # the head reads one direction, which only "a" has
        for p in net.model.layers.parameters():
            if p.ndim == 2:
                p.mul_(0.01)
        net.model.embed_tokens.weight[:, 0] = 3.0
        net.lm_head.weight[:, 0] = 0
        net.lm_head.weight[a] = 0
        net.lm_head.weight[a, 0] = 30.0
    model = TransformersLM(net)
    quantize_model(model, "ternary")
    save_packed(path / "student.npz", model, TeacherTokenizer(tokenizer, 300).describe())
    pytest.importorskip("gguf")
    export.export(str(path), "gguf", None, None)
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_one_answer(folder, capsys, engine):
    """Of so many tokens, and up to a text that ends it."""
    words = [str(folder), "--engine", engine, "--prompt", "hi", "--temperature", "0"]
    assert chat.main([*words, "--max_tokens", "7"]) == 0
    assert capsys.readouterr().out == "aaaaaaa\n"
    assert chat.main([*words, "--stop", "aaa", "--system", "be brief"]) == 0
    assert set(capsys.readouterr().out) <= {"a", "\n"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_conversation(folder, capsys, monkeypatch, engine):
    """The history grows, is forgotten on request, and an empty line is nothing."""
    lines = iter(["hi", "", "and", "/reset", "new", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    told = []
    find = chat.find_engine

    def listen(*args):
        found = find(*args)
        answer = found.answer
        found.answer = lambda messages, o, say: (
            told.append(list(messages)),
            answer(messages, o, say),
        )
        return found

    monkeypatch.setattr(chat, "find_engine", listen)
    words = [str(folder), "--engine", engine, "--temperature", "0", "--max_tokens", "3"]
    assert chat.main([*words, "--system", "be kind"]) == 0
    assert capsys.readouterr().out.count("aaa\n") == 3
    turns = [[m["content"] for m in messages] for messages in told]
    assert turns == [["be kind", "hi"], ["be kind", "hi", "aaa", "and"], ["be kind", "new"]]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupt_ends_the_answer_only(folder, capsys, engine):
    """What was said stays; the handler from before is back."""
    found = chat.find_engine(str(folder), engine, None)
    o = argparse.Namespace(temperature=0.0, top_p=1.0, seed=0, stop=[], max_tokens=200)
    count = 0
    answer = found.answer

    def pressed(messages, o, say):
        def also(piece):
            nonlocal count
            count += len(piece)
            if count == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return say(piece)

        answer(messages, o, also)

    found.answer = pressed
    before = signal.getsignal(signal.SIGINT)
    said = chat.talk(found, [{"role": "user", "content": "hi"}], o)
    assert 5 <= len(said) < 100
    assert signal.getsignal(signal.SIGINT) is before


def test_a_student_of_bytes_goes_on_with_the_text(tmp_path, capsys):
    config = ModelConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    from lowbit.text.tokenizers import ByteTokenizer

    save_packed(tmp_path / "s.npz", CausalLM(config).initialise(0), ByteTokenizer().describe())
    assert chat.main([str(tmp_path), "--prompt", "hi", "--max_tokens", "4"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "stops", "said"),
    [("abc", [], "abc"), ("abUse", ["User:"], "ab"), ("abUsex", ["User:"], "abUsex"),
     ("a\ufffd", [], "a"), ("aab", ["abc", "b!"], "a")],
)  # fmt: skip
def test_what_may_end_an_answer_is_held_back(text, stops, said):
    assert text[: chat.sure_part(text, stops)] == said


def test_a_gguf_of_an_older_run_is_not_talked_to(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    os.utime(tmp_path / "student.gguf", (1, 1))
    assert chat.find_engine(str(tmp_path), "auto", None).name == "torch"


def test_mistakes(folder, tmp_path, capsys):
    for words, reason in {
        (str(tmp_path / "none"),): "no such file or folder",
        (str(tmp_path / "none.gguf"), "--engine", "llama.cpp"): "no such file",
        (str(tmp_path), "--engine", "llama.cpp"): "no up-to-date .gguf file",
        (str(folder), "--prompt", " "): "at least one character",
    }.items():
        assert chat.main(list(words)) == 2
        err = capsys.readouterr().err
        assert reason in err
        assert err.count("\n") == 1
    with pytest.raises(SystemExit) as e:
        chat.main([str(folder), "--top_p", "2"])
    assert e.value.code == 2


def test_a_nucleus_is_the_least_set_of_that_mass():
    """With top_p at nothing only the most likely token is left; with 1 any of the top_k."""
    model = CausalLM(ModelConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    model.initialise(0)
    greedy = generate(model, [1], 6, temperature=0)
    new = stream(model, [1], temperature=5.0, top_p=0.0)
    assert [next(new) for _ in range(6)] == greedy
    wide = stream(model, [1], temperature=5.0)
    assert [next(wide) for _ in range(6)] != greedy


def test_an_http_api_answers(folder):
    """What the guide says of servers: a GGUF behind the OpenAI-style API that llama.cpp has."""
    pytest.importorskip("xllamacpp")
    server = chat.open_server(next(folder.glob("*.gguf")), 256, 1)
    asked = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{server.listening_address}/v1/chat/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)
    assert found["choices"][0]["message"]["content"] == "aaaaa"
    assert found["usage"]["completion_tokens"] == 5
