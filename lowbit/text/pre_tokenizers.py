"""How byte-level BPE cuts text before it merges: the names that GGUF files have for it.

Two models with one vocabulary and other cuts give other ids, so the name must be right:
`tokenizer.ggml.pre` of a file that is read says which cuts to make, and of a file that is written,
which were made.
"""

from __future__ import annotations

from typing import Any

from lowbit.extras import require

# Words, numbers, other signs and white space, as Llama 3 and Qwen 2 cut them; they differ in how
# many digits stay together.
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex,
    }  # fmt: skip


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


#: Name in GGUF -> the steps, as tokenizer.json has them.
KNOWN: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    "llama-bpe": [_split(_CUTS.format(numbers=r"\p{N}{1,3}")), _byte_level(False)],
    "smaug-bpe": [_split(_CUTS.format(numbers=r"\p{N}{1,3}")), _byte_level(False)],
    "qwen2": [_split(_CUTS.format(numbers=r"\p{N}")), _byte_level(False)],
}
#: What stands for a space in a piece of SentencePiece's.
SPACE = "\u2581"
#: Other names that files have for them.
ALSO = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
#: Of these a word that is a token is not merged.
WHOLE_WORDS = ("llama-bpe",)


def make(name: str) -> Any:
    """The `tokenizers` object of a name in KNOWN."""
    pre = require("tokenizers", "hf").pre_tokenizers
    steps: list[Any] = []
    for step in KNOWN[name]:
        if step["type"] == "ByteLevel":
            steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"]))
        elif step["type"] == "Digits":
            steps.append(pre.Digits(individual_digits=True))
        else:
            regex = require("tokenizers", "hf").Regex(step["pattern"]["Regex"])
            steps.append(pre.Split(regex, behavior="isolated", invert=False))
    return steps[0] if len(steps) == 1 else pre.Sequence(steps)


def cut_in_pieces(backend: Any, opens: bool) -> None:
    """Let a `tokenizers.Tokenizer` of SentencePiece's pieces do to a text what engines do: nothing
    but a space before it, where it ``opens``, and SPACE for each. In place."""
    tokenizers = require("tokenizers", "hf")
    normal, back = tokenizers.normalizers, tokenizers.decoders
    backend.normalizer = normal.Sequence(
        [*([normal.Prepend(SPACE)] if opens else []), normal.Replace(" ", SPACE)]
    )
    backend.pre_tokenizer = None
    backend.decoder = back.Sequence(
        [
            back.Replace(SPACE, " "),
            back.ByteFallback(),
            back.Fuse(),
            *([back.Strip(" ", 1, 0)] if opens else []),
        ]
    )


def name_of(description: Any, ignore_merges: bool = False) -> str | None:
    """The name of what a tokenizer.json has as its ``pre_tokenizer``; None for another. Engines
    take a word that is a token without merging it, ``ignore_merges``, where the name is one of
    WHOLE_WORDS."""
    if not isinstance(description, dict):
        return None
    steps = description.get("pretokenizers", [description])
    # Offsets, which trim_offsets is about, are no matter of ids.
    found = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]
    for name, known in KNOWN.items():
        if ignore_merges == (name in WHOLE_WORDS) and found == [
            {k: v for k, v in step.items() if k != "trim_offsets"} for step in known
        ]:
            return name
    return None
