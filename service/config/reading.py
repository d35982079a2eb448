"""Reading a config file: YAML, made strict, and errors that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from service.config.base import shown
from service.config.composition import SECTIONS, Config
from service.config.kernels import ExpertKernels, RoutedOptions
from service.errors import ConfigError

_Tuned = TypeVar("_Tuned", ExpertKernels, RoutedOptions)

_VARIABLE = "the name of an environment variable is needed, in capitals"
# What is needed where a secret may have been written by mistake.
_SECRET: dict[int | str, str] = {
    "api_key_env": _VARIABLE,
    "key_env": _VARIABLE,
    "url_env": _VARIABLE,
    "sha256": "64 hexadecimal digits are needed",
    "url": "a URL is needed, http(s) for an endpoint, redis, rediss or unix for a store",
}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_config(text: str, source: str) -> Config:
    """Parse and validate a config; `source` is named in errors.

    Raises ConfigError with one line per fault.
    """
    try:
        data = yaml.load(text, _Loader)  # a safe loader, made stricter
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        at = f" line {where.line + 1}, column {where.column + 1}" if where else ""
        problem = getattr(error, "problem", None) or "can't be read"
        raise ConfigError(f"{source}:{at} not valid YAML: {problem}") from None
    return _validated(data, source)


def read_config(data: object, source: str, folder: Path) -> Config:
    """Validate a config that has been parsed already. Paths in it are taken relative to `folder`.

    `source` is named in errors. Raises ConfigError with one line per fault.
    """
    return _anchored(_validated(data, source), folder)


def _validated(data: object, source: str) -> Config:
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a mapping with the key `experts` is needed at the top")
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error, source))) from None


def _faults(error: ValidationError, source: str) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        path = ".".join(str(part) for part in fault["loc"] if part != "[key]")
        said = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            allowed = sorted(_keys_at(fault["loc"][:-1]))
            close = difflib.get_close_matches(str(fault["loc"][-1]), allowed, n=1)
            hint = f" did you mean {close[0]!r}?" if close else ""
            said = f"unknown key;{hint} allowed: {', '.join(allowed)}"
        elif fault["type"] == "missing":
            said = "missing, and it has no default"
        elif fault["loc"] and fault["loc"][-1] in _SECRET:
            # Not shown: somebody may have put the key itself here.
            said = _SECRET[fault["loc"][-1]]
        elif fault["type"] != "value_error":
            said = f"{said[0].lower()}{said[1:]}, not {shown(fault['input'])}"
        yield f"{source}: {path + ': ' if path else ''}{said}"


def _keys_at(path: tuple[int | str, ...]) -> set[str]:
    # By kind of place, not by name: an expert or a pool may well be called "vllm".
    for place, section in SECTIONS.items():
        if len(place) == len(path) and all(
            want in ("*", got) for want, got in zip(place, path, strict=True)
        ):
            return set(section.model_fields)
    raise KeyError(path)


def load_config(path: Path) -> Config:
    """Read a config file. Paths in it are taken relative to it. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    return _anchored(parse_config(text, str(path)), path.resolve().parent)


def _anchored(config: Config, folder: Path) -> Config:
    """Make the relative paths in a config absolute, so that every process reads them alike."""

    def at(value: str) -> str:
        return str((folder / Path(value).expanduser()).resolve())

    def looks_like_path(value: str) -> bool:
        return value.startswith(("./", "../", "/", "~"))

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
                if expert.model is not None and looks_like_path(expert.model)
                else expert.model,
                "vllm": tuned(expert.vllm),
            }
        )
        for name, expert in config.experts.items()
    }
    pools = {
        kind: pool.model_copy(update={"vllm": tuned(pool.vllm)})
        for kind, pool in config.pools.items()
    }
    artifact = config.router.artifact
    keys_file = config.store.keys_file
    return config.model_copy(
        update={
            "experts": experts,
            "pools": pools,
            "router": config.router.model_copy(
                update={"artifact": at(artifact) if artifact is not None else None}
            ),
            "store": config.store.model_copy(
                update={"keys_file": at(keys_file) if keys_file is not None else None}
            ),
            "models_dir": at(config.models_dir) if config.models_dir is not None else None,
        }
    )
