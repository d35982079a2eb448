"""YAML in all its spellings is read as meant, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from service.config import Config, load_config, parse_config
from service.config.model_pin_writer import pin_models
from service.config.strict_yaml_loader import ConfigDumper, ConfigLoader
from service.errors import ConfigError

POOLS = "\npools: {cpu: {engine: simulated}}\n"


def parse(experts: str) -> Config:
    """A config of these experts, in a pool with a simulated engine."""
    return parse_config(f"experts:\n{experts}{POOLS}", "coe.yaml")


def refusal(text: str) -> str:
    """The error that a config's text gets."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "coe.yaml")
    return caught.value.message


# --- merge keys


def test_parse_merge_keys_own_keys_win() -> None:
    config = parse(
        "  a: &first {model: some-model, categories: [general], description: one}\n"
        "  b:\n    <<: *first\n    categories: [math]\n"
        "  c:\n    <<: [*first, {description: two}]\n    categories: [code]\n"
        "  d: {<<: [{description: three}, *first]}"
    )
    details = {name: (e.model, e.categories, e.description) for name, e in config.experts.items()}
    assert details == {
        "a": ("some-model", ("general",), "one"),
        "b": ("some-model", ("math",), "one"),
        "c": ("some-model", ("code",), "one"),
        "d": ("some-model", ("general",), "three"),
    }


def test_parse_merge_of_a_merge_and_anchor_as_a_value() -> None:
    config = parse(
        "  a: &a {model: m, price: &p {prompt: 1, completion: 2}}\n"
        "  b: &b {<<: *a, description: b}\n"
        "  c: {<<: *b, description: c}\n"
        "  d: {model: m, price: *p}"
    )
    assert [e.description for e in config.experts.values()] == ["", "b", "c", ""]
    assert {e.price for e in config.experts.values()} == {config.experts["a"].price}


@pytest.mark.parametrize(
    "experts",
    [
        "  a: {model: m, model: n}",
        "  a: &a {model: m}\n  b:\n    <<: *a\n    model: x\n    model: y",
        "  a: &a {model: m}\n  b:\n    <<: *a\n    <<: *a",
        "  a: {model: m}\n  a: {model: m}",
        '  no: {model: m}\n  "no": {model: m}',
    ],
)
def test_parse_duplicate_key_raises_with_its_line(experts: str) -> None:
    message = refusal(f"experts:\n{experts}{POOLS}")
    assert "is given twice" in message
    assert f"line {1 + len(experts.splitlines())}," in message


# --- names that YAML 1.1 takes for something else

SURPRISES = ("no", "yes", "on", "off", "y", "n", "true", "null", "1.5", "7", "010", "1e3", "0x1f")


@pytest.mark.parametrize("name", [*SURPRISES, "1:30", "2026-01-01", "1_000"])
def test_parse_expert_names_that_look_like_other_types_stay_text(name: str) -> None:
    assert list(parse(f"  {name}: {{model: m}}").experts) == [name]


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "1:30", "2026-01-01", "010", "1_000"])
def test_parse_text_that_yaml_1_1_would_convert_stays_text(text: str) -> None:
    expert = parse(f"  a: {{model: {text}, categories: [{text}]}}").experts["a"]
    assert (expert.model, expert.categories) == (text, (text,))


@pytest.mark.parametrize(
    ("written", "kind"),
    [("3.10", "number"), ("7", "number"), ("1e3", "number"), ("true", "boolean"), ("~", "null")],
)
@pytest.mark.parametrize(
    ("experts", "place"),
    [
        ("  a: {model: m, categories: [x, %s]}", "experts.a.categories.1"),
        ("  a: {model: m}\n  b: {base: a, adapter: x, description: %s}", "experts.b.description"),
    ],
)
def test_parse_number_for_a_text_field_raises_with_its_spelling(
    experts: str, place: str, written: str, kind: str
) -> None:
    message = refusal(f"experts:\n{experts % written}{POOLS}")
    assert f'coe.yaml: {place}: a text is needed, and {written} is a {kind}; write "{written}"' in (
        message.splitlines()
    )


@pytest.mark.parametrize(
    ("written", "value"),
    [("8", 8), ("010", 10), ("1e3", 1000), ("0x10", 16), ("0o17", 15), ("1_000", 1000)],
)
def test_parse_integers_in_any_common_notation(written: str, value: int) -> None:
    text = f"experts: {{a: {{model: m}}}}\npools: {{cpu: {{engine: simulated, slots: {written}}}}}"
    assert parse_config(text, "coe.yaml").pools["cpu"].slots == value


def test_parse_sexagesimal_is_not_a_number() -> None:
    assert "server.port" in refusal(
        "experts: {a: {model: m}}\nserver: {port: 1:30}\npools: {cpu: {engine: simulated}}"
    )


@pytest.mark.parametrize(("written", "value"), [("yes", True), ("off", False), ("True", True)])
def test_parse_boolean_fields_accept_yes_no_on_off(written: str, value: bool) -> None:
    assert parse(f"  a: {{model: m, pinned: {written}}}").experts["a"].pinned is value


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**12), 10**12)
        | st.floats(allow_nan=False)
        | st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(SURPRISES), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
@example(["0E0", "1e3", "0o7", "010", "no", "~", ".inf"])
def test_config_loader_reads_back_what_was_dumped(data: object) -> None:
    assert yaml.load(yaml.dump(data, Dumper=ConfigDumper), ConfigLoader) == data


# --- how editors save


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_load_ignores_byte_order_mark_and_line_endings(tmp_path: Path, mark: str, end: str) -> None:
    path = tmp_path / "coe.yaml"
    text = f"{mark}experts:\n  a: {{model: m}}{POOLS}".replace("\n", end)
    path.write_bytes(text.encode())
    assert list(load_config(path).experts) == ["a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a mapping with the key `experts`"),
        ("- a\n- b\n", "a mapping with the key `experts`"),
        (f"experts: {{a: {{model: m}}}}{POOLS}---\nexperts: {{}}", "document"),
        ("experts:\n\ta: {model: m}\n", "line 2"),
        ("experts:\n  ? [a]\n  : {model: m}\n", "a key must be a name"),
        ("experts: &a {a: *a}", "holds itself"),
        ("a: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_parse_invalid_config_raises_one_line(text: str, expected: str) -> None:
    message = refusal(text)
    assert expected in message
    assert len(message.splitlines()) == 1


def test_parse_nested_aliases_end_in_bounded_time() -> None:
    lines = ["experts:", "  a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for n in range(1, 12):
        lines.append(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    # Without a bound this would take years.
    assert "over 100,000 values" in refusal("\n".join(lines))


# --- variables, as other tools have them


@pytest.mark.parametrize(
    ("text", "place", "shown"),
    [
        ("experts: {a: {model: '${MODELS}/tiny'}}", "experts.a.model", "${MODELS}"),
        ("experts: {a: {model: $HOME/tiny}}", "experts.a.model", "$HOME"),
        ("experts: {a: {model: m}, b: {base: a, adapter: '${X}/a'}}", "experts.b.adapter", "${X}"),
        ("experts: {a: {remote: {url: '${URL}/v1', model: m}}}", "experts.a.remote.url", "${URL}"),
        (
            "experts: {a: {remote: {url: 'http://${HOST}/v1', model: m}}}",
            "experts.a.remote.url",
            "${HOST}",
        ),
        (
            "experts: {a: {remote: {url: 'http://h/v1', model: os.environ/NAME}}}",
            "experts.a.remote.model",
            "os.environ/",
        ),
        ("experts: {a: {model: m, categories: ['${C:-x}']}}", "experts.a.categories.0", "${C"),
    ],
)
def test_parse_variable_raises_with_its_place(text: str, place: str, shown: str) -> None:
    message = refusal(text + POOLS)
    assert message.startswith(f"coe.yaml: {place}: variables are not replaced in this file")
    assert shown in message


@pytest.mark.parametrize("value", ["'${KEY}'", "os.environ/KEY", "$KEY", "sk-live-9f8e7d6c"])
@pytest.mark.parametrize(
    "text",
    [
        "experts: {a: {remote: {url: 'http://h/v1', model: m, api_key_env: %s}}}",
        "experts: {a: {model: m}}\nstore: {kind: redis, url_env: %s}" + POOLS,
        "experts: {a: {model: m}}\nkeys: {k: {tenant: t, key_env: %s}}" + POOLS,
    ],
)
def test_parse_variable_for_an_env_name_raises_without_its_value(text: str, value: str) -> None:
    message = refusal(text % value)
    assert "_env: the name of an environment variable is needed" in message
    assert "KEY" not in message
    assert "9f8e7d6c" not in message


def test_parse_dollar_in_a_description_is_text() -> None:
    expert = parse("  a: {model: m, description: 'costs $5, or ${NAME}'}").experts["a"]
    assert expert.description == "costs $5, or ${NAME}"


# --- pinning


def test_pin_models_changes_only_the_experts_models() -> None:
    text = (
        "# org/name is a comment\n"
        "experts:\n"
        "  a: &a {model: org/name, description: org/name}  # org/name\n"
        "  b: {<<: *a}\n"
        "  c: {model: 'org/name'}\n"
        "  d: {model: org/other}\n"
        "  e: {remote: {url: 'http://h', model: org/name}}\n"
    )
    changed = pin_models(text, {"org/name": "org/name@c"})
    assert changed == text.replace("{model: org/name, desc", "{model: org/name@c, desc").replace(
        "'org/name'", "'org/name@c'"
    )
    assert pin_models("experts: []", {"org/name": "x"}) == "experts: []"
