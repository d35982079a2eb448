"""Reference documents made from the code: config, metrics, errors, commands, HTTP endpoints.

`python -m service.cli.reference` writes every document into the checkout that it runs in. A test
holds the files equal to what this module makes, so that they never tell less than the code does.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from service import errors
from service.config import SECTIONS, Config
from service.telemetry import metrics as metric_table
from service.telemetry.labels import LABELS

_NOTE = "<!-- Made by `python -m service.cli.reference`; edit the code that it reads instead. -->\n"


def config_reference() -> str:
    """Every config key with its default and description, as Markdown."""
    parts = ["# Configuration\n", _NOTE]
    parts.append(
        "One YAML file describes a composition. Unknown keys are refused. `coe check` validates\n"
        "a file, `coe config schema` prints the JSON schema, and `deploy/config/reference.yaml`\n"
        "shows every key in place.\n"
    )
    for place, model in SECTIONS.items():
        parts.append(f"## `{_path(place)}`\n\n{inspect.cleandoc(model.__doc__ or '')}\n")
        parts.append("| key | default | meaning |\n| --- | --- | --- |")
        for name, field in model.model_fields.items():
            if _section_of(place, name) is not None:
                parts.append(
                    f"| `{name}` | | see [`{_path((*place, name))}`](#{_anchor((*place, name))}) |"
                )
            else:
                parts.append(f"| `{name}` | {_default(field)} | {_cell(field.description or '')} |")
        parts.append("")
    return "\n".join(parts)


def _section_of(place: tuple[str, ...], name: str) -> tuple[str, ...] | None:
    """The section that a key opens, if it is one."""
    for candidate in ((*place, name), (*place, name, "*")):
        if candidate in SECTIONS:
            return candidate
    return None


def _path(place: tuple[str, ...]) -> str:
    """`experts.NAME.remote` for ("experts", "*", "remote")."""
    named = {"pools": "KIND"}
    parts = [
        named.get(place[i - 1], "NAME") if part == "*" else part for i, part in enumerate(place)
    ]
    return ".".join(parts) or "(top level)"


def _anchor(place: tuple[str, ...]) -> str:
    section = _section_of(place[:-1], place[-1])
    assert section is not None
    return _path(section).replace(".", "").lower()


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = _default_value(field)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    if value == {}:
        return "`{}`"
    return f"`{value}`" if value != "" else '`""`'


def _default_value(field: Any) -> Any:
    if field.default_factory is not None:
        return field.default_factory()
    return None if field.default is PydanticUndefined else field.default


def config_example() -> str:
    """Every config key, commented out, with its default and description, as YAML."""
    lines = [
        "# Every key of the config file, with its default and meaning. Nothing here is set: take",
        "# the lines that you need into a file of your own. NAME and KIND are yours to choose.",
        "# Made by `python -m service.cli.reference`.",
        "",
    ]
    lines += _example_of((), Config, 0)
    return "\n".join(lines) + "\n"


def _example_of(place: tuple[str, ...], model: type[BaseModel], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in model.model_fields.items():
        section = _section_of(place, name)
        if section is None:
            yield from _comment(f"{field.description or ''}", indent)
            yield f"# {indent}{name}: {_yaml_default(field)}"
            yield "#" if depth else ""
            continue
        inner = SECTIONS[section]
        yield from _comment(field.description or inspect.cleandoc(inner.__doc__ or ""), indent)
        yield f"# {indent}{name}:"
        if section[-1] == "*":
            yield f"# {indent}  {'KIND' if name == 'pools' else 'NAME'}:"
        yield from _example_of(section, inner, depth + (2 if section[-1] == "*" else 1))


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(text.split("\n\n")[0], width=max(40, 96 - len(indent))):
        yield f"# {indent}# {line}"


def _yaml_default(field: Any) -> str:
    if field.is_required():
        return "  # required"
    value = _default_value(field)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    return "{}" if value == {} else str(value) or '""'


def metrics_reference() -> str:
    """Every metric that the service declares, and what bounds its labels, as Markdown."""
    parts = ["# Metrics\n", _NOTE]
    for group, declared in metric_table.GROUPS.items():
        parts.append(f"## {group}\n")
        parts.append(
            "| metric | kind | process | labels | meaning |\n| --- | --- | --- | --- | --- |"
        )
        for one in declared:
            labels = ", ".join(f"`{label}`" for label in one.labels)
            parts.append(
                f"| `{one.name}` | {one.kind} | {one.side} | {labels} | {_cell(one.meaning)} |"
            )
        parts.append("")
    parts.append("## Labels\n\n| label | values |\n| --- | --- |")
    parts += [f"| `{label}` | {_cell(bound)} |" for label, bound in LABELS.items()]
    parts.append("")
    return "\n".join(parts)


def errors_reference() -> str:
    """Every error that a client can get: status, code, type and meaning, as Markdown."""
    from service.http.openai_errors import detail_of, status_of

    parts = ["# Errors\n", _NOTE]
    parts.append(
        "Errors have the shape of the API that was asked: OpenAI's\n"
        '`{"error": {"message", "type", "param", "code"}}`, or Anthropic\'s on `/v1/messages`.\n'
        "A stream that has begun ends with an error event. Config and artifact errors end a\n"
        "command with one line and exit status 2 or 1; a running service answers them with 500.\n"
    )
    parts.append("| status | code | type | meaning |\n| --- | --- | --- | --- |")
    rows = []
    for kind in _subclasses(errors.CoeError):
        error = kind("")
        meaning = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
        rows.append((status_of(error), kind.code, detail_of(error)["type"], meaning))
    parts += [f"| {s} | `{c}` | `{t}` | {_cell(m)} |" for s, c, t, m in sorted(set(rows))]
    parts.append("")
    return "\n".join(parts)


def _subclasses(kind: type[errors.CoeError]) -> Iterator[type[errors.CoeError]]:
    for one in kind.__subclasses__():
        if one.__module__ == errors.__name__:
            yield one
        yield from _subclasses(one)


def commands_reference() -> str:
    """Every command with its options and arguments, as Markdown."""
    from service.cli import cli

    parts = ["# Commands\n", _NOTE]
    parts += _command_parts(cli, ("coe",))
    return "\n".join(parts)


def _command_parts(command: click.Command, path: tuple[str, ...]) -> Iterator[str]:
    context = click.Context(
        command, info_name=" ".join(path), terminal_width=96, max_content_width=96
    )
    yield f"## `{' '.join(path)}`\n"
    yield f"```text\n{command.get_help(context).strip()}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _command_parts(inner, (*path, name))


def http_reference() -> str:
    """Every endpoint of the gateway with its summary, as Markdown."""
    from service.config import parse_config
    from service.gateway.openapi import describe

    parts = ["# HTTP endpoints\n", _NOTE]
    parts.append(
        "A running service describes itself at `/openapi.json`, and `/docs` lets you try it.\n"
        "Bodies are OpenAI's or Anthropic's; fields that the gateway does not check go to the\n"
        "engine as they are.\n"
    )
    parts.append("| method | path | summary |\n| --- | --- | --- |")
    config = parse_config("experts: {demo: {model: demo}}\npools: {cpu: {}}\n", "reference")
    for path, operations in describe(config)["paths"].items():
        for method, operation in operations.items():
            parts.append(f"| {method.upper()} | `{path}` | {_cell(operation['summary'])} |")
    parts.append("")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


DOCUMENTS: dict[str, Callable[[], str]] = {
    "docs/reference/config.md": config_reference,
    "docs/reference/metrics.md": metrics_reference,
    "docs/reference/errors.md": errors_reference,
    "docs/reference/cli.md": commands_reference,
    "docs/reference/http-api.md": http_reference,
    "deploy/config/reference.yaml": config_example,
}


def write_documents(root: Path) -> list[str]:
    """Write every document below `root`; returns the names of those that changed."""
    changed = []
    for name, make in DOCUMENTS.items():
        path = root / name
        text = make()
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            changed.append(name)
    return changed


if __name__ == "__main__":
    for document in write_documents(Path.cwd()):
        sys.stdout.write(f"written: {document}\n")
