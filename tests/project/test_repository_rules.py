"""The rules of the repository: imports, layout, and texts that must stay out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = {
    ".ci",
    ".dockerignore",
    ".editorconfig",
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "Dockerfile",
    "LICENSE",
    "Makefile",
    "NOTICE",
    "README.md",
    "deploy",
    "docs",
    "examples",
    "helm",
    "loadtests",
    "pyproject.toml",
    "router_models",
    "service",
    "tests",
}
# Each may be imported in these modules of the service, and nowhere else in it.
ONLY_IN = {
    "vllm": {
        "service/engine/vllm/async_llm_handle.py",
        "service/engine/vllm/worker/expert_grammars.py",
        "service/engine/vllm/worker/thinking_marks.py",
        "service/engine/vllm/worker/second_model.py",
        "service/engine/vllm/worker/merged_expert_worker.py",
        "service/engine/vllm/worker/gate_capture.py",
        "service/engine/vllm/worker/gate_access.py",
        "service/engine/vllm/worker/gate_choice_recorder.py",
        "service/engine/vllm/worker/graph_steering.py",
        "service/engine/vllm/worker/model_access.py",
        "service/engine/vllm/worker/offload_worker.py",
        "service/engine/vllm/worker/eager_steering.py",
        "service/engine/vllm/worker/swap_extension.py",
        "service/engine/vllm/worker/pack_while_loading.py",
        "service/engine/vllm/worker/gpu_worker.py",
    },
    "ray": {
        "service/deployment/serve_application.py",
        "service/deployment/serve_autoscaling.py",
        "service/deployment/external_cluster_app.py",
        "service/deployment/serve_pool_discovery.py",
        "service/deployment/drain_node.py",
        "service/deployment/local_cluster.py",
        "service/deployment/replicas.py",
    },
    "fastapi": {
        "service/gateway/app.py",
        "service/gateway/dependencies.py",
        *(
            f"service/gateway/routes/{name}.py"
            for name in (
                "added_experts",
                "admin",
                "batch_plan",
                "batches",
                "conversations",
                "feedback",
                "files",
                "health",
                "keys",
                "metrics",
                "models",
                "ollama",
                "openapi",
                "route",
                "stored_responses",
                "usage",
            )
        ),
    },
    "redis": {"service/store/redis_commands.py"},
    "pickle": set(),
}


def tracked() -> list[Path]:
    """The files in git that are there (others may be about to be committed)."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> Iterator[tuple[Path, str]]:
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            yield path.relative_to(ROOT), data.decode()


def imported(path: Path) -> set[str]:
    """The top-level packages that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_import_layers_are_kept() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    ran = subprocess.run(
        [linter, "--config", "pyproject.toml", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_each_heavy_package_is_imported_in_its_modules_only(package: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "service").rglob("*.py")
        if package in imported(path)
    }
    assert users == ONLY_IN[package]


def test_importing_the_service_imports_nothing_heavy() -> None:
    """Help is quick, and a gateway holds no engine."""
    code = (
        "import sys, service.cli, service.gateway.gateway_reload, service.pool.pool_process\n"
        "heavy = {'vllm', 'torch', 'transformers', 'ray', 'sklearn'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"


def test_top_level_has_no_unlisted_entries() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in tracked()} <= TOP


# Put together here, so that this file does not find itself.
REGISTRIES = ("pypi" + ".org", "files.pythonhosted" + ".org", "hugging" + "face.co")
MACHINE = ("/ro" + "ot/", "/wo" + "rk/", "/ho" + "me/")
ALLOWED = {
    # Where one may point a person, or a client that is told to fetch, at a registry.
    "README.md",
    "NOTICE",
    "deploy/setup.sh",
}


@pytest.mark.parametrize("part", MACHINE)
def test_files_name_no_personal_machine_path(part: str) -> None:
    found = [str(path) for path, text in texts() if part in text and path.suffix != ".jsonl"]
    assert found == []


@pytest.mark.parametrize("host", REGISTRIES)
def test_files_name_no_registry_host(host: str) -> None:
    found = [str(path) for path, text in texts() if host in text and str(path) not in ALLOWED]
    assert found == []


def test_make_targets_named_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"setup", "serve", "test", "check"} <= targets
    named = {
        name
        for path in ROOT.rglob("README.md")
        if ".venv" not in path.parts and "node_modules" not in path.parts
        for name in re.findall(r"\bmake ([a-z][a-z-]+)\b(?=[`\s)])", _code(path.read_text()))
    }
    assert named <= targets


def _code(text: str) -> str:
    """What stands in backticks or indented blocks: prose may use the word, too."""
    fenced = re.findall(r"```.*?```|`[^`\n]+`|^ {4}.*$", text, re.DOTALL | re.MULTILINE)
    return "\n".join(part.strip("`") + "\n" for part in fenced)


def test_continuous_integration_runs_the_readme_s_commands() -> None:
    run = (ROOT / ".ci" / "run").read_text()
    assert "make check" in run
    assert "make test" in run


def test_skipped_tests_give_a_reason() -> None:
    bare = re.compile(
        r"pytest\.mark\.skip\b(?!if)(?!\(\s*reason)|pytest\.skip\(\s*\)|mark\.xfail\b"
    )
    found = [str(p) for p, text in texts() if p.parts[0] == "tests" and bare.search(text)]
    assert found == []
