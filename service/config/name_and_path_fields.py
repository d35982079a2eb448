"""What each text of a config stands for: the table of those that name something else in it. Pure.

Programs that write configs move paths and leave out names by this table. A test holds it against
the schema, so that every field with a text is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from enum import Enum, auto
from typing import Any

from service.config.router import NO_ARTIFACT
from service.config.section_base import is_path
from service.config.vllm_args import argument_name


class Meaning(Enum):
    """What a field's text, or each text of its list, stands for."""

    EXPERT = auto()
    EXPERT_OR_RECIPE = auto()
    ALIAS_TARGET = auto()
    """An expert, a recipe, `auto` or an alias, or weights by these."""
    CATEGORY = auto()
    TENANT = auto()
    PATH = auto()
    MODEL = auto()
    """A path where it begins like one, else a name of a catalogue or hub."""
    ARTIFACT = auto()
    """A path, but for the word that leaves out the built-in artifact."""
    ENGINE_ARGUMENTS = auto()
    """Arguments of vLLM; `speculative_config.model` is a path."""
    OTHER = auto()


Place = tuple[str, ...]

# By the field's path; `*` stands for a name that the user chooses.
TEXT_FIELDS: Mapping[Place, Meaning] = {
    ("server", "host"): Meaning.OTHER,
    ("server", "allowed_hosts"): Meaning.OTHER,
    ("server", "cors_origins"): Meaning.OTHER,
    ("server", "limits", "chat_template_kwargs"): Meaning.OTHER,
    ("router", "artifact"): Meaning.ARTIFACT,
    ("router", "fallback"): Meaning.EXPERT,
    ("router", "encoder", "model"): Meaning.MODEL,
    ("telemetry", "metrics_host"): Meaning.OTHER,
    ("telemetry", "traces_url"): Meaning.OTHER,
    ("models_dir",): Meaning.PATH,
    ("experts",): Meaning.EXPERT,
    ("experts", "*", "model"): Meaning.MODEL,
    ("experts", "*", "base"): Meaning.EXPERT,
    ("experts", "*", "adapter"): Meaning.PATH,
    ("experts", "*", "profile"): Meaning.PATH,
    ("experts", "*", "remote", "url"): Meaning.OTHER,
    ("experts", "*", "remote", "model"): Meaning.OTHER,
    ("experts", "*", "remote", "api_key_env"): Meaning.OTHER,
    ("experts", "*", "command", "run"): Meaning.OTHER,
    ("experts", "*", "command", "url"): Meaning.OTHER,
    ("experts", "*", "command", "ready"): Meaning.OTHER,
    ("experts", "*", "command", "model"): Meaning.OTHER,
    ("experts", "*", "command", "env"): Meaning.OTHER,
    ("experts", "*", "command", "secret_env"): Meaning.OTHER,
    ("experts", "*", "command", "cwd"): Meaning.PATH,
    ("experts", "*", "command", "sleep", "url"): Meaning.OTHER,
    ("experts", "*", "command", "sleep", "body"): Meaning.OTHER,
    ("experts", "*", "command", "wake", "url"): Meaning.OTHER,
    ("experts", "*", "command", "wake", "body"): Meaning.OTHER,
    ("experts", "*", "defaults", "system"): Meaning.OTHER,
    ("experts", "*", "defaults", "stop"): Meaning.OTHER,
    ("experts", "*", "defaults", "response_format"): Meaning.OTHER,
    ("experts", "*", "defaults", "chat_template_kwargs"): Meaning.OTHER,
    ("experts", "*", "categories"): Meaning.CATEGORY,
    ("experts", "*", "quality"): Meaning.CATEGORY,
    ("experts", "*", "quality_from"): Meaning.EXPERT,
    ("experts", "*", "vllm", "tuned_config_folder"): Meaning.PATH,
    ("experts", "*", "description"): Meaning.OTHER,
    ("experts", "*", "space"): Meaning.OTHER,
    ("recipes",): Meaning.EXPERT_OR_RECIPE,
    ("recipes", "*", "members"): Meaning.EXPERT,
    ("recipes", "*", "later"): Meaning.EXPERT,
    ("recipes", "*", "quality"): Meaning.CATEGORY,
    ("aliases",): Meaning.OTHER,
    ("aliases", "*", "to"): Meaning.ALIAS_TARGET,
    ("recipes", "*", "deliberate", "review"): Meaning.OTHER,
    ("recipes", "*", "deliberate", "revise"): Meaning.OTHER,
    ("recipes", "*", "recruit", "among"): Meaning.EXPERT,
    ("recipes", "*", "recruit", "aggregator"): Meaning.EXPERT,
    ("recipes", "*", "recruit", "prompt"): Meaning.OTHER,
    ("categories",): Meaning.CATEGORY,
    ("categories", "*", "description"): Meaning.OTHER,
    ("categories", "*", "examples"): Meaning.OTHER,
    ("categories", "*", "expert"): Meaning.EXPERT,
    ("pools",): Meaning.OTHER,
    ("pools", "*", "experts"): Meaning.EXPERT,
    ("pools", "*", "vllm", "tool_call_parser"): Meaning.OTHER,
    ("pools", "*", "vllm", "reasoning_parser"): Meaning.OTHER,
    ("pools", "*", "vllm", "media_domains"): Meaning.OTHER,
    ("pools", "*", "vllm", "args"): Meaning.ENGINE_ARGUMENTS,
    ("pools", "*", "vllm", "tuned_config_folder"): Meaning.PATH,
    ("pools", "*", "simulated", "poison"): Meaning.OTHER,
    ("tenants",): Meaning.TENANT,
    ("tenants", "*", "experts"): Meaning.EXPERT,
    ("keys",): Meaning.OTHER,
    ("keys", "*", "experts"): Meaning.EXPERT,
    ("keys", "*", "tenant"): Meaning.TENANT,
    ("keys", "*", "key_env"): Meaning.OTHER,
    ("keys", "*", "sha256"): Meaning.OTHER,
    ("prices", "unit"): Meaning.OTHER,
    ("budgets",): Meaning.OTHER,
    ("budgets", "*", "tenant"): Meaning.TENANT,
    ("savings", "against"): Meaning.EXPERT_OR_RECIPE,
    ("shadow", "experts"): Meaning.EXPERT,
    ("shadow", "judge"): Meaning.EXPERT,
    ("shadow", "folder"): Meaning.PATH,
    ("batches", "folder"): Meaning.PATH,
    ("responses", "folder"): Meaning.PATH,
    ("store", "url"): Meaning.OTHER,
    ("store", "url_env"): Meaning.OTHER,
    ("store", "prefix"): Meaning.OTHER,
    ("store", "keys_file"): Meaning.PATH,
    ("store", "cache_url"): Meaning.OTHER,
    ("store", "cache_url_env"): Meaning.OTHER,
    ("added_experts", "roots"): Meaning.PATH,
    ("added_experts", "file"): Meaning.PATH,
}


def holders(data: Any, place: Place) -> Iterator[tuple[MutableMapping[str, Any], Place]]:
    """Yield each mapping of a config's data that has the field, and the field's path in the data.

    Args:
        data: The config's data, as read from YAML.
        place: A key of `TEXT_FIELDS`.
    """
    yield from _holders(data, place, ())


def _holders(
    data: Any, place: Place, above: Place
) -> Iterator[tuple[MutableMapping[str, Any], Place]]:
    if not isinstance(data, MutableMapping):
        return
    first, *rest = place
    for key in list(data) if first == "*" else [first]:
        if not rest and key in data:
            yield data, (*above, key)
        elif rest:
            yield from _holders(data.get(key), tuple(rest), (*above, str(key)))


def move_paths(data: dict[str, Any], move: Callable[[str], str]) -> None:
    """Replace each path of a config's data, in place.

    Args:
        data: The config's data, as read from YAML.
        move: Makes the new path of an old one.
    """
    for place, meaning in TEXT_FIELDS.items():
        for holder, _ in holders(data, place):
            value = holder[place[-1]]
            if meaning is Meaning.ENGINE_ARGUMENTS and isinstance(value, dict):
                _move_draft(value, move)
            elif isinstance(value, str) and _leads_to_a_file(value, meaning):
                holder[place[-1]] = move(value)
            elif isinstance(value, list) and meaning is Meaning.PATH:
                holder[place[-1]] = [move(path) for path in value if isinstance(path, str)]
    # A command without a folder runs in that of the config.
    for holder, _ in holders(data, ("experts", "*", "command", "run")):
        if "cwd" not in holder and (moved := move(".")) not in (".", "./"):
            holder["cwd"] = moved


def _leads_to_a_file(value: str, meaning: Meaning) -> bool:
    match meaning:
        case Meaning.PATH:
            return True
        case Meaning.MODEL:
            return is_path(value)
        case Meaning.ARTIFACT:
            return value != NO_ARTIFACT
    return False


def _move_draft(args: dict[str, Any], move: Callable[[str], str]) -> None:
    for key, value in args.items():
        if argument_name(key) != "speculative_config" or not isinstance(value, dict):
            continue
        if isinstance(model := value.get("model"), str):
            value["model"] = move(model)
