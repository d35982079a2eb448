"""Grammars are compiled in a worker process, which may crash without harm."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from service.engine.grammar_check import Grammar, GrammarChecker, SharedChecker, Vocabulary
from service.errors import InvalidRequestError, OverCapacityError
from tests.support.polling import until

xgrammar = pytest.importorskip("xgrammar")
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore", "error:::service"),
]
CRASHING = "(" * 17_000 + "a" + ")?" * 17_000


def schema(**of: Any) -> Grammar:
    return Grammar("json", json.dumps({"type": "string", **of}))


def optional(properties: int) -> Grammar:
    """The states of its automaton are as many as the pairs of its properties."""
    either = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    named = {f"p{i}": either for i in range(properties)}
    return Grammar("json", json.dumps({"type": "object", "properties": named}))


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokens = [*(chr(code) for code in range(32, 127)), "</s>", "the", '{"', '"}']
    info = xgrammar.TokenizerInfo(tokens, stop_token_ids=[95])
    return Vocabulary("letters", info.serialize_json())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def checker() -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker(cpu_s=0.5)
    yield made
    worker = psutil.Process(pid_of(made))
    await made.close()
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def pid_of(checker: GrammarChecker) -> int:
    assert checker._worker is not None
    return checker._worker._process.pid


FIT = {
    "a schema": schema(maxLength=8),
    "a pattern": schema(pattern="^[a-z]{1,8}$"),
    "a pattern as nested as a gateway lets through": schema(pattern="(" * 64 + "a" + ")?" * 64),
    "a regex": Grammar("regex", "(yes|no)"),
    "EBNF": Grammar("ebnf", 'root ::= "yes" | "no"'),
    "Lark": Grammar("lark", 'start: "yes" | "no"'),
    "a tag": Grammar(
        "structural_tag",
        json.dumps(
            {
                "type": "structural_tag",
                "format": {"type": "json_schema", "json_schema": {"type": "object"}},
            }
        ),
    ),
    "a tag of the older form": Grammar(
        "structural_tag",
        json.dumps(
            {
                "structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}],
                "triggers": ["<f"],
            }
        ),
    ),
}
UNFIT = {
    "a crash": (schema(pattern=CRASHING), "can't process it"),
    "a regex that crashes": (Grammar("regex", CRASHING), ""),
    "too much to read": (
        schema(pattern="^(((a|b|cd){1,100}c){1,100}d){1,100}$"),
        "too much time",
    ),
    "too much to compile": (optional(3000), "too much time"),
    "no schema": (Grammar("json", "{"), "not valid"),
    "no regex": (Grammar("regex", "((("), "not valid"),
    "no EBNF": (Grammar("ebnf", "root ::= ((("), "not valid"),
    "no Lark": (Grammar("lark", "start: ((("), "not valid"),
    "no tag": (Grammar("structural_tag", "{}"), "not valid"),
    "a tag without an end": (
        Grammar("structural_tag", '{"structures": [{"begin": "a"}], "triggers": []}'),
        "missing",
    ),
}


@pytest.mark.parametrize("name", FIT)
async def test_grammar_check_valid_grammar_passes(
    checker: GrammarChecker, vocabulary: Vocabulary, name: str
) -> None:
    await checker.check(FIT[name], vocabulary)
    await checker.check(FIT[name], None)


@pytest.mark.parametrize("name", UNFIT)
async def test_grammar_check_invalid_or_expensive_grammar_is_refused_and_the_worker_goes_on(
    checker: GrammarChecker, vocabulary: Vocabulary, name: str
) -> None:
    await checker.check(FIT["a regex"], vocabulary)
    before = pid_of(checker)
    grammar, why = UNFIT[name]
    with pytest.raises(InvalidRequestError, match=why) as refused:
        await checker.check(grammar, vocabulary)
    assert "/project/" not in refused.value.message, "a place in somebody's source"
    assert pid_of(checker) == before
    await checker.check(FIT["EBNF"], vocabulary)


async def test_grammar_check_expensive_grammar_does_not_block_the_loop(
    checker: GrammarChecker, vocabulary: Vocabulary
) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    beside = asyncio.create_task(others())
    with pytest.raises(InvalidRequestError):
        await checker.check(optional(3001), vocabulary)
    beside.cancel()
    assert turns >= 5


async def test_grammar_check_result_is_shared_by_concurrent_and_later_requests(
    checker: GrammarChecker, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    await checker.check(FIT["a regex"], vocabulary)
    count = 0
    real = checker._worker.ask  # type: ignore[union-attr]

    async def ask(*given: Any) -> str:
        nonlocal count
        count += 1
        return await real(*given)

    monkeypatch.setattr(checker._worker, "ask", ask)
    new = schema(pattern="^once$")
    gone = asyncio.create_task(checker.check(new, vocabulary))
    rest = [asyncio.create_task(checker.check(new, vocabulary)) for _ in range(8)]
    await asyncio.sleep(0)
    gone.cancel()  # the first who asked leaves: the others are told all the same
    await asyncio.gather(*rest)
    await checker.check(new, vocabulary)
    assert count == 1


async def test_grammar_check_abandoned_checks_do_not_delay_others(
    checker: GrammarChecker, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    await checker.check(FIT["a regex"], vocabulary)
    requests: list[Grammar] = []
    real = checker._worker.ask  # type: ignore[union-attr]

    async def ask(grammar: Grammar, *given: Any) -> str:
        requests.append(grammar)
        return await real(grammar, *given)

    monkeypatch.setattr(checker._worker, "ask", ask)
    costly = [optional(3100 + i) for i in range(40)]
    left = [asyncio.create_task(checker.check(item, vocabulary)) for item in costly]
    await asyncio.sleep(0.1)
    for item in left:
        item.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await checker.check(schema(pattern="^after they left$"), vocabulary)
    # How many began before their clients left depends on the machine; most never begin.
    assert len(requests) < len(costly) // 2, (
        "one after the other they would take half a second each"
    )
    assert len(checker._asking) <= 2
    # Who comes with one of them later gets a verdict of its own.
    with pytest.raises(InvalidRequestError):
        await checker.check(costly[-1], vocabulary)


@pytest.mark.parametrize("own", [True, False])
async def test_grammar_check_tenants_take_turns(
    checker: GrammarChecker, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    await checker.check(FIT["a regex"], vocabulary)
    tried: list[Grammar] = []

    async def ask(grammar: Grammar, *given: Any) -> str:
        tried.append(grammar)
        await asyncio.sleep(0.001)
        return ""

    monkeypatch.setattr(checker._worker, "ask", ask)
    many = [schema(pattern=f"^many {own} {i}$") for i in range(50)]
    loud = [asyncio.create_task(checker.check(item, vocabulary, "loud")) for item in many]
    await asyncio.sleep(0)
    # Another tenant's grammar, or the last of the first tenant's, which it asks for as well.
    wanted = schema(pattern="^one$") if own else many[-1]
    await checker.check(wanted, vocabulary, "quiet")
    assert tried.index(wanted) <= 4
    await asyncio.gather(*loud)
    assert len(tried) == len({item.spec for item in tried}) == 50 + own
    assert not checker._asking
    assert (checker._turns._free, len(checker._turns._lines)) == (2, 0)


async def test_grammar_check_turns_are_given_back_whoever_leaves(
    checker: GrammarChecker, vocabulary: Vocabulary
) -> None:
    await checker.check(FIT["a regex"], vocabulary)
    for rounds in range(4):
        asked = [
            asyncio.create_task(
                checker.check(schema(pattern=f"^{rounds} {i}$"), vocabulary, str(i % 3))
            )
            for i in range(12)
        ]
        for _ in range(rounds):
            await asyncio.sleep(0)
        for task in asked[rounds::2]:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    await until(lambda: not checker._asking, "nobody asks any more")
    assert (checker._turns._free, len(checker._turns._lines)) == (2, 0)


async def test_grammar_check_killed_worker_is_replaced(
    checker: GrammarChecker, vocabulary: Vocabulary
) -> None:
    await checker.check(FIT["a regex"], vocabulary)
    before = pid_of(checker)
    psutil.Process(before).kill()
    await checker.check(schema(pattern="^after a kill$"), vocabulary)
    assert pid_of(checker) != before


async def test_grammar_check_without_a_worker_raises_retryable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checker = GrammarChecker(cpu_s=1.0)
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(OverCapacityError):
        await checker.check(FIT["a regex"], None)
    await checker.close()


async def test_grammar_check_shared_worker_ends_with_its_last_user() -> None:
    shared = SharedChecker(lambda: GrammarChecker(cpu_s=1.0))
    first, second = shared.acquire(), shared.acquire()
    assert first is second
    await first.check(FIT["a regex"], None)
    worker = psutil.Process(pid_of(first))
    await shared.release()
    assert worker.is_running()
    await shared.release()
    assert not worker.is_running()
    assert shared.acquire() is not first
