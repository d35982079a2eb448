"""The config file: valid configs load, and each error names file, path, fault and remedy."""

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


def test_minimal_config_has_the_documented_defaults() -> None:
    config = parse_config(yaml.safe_dump(MINIMAL), "coe.yaml")
    assert config.server.host == "127.0.0.1"
    assert config.server.port == 8000
    assert config.server.deadline_ms == 120_000
    assert config.fallback == "general"
    assert config.category_map() == {"general": "general"}
    assert config.pools["cpu"].most_replicas == 1
    assert config.model_sources() == {}


def test_config_every_field_has_a_description() -> None:
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
            "coe.yaml: servers: unknown key; did you mean 'server'? allowed: added_experts, "
            "aliases, batches, budgets, categories, experts, feedback, keys, models_dir, pools, "
            "prices, recipes, responses, router, savings, server, shadow, store, telemetry, "
            "tenants",
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
            "coe.yaml: experts.general: needs exactly one of model, base (with adapter, profile, "
            "defaults or thinking), remote, command",
        ),
        (
            {"experts": {"general": {"model": "m", "adapter": "a"}}},
            "coe.yaml: experts.general: adapter goes together with base",
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
            {"budgets": {"b": {"amount": 1, "period": "day", "tenant": "acme"}}},
            "coe.yaml: budgets.b.tenant: no tenant 'acme'; tenants: default; "
            "a tenant of stored keys has to be in `tenants`",
        ),
        (
            {
                "keys": {"k": {"tenant": "acme", "sha256": "0" * 64}},
                "budgets": {"b": {"amount": 1, "period": "day", "tenant": "acne"}},
            },
            "coe.yaml: budgets.b.tenant: no tenant 'acne'; did you mean 'acme'? "
            "tenants: acme, default; a tenant of stored keys has to be in `tenants`",
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
def test_config_error_message_is_exact(changes: dict[str, object], expected: str) -> None:
    said = [
        line.replace("coe.yaml: Value error, ", "coe.yaml: ") for line in faults(minimal(**changes))
    ]
    assert said == [expected]


def test_config_unknown_key_lists_the_keys_of_its_section() -> None:
    (said,) = faults(minimal(pools={"vllm": {"engine": "simulated", "max_model_len": 1}}))
    assert said.startswith("coe.yaml: pools.vllm.max_model_len: unknown key;")
    assert "max_queued_requests" in said
    assert "enforce_eager" not in said


def test_config_several_errors_have_a_line_each() -> None:
    lines = faults(minimal(server={"port": 0, "gateways": 0}))
    assert [line.split(": ")[1] for line in lines] == ["server.port", "server.gateways"]


def test_config_missing_key_is_named() -> None:
    assert faults({"pools": {}}) == ["coe.yaml: experts: missing, and it has no default"]


@pytest.mark.parametrize("text", ["", "- a\n- b", "just words"])
def test_config_that_is_not_a_mapping_raises(text: str) -> None:
    assert faults(text) == ["coe.yaml: a mapping with the key `experts` is needed at the top"]


def test_config_invalid_yaml_raises_with_its_place() -> None:
    (said,) = faults("server: {port: 1\nexperts: 2")
    assert said.startswith("coe.yaml: line 2, column 8 not valid YAML:")


def test_config_yaml_tags_create_no_objects() -> None:
    (said,) = faults("experts: !!python/object/apply:os.getcwd []")
    assert "could not determine a constructor" in said


def test_config_adapter_needs_a_base_in_the_same_pool() -> None:
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


def test_config_remote_expert_with_a_pool_raises() -> None:
    experts = {"far": {"remote": {"url": "http://somewhere/v1", "model": "m"}}}
    config = parse_config(yaml.safe_dump({"experts": experts}), "coe.yaml")
    assert config.experts["far"].remote is not None
    said = faults({"experts": experts, "pools": {"cpu": {"experts": ["far"]}}})[0]
    assert "'far' is remote and needs no pool" in said


def test_config_pool_lists_bases_before_their_adapters() -> None:
    experts = {
        "z-adapter": {"base": "base", "adapter": "x"},
        "base": {"model": "m"},
    }
    config = parse_config(yaml.safe_dump(minimal(experts=experts)), "coe.yaml")
    assert config.local_experts("cpu") == ("base", "z-adapter")


def test_config_category_goes_to_the_first_expert_that_names_it() -> None:
    experts = {
        "a": {"model": "m", "categories": ["math"]},
        "b": {"model": "m", "categories": ["math", "general"]},
    }
    config = parse_config(yaml.safe_dump(minimal(experts=experts)), "coe.yaml")
    assert config.category_map() == {"math": "a", "general": "b"}
    assert config.fallback == "b"


def test_config_paths_are_relative_to_the_file_and_names_unchanged(tmp_path: Path) -> None:
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


def test_config_missing_or_binary_file_raises(tmp_path: Path) -> None:
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
def test_config_bytes_accept_units(given: object, meant: int) -> None:
    assert parse_bytes(given) == meant


def test_config_examples_are_valid() -> None:
    root = Path(__file__).parents[3]
    found = sorted(
        set((root / "deploy" / "config").glob("*.yaml")) - {root / "deploy/config/reference.yaml"}
    )
    assert found
    for path in found:
        assert load_config(path).experts, path


def test_config_duplicate_key_raises_with_its_line() -> None:
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
def test_config_misplaced_secret_is_not_echoed(given: dict[str, object]) -> None:
    assert "hush" not in "\n".join(faults(minimal(**given)))


@pytest.mark.parametrize(
    ("sections", "tenant"),
    [
        ({"tenants": {"acme": {}}}, "acme"),
        ({"keys": {"k": {"tenant": "acme", "sha256": "0" * 64}}}, "acme"),
        ({"tenants": {"acme": {}}}, "default"),
        ({}, "default"),
    ],
)
def test_config_budget_of_a_tenant_that_a_request_can_have_passes(
    sections: dict[str, object], tenant: str
) -> None:
    budget = {"amount": 1, "period": "day", "tenant": tenant}
    data = minimal(budgets={"b": budget}, **sections)
    assert parse_config(yaml.safe_dump(data), "coe.yaml").budgets["b"].tenant == tenant


@pytest.mark.parametrize(
    "value",
    [
        *("!!int foo", "!!int ''", "!!float x", "!!bool x", "!!timestamp x", "!!int 0x"),
        *("!!timestamp 2026-99-99", "!!pairs [1]", "!!omap {a: 1}", "!!binary é", "!!set [1]"),
    ],
)
def test_values_that_do_not_fit_their_tags_are_faults_of_the_config(value: str) -> None:
    with pytest.raises(ConfigError, match=r"f\.yaml"):
        parse_config(
            f"experts: {{a: {{model: ./a}}}}\npools: {{p: {{}}}}\nspare: {value}\n", "f.yaml"
        )
