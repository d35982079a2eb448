"""The config file: what is taken, and that every refusal names file, path, fault and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from service.config import Config, load_config, parse_bytes, parse_config
from service.errors import ConfigError

MINIMAL = {
    "experts": {"general": {"model": "some-model"}},
    "pools": {"cpu": {"engine": "simulated"}},
}


def faults(data: object) -> list[str]:
    """The lines of the error that a config gets."""
    text = data if isinstance(data, str) else yaml.safe_dump(data)
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "coe.yaml")
    return caught.value.message.splitlines()


def minimal(**changes: object) -> dict[str, object]:
    return {**MINIMAL, **changes}


def test_a_minimal_config_gets_the_documented_defaults() -> None:
    config = parse_config(yaml.safe_dump(MINIMAL), "coe.yaml")
    assert config.server.host == "127.0.0.1"
    assert config.server.port == 8000
    assert config.server.deadline_ms == 120_000
    assert config.fallback == "general"
    assert config.category_map() == {"general": "general"}
    assert config.pools["cpu"].most_replicas == 1
    assert config.model_sources() == {}


def test_every_field_is_described() -> None:
    schema = Config.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    silent = [
        f"{section.get('title')}.{name}"
        for section in sections
        for name, field in section.get("properties", {}).items()
        if not field.get("description") and "$ref" not in field
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"server": {"prot": 1}},
            "coe.yaml: server.prot: unknown key; did you mean 'port'? allowed: access_log, "
            "allow_unauthenticated, allowed_hosts, breaker, cors_origins, deadline_ms, drain_s, "
            "gateways, host, limits, max_body_bytes, port, require_keys",
        ),
        (
            {"servers": {}},
            "coe.yaml: servers: unknown key; did you mean 'server'? allowed: budgets, "
            "experts, feedback, keys, models_dir, pools, recipes, router, server, store, "
            "telemetry, tenants",
        ),
        (
            {"server": {"port": 70_000}},
            "coe.yaml: server.port: input should be less than or equal to 65535, not 70000",
        ),
        (
            {"server": {"port": "many"}},
            "coe.yaml: server.port: input should be a valid integer, unable to parse string as "
            "an integer, not 'many'",
        ),
        (
            {"pools": {"cpu": {"engine": "llama"}}},
            "coe.yaml: pools.cpu.engine: input should be 'vllm' or 'simulated', not 'llama'",
        ),
        (
            {"pools": {"cpu": {"memory_bytes": "a lot"}}},
            "coe.yaml: pools.cpu.memory_bytes: input should be a number of bytes, or one with a "
            'unit such as "512MiB" or "2GB", not \'a lot\'',
        ),
        (
            {"pools": {"cpu": {"min_replicas": 3, "max_replicas": 2}}},
            "coe.yaml: pools.cpu: max_replicas must be at least min_replicas, and at least 1",
        ),
        (
            {"pools": {"cpu": {"experts": ["genral"]}}},
            "coe.yaml: pools.cpu.experts: no expert 'genral'; did you mean 'general'? "
            "experts: general",
        ),
        (
            {"router": {"fallback": "zzz"}},
            "coe.yaml: router.fallback: no expert 'zzz'; experts: general",
        ),
        (
            {"experts": {"general": {}}},
            "coe.yaml: experts.general: needs exactly one of model, base (with adapter or "
            "profile), remote",
        ),
        (
            {"experts": {"general": {"model": "m", "adapter": "a"}}},
            "coe.yaml: experts.general: base goes together with adapter or profile",
        ),
        (
            {"experts": {"general": {"model": "m", "profile": "p"}}},
            "coe.yaml: experts.general: profile needs base, and no adapter",
        ),
        (
            {"experts": {"general": {"base": "b", "profile": "p", "form": "merged"}}},
            "coe.yaml: experts.general: form 'steered' requires `profile`, and `profile` "
            "requires this form",
        ),
        (
            {"pools": {}},
            "coe.yaml: experts 'general' are in no pool; add a pool under `pools`",
        ),
        (
            {"server": {"gateways": 2}},
            "coe.yaml: server.gateways: several gateways need a shared store; "
            "set store.kind to redis",
        ),
        (
            {"store": {"kind": "redis"}},
            "coe.yaml: store: kind redis needs exactly one of url, url_env",
        ),
        (
            {"store": {"kind": "redis", "url": "redis://:secret@host"}},
            "coe.yaml: store: put a URL that contains a password in url_env",
        ),
        (
            {"budgets": {"all": {"amount": 1}}},
            "coe.yaml: budgets.all: needs exactly one of period, window_s",
        ),
        (
            {"keys": {"a": {"tenant": "a"}}},
            "coe.yaml: keys.a: needs exactly one of key_env, sha256",
        ),
        (
            {"tenants": {"acme": {}}, "keys": {"k": {"tenant": "acne", "sha256": "0" * 64}}},
            "coe.yaml: keys.k.tenant: no tenant 'acne'; did you mean 'acme'? "
            "tenants: acme, default",
        ),
        (
            {
                "tenants": {"acme": {}},
                "budgets": {"b": {"amount": 1, "period": "day", "tenant": "x"}},
            },
            "coe.yaml: budgets.b.tenant: no tenant 'x'; tenants: acme, default",
        ),
        (
            {"server": {"allow_unauthenticated": True, "require_keys": True}},
            "coe.yaml: server: allow_unauthenticated and require_keys exclude each other",
        ),
        (
            {"store": {"cache_url": "redis://host"}},
            "coe.yaml: store: cache_url and cache_url_env need kind redis",
        ),
        (
            {"store": {"kind": "redis", "url": "redis://a", "cache_url": "redis://:secret@host"}},
            "coe.yaml: store: put a URL that contains a password in cache_url_env",
        ),
        (
            {"tenants": {"a": {"experts": ["genral"]}}},
            "coe.yaml: tenants.a.experts: no expert 'genral'; did you mean 'general'? "
            "experts: general",
        ),
        (
            {"experts": {"auto/x": {"model": "m"}}},
            "coe.yaml: experts.auto/x: the prefix 'auto' is reserved",
        ),
    ],
)
def test_a_fault_is_named_exactly(changes: dict[str, object], expected: str) -> None:
    said = [
        line.replace("coe.yaml: Value error, ", "coe.yaml: ") for line in faults(minimal(**changes))
    ]
    assert said == [expected]


def test_a_section_called_like_another_lists_its_own_keys() -> None:
    (said,) = faults(minimal(pools={"vllm": {"engine": "simulated", "max_model_len": 1}}))
    assert said.startswith("coe.yaml: pools.vllm.max_model_len: unknown key;")
    assert "max_queued_requests" in said
    assert "enforce_eager" not in said


def test_every_fault_has_its_own_line() -> None:
    lines = faults(minimal(server={"port": 0, "gateways": 0}))
    assert [line.split(": ")[1] for line in lines] == ["server.port", "server.gateways"]


def test_what_is_missing_is_named() -> None:
    assert faults({"pools": {}}) == ["coe.yaml: experts: missing, and it has no default"]


@pytest.mark.parametrize("text", ["", "- a\n- b", "just words"])
def test_something_else_than_a_mapping(text: str) -> None:
    assert faults(text) == ["coe.yaml: a mapping with the key `experts` is needed at the top"]


def test_broken_yaml_says_where() -> None:
    (said,) = faults("server: {port: 1\nexperts: 2")
    assert said.startswith("coe.yaml: line 2, column 8 not valid YAML:")


def test_yaml_never_makes_objects() -> None:
    (said,) = faults("experts: !!python/object/apply:os.getcwd []")
    assert "could not determine a constructor" in said


def test_an_adapter_needs_a_base_with_weights_in_the_same_pool() -> None:
    experts = {
        "a": {"model": "m"},
        "b": {"base": "a", "adapter": "x"},
        "c": {"base": "b", "adapter": "x"},
    }
    assert "'b' has no full weights of its own" in faults(minimal(experts=experts))[0]
    del experts["c"]
    pools = {"cpu": {"engine": "simulated", "experts": ["b"]}}
    assert (
        "'b' is an adapter of 'a', which is not in this pool"
        in (faults(minimal(experts=experts, pools=pools))[0])
    )


def test_a_remote_expert_has_no_pool() -> None:
    experts = {"far": {"remote": {"url": "http://somewhere/v1", "model": "m"}}}
    config = parse_config(yaml.safe_dump({"experts": experts}), "coe.yaml")
    assert config.experts["far"].remote is not None
    said = faults({"experts": experts, "pools": {"cpu": {"experts": ["far"]}}})[0]
    assert "'far' is remote and needs no pool" in said


def test_bases_come_before_their_adapters() -> None:
    experts = {
        "z-adapter": {"base": "base", "adapter": "x"},
        "base": {"model": "m"},
    }
    config = parse_config(yaml.safe_dump(minimal(experts=experts)), "coe.yaml")
    assert config.local_experts("cpu") == ("base", "z-adapter")


def test_the_first_expert_that_names_a_category_has_it() -> None:
    experts = {
        "a": {"model": "m", "categories": ["math"]},
        "b": {"model": "m", "categories": ["math", "general"]},
    }
    config = parse_config(yaml.safe_dump(minimal(experts=experts)), "coe.yaml")
    assert config.category_map() == {"math": "a", "general": "b"}
    assert config.fallback == "b"


def test_paths_are_taken_from_the_file_and_names_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    data = minimal(
        router={"artifact": "../artifact"},
        models_dir="models",
        experts={
            "named": {"model": "smollm2-135m-instruct"},
            "hub": {"model": "org/repo"},
            "folder": {"model": "./weights"},
            "adapter": {"base": "named", "adapter": "lora"},
        },
    )
    path = folder / "coe.yaml"
    path.write_text(yaml.safe_dump(data))
    config = load_config(path)
    assert config.router.artifact == str(tmp_path / "artifact")
    assert config.models_dir == str(folder / "models")
    assert config.experts["named"].model == "smollm2-135m-instruct"
    assert config.experts["hub"].model == "org/repo"
    assert config.experts["folder"].model == str(folder / "weights")
    assert config.experts["adapter"].adapter == str(folder / "lora")


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(missing)
    assert caught.value.message == f"{missing}: no such file"
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("512MiB", 512 * 2**20), ("2 GB", 2 * 10**9), ("7", 7), ("1.5k", 1500), (9, 9), ("3b", 3)],
)
def test_bytes_with_units(given: object, meant: int) -> None:
    assert parse_bytes(given) == meant


def test_the_examples_in_the_repository_are_valid() -> None:
    root = Path(__file__).parents[3]
    found = sorted(
        set((root / "deploy" / "config").glob("*.yaml")) - {root / "deploy/config/reference.yaml"}
    )
    assert found
    for path in found:
        assert load_config(path).experts, path


def test_a_key_given_twice_is_refused_with_its_line() -> None:
    text = "experts:\n  a: {model: x}\n  a: {model: y}\npools: {cpu: {}}\n"
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "f.yaml")
    assert caught.value.message == (
        "f.yaml: line 3, column 3 not valid YAML: the key 'a' is given twice"
    )


@pytest.mark.parametrize(
    "given",
    [
        {"keys": {"a": {"key_env": "sk-hush"}}},
        {"keys": {"a": {"sha256": "sk-hush"}}},
        {"store": {"kind": "redis", "url_env": "redis://:sk-hush@host"}},
        {"store": {"kind": "redis", "url": "http://:sk-hush@host"}},
        {"store": {"kind": "redis", "url": "redis://:sk-hush@host"}},
    ],
)
def test_a_secret_in_the_wrong_place_is_not_repeated(given: dict[str, object]) -> None:
    assert "hush" not in "\n".join(faults(minimal(**given)))
