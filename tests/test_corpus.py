"""Reading, splitting and sampling text."""

from __future__ import annotations

import gzip
import json
import os
import string
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import make_text
from hypothesis import given
from hypothesis import strategies as st

from lowbit import UserError
from lowbit.text import corpus as corpora
from lowbit.text.corpus import cached_tokens, load_corpus, windows
from lowbit.text.documents import (
    SECTION_CHARS,
    VALIDATION_SHARE,
    Document,
    cached_stdlib_documents,
    deduplicate,
    find_files,
    into_sections,
    place,
    read_documents,
    stdlib_documents,
)
from lowbit.text.sampler import StratifiedSampler
from lowbit.text.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(*paths: str) -> list[Document]:
    return list(read_documents(find_files(paths)))


def numbered(n: int) -> list[Document]:
    return [(f"doc{i}", f"text of {i}") for i in range(n)]


# --------------------------------------------------------------------------------- reading


def test_readers(tmp_path: Path) -> None:
    """Text, Markdown and Python whole; JSON lines one document a line, blank lines skipped."""
    text = write(tmp_path, "a.txt", "plain\n\ntext")
    markdown = write(tmp_path, "b.md", "# Title")
    python = write(tmp_path, "c.py", "x = 1\n")
    lines = write(tmp_path, "d.jsonl", '{"text": "one\\n1", "id": 4}\n\n  \n{"text": "zwei é"}\n')
    assert read(text, markdown, python, lines) == [
        ("a.txt", "plain\n\ntext"),
        ("b.md", "# Title"),
        ("c.py", "x = 1\n"),
        ("d.jsonl:1", "one\n1"),
        ("d.jsonl:4", "zwei é"),
    ]


def test_folders_are_walked_in_order(tmp_path: Path) -> None:
    """Known suffixes at any depth and in any case, sorted; others are left alone, and so is what is
    hidden. Names are relative to the folder."""
    odd = ("a/x.bin", "n.txt.bak", ".git/description.txt", "a/.notes.md")
    for name in ("z.TXT", "a/b/c.md", "m.py", *odd):
        write(tmp_path, name, name)
    found = read(str(tmp_path))
    assert [t for _, t in found] == [n for n, _ in found] == ["a/b/c.md", "m.py", "z.TXT"]


def test_names_do_not_depend_on_how_a_folder_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So neither does the split, nor after the folder has moved: what was trained on is never
    validated on."""
    for i in range(40):
        write(tmp_path, f"docs/{i}.md", f"text {i}")
    monkeypatch.chdir(tmp_path)
    spellings = ["docs", "./docs", str(tmp_path / "docs"), "docs/../docs/"]
    names = [[n for n, _ in find_files([x])] for x in spellings]
    (tmp_path / "docs").rename(tmp_path / "moved")
    names.append([n for n, _ in find_files(["moved"])])
    assert all(x == names[0] for x in names)
    assert sum(place(n) < VALIDATION_SHARE for n in names[0]) in range(1, 10)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_byte_order_mark_and_windows_lines(tmp_path: Path, suffix: str) -> None:
    """A BOM goes and CRLF becomes LF, so the same text gives the same tokens."""
    body = "a\n\nb\n" if suffix == "txt" else '{"text": "a"}\n{"text": "b"}\n'
    plain = read(write(tmp_path, f"plain.{suffix}", body))
    raw = b"\xef\xbb\xbf" + body.replace("\n", "\r\n").encode()
    odd = read(write(tmp_path, f"odd.{suffix}", raw))
    assert [t for _, t in odd] == [t for _, t in plain]
    assert "\ufeff" not in odd[0][1]


BAD_FILES = {
    "binary": ("a.txt", b"text\0more", "a.txt is a binary file"),
    "latin-1": ("a.txt", b"caf\xe9 x", "a.txt is not UTF-8 (byte 3)"),
    "utf-16": ("a.md", "text".encode("utf-16"), "a.md is UTF-16"),
    "truncated utf-8": ("a.txt", "é".encode()[:1], "not UTF-8 (byte 0)"),
    "empty": ("a.txt", b"", "no text in"),
    "blank": ("a.txt", b" \n\t\n", "no text in"),
    "suffix": (
        "a.csv",
        b"text",
        "expected one of .txt, .md, .py, ",
    ),
    "no gzip": ("a.jsonl.gz", b'{"text": "a"}', "a.jsonl.gz is damaged, or no gzip file"),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-9], "is damaged, or no gzip"),
    "gzip json": ("a.jsonl.gz", gzip.compress(b"x"), "a.jsonl.gz line 1: expected"),
    "json": ("a.jsonl", b'{"text": "a"}\nnot json\n', "a.jsonl line 2: expected"),
    "json key": ("a.jsonl", b'{"txt": "a"}\n', "a.jsonl line 1: expected"),
    "json list": ("a.jsonl", b'["text"]\n', "a.jsonl line 1: expected"),
    "json number": ("a.jsonl", b"5\n", "a.jsonl line 1: expected"),
    "json deep": ("a.jsonl", b"[" * 100_000, "a.jsonl line 1: expected"),
    "json type": ("a.jsonl", b'{"text": 5}\n', "a.jsonl line 1: text is not a string"),
    "json surrogate": ("a.jsonl", b'{"text": "a\\ud800"}', "a.jsonl line 1: text holds half"),
    "chat no list": ("a.jsonl", b'{"messages": "hi"}', "line 1: messages is not a list"),
    "chat empty": ("a.jsonl", b'{"messages": []}', "line 1: messages is not a list"),
    "chat no role": ("a.jsonl", b'{"messages": [{"content": "a"}]}', "message 1 has no role"),
    "chat null": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": null}]}',
        "content of message 1 is not a string",
    ),
    "no parquet": ("a.parquet", b"PAR1 and more", "a.parquet is damaged, or no parquet file"),
    "json empty": ("a.jsonl", b'{"text": ""}\n', "no text in"),
}


def test_gzipped_lines_are_lines(tmp_path: Path) -> None:
    """The same documents, and found in a folder, too."""
    lines = b'{"text": "one"}\n{"text": "zwei \xc3\xa9"}\n'
    path = write(tmp_path, "d.jsonl.gz", gzip.compress(lines))
    found = read(path)
    assert [text for _, text in found] == ["one", "zwei \u00e9"]
    assert read(str(tmp_path)) == found


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Each is refused in one line that says which flag, file and why."""
    with pytest.raises(UserError) as e:
        read(write(tmp_path, name, content))
    assert message in str(e.value)
    assert str(e.value).startswith("--data: ")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["absent.txt", "absent/x.txt", "x" * 300])
def test_missing_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read(str(tmp_path / name))


def test_folder_without_text(tmp_path: Path) -> None:
    write(tmp_path, "data.bin", b"x")
    with pytest.raises(UserError, match=r"no \.txt, .* files under"):
        read(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_unreadable_permissions(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "text")
    os.chmod(path, 0)
    with pytest.raises(UserError, match="cannot read"):
        read(path)


def test_one_bad_file_spoils_the_folder(tmp_path: Path) -> None:
    """Nothing is skipped in silence."""
    write(tmp_path, "a.txt", "good")
    write(tmp_path, "b.txt", b"\0")
    with pytest.raises(UserError, match=r"b\.txt is a binary"):
        read(str(tmp_path))


# ----------------------------------------------------------------- paragraphs and sections


def test_deduplicate_keeps_first_occurrences() -> None:
    """Across documents, ignoring white space; documents left empty go."""
    documents = [
        ("a", "one\n\ntwo  words\n\none"),
        ("b", "two\n words\n \t\none"),
        ("c", "\nthree"),
    ]
    assert list(deduplicate(documents)) == [("a", "one\n\ntwo  words"), ("c", "three")]


PARAGRAPHS = st.lists(st.text(string.ascii_lowercase + " ", max_size=5), max_size=12)


@given(texts=st.lists(PARAGRAPHS, max_size=5))
def test_deduplicate_is_idempotent(texts: list[list[str]]) -> None:
    """No paragraph is left twice, none is lost, and a second pass changes nothing."""
    documents = [(str(i), "\n\n".join(t)) for i, t in enumerate(texts)]
    kept = list(deduplicate(documents))
    left = [" ".join(p.split()) for _, t in kept for p in t.split("\n\n")]
    assert len(left) == len(set(left))
    assert set(left) == {" ".join(p.split()) for t in texts for p in t} - {""}
    assert list(deduplicate(kept)) == kept


def test_sections_keep_the_text() -> None:
    """Sections end at paragraph ends, are about SECTION_CHARS long, and lose nothing."""
    text = make_text(50_000).strip()
    sections = into_sections([("a", text), ("b", "short")])
    assert sections[-1] == ("b#0", "short")
    mine = sections[:-1]
    assert [n for n, _ in mine] == [f"a#{i}" for i in range(len(mine))]
    assert "\n\n".join(t for _, t in mine) == text
    assert len(mine) > 8
    for _, section in mine[:-1]:
        assert SECTION_CHARS <= len(section) < 2 * SECTION_CHARS


def test_a_paragraph_longer_than_a_section_is_cut() -> None:
    """Text without blank lines can still be split, and every character is kept."""
    text = "x" * (2 * SECTION_CHARS) + "y" * 10
    sections = into_sections([("a", text)])
    assert [t for _, t in sections] == ["x" * SECTION_CHARS] * 2 + ["y" * 10]


# ----------------------------------------------------------------------------------- split


def halves(folder: Path, documents: list[Document]) -> tuple[list[str], list[str]]:
    """The texts that `tokenise` puts into training and into validation, in order."""
    folder.mkdir(exist_ok=True)
    corpora.tokenise(documents, TOKENIZER, folder)
    return tuple(  # type: ignore[return-value]
        x.split("\n\n") if (x := (folder / part).read_text()) else [] for part in corpora.PARTS
    )


def test_split_is_a_partition_in_order(tmp_path: Path) -> None:
    """Each document is in exactly one part, in its old order, at about the given share."""
    texts = [t for _, t in numbered(4000)]
    train, validation = halves(tmp_path, numbered(4000))
    assert sorted(train + validation) == sorted(texts)
    assert train == [t for t in texts if t in set(train)]
    assert validation == [t for t in texts if t in set(validation)]
    assert len(validation) / 4000 == pytest.approx(VALIDATION_SHARE, abs=0.012)


@given(extra=st.integers(0, 60), reverse=st.booleans())
def test_split_is_stable(extra: int, reverse: bool) -> None:
    """Added or reordered documents, or changed texts, do not move the old ones."""
    base, more = numbered(100), [(f"more{i}", f"x{i}") for i in range(extra)]
    documents = [(n, t + "!") for n, t in base] + more
    with tempfile.TemporaryDirectory() as folder:
        _, held = halves(Path(folder), base)
        _, later = halves(Path(folder), documents[::-1] if reverse else documents)
    assert held
    assert {t[:-1] for t in later if t.startswith("text")} == set(held)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_something_is_held_out_of_few_documents(tmp_path: Path, n: int) -> None:
    """The one whose name's hash is the least, where none is below the share."""
    train, validation = halves(tmp_path, numbered(n))
    assert train
    least = min(numbered(n), key=lambda d: place(d[0] + "#0"))
    assert least[1] in validation


# --------------------------------------------------------------------------------- windows


@given(length=st.integers(0, 60), seq_len=st.integers(1, 12))
def test_windows_overlap_by_one(length: int, seq_len: int) -> None:
    """Inputs tile the tokens, labels are the next tokens, and no whole window is lost."""
    tokens = np.arange(length, dtype=np.uint8)
    got = windows(tokens, seq_len)
    n = max(0, (length - 1) // seq_len)
    assert got.shape == (n, seq_len + 1)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got[:, :-1].ravel(), tokens[: n * seq_len])
    np.testing.assert_array_equal(got[:, 1:].ravel(), tokens[1 : n * seq_len + 1])
    np.testing.assert_array_equal(got[1:, 0], got[:-1, -1])


def test_documents_are_separated_by_a_blank_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing before the first or after the last, whatever is tokenised at once."""
    documents = [(f"d{i}", f"é{i}") for i in range(50)]
    whole = halves(tmp_path, documents)
    monkeypatch.setattr(corpora, "CHARACTERS_AT_ONCE", 5)
    assert halves(tmp_path, documents) == whole
    assert sorted(whole[0] + whole[1]) == sorted(t for _, t in documents)


def test_load_corpus(text_file: Path) -> None:
    """Both parts have windows, the counts are those of the tokens, and it is deterministic."""
    corpus = load_corpus([str(text_file)], 64, TOKENIZER)
    again = load_corpus([str(text_file)], 64, TOKENIZER)
    assert corpus.train.shape == ((corpus.train_tokens - 1) // 64, 65)
    assert corpus.validation.shape == ((corpus.validation_tokens - 1) // 64, 65)
    assert corpus.validation_tokens < corpus.train_tokens
    assert np.array_equal(corpus.train, again.train)
    assert corpus.fingerprint == again.fingerprint
    other = load_corpus([str(text_file)], 32, TOKENIZER)
    assert other.fingerprint == corpus.fingerprint  # of the text, not of the windows


def test_fingerprint_follows_the_text(text_file: Path, tmp_path: Path) -> None:
    """One changed character is another fingerprint."""
    text = text_file.read_text()
    path = write(tmp_path, "a.txt", text)
    first = load_corpus([path], 64, TOKENIZER)
    write(tmp_path, "a.txt", text[:-3] + "#" + text[-2:])
    second = load_corpus([path], 64, TOKENIZER)
    assert first.fingerprint != second.fingerprint


def test_tokens_are_made_once(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run maps the files of the first, which are made anew where one is damaged or the
    text has changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path, "a.txt", text_file.read_bytes())
    made = []
    tokenise = corpora.tokenise
    monkeypatch.setattr(corpora, "tokenise", lambda *a: (made.append(1), tokenise(*a)))
    first = load_corpus([path], 64, TOKENIZER)
    second = load_corpus([path], 32, TOKENIZER)
    assert len(made) == 1
    assert first.fingerprint == second.fingerprint
    expected = first.train[:50].copy()
    folder, kept = cached_tokens([path], TOKENIZER)
    assert kept
    assert sorted(x.name for x in folder.parent.iterdir()) == [folder.name]
    for spoil in (
        lambda: (folder / "train").write_bytes(b"short"),
        lambda: (folder / "index.json").write_text("{"),
        lambda: (folder / "index.json").unlink(),
        lambda: write(tmp_path, "a.txt", text_file.read_bytes() + b"more"),
    ):
        made.clear()
        spoil()
        found = load_corpus([path], 64, TOKENIZER)
        assert len(made) == 1
        assert np.array_equal(found.train[:50], expected)


def test_a_cache_that_cannot_be_written_only_costs_time(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_corpus([str(text_file)], 64, TOKENIZER)
    monkeypatch.setenv("XDG_CACHE_HOME", write(tmp_path, "file", "no folder"))
    found = load_corpus([str(text_file)], 64, TOKENIZER)
    assert found.fingerprint == expected.fingerprint
    assert np.array_equal(found.train, expected.train)


def test_a_text_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither half a cache nor a message of several lines."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path, "docs/a.txt", make_text(5000))
    write(tmp_path, "docs/b.txt", b"\xff")
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8"):
        load_corpus([str(tmp_path / "docs")], 64, TOKENIZER)
    assert not list((tmp_path / "cache" / "apl-hybrid").iterdir())


def test_parquet(tmp_path: Path) -> None:
    """A column of texts, or of chats; another file is refused by name."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    for name, columns in {
        "a.parquet": {"id": [1, 2], "text": ["one", "zwei é"]},
        "b.parquet": {"messages": [chat]},
        "c.parquet": {"words": ["x"]},
    }.items():
        parquet.write_table(arrow.table(columns), tmp_path / name)
    assert read(str(tmp_path / "a.parquet")) == [("a.parquet:1", "one"), ("a.parquet:2", "zwei é")]
    assert read(str(tmp_path / "b.parquet")) == [("b.parquet:1", chat)]
    with pytest.raises(UserError, match="no column text or messages"):
        read(str(tmp_path / "c.parquet"))


def test_chats_need_a_template(tmp_path: Path) -> None:
    line = '{"messages": [{"role": "user", "content": "hi"}]}\n'
    with pytest.raises(UserError, match=r"a\.jsonl:1 is a chat; that needs a teacher with a chat"):
        load_corpus([write(tmp_path, "a.jsonl", line)], 64, TOKENIZER)


@pytest.mark.parametrize("text", ["short", "one\n\ntwo"])
def test_too_little_text(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="too few for windows of 64"):
        load_corpus([write(tmp_path, "a.txt", text)], 64, TOKENIZER)


# ---------------------------------------------------------------------------------- sampler


def labels_of(sizes: list[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)) * 3, sizes))


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=7)


@given(sizes=SIZES, batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_without_replacement_inside_a_pass(sizes: list[int], batch: int, seed: int) -> None:
    """Before a cluster's window comes again, every other of its windows has come."""
    labels = labels_of(sizes)
    sampler = StratifiedSampler(labels, batch, seed)
    drawn = Counter()
    for _ in range(30):
        picked = sampler.next_batch()
        assert picked.shape == (batch,)
        drawn.update(picked.tolist())
        for k in np.unique(labels):
            counts = [drawn[i] for i in np.flatnonzero(labels == k)]
            assert max(counts) - min(counts) <= 1


@given(
    sizes=st.lists(st.one_of(st.integers(1, 9), st.integers(1, 3000)), min_size=1, max_size=12),
    batches=st.lists(st.integers(0, 17), min_size=1, max_size=60),
)
def test_proportional_at_all_times(sizes: list[int], batches: list[int]) -> None:
    """After n places a cluster has had its share of n to within one, whatever batch sizes."""
    labels = labels_of(sizes)
    sampler = StratifiedSampler(labels, 8, 0)
    share = np.array(sizes) / sum(sizes)
    counts = np.zeros(len(sizes))
    for size in batches:
        picked = sampler.next_batch(size)
        assert len(picked) == size
        counts += np.bincount(labels[picked] // 3, minlength=len(sizes))
        assert np.abs(counts - share * counts.sum()).max() < 1


def test_proportional_over_a_long_run() -> None:
    """Ten thousand batches of very uneven clusters do not drift."""
    sizes = [6, 4, 20, 20, 65, 1549, 1]
    labels = labels_of(sizes)
    sampler = StratifiedSampler(labels, 5, 0)
    counts = np.zeros(len(sizes))
    for _ in range(10_000):
        counts += np.bincount(labels[sampler.next_batch()] // 3, minlength=len(sizes))
    assert np.abs(counts - np.array(sizes) / sum(sizes) * 50_000).max() < 1


@given(sizes=SIZES, batch=st.integers(1, 9), before=st.integers(0, 12))
def test_state_round_trip(sizes: list[int], batch: int, before: int) -> None:
    """A sampler restored from JSON, whatever its seed, continues with the same batches."""
    sampler = StratifiedSampler(labels_of(sizes), batch, 1)
    for _ in range(before):
        sampler.next_batch()
    state = json.loads(json.dumps(sampler.state_dict()))
    want = [sampler.next_batch().tolist() for _ in range(12)]
    restored = StratifiedSampler(labels_of(sizes), batch, 2)
    restored.load_state_dict(state)
    assert [restored.next_batch().tolist() for _ in range(12)] == want


def test_a_saved_state_does_not_move() -> None:
    """Drawing on after state_dict leaves the saved state as it was."""
    sampler = StratifiedSampler(labels_of([5, 9]), 4, 0)
    state = sampler.state_dict()
    frozen = json.dumps(state)
    for _ in range(5):
        sampler.next_batch()
    assert json.dumps(state) == frozen


@pytest.mark.parametrize("batch", [1, 4, 5, 20])
def test_one_cluster_is_a_permutation(batch: int) -> None:
    """Passes over the windows are permutations, and different ones."""
    sampler = StratifiedSampler(np.full(20, 7), batch, 0)
    passes = [np.concatenate([sampler.next_batch() for _ in range(20 // batch)]) for _ in range(2)]
    for one in passes:
        assert sorted(one.tolist()) == list(range(20))
    assert passes[0].tolist() != passes[1].tolist()


def test_seeds_differ() -> None:
    a, b, c = (StratifiedSampler(labels_of([30, 30]), 20, s).next_batch() for s in (0, 0, 1))
    assert a.tolist() == b.tolist() != c.tolist()


def test_a_cluster_smaller_than_its_quota() -> None:
    """A batch larger than all windows takes each as often as it must, and its share."""
    sampler = StratifiedSampler(np.array([0, 0, 1]), 12, 0)
    for _ in range(3):
        assert Counter(sampler.next_batch().tolist()) == {0: 4, 1: 4, 2: 4}


def test_places_in_a_batch_are_mixed() -> None:
    """Clusters do not sit in fixed places of the batch."""
    labels = np.repeat([0, 1], 50)
    sampler = StratifiedSampler(labels, 4, 0)
    firsts = [labels[sampler.next_batch()[0]] for _ in range(40)]
    assert 5 < sum(firsts) < 35


# -------------------------------------------------------------------------- standard library


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache folder of its own for this module."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def test_stdlib_corpus(cache: Path) -> None:
    """Over a megabyte, the same at each parse, from the cache, and after a damaged cache."""
    first = cached_stdlib_documents()
    files = list(cache.rglob("*.json"))
    assert len(files) == 1
    assert cached_stdlib_documents() == first == stdlib_documents()
    assert sum(len(t) for _, t in first) > 1_000_000
    assert len({n for n, _ in first}) == len(first)
    assert any(n.startswith("topic/") for n, _ in first)
    assert not any("/test/" in n or "site-packages" in n for n, _ in first)
    assert [p.name for p in files[0].parent.iterdir()] == [files[0].name]


@pytest.mark.parametrize("damage", ["", "5", "[1]", '[["a"]]', "\xff"])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file holds, the documents are parsed again and the file replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("lowbit.text.documents.stdlib_documents", lambda: [("a", "b")])
    cached_stdlib_documents()
    (file,) = tmp_path.rglob("*.json")
    file.write_bytes(damage.encode("latin-1"))
    assert cached_stdlib_documents() == [("a", "b")]
    assert json.loads(file.read_text()) == [["a", "b"]]


def test_an_unwritable_cache_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the place of the cache folder is no error."""
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("lowbit.text.documents.stdlib_documents", lambda: [("a", "b")])
    assert cached_stdlib_documents() == [("a", "b")]


def test_stdlib_beside_other_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, it is what it is without a name, and what is held out of it stays held out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    documents = [(f"lib/{i}.py", f"number {i} " * 9) for i in range(60)]
    monkeypatch.setattr("lowbit.text.documents.stdlib_documents", lambda: documents)
    alone = load_corpus([], 16, TOKENIZER)
    assert load_corpus(["stdlib"], 16, TOKENIZER).fingerprint == alone.fingerprint
    file = write(tmp_path, "more.txt", make_text(20_000))
    both = load_corpus([file, "stdlib"], 16, TOKENIZER)
    assert both.train_tokens + both.validation_tokens > alone.train_tokens + 19_000
    held = len(alone.validation) - 1  # the last window may end in other text
    assert np.array_equal(both.validation[:held], alone.validation[:held])


def test_stdlib_train_and_validation_are_disjoint(cache: Path) -> None:
    """No document and no paragraph of the held-out text is in the training text."""
    documents = list(deduplicate(cached_stdlib_documents()))
    validation = [d for d in documents if place(d[0]) < VALIDATION_SHARE]
    train = [d for d in documents if d not in validation]
    assert not {n for n, _ in train} & {n for n, _ in validation}
    seen = {" ".join(p.split()) for _, t in train for p in t.split("\n\n")}
    held = {" ".join(p.split()) for _, t in validation for p in t.split("\n\n")}
    assert not seen & held
    share = sum(len(t) for _, t in validation) / sum(len(t) for _, t in documents)
    assert 0.02 < share < 0.12
