"""SentencePiece's pieces in GGUF: an engine cuts text as transformers does."""

from __future__ import annotations

import pytest
from conftest import make_text
from families import heard_by_engine, of_pieces, pieces_tokenizer

from lowbit import UserError
from lowbit.files.gguf_file import export_gguf
from lowbit.files.gguf_tokenizer import Vocabulary, opens_with_space, scores_of
from lowbit.files.packed import read_packed

pytest.importorskip("gguf")
pytest.importorskip("transformers")


@pytest.mark.parametrize("opens", [True, False])
def test_the_engine_cuts_pieces_as_we_do(tmp_path, opens):
    """The same distribution after a text as after the ids that transformers makes of it; of some
    ids there is no other text."""
    tokenizer = pieces_tokenizer(opens)
    export_gguf(read_packed(of_pieces(tmp_path, "llama", tokenizer)), tmp_path / "a.gguf")
    heard = heard_by_engine(tmp_path / "a.gguf", tokenizer.convert_tokens_to_ids("a"), 512)
    texts = [make_text(300), "The miller's 12345  letters,\n\n é don't ", "  北京 🙂", "x"]
    for text in texts:
        assert heard(text) == heard(tokenizer(text)["input_ids"])
    ids = tokenizer(texts[0])["input_ids"]
    assert len(ids) < 0.6 * len(texts[0])  # pieces, not letters
    assert heard(texts[0]) != heard([*ids[:-2], *ids[-1:]])


def test_tokens_that_take_spaces_away(tmp_path):
    """Phi-3's do; of other families the file could not say it."""
    from tokenizers import AddedToken

    tokenizer = pieces_tokenizer()
    turns = ["<|user|>", "<|end|>"]
    tokenizer.add_tokens([AddedToken(t, special=True, rstrip=True) for t in turns], True)
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True)], True)
    tokenizer.chat_template = "<|user|>\n{{ messages[0].content }}<|end|>\n"
    path = of_pieces(tmp_path, "phi3", tokenizer)
    export_gguf(read_packed(path), tmp_path / "a.gguf")
    heard = heard_by_engine(tmp_path / "a.gguf", tokenizer.convert_tokens_to_ids("a"), 512)
    text = "<|user|>\nthe mill<|end|>\nthe"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<0x0A>") not in ids
    assert heard(text) == heard(ids)
    with pytest.raises(UserError, match=r"spaces beside <\|user\|> away"):
        export_gguf(read_packed(of_pieces(tmp_path, "llama", tokenizer)), tmp_path / "b.gguf")


def test_pieces_without_scores():
    """Where no scores merge as the list of pairs does, there is no such file."""

    def vocabulary(*merges: str) -> Vocabulary:
        tokens = {t: i for i, t in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
        return Vocabulary(
            {"model": {"vocab": tokens, "merges": list(merges)}, "added_tokens": []}, None
        )

    whole = ("a b", "b c", "ab c", "a bc")
    assert scores_of(vocabulary(*whole)) == {"ab": 0.0, "bc": -1.0, "abc": -2.0}
    with pytest.raises(ValueError, match="not in the list"):
        scores_of(vocabulary(*whole[:3]))
    with pytest.raises(ValueError, match="stand apart"):
        scores_of(vocabulary("a b", "ab c", "b c", "a bc"))


def normalized(*steps: dict, cut: dict | None = None) -> dict:
    """What is done to a text before it is cut in pieces."""
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}, "pre_tokenizer": cut}


PREPEND = {"type": "Prepend", "prepend": "\u2581"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
META = {"type": "Metaspace", "replacement": "\u2581", "split": False}


@pytest.mark.parametrize(
    ("done", "opens"),
    [(normalized(PREPEND, REPLACE), True), (normalized(REPLACE), False),
     ({"normalizer": REPLACE, "pre_tokenizer": None}, False),
     (normalized(REPLACE, cut={"type": "Split", "pattern": {"String": " "}}), False),
     ({"normalizer": None, "pre_tokenizer": {**META, "prepend_scheme": "first"}}, True),
     ({"normalizer": None, "pre_tokenizer": {**META, "prepend_scheme": "never"}}, False),
     ({"normalizer": None, "pre_tokenizer": {**META, "split": True}}, None),
     ({"normalizer": None, "pre_tokenizer": None}, None),
     (normalized({"type": "NFKC"}, REPLACE), None)],
)  # fmt: skip
def test_what_is_done_to_a_text(done, opens):
    assert opens_with_space(done) is opens
