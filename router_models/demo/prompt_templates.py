"""Generates prompts for the demo router from templates and fillers.

Recorded prompts are questions of benchmarks, but people also say hello, ask for a joke and paste
code. The templates in `prompts.json` stand for such prompts. They are drawn with a seed, so that a
fit is reproducible. The hand-written test set in `tests/unit` shares no template with them on
purpose.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from functools import cache
from pathlib import Path

DATA = Path(__file__).with_name("prompts.json")


@cache
def _lists() -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = json.loads(DATA.read_text(encoding="utf-8"))
    return found


def templated(label: str, count: int, seed: int) -> list[str]:
    """`count` prompts of one category, each template in turn, fillers drawn with `seed`."""
    draw = random.Random(f"{label}/{seed}")
    templates = _lists()["templates"][label]
    return [_fill(templates[i % len(templates)], draw) for i in range(count)]


def template_count(label: str) -> int:
    """Return a category's number of templates; prompt i of `templated` uses i modulo this."""
    return len(_lists()["templates"][label])


def _fill(template: str, draw: random.Random) -> str:
    fillers = _lists()["fillers"]
    parts = template.split("{")
    out = [parts[0]]
    for part in parts[1:]:
        name, brace, rest = part.partition("}")
        if brace and name == "n":
            out.append(str(draw.choice((draw.randint(2, 99), draw.randint(10, 5000)))))
        elif brace and name == "s":
            out.append(str(draw.randint(2, 12)))
        elif brace and name in fillers:
            out.append(draw.choice(fillers[name]))
        else:  # braces of code
            out.append("{" + name + brace)
        out.append(rest)
    text = "".join(out)
    shape = draw.random()  # people are careless with capitals and full stops
    if "\n" not in text and shape < 0.25:
        text = text.lower().rstrip("?.!")
    return text


def library_functions(count: int, seed: int) -> list[str]:
    """Requests for functions of this Python's own standard library, made from their docstrings.

    Half ask in words for what the docstring's first line says, half give
    signature and docstring to be completed. Fewer where the library is not
    installed as source.
    """
    draw = random.Random(f"library/{seed}")
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        if {"test", "tests", "idlelib", "site-packages", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            doc = ast.get_docstring(node)
            if not doc or not 20 <= len(doc) <= 1500:
                continue
            first = doc.splitlines()[0].rstrip(".")
            call = f"{node.name}({ast.unparse(node.args)})"
            head = f"def {call}:"
            found.append(
                draw.choice(
                    (
                        f"Write a Python function `{call}`: {first}.",
                        f"Implement this in Python: {doc}",
                        f'{head}\n    """{doc}"""\n',
                        f"Complete this function:\n{head}\n    # {first}",
                        f"Write a function to {first[0].lower()}{first[1:]}.",
                    )
                )
            )
    draw.shuffle(found)
    return found[:count]
