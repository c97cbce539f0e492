"""Talk to a student: ``apl-chat student/``.

In llama.cpp where its package (extra chat) and a GGUF file are there, in torch otherwise. Ctrl-C
ends an answer; /reset forgets the conversation; /exit, or Ctrl-D, ends the program.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lowbit import UserError, first_line
from lowbit.arguments import COUNT, Parser, number, words
from lowbit.console import Printer, complain, silence
from lowbit.export import find_packed
from lowbit.extras import require
from lowbit.generate import MOST_LIKELY, stream
from lowbit.models.interface import LanguageModel
from lowbit.models.teacher import load_teacher
from lowbit.text.tokenizers import Message, TeacherTokenizer, Tokenizer, end_ids, opened

CONTEXT = 4096  # tokens of a conversation, at most, in llama.cpp
TOP_K = 40


class Engine(Protocol):
    name: str

    def answer(
        self, messages: Sequence[Message], o: argparse.Namespace, say: Callable[[str], bool]
    ) -> None:
        """Say the answer piece by piece, until it is complete or ``say`` is False. UserError where
        the engine gives none."""


def open_server(path: Path, context: int, threads: int | None) -> Any:
    """A GGUF file in `xllamacpp`'s server, which says nothing by itself. UserError where it cannot
    be loaded."""
    package = require("xllamacpp", "chat")
    params = package.CommonParams()
    params.n_ctx, params.warmup, params.verbosity, params.use_jinja = context, False, -1, True
    if threads:
        params.cpuparams.n_threads = threads
    try:
        params.model.path = str(path)
        return package.Server(params)
    except Exception as e:  # the package's own errors
        raise UserError(f"{path} cannot be loaded by llama.cpp: {first_line(e)}") from e


class LlamaCpp:
    """A GGUF file in llama.cpp, which renders the chat template that the file holds."""

    name = "llama.cpp"

    def __init__(self, path: Path, threads: int | None) -> None:
        self.server = open_server(path, CONTEXT, threads)

    def answer(
        self, messages: Sequence[Message], o: argparse.Namespace, say: Callable[[str], bool]
    ) -> None:
        problem: list[str] = []

        def take(chunk: dict[str, Any]) -> bool:
            if "error" in chunk:
                problem.append(str(chunk["error"].get("message", chunk["error"])))
                return True
            delta = chunk["choices"][0].get("delta", {})
            return not say(delta.get("content") or delta.get("reasoning_content") or "")

        asked = {
            "messages": list(messages), "stream": True, "max_tokens": o.max_tokens,
            "temperature": o.temperature if o.temperature >= MOST_LIKELY else 0,
            "top_p": o.top_p, "top_k": TOP_K, "seed": o.seed, "stop": o.stop,
        }  # fmt: skip
        try:
            self.server.handle_chat_completions(asked, take)
        except Exception as e:  # the package's own errors
            problem.append(first_line(e))
        if problem:
            raise UserError(f"llama.cpp: {problem[0]}")


class Torch:
    """A student's packed file, or any model that --teacher takes, in torch."""

    name = "torch"

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """By the chat template; without one, what was said last, to be continued."""
        text = messages[-1]["content"]
        if isinstance(self.tokenizer, TeacherTokenizer) and self.tokenizer.has_template:
            try:
                text = self.tokenizer.rendered(messages, ask=True)
            except Exception as e:
                raise UserError(f"the chat template refuses this: {first_line(e)}") from e
        return opened(self.tokenizer, text)

    def answer(
        self, messages: Sequence[Message], o: argparse.Namespace, say: Callable[[str], bool]
    ) -> None:
        settings = dict(temperature=o.temperature, top_k=TOP_K, top_p=o.top_p, seed=o.seed)
        ends = end_ids(self.tokenizer)
        ids: list[int] = []
        told, text = 0, ""
        for token in stream(self.model, self.prompt(messages), **settings):
            if token in ends or len(ids) == o.max_tokens:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids)
            cut = min((i for s in o.stop if (i := text.find(s)) >= 0), default=None)
            if cut is not None:
                say(text[told:cut])
                return
            sure = sure_part(text, o.stop)
            if not say(text[told:sure]):
                return
            told = max(told, sure)
        say(text[told:])


def sure_part(text: str, stops: Sequence[str]) -> int:
    """How much of a text can be said: not half a character, nor what may begin a text that ends
    the answer."""
    sure = len(text.rstrip("\ufffd"))
    for stop in stops:
        for n in range(min(len(stop) - 1, sure), 0, -1):
            if text.endswith(stop[:n]):
                sure = min(sure, len(text) - n)
                break
    return sure


def find_engine(student: str, engine: str, threads: int | None) -> Engine:
    """The engine asked for, or the faster one that there is a file and a package for."""
    if not student:
        raise UserError("the student: an empty path")
    path = Path(student)
    ggufs = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    packed = [find_packed(student)] if path.is_dir() and list(path.glob("*.npz")) else []
    if packed:  # of the same run only
        made = packed[0].with_suffix(".gguf")
        fresh = made.is_file() and made.stat().st_mtime >= packed[0].stat().st_mtime
        ggufs = [made] if fresh else []
    have = importlib.util.find_spec("xllamacpp") is not None
    if engine == "llama.cpp" or (engine == "auto" and ggufs and have):
        if not ggufs:
            raise UserError(
                f"--engine llama.cpp: no up-to-date .gguf file in {student}; make it with "
                f"apl-export {student} --to gguf"
            )
        if not ggufs[0].is_file():
            raise UserError(f"no such file or folder: {student}")
        return LlamaCpp(ggufs[0], threads)
    if threads:
        import torch

        torch.set_num_threads(threads)
    try:
        return Torch(*load_teacher(str(packed[0]) if packed else student))
    except UserError as e:
        raise UserError(str(e).removeprefix("--teacher: ")) from e


class Interrupt:
    """Inside `listening`, Ctrl-C only sets ``pressed``."""

    pressed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        self.pressed = False
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "pressed", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def talk(engine: Engine, messages: Sequence[Message], o: argparse.Namespace) -> str:
    """Print the answer to a conversation as it comes; returns it."""
    interrupt, tell, said = Interrupt(), Printer(), []

    def say(piece: str) -> bool:
        said.append(piece)
        tell(piece, end="")
        return not (interrupt.pressed or tell.closed)

    with interrupt.listening():
        engine.answer(messages, o, say)
    tell("")
    return "".join(said)


def converse(engine: Engine, o: argparse.Namespace) -> None:
    first: list[Message] = [{"role": "system", "content": o.system}] if o.system else []
    messages = list(first)
    while True:
        try:
            asked = input("> ")
        except (EOFError, KeyboardInterrupt):
            Printer()("")
            return
        except (OSError, RuntimeError):  # nothing is left of stdin, or of stdout
            silence(sys.stdout)
            return
        if asked.strip() == "/exit":
            return
        if asked.strip() == "/reset":
            messages = list(first)
            continue
        if not asked.strip():
            continue
        messages.append({"role": "user", "content": asked})
        try:
            answer = talk(engine, messages, o)
            messages.append({"role": "assistant", "content": answer})
        except UserError as e:
            messages.pop()
            complain(f"error: {e} (/reset forgets the conversation)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="apl-chat", description=__doc__, allow_abbrev=False)
    parser.add_argument("student", help="a run's output folder, a .gguf or .npz file, or a teacher")
    parser.add_argument("--prompt", type=words, help="answer this and end")
    parser.add_argument("--system", type=words, help="what the conversation begins with")
    parser.add_argument("--temperature", type=number(float, 0), default=0.7, help="default 0.7")
    parser.add_argument("--top_p", type=number(float, 0, 1), default=0.95, help="default 0.95")
    parser.add_argument("--max_tokens", type=COUNT, default=512, help="of an answer (default 512)")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0)
    stops = "texts that end an answer"
    parser.add_argument("--stop", type=words, nargs="+", default=[], help=stops)
    parser.add_argument("--engine", choices=["auto", "llama.cpp", "torch"], default="auto")
    parser.add_argument("--threads", type=number(int, 1, 1024), help="default: the engine's own")
    o = parser.parse_args(argv)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    try:
        if o.prompt is not None and not o.prompt.strip():
            raise UserError("--prompt: give at least one character")
        engine = find_engine(o.student, o.engine, o.threads)
        if o.prompt is None:
            Printer()(f"{o.student} in {engine.name}; Ctrl-C ends an answer, /exit the program")
            converse(engine, o)
        else:
            messages = [{"role": "system", "content": o.system}] if o.system else []
            talk(engine, [*messages, {"role": "user", "content": o.prompt}], o)
    except UserError as e:
        return e.tell()
    return 0


if __name__ == "__main__":
    sys.exit(main())
