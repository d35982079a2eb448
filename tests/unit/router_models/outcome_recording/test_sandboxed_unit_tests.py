"""Unit tests of answers: what passes, and what a hostile answer can't do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

import pytest

from router_models.outcome_recording import sandboxed_unit_tests
from router_models.outcome_recording.answer_check_kinds import UnitTestsCheck
from router_models.outcome_recording.answer_scoring import ScoringError
from router_models.outcome_recording.sandboxed_unit_tests import (
    _split,
    code_of,
    probe,
    score_code,
)
from tests.support.polling import until

ADD = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'"]


WITHOUT = {
    "test_score_code_without_a_sandbox_is_an_error_not_a_score",
    "test_code_of_takes_the_blocks_that_define_what_tests_use",
    "test_split_tells_the_sandbox_no_more_than_needed",
}


def check(*tests: str, partial: bool = False, timeout_s: float = 5.0) -> UnitTestsCheck:
    return UnitTestsCheck(
        kind="unit_tests", tests=list(tests), partial=partial, timeout_s=timeout_s
    )


@pytest.fixture(autouse=True)
async def _needs_a_sandbox(request: pytest.FixtureRequest) -> None:
    if request.node.name.partition("[")[0] not in WITHOUT and (reason := await probe()):
        pytest.skip(f"no sandbox here: {reason}")


@pytest.mark.parametrize(
    ("tests", "answer"),
    [
        (ADD, "def add(a, b):\n    return a + b"),
        (ADD, "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nEnjoy!"),
        (ADD, "```python\nadd = lambda a, b: a + b\n```\nUse:\n```python\nadd(input())\n```"),
        (ADD, "```py\nimport operator\n```\n```py\nadd = operator.add\n```"),
        (ADD, "```python\ndef add(a, b):\n    print('PASSED')\n    return a + b"),
        (["s = S()\ns.push(1)\nassert s.items == [1]"], "class S(list):\n"
         "    push = list.append\n    items = property(list)"),
        (["assert (1, {'a': {2, 3}}, None, 1.5, b'x') == f()"],
         "f = lambda: (1, {'a': {2, 3}}, None, 1.5, b'x')"),
        (["assert f() is None", "assert not f()", "assert f() != 0", "assert 'a' not in 'b'"],
         "def f(): pass"),
        (["assert abs(f(2) - 1.41421) < 1e-4", "assert f(4) <= 2", "assert 3 > f(4)"],
         "from math import sqrt as f"),
        (["from math import isclose\nassert isclose(f(2), 1.4142, rel_tol=1e-3)"],
         "f = lambda x: x ** 0.5"),
        (["try:\n    f(-1)\n    ok = False\nexcept ValueError:\n    ok = True\nassert ok"],
         "def f(x):\n    raise ValueError(x)"),
        (["assert f() == {'a': 1}"], "from collections import Counter\nf = lambda: Counter('a')"),
        (["assert f() == 2 ** 200"], "f = lambda: 1 << 200"),
    ],
)  # fmt: skip
async def test_score_code_right_code_passes(tests: list[str], answer: str) -> None:
    score = await score_code(check(*tests), answer)
    assert score.value == 1.0, score.reason


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I can't do that.",
        "def add(a, b):\n    return a - b",
        "def add(a, b):\n    return str(a + b)",
        "def add(a, b) return",
        "def sub(a, b):\n    return a + b",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "import os\nos.kill(1, 9)\nos.abort()",
        "def add(a, b):\n    raise RuntimeError('no')",
        "def add(a, b):\n    return add(a, b)",
        # Pass markers of many kinds, on every open file.
        "print('PASSED 3 of 3')\nimport os\nos._exit(0)",
        "import os, json\n"
        "for fd in range(64):\n"
        "    for i in range(3):\n"
        "        try: os.write(fd, json.dumps({'i': i, 'value': True}).encode() + b'\\n')\n"
        "        except OSError: pass\n"
        "os._exit(0)",
        # A value that claims to be equal to everything.
        "class Yes:\n"
        "    def __eq__(self, other): return True\n"
        "    __hash__ = None\n"
        "def add(a, b): return Yes()",
        "class Yes(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Yes(7)",
        # The encoder itself is replaced.
        "import __main__\n__main__.encode = lambda value, deep=0: True\ndef add(a, b): return 0",
        "import json\n"
        'json.dumps = lambda *a, **b: \'{"i": 0, "value": true}\'\n'
        "def add(a, b): return 0",
    ],
)
async def test_score_code_wrong_or_hostile_code_fails(answer: str) -> None:
    assert (await score_code(check(*ADD), answer)).value == 0.0


_FORGED = """import os
for value in VALUES:
    for i in range(8):
        os.write(3, b'{"i": %d, "value": %s}\\n' % (i, value))
os._exit(0)
"""


@pytest.mark.parametrize(
    "tests",
    [
        ["assert abs(f(2) - 4.0) < 1e-6"],
        ["assert abs(4 - f(2)) <= 0.5"],
        ["assert 3.5 < f(2) < 4.5"],
        ["import math", "assert math.isclose(f(2), 4.0, rel_tol=1e-9)"],
        ["import math", "assert not math.isclose(4.0, f(3)) and math.isclose(4.0, f(2))"],
        ["assert not f(3) == 4 and f(2) == 4"],
        ["assert f(2) == 4 and abs(f(1) - 1) < 0.1"],
        ["assert f(2) == 4 and not f(0)"],
    ],
)
@pytest.mark.parametrize(
    "values", [[b"true"], [b"false"], [b'{"int": "-5"}'], [b'{"tuple": [true, true]}'], [b"null"]]
)
async def test_score_code_forged_values_fail_and_right_ones_pass(
    tests: list[str], values: list[bytes]
) -> None:
    whole = check("\n".join(tests))
    assert (await score_code(whole, f"VALUES = {values}\n{_FORGED}")).value == 0.0
    if values == [b"true"]:
        assert (await score_code(whole, "def f(x):\n    return x ** 2.0")).value == 1.0
        assert (await score_code(whole, "def f(x):\n    return x + 3")).value == 0.0


@pytest.mark.parametrize(
    ("test", "computed", "right", "wrong"),
    [
        ("assert f(2) == 4", "f(2)", 4, 5),
        ("assert 4 != f(2)", "f(2)", 5, 4),
        ("assert abs(f(2) - 4.0) < 1e-6", "f(2)", 4.0, -5),
        ("assert 1 < f(2) <= 4", "f(2)", 4, 1),
        ("assert f(2) in (1, 2)", "f(2)", 2, 3),
        ("assert not f(2)", "bool(f(2))", False, True),
        ("assert not f(2) > 3", "f(2)", 3, 4),
        ("assert f(1) and f(2) == 4", "(bool(f(1)), f(2))", (True, 4), (True, 3)),
        ("assert math.isclose(f(2), 4.0)", "f(2)", 4.0, 4.1),
        # What is computed as a whole.
        ("assert f(1) == f(2)", "bool(f(1) == f(2))", True, False),
        ("assert f(1) == 2 or f(1) == 3", "bool(f(1) == 2 or f(1) == 3)", True, False),
        ("assert abs(f(1) - f(2)) < 3", "abs(f(1) - f(2))", 2, 3),
        ("assert isinstance(f(1), int)", "bool(isinstance(f(1), int))", True, False),
    ],
)
def test_split_tells_the_sandbox_no_more_than_needed(
    test: str, computed: str, right: object, wrong: object
) -> None:
    split = _split(test)
    assert split.expression == computed
    assert split.passes(right)
    assert not split.passes(wrong)


async def test_score_code_partial_counts_the_share() -> None:
    wrong = "def add(a, b):\n    return a + b if a else 1\n"
    tests = ["assert add(0, 2) == 2", "assert add(1, 2) == 3"]
    assert (await score_code(check(*tests, partial=True), wrong)).value == 0.5
    assert (await score_code(check(*tests), wrong)).value == 0.0


@pytest.mark.parametrize(
    "act",
    [
        "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=2)",
        "import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)",
        "open('/tmp/x', 'w')",
        "open('/usr/x', 'w')",
        "open('/dev/shm/x', 'w')",
        "open(HERE, 'w')",
        "open(HERE)",
        "import os; os.listdir(os.path.expanduser('~'))",
        "open('/etc/passwd')",
        "open('/proc/self/environ')",
        "import os; os.fork()",
        "import threading; threading.Thread(target=print).start()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.setuid(0)",
        "import os; os.mkdir('/x')",
        "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/usr', b'tmpfs', 0, None) == 0",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "x = 'x' * 10**9",
    ],
)
async def test_sandbox_refuses(act: str, tmp_path: Path) -> None:
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    here = tmp_path / "file"
    here.write_text("mine")
    act = act.replace("PORT", str(port)).replace("HERE", repr(str(here)))
    answer = (
        "def act():\n    try:\n        "
        + act.replace("; ", "\n        ")
        + "\n    except BaseException as error:\n        return type(error).__name__\n"
        "    return 'done'"
    )
    try:
        run = await score_code(
            check("assert act() != 'done'", "assert act() in ('NameError', 'SyntaxError')",
                  partial=True), answer
        )  # fmt: skip
        assert run.value == 0.5  # it was refused, and not because the test itself is wrong
        assert here.read_text() == "mine"
    finally:
        server.close()


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "x = []\nwhile True:\n    try: x.append('x' * 10**7)\n    except MemoryError: pass",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "import os\nwhile True:\n    for fd in range(32):\n"
        "        try: os.write(fd, b'x' * 10**6)\n        except OSError: pass",
        "10 ** 10 ** 10",
        # It takes the signal away that the kernel sends when its parent ends.
        "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntime.sleep(30)",
    ],
)
async def test_sandbox_bounds_time_and_memory(source: str) -> None:
    begun = time.monotonic()
    before = children()
    score = await score_code(check("assert f() == 1", timeout_s=1.0), source + "\nf = lambda: 1")
    assert score.value == 0.0
    assert time.monotonic() - begun < 25
    await until(lambda: children() <= before, "no process is left behind")


def children() -> set[int]:
    """Processes that run the sandbox's program."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes()
            if b"PYTHONHASHSEED" in line or b"sys.set_int_max_str_digits" in line:
                found.add(int(folder.name))
    return found


async def test_sandbox_a_test_cut_by_time_keeps_those_before() -> None:
    source = "def f(x):\n    while x == 2: pass\n    return x"
    tests = ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3"]
    score = await score_code(check(*tests, partial=True, timeout_s=2.0), source)
    assert score.value == pytest.approx(1 / 3)


async def test_sandbox_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COE_SECRET_OF_THE_TEST", "x")
    source = "import os\ndef f():\n    return sorted(os.environ)"
    score = await score_code(check("assert 'COE_SECRET_OF_THE_TEST' not in f()"), source)
    assert score.value == 1.0
    assert "COE_SECRET_OF_THE_TEST" in os.environ


async def test_score_code_without_a_sandbox_is_an_error_not_a_score(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "init.py"
    broken.write_text("import sys\nsys.exit('sandbox: new namespaces: Operation not permitted')")
    monkeypatch.setattr(sandboxed_unit_tests, "_INIT", broken)
    with pytest.raises(ScoringError, match="new namespaces: Operation not permitted"):
        await score_code(check(*ADD), "def add(a, b):\n    return a + b")
    assert "Operation not permitted" in str(await probe())


def test_code_of_takes_the_blocks_that_define_what_tests_use() -> None:
    answer = (
        "```python\nimport math\n```\n```python\ndef f(x):\n    return math.pi\n```\n"
        "```bash\npip install x\n```\n```python\nprint(f(1))\n```"
    )
    assert code_of(answer, ["assert f(1) == 3"]) == "import math\n\ndef f(x):\n    return math.pi"
