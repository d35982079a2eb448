"""The layout of the tests: each file in `tests/unit` is named after the module that it tests."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "tests" / "unit"
# These test something that is no module, for the reason given.
EXCEPTIONS = {
    "classifier/test_demo_artifact.py": "tests the committed artifact, which is data",
    "router_models/experts/test_artifacts.py": "tests the committed adapters, which are data",
    "router_models/test_outcomes_builtin.py": "tests the committed tasks, which are data",
    "models/test_model_folders.py": "`coe check` of model folders takes several modules",
}


def module_of(test: Path) -> Path:
    """Name the module or package that a file in `tests/unit` should test, without its ending."""
    relative = test.relative_to(UNIT)
    own = relative.parts[0] in {"loadtests", "router_models"}
    package = (ROOT if own else ROOT / "service") / relative.parent
    return package / relative.stem.removeprefix("test_")


@pytest.mark.parametrize("test", sorted(UNIT.rglob("test_*.py")), ids=lambda test: test.stem)
def test_unit_test_file_is_named_after_an_existing_module(test: Path) -> None:
    if test.relative_to(UNIT).as_posix() in EXCEPTIONS:
        return
    module = module_of(test)
    assert module.with_suffix(".py").is_file() or (module / "__init__.py").is_file()


def test_unit_test_exceptions_are_existing_files_without_a_module() -> None:
    for name in EXCEPTIONS:
        assert (UNIT / name).is_file()
        assert not module_of(UNIT / name).with_suffix(".py").exists()
