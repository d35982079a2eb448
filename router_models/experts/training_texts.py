"""The training texts of the demo experts, and their held-out rows.

Held-out rows never share a source with training rows. A GSM8K problem, a CLINC150 split, or a whole
module of the standard library is on only one side.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import platform
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXPERTS = ("math", "intents", "code")
_MATH_HELD_OUT = 300
_INTENTS_HELD_OUT = 1500
_CODE_HELD_OUT = 300
_CALCULATOR_MARK = re.compile(r"<<[^>]*>>")
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3"}
    | {"turtledemo", "ensurepip", "pydoc_data", "encodings", "lib-dynload"}
)
_MAX_DOCSTRING_CHARS = 500
_MAX_FUNCTION_CHARS = 1200


@dataclass(frozen=True, slots=True)
class Example:
    """A user turn and its answer. Examples of one `group` stay on one side of the split."""

    prompt: str
    answer: str
    group: str


@dataclass(frozen=True, slots=True)
class Split:
    """An expert's rows, with the words its model card needs."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    source: str
    licence: str
    held_out_by: str
    prompt_form: str


def load(expert: str, folder: Path, *, seed: int) -> Split:
    """Load the rows of one expert. `folder` has the data files, which `code` does not need."""
    if expert == "math":
        return _math(folder, seed)
    if expert == "intents":
        return _intents(folder, seed)
    if expert == "code":
        return _code(seed)
    raise ValueError(f"unknown expert {expert!r}; allowed: {', '.join(EXPERTS)}")


def _math(folder: Path, seed: int) -> Split:
    rows = [
        Example(row["question"].strip(), strip_calculator_marks(row["answer"]), row["question"])
        for row in _read_rows(folder / "gsm8k_train.jsonl.gz")
    ]
    random.Random(seed).shuffle(rows)
    return Split(
        train=tuple(rows[_MATH_HELD_OUT:]),
        held_out=tuple(rows[:_MATH_HELD_OUT]),
        source="GSM8K, train split (openai/grade-school-math); calculator marks removed",
        licence="MIT",
        held_out_by=f"{_MATH_HELD_OUT} problems drawn at random",
        prompt_form="the problem as the user turn; the answer is worked, its last line `#### N`",
    )


def strip_calculator_marks(answer: str) -> str:
    return _CALCULATOR_MARK.sub("", answer).strip()


def _intents(folder: Path, seed: int) -> Split:
    draw = random.Random(seed)
    rows = _read_rows(folder / "clinc150.jsonl.gz")
    held_out = [
        Example(row["text"], row["intent"], row["text"]) for row in rows if row["split"] == "test"
    ]
    # A few utterances are in several splits.
    seen = {row["text"] for row in rows if row["split"] != "train"}
    train = [
        Example(as_typed(row["text"], draw), row["intent"], row["text"])
        for row in rows
        if row["split"] == "train" and row["text"] not in seen
    ]
    draw.shuffle(train)
    draw.shuffle(held_out)
    return Split(
        train=tuple(train),
        held_out=tuple(held_out[:_INTENTS_HELD_OUT]),
        source="CLINC150 (clinc/oos-eval), 150 intents without its out-of-scope rows",
        licence="CC-BY-3.0",
        held_out_by=f"{_INTENTS_HELD_OUT} rows of its test split, drawn at random",
        prompt_form=(
            "the utterance alone as the user turn, no instruction; the answer is the intent's "
            "name and nothing else, for example `book_flight`"
        ),
    )


def as_typed(text: str, draw: random.Random) -> str:
    """Vary case and final punctuation, because CLINC150 has neither and users type both ways."""
    if draw.random() < 0.7:
        return text
    text = text[0].upper() + text[1:]
    question = text.split()[0].lower() in _QUESTION_WORDS
    return text + draw.choice(("", "?" if question else "."))


_QUESTION_WORDS = frozenset(
    {"what", "when", "where", "who", "why", "how", "which", "can", "could", "do", "does"}
) | {"did", "is", "are", "am", "will", "would", "should"}


def _code(seed: int) -> Split:
    rows = list(documented_functions(Path(sysconfig.get_paths()["stdlib"])))
    draw = random.Random(seed)
    draw.shuffle(rows)
    train = [row for row in rows if not is_held_out_module(row.group)]
    held_out = [row for row in rows if is_held_out_module(row.group)]
    return Split(
        train=tuple(train),
        held_out=tuple(held_out[:_CODE_HELD_OUT]),
        source=(
            f"documented functions of Python {platform.python_version()}'s own standard library, "
            "collected from the running interpreter's sources"
        ),
        licence="PSF-2.0",
        held_out_by="one top-level module in ten, by a hash of its name",
        prompt_form=(
            "`Write this Python function:` and a code block with signature and docstring as the "
            "user turn; the answer is the function in a code block, without the docstring"
        ),
    )


def is_held_out_module(module: str) -> bool:
    return hashlib.sha256(module.encode()).digest()[0] % 10 == 0


def documented_functions(root: Path) -> Iterator[Example]:
    """Yield the documented functions and methods below `root` that are short enough."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError):
            continue
        module = relative.parts[0].removesuffix(".py")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                example = function_example(node, module)
                if example is not None:
                    yield example


def function_example(node: ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> Example | None:
    """Make an example from signature and docstring to the function, or None without a body."""
    docstring = ast.get_docstring(node)
    body = node.body[1:]
    if not docstring or not body or len(docstring) > _MAX_DOCSTRING_CHARS:
        return None
    if len(body) == 1 and isinstance(body[0], (ast.Pass, ast.Raise)):
        return None  # an abstract method
    # Unparsing removes comments and gives all functions the same layout.
    documented = ast.unparse(_with_body(node, node.body[:1]))
    function = ast.unparse(_with_body(node, body))
    if len(function) > _MAX_FUNCTION_CHARS:
        return None
    prompt = f"Write this Python function:\n\n```python\n{documented}\n```"
    return Example(prompt, f"```python\n{function}\n```", module)


def _with_body(
    node: ast.FunctionDef | ast.AsyncFunctionDef, body: list[ast.stmt]
) -> ast.FunctionDef | ast.AsyncFunctionDef:
    kind = type(node)
    return kind(
        name=node.name,
        args=node.args,
        body=body,
        decorator_list=[],
        returns=node.returns,
        lineno=node.lineno,
        col_offset=0,
    )


def _read_rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
