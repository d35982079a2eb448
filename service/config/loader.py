"""Loads a config file as strict YAML, with errors that a person can act on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from service.config.moe_options import ExpertKernels
from service.config.pools import VllmOptions
from service.config.router import NO_ARTIFACT
from service.config.schema import SECTIONS, Config
from service.config.section_base import is_path, shown
from service.config.strict_yaml_loader import ConfigLoader, line_of, written_at
from service.errors import ConfigError

_Tuned = TypeVar("_Tuned", ExpertKernels, VllmOptions)

_VARIABLE = "the name of an environment variable is needed, in capitals"
# Messages for fields in which a secret may stand by mistake. They do not show the value.
_SECRET_FIELDS: dict[int | str, str] = {
    "api_key_env": _VARIABLE,
    "key_env": _VARIABLE,
    "url_env": _VARIABLE,
    "sha256": "64 hexadecimal digits are needed",
    "url": "a URL is needed, http(s) for an endpoint, redis, rediss or unix for a store",
}


# References to variables, as other tools write them: ${NAME}, $NAME at the start of a path,
# os.environ/NAME.
_VARIABLE_REFERENCE = re.compile(
    r"\$\{[A-Za-z_][A-Za-z0-9_.]*[^}]*\}|^\$[A-Za-z_][A-Za-z0-9_]*(?=$|[/:])|^os\.environ/"
)
_MAX_VALUES = 100_000
_TYPES = {bool: "boolean", int: "number", float: "number", type(None): "null"}


def parse_config(text: str, source: str) -> Config:
    """Parse and validate a config.

    Args:
        text: YAML.
        source: Name of the config in errors.

    Raises:
        ConfigError: The config is wrong; the message has one line per fault.
    """
    try:
        data = yaml.load(text, ConfigLoader)  # a safe loader, made stricter
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: it is nested too deeply") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        at = f" line {where.line + 1}, column {where.column + 1}" if where else ""
        problem = getattr(error, "problem", None) or "can't be read"
        raise ConfigError(f"{source}:{at} not valid YAML: {problem}") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        # PyYAML's constructors raise them for explicit tags, such as `!!int x`.
        raise ConfigError(f"{source}: not valid YAML: a value does not fit its tag") from None
    return _validated(data, source, text)


def read_config(data: object, source: str, folder: Path) -> Config:
    """Validate a parsed config.

    Args:
        data: The config.
        source: Name of the config in errors.
        folder: Base of relative paths in the config.

    Raises:
        ConfigError: The config is wrong; the message has one line per fault.
    """
    return _anchored(_validated(data, source), folder)


def validated_config(data: object, source: str) -> Config:
    """Validate a config whose paths are absolute already.

    Args:
        data: The config; sections of it may be validated already.
        source: Name of the config in errors.

    Raises:
        ConfigError: The config is wrong; the message has one line per fault.
    """
    return _validated(data, source)


def _validated(data: object, source: str, text: str | None = None) -> Config:
    """Validate `data`; with its source `text`, errors show values as they are written."""
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a mapping with the key `experts` is needed at the top")
    try:
        if used := list(_variables(data, (), [_MAX_VALUES])):
            raise ConfigError("\n".join(f"{source}: {line}" for line in used))
        return Config.model_validate(data)
    except RecursionError:
        raise ConfigError(
            f"{source}: it is nested too deeply, holds itself, or has over {_MAX_VALUES:,} values"
        ) from None
    except ValidationError as error:
        raise ConfigError("\n".join(faults_of(error, source, text))) from None


def _variables(value: object, place: tuple[str, ...], left: list[int]) -> Iterator[str]:
    """Yield an error for each value that refers to a variable, because none are replaced.

    `left` counts down the remaining values: aliases of aliases can make billions of them.
    """
    left[0] -= 1
    if left[0] < 0:
        raise RecursionError
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("description", "examples"):  # free text
                yield from _variables(item, (*place, str(key)), left)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _variables(item, (*place, str(number)), left)
    elif isinstance(value, str) and (found := _VARIABLE_REFERENCE.search(value)) is not None:
        where = ".".join(place)
        if place and place[-1].endswith("_env"):
            yield f"{where}: {_VARIABLE}, as it is: NAME, not ${{NAME}} or os.environ/NAME"
            return
        name = re.match(r"\$\{?[A-Za-z_][A-Za-z0-9_]*\}?|os\.environ/", found[0])
        yield (
            f"{where}: variables are not replaced in this file, and "
            f"{name[0] if name else found[0]} would be taken as it is; write the value (keys and "
            "the store's URL come from the environment, by the fields that end in _env)"
        )


def faults_of(
    error: ValidationError,
    source: str,
    text: str | None = None,
    section: tuple[int | str, ...] = (),
) -> Iterator[str]:
    """Yield a line for each fault that validation has found.

    Args:
        error: The faults.
        source: Name of the config in errors.
        text: The config as it was written, whose lines and values the errors show.
        section: Path of the validated section in a config.
    """
    for fault in error.errors(include_url=False):
        if fault["type"] == "categories":
            for place, said in fault["ctx"]["faults"]:
                at = None if text is None else line_of(text, place)
                where = source if at is None else f"{source}:{at}"
                yield f"{where}: {'.'.join(map(str, place))}: {said}"
            continue
        path = ".".join(str(part) for part in fault["loc"] if part != "[key]")
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            allowed = sorted(_keys_at((*section, *fault["loc"][:-1])))
            close = difflib.get_close_matches(str(fault["loc"][-1]), allowed, n=1)
            hint = f" did you mean {close[0]!r}?" if close else ""
            message = f"unknown key;{hint} allowed: {', '.join(allowed)}"
        elif fault["type"] == "missing":
            message = "missing, and it has no default"
        elif fault["loc"] and fault["loc"][-1] in _SECRET_FIELDS:
            # The value may be the key itself, so it is not shown.
            message = _SECRET_FIELDS[fault["loc"][-1]]
        elif fault["type"] == "string_type" and type(fault["input"]) in _TYPES:
            written = None if text is None else written_at(text, fault["loc"])
            value = shown(fault["input"]) if written is None else written or "nothing"
            remedy = "put it in quotes" if written is None else f'write "{written}"'
            kind = _TYPES[type(fault["input"])]
            message = f"a text is needed, and {value} is a {kind}; {remedy}"
        elif fault["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]}, not {shown(fault['input'])}"
        yield f"{source}: {path + ': ' if path else ''}{message}"


def _keys_at(path: tuple[int | str, ...]) -> set[str]:
    # Match by section and not by name: an expert or a pool may have the name "vllm".
    for place, section in SECTIONS.items():
        if len(place) == len(path) and all(
            want in ("*", got) for want, got in zip(place, path, strict=True)
        ):
            return set(section.model_fields)
    raise KeyError(path)


def load_config(path: Path) -> Config:
    """Read a config file; relative paths in it start at its folder.

    Raises:
        ConfigError: The file can't be read, or the config is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    return _anchored(parse_config(text, str(path)), path.resolve().parent)


def _anchored(config: Config, folder: Path) -> Config:
    """Make the relative paths in a config absolute, so that all processes resolve them alike."""

    def at(value: str) -> str:
        return str((folder / Path(value).expanduser()).resolve())

    def tuned(options: _Tuned) -> _Tuned:
        folder = options.tuned_config_folder
        if folder is None:
            return options
        return options.model_copy(update={"tuned_config_folder": at(folder)})

    experts = {
        name: expert.model_copy(
            update={
                "adapter": at(expert.adapter) if expert.adapter is not None else None,
                "profile": at(expert.profile) if expert.profile is not None else None,
                "model": at(expert.model)
                if expert.model is not None and is_path(expert.model)
                else expert.model,
                "vllm": tuned(expert.vllm),
                "command": expert.command.model_copy(update={"cwd": at(expert.command.cwd or ".")})
                if expert.command is not None
                else None,
            }
        )
        for name, expert in config.experts.items()
    }

    def of_engine(options: VllmOptions) -> VllmOptions:
        draft = options.args.get("speculative_config", {})
        if not is_path(draft.get("model") or ""):
            return tuned(options)
        args = {**options.args, "speculative_config": {**draft, "model": at(draft["model"])}}
        return tuned(options).model_copy(update={"args": args})

    pools = {
        kind: pool.model_copy(update={"vllm": of_engine(pool.vllm)})
        for kind, pool in config.pools.items()
    }
    artifact = config.router.artifact
    encoder = config.router.encoder
    if encoder is not None and encoder.model is not None and is_path(encoder.model):
        encoder = encoder.model_copy(update={"model": at(encoder.model)})
    keys_file = config.store.keys_file
    outcomes = config.shadow.folder
    files = config.batches.folder
    responses = config.responses.folder
    added = config.added_experts
    return config.model_copy(
        update={
            "experts": experts,
            "pools": pools,
            "router": config.router.model_copy(
                update={
                    "artifact": artifact if artifact in (None, NO_ARTIFACT) else at(artifact),
                    "encoder": encoder,
                }
            ),
            "shadow": config.shadow.model_copy(
                update={"folder": at(outcomes) if outcomes is not None else None}
            ),
            "batches": config.batches.model_copy(
                update={"folder": at(files) if files is not None else None}
            ),
            "responses": config.responses.model_copy(
                update={"folder": at(responses) if responses is not None else None}
            ),
            "store": config.store.model_copy(
                update={"keys_file": at(keys_file) if keys_file is not None else None}
            ),
            "added_experts": added.model_copy(
                update={
                    "roots": tuple(map(at, added.roots)),
                    "file": at(added.file) if added.file is not None else None,
                }
            ),
            "models_dir": at(config.models_dir) if config.models_dir is not None else None,
        }
    )
