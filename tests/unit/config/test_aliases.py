"""The section `aliases`: its short forms, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from service.config import Config, parse_config
from service.config.aliases import AliasConfig, ResolvedAlias, resolve_aliases
from service.errors import ConfigError

BASE = """
experts:
  small: {model: m, categories: [general]}
  new: {model: n, categories: [law]}
  to: {model: o}
  embed-a: {model: p, capabilities: [embeddings], space: one}
  embed-b: {model: q, capabilities: [embeddings], space: two}
recipes:
  both: {kind: cascade, members: [small], later: [new]}
pools: {cpu: {engine: simulated}}
"""


def read(aliases: str) -> Config:
    return parse_config(f"{BASE}aliases: {aliases}\n", "f.yaml")


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ("auto", {"auto": 1}),
        ("'auto:best/law'", {"auto:best/law": 1}),
        ("both", {"both": 1}),
        ("{small: 90, new: 10}", {"small": 90, "new": 10}),
        ("{to: small}", {"small": 1}),
        ("{to: {small: 3, new: 0}}", {"small": 3, "new": 0}),
        # `to` is an expert here.
        ("{to: 9, new: 1}", {"to": 9, "new": 1}),
    ],
)
def test_alias_short_form_has_targets(given: str, targets: dict[str, float]) -> None:
    config = read(f"{{prod: {given}}}")
    assert config.aliases["prod"].to == targets
    assert Config.model_validate(config.model_dump()) == config
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("given", "place", "said"),
    [
        (
            "{a: smal}",
            "a",
            "no target 'smal'; did you mean 'small'? allowed: auto: auto, auto:fast",
        ),
        ("{a: auto:bset}", "a", "did you mean 'auto:best'?"),
        ("{a: auto/math}", "a", "categories: general, law"),
        ("{a: claude-1, 'claude-*': auto}", "a", "no target 'claude-1'"),
        ("{a: 'claude-*', 'claude-*': auto}", "a", "no target 'claude-*'"),
        ("{a: a}", "a", "leads back to itself (a → a)"),
        ("{x: a, a: b, b: c, c: a}", "a", "leads back to itself (a → b → c → a)"),
        ("{a: {small: 1, b: 1}, b: {new: 1, a: 1}}", "a", "leads back to itself (a → b → a)"),
        ("{a: {small: 1, b: 1}, b: {new: 1, small: 1}}", "a", "only one alias on the way"),
        ("{small: new}", "small", "the name is taken by an expert or a recipe"),
        ("{both: new}", "both", "the name is taken by an expert or a recipe"),
        ("{'auto:fast': new}", "auto:fast", "the reserved prefix 'auto'"),
        ("{a: {small: 0}}", "a", "all weights are 0"),
        ("{a: {}}", "a.to", "at least 1 item"),
        ("{a: [small]}", "a", "an alias is the name of one target, targets with weights"),
        ("{a: {small: -1}}", "a.to.small", "greater than or equal to 0"),
        ("{a: {small: x}}", "a.to.small", "valid number"),
        ("{a: {to: small, more: {}}}", "a.more", "unknown key"),
        ("{a: {to: small, rollback: {min_requests: 9}}}", "a", "rollback needs several targets"),
        (
            "{a: {to: {small: 1, new: 1}, rollback: {confidence: 1}}}",
            "a.rollback.confidence",
            "less",
        ),
        (
            "{a: {to: {small: 1, new: 1}, rollback: {margin: 1}}}",
            "a.rollback.margin",
            "error_margin",
        ),
        ("{'a b': small}", "a b", "match pattern"),
        ("{a: {embed-a: 1, embed-b: 1}}", "a", "'embed-a', 'embed-b' embed into several"),
    ],
)
def test_alias_wrong_is_refused_with_its_name(given: str, place: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(given)
    lines = error.value.message.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"f.yaml: aliases.{place}: ")
    assert said in lines[0]


@pytest.mark.parametrize(
    "place", ["tenants: {t: {experts: [prod]}}", "keys: {k: {experts: [prod]}}"]
)
def test_alias_in_an_allow_list_is_refused(place: str) -> None:
    text = (
        place.replace("[prod]}", "[prod], sha256: " + "0" * 64 + "}") if "keys" in place else place
    )
    with pytest.raises(
        ConfigError, match="'prod' is an alias; list the experts that it stands for"
    ):
        parse_config(f"{BASE}aliases: {{prod: small}}\n{text}\n", "f.yaml")


def test_aliases_of_aliases_end_at_targets() -> None:
    given: dict[str, Any] = {
        "prod": {"small": 90, "nick": 10, "again": 5},
        "nick": "new",
        "again": "new",
        "gpt-4o": "prod",
        "gpt-*": "gpt-4o",
    }
    aliases = {name: AliasConfig.model_validate(alias) for name, alias in given.items()}
    resolved = resolve_aliases(aliases)
    shared = ResolvedAlias("prod", {"small": 90, "new": 15})
    assert resolved["prod"] == resolved["gpt-4o"] == resolved["gpt-*"] == shared
    assert resolved["nick"] == resolved["again"] == ResolvedAlias(None, {"new": 1})


def test_aliases_have_a_json_schema() -> None:
    forms = Config.model_json_schema()["$defs"]["AliasConfig"]["anyOf"]
    assert [form["type"] for form in forms] == ["string", "object", "object"]
