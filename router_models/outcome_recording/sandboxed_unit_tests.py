"""Runs the code of an answer against unit tests in a sandbox, and judges the values outside of it.

The sandbox (`sandbox_init`) has no network, no home, nothing that can be written, no further
processes, and bounds on memory and time. It gets the expressions of the tests, not what their
values should be: in `assert f(2) == 4` it computes `f(2)`, and the comparison is made here.

The answer runs in the process that writes the values, so that it can write any value for any test.
What holds is that it has to know the value. It is not told it where an assertion compares with a
literal (also by a distance, `math.isclose`, a chain, `not` or `and`). It can pass by writing `true`
where an assertion is computed as a whole: two computed sides, `or`, `isinstance`, `all` and other
calls. Nothing inside of one process can prevent that, so prefer literals in tests.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import contextlib
import json
import math
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_models.outcome_recording.answer_check_kinds import UnitTestsCheck
from router_models.outcome_recording.answer_scoring import Score, ScoringError
from service.broker.answer_agreement import after_thinking

_INIT = Path(__file__).with_name("sandbox_init.py")
_MOST_BYTES = 4 * 1024**2
_START_S = 10.0
_PROBE = UnitTestsCheck(kind="unit_tests", tests=["assert probe() == 1"], timeout_s=10.0)
_FENCES = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_NONE = object()


@dataclass(frozen=True, slots=True)
class _Test:
    """A test in two parts: what the sandbox computes, and what its value must be."""

    setup: str
    expression: str
    passes: Callable[[Any], bool]


async def probe() -> str | None:
    """Why there is no sandbox on this machine; None where there is one."""
    if sys.platform != "linux":
        return f"sandboxes need Linux, and this is {sys.platform}"
    try:
        score = await score_code(_PROBE, "def probe():\n    return 1")
    except ScoringError as error:
        return str(error)
    return None if score.value == 1.0 else f"a trivial test fails: {score.reason}"


async def score_code(check: UnitTestsCheck, text: str) -> Score:
    """Score an answer's code by its tests.

    Raises:
        ScoringError: The sandbox does not start, which is not the answer's fault.
    """
    tests = [_split(test) for test in check.tests]
    source = code_of(text, check.tests)
    if source is None:
        return Score(0.0, "no Python code")
    cases = [{"setup": test.setup, "expression": test.expression} for test in tests]
    replies = await _run(check, {"source": source, "tests": cases})
    passed = 0
    for i, test in enumerate(tests):
        reply = replies.get(i)
        if reply is not None and "value" in reply:
            with contextlib.suppress(Exception):
                passed += test.passes(_decode(reply["value"]))
    share = passed / len(tests)
    reason = f"{passed} of {len(tests)} tests"
    return Score(share if check.partial else float(passed == len(tests)), reason)


def code_of(text: str, tests: list[str]) -> str | None:
    """The code of an answer: its fenced blocks that define what the tests use, else all of it."""
    answer = after_thinking(text).strip()
    blocks = [block for block in _FENCES.findall(answer) if _parsed(block) is not None]
    wanted = _names_of(tests)
    chosen: list[str] = []
    for block in blocks:
        if new := _defined(block) & wanted:
            chosen.append(block)
            wanted -= new
    found = chosen or blocks or ([answer] if answer and _parsed(answer) is not None else [])
    # A block may be the imports that the next one needs.
    imports = [block for block in blocks if block not in found and _only_imports(block)]
    return "\n\n".join([*imports, *found]) or None


def _parsed(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _only_imports(source: str) -> bool:
    body = ast.parse(source).body
    return bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def _names_of(tests: list[str]) -> set[str]:
    """The names that tests use and do not set themselves."""
    used: set[str] = set()
    for test in tests:
        names = [node for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)]
        own = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        used |= {node.id for node in names} - own
    return used - set(dir(builtins))


def _split(test: str) -> _Test:
    """Split a test at its last assertion: what the sandbox computes, and what must come of it."""
    *before, last = ast.parse(test).body
    assert isinstance(last, ast.Assert)
    setup = "\n".join(map(ast.unparse, before))
    computed, passes = _claim(last.test)
    return _Test(setup, ast.unparse(computed), passes)


_Passes = Callable[[Any], bool]


def _claim(node: ast.expr) -> tuple[ast.expr, _Passes]:
    """Split what is claimed: an expression for the sandbox, and what its value must be.

    The expression tells as little as can be of what the value must be. `passes` raises where the
    value is of a wrong kind.
    """
    match node:
        case ast.UnaryOp(ast.Not(), inner):
            computed, inner_passes = _claim(inner)
            return computed, lambda value: not inner_passes(value)
        case ast.BoolOp(ast.And(), parts):
            # All have to be true, so that all of them would be computed anyway.
            claims = [_claim(part) for part in parts]
            together = ast.Tuple([computed for computed, _ in claims], ast.Load())
            tests = [passes for _, passes in claims]
            return together, lambda values: all(
                passes(value) for passes, value in zip(tests, values, strict=True)
            )
        case ast.Compare(left, ops, rights):
            sides = [left, *rights]
            open_sides = [i for i, side in enumerate(sides) if _literal(side) is _NONE]
            if len(open_sides) == 1:
                at = open_sides[0]
                values = [_literal(side) for side in sides]
                compares = [_OPERATORS[type(op)] for op in ops]
                computed, measure = _measure(sides[at])
                return computed, lambda value: _holds(
                    [*values[:at], measure(value), *values[at + 1 :]], compares
                )
        case ast.Call(ast.Attribute(ast.Name("math"), "isclose"), [a, b]):
            options = {str(word.arg): _literal(word.value) for word in node.keywords}
            known = {*options} <= {"rel_tol", "abs_tol"} and _NONE not in options.values()
            one, other = _literal(a), _literal(b)
            if known and (one is _NONE) != (other is _NONE):
                fixed = other if one is _NONE else one
                return (a if one is _NONE else b), lambda value: math.isclose(
                    value, fixed, **options
                )
    whole = ast.Call(ast.Name("bool", ast.Load()), [node], [])
    return whole, _is_true


def _measure(node: ast.expr) -> tuple[ast.expr, Callable[[Any], Any]]:
    """Take the distance from a literal out of an expression, as in `abs(f(2) - 4.0) < 1e-6`."""
    match node:
        case ast.Call(ast.Name("abs"), [ast.BinOp(left, ast.Sub(), right)], []):
            one, other = _literal(left), _literal(right)
            if one is _NONE and other is not _NONE:
                return left, lambda value: abs(value - other)
            if other is _NONE and one is not _NONE:
                return right, lambda value: abs(one - value)
    return node, lambda value: value


def _holds(values: list[Any], compares: list[Callable[[Any, Any], Any]]) -> bool:
    return all(compare(a, b) for a, b, compare in zip(values, values[1:], compares, strict=False))


def _is_true(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false is needed")
    return value


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return _NONE


def _decode(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    match kind:
        case "int":
            return int(value)
        case "float":
            return float(value)
        case "complex":
            return complex(float(value[0]), float(value[1]))
        case "bytes":
            return bytes.fromhex(value)
        case "dict":
            return {_decode(k): _decode(v) for k, v in value}
    kinds: dict[str, Callable[[Any], Any]] = {
        "list": list,
        "tuple": tuple,
        "set": set,
        "frozenset": frozenset,
    }
    return kinds[kind](map(_decode, value))


async def _run(check: UnitTestsCheck, job: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Start a sandbox, and return its reply to each test that it got to."""
    limits = {"memory_bytes": check.memory_bytes, "cpu_s": math.ceil(check.timeout_s) + 1}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(_INIT), json.dumps(limits)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={},
        cwd="/",
        limit=_MOST_BYTES,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    replies: dict[int, dict[str, Any]] = {}
    ready = False
    errors = asyncio.create_task(process.stderr.read(10_000))
    try:
        async with asyncio.timeout(_START_S) as bound:
            with contextlib.suppress(ConnectionError):
                process.stdin.write(json.dumps(job).encode() + b"\n")
                await process.stdin.drain()
                process.stdin.close()
            read = 0
            while line := await process.stdout.readline():
                read += len(line)
                reply = _reply(line)
                if reply is None or read > _MOST_BYTES:
                    break  # the answer writes to the channel itself
                if not ready:
                    ready = True
                    bound.reschedule(asyncio.get_running_loop().time() + check.timeout_s)
                elif isinstance(number := reply.get("i"), int):
                    replies.setdefault(number, reply)
    except (TimeoutError, ValueError):
        pass  # a timeout, or a line without an end; what came before it counts
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if not ready:
            await asyncio.wait([errors], timeout=1.0)
        errors.cancel()
    if not ready:
        output = errors.result().decode(errors="replace").strip() if errors.done() else ""
        raise ScoringError(
            f"the sandbox does not start: {output.split(chr(10))[-1] or 'no reason'}"
        )
    return replies


def _reply(line: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
