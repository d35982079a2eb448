"""Browser requests refused by Host, Origin, Sec-Fetch-Site and Content-Type."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.config import ServerConfig
from service.errors import CoeError, UnsupportedMediaTypeError
from service.gateway.cross_site_guard import CrossOriginRules, has_body

RULES = CrossOriginRules(
    "127.0.0.1",
    ("api.example.com", "*.inner.example"),
    ("https://chat.example.com", "app://obsidian.md", "*"),
)
PLAIN = CrossOriginRules("127.0.0.1")


def code_of(
    rules: CrossOriginRules,
    method: str = "GET",
    *,
    keyless: bool = True,
    takes: str = "",
    **headers: str,
) -> str | None:
    given = {
        name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()
    }
    try:
        rules.check(
            method.encode(),
            given,
            keyless=keyless,
            body=has_body(given),
            uploads=takes == "uploads",
            ollama=takes == "ollama",
        )
    except CoeError as error:
        return error.code
    return None


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8000",
        "127.0.0.1",
        "localhost:8000",
        "LocalHost.",
        "coe.localhost:1",
        "[::1]:8000",
        "192.168.1.7:8000",
        "203.0.113.9",
        "coe",
        "coe-gateway:8000",
        "coe.team.svc:8000",
        "coe.team.svc.cluster.local",
        "box.local:8000",
        "coe.corp.internal",
        "api.example.com",
        "API.example.com:443",
        "a.inner.example",
        "a.b.inner.example:8000",
    ],
)
def test_check_own_host_without_keys_passes(host: str) -> None:
    assert code_of(RULES, host=host) is None
    body = {"content_length": "2", "content_type": "application/json"}
    assert code_of(RULES, "POST", keyless=True, host=host, **body) is None


@pytest.mark.parametrize(
    "host",
    [
        "attacker.example",
        "attacker.example:8000",
        "127.0.0.1.attacker.example",
        "localhost.attacker.example",
        "evilapi.example.com",
        "api.example.com.evil.org",
        "inner.example",
        "127.0.0.1.nip.io",
        "local.evil.org",
        "evillocal.com",
        "xn--80ak6aa92e.com:8000",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_check_foreign_host_without_keys_is_forbidden(host: str, method: str) -> None:
    assert code_of(RULES, method, host=host) == "host_not_allowed"
    # The same with an Origin to match, as after a rebinding.
    assert code_of(PLAIN, method, host=host, origin=f"http://{host}") == "host_not_allowed"
    # Once keys are needed only those who configured names are strict.
    assert code_of(PLAIN, method, host=host, keyless=False) is None
    assert code_of(RULES, method, host=host, keyless=False) == "host_not_allowed"


@pytest.mark.parametrize("host", ["a b", "a/b", "user@host", "a:99999999", "", "[::1", "ä.example"])
def test_check_malformed_host_is_a_bad_request(host: str) -> None:
    assert code_of(PLAIN, host=host) == "invalid_request_error"


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost"),
        ("localhost:80", "http://localhost"),
        ("localhost", "http://localhost:80"),
        ("api.example.com", "https://api.example.com"),
        ("api.example.com:443", "https://api.example.com"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("127.0.0.1:8000", "https://chat.example.com"),
        ("127.0.0.1:8000", "app://obsidian.md"),
    ],
)
def test_check_own_or_configured_origin_without_keys_passes(host: str, origin: str) -> None:
    assert code_of(RULES, "OPTIONS", host=host, origin=origin) is None


@pytest.mark.parametrize(
    "origin",
    [
        "http://attacker.example",
        "null",
        "http://127.0.0.1:3000",
        "http://localhost:8000",
        "https://chat.example.com.evil.org",
        "https://chat.example.com:8443",
        "http://chat.example.com",
        "file://",
        "",
        "chrome-extension://abcdef",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_check_foreign_origin_without_keys_is_forbidden(origin: str, method: str) -> None:
    assert code_of(RULES, method, host="127.0.0.1:8000", origin=origin) == "origin_not_allowed"
    # A page has no key to show: with keys its origin says nothing.
    assert code_of(RULES, method, host="127.0.0.1:8000", origin=origin, keyless=False) is None


@pytest.mark.parametrize(
    ("method", "site", "mode", "dest", "refused"),
    [
        ("GET", "same-origin", "cors", "empty", False),
        ("GET", "none", "navigate", "document", False),
        ("GET", "cross-site", "navigate", "document", False),
        ("GET", "cross-site", "navigate", "iframe", True),
        ("GET", "cross-site", "no-cors", "image", True),
        ("GET", "same-site", "no-cors", "script", True),
        ("POST", "cross-site", "navigate", "document", True),
    ],
)
def test_check_cross_site_subresource_without_keys_is_forbidden(
    method: str, site: str, mode: str, dest: str, refused: bool
) -> None:
    code = code_of(
        PLAIN,
        method,
        host="127.0.0.1:8000",
        sec_fetch_site=site,
        sec_fetch_mode=mode,
        sec_fetch_dest=dest,
    )
    assert code == ("origin_not_allowed" if refused else None)


@pytest.mark.parametrize("keyless", [True, False])
@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/vnd.api+json", True),
        ("", False),
        ("text/plain", False),
        ("text/plain; application/json", False),
        ("application/x-www-form-urlencoded", False),
        ("multipart/form-data; boundary=x", False),
        ("application/jsonp", False),
        ("application/octet-stream", False),
    ],
)
def test_check_post_body_that_is_not_json_is_refused(kind: str, taken: bool, keyless: bool) -> None:
    for announced in ({"content_length": "2"}, {"transfer_encoding": "chunked"}):
        headers = {"host": "localhost", "content_type": kind, **announced}
        code = code_of(PLAIN, "POST", keyless=keyless, **headers)
        assert code == (None if taken else UnsupportedMediaTypeError.code)
    assert code_of(PLAIN, "POST", keyless=keyless, host="localhost", content_type=kind) is None


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize("keyless", [True, False])
@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        (FORM, True),
        ("Application/X-WWW-Form-Urlencoded; charset=UTF-8", True),
        ("application/json", True),
        ("", False),
        ("text/plain", False),
        ("multipart/form-data; boundary=x", False),
        (f"{FORM}+x", False),
        (f"text/plain; {FORM}", False),
    ],
)
def test_check_ollama_body_of_curl_passes_and_what_a_page_can_send_does_not(
    kind: str, taken: bool, keyless: bool
) -> None:
    headers = {"host": "localhost", "content_type": kind, "content_length": "2"}
    code = code_of(PLAIN, "POST", keyless=keyless, takes="ollama", **headers)
    assert code == (None if taken else UnsupportedMediaTypeError.code)
    if kind != FORM:
        return
    assert code_of(PLAIN, "POST", keyless=keyless, **headers) == UnsupportedMediaTypeError.code
    # Pages of other sites and of this one: every browser has one of these headers.
    for name, value in (
        ("origin", "http://localhost"),
        ("origin", "null"),
        ("origin", "https://attacker.example"),
        ("referer", "https://attacker.example/"),
        ("sec_fetch_site", "cross-site"),
        ("sec_fetch_site", "same-origin"),
    ):
        browser = {**headers, name: value}
        assert code_of(PLAIN, "POST", keyless=keyless, takes="ollama", **browser) is not None


@pytest.mark.parametrize(
    ("coding", "taken"),
    [("identity", True), ("", True), ("gzip", False), ("br", False), ("GZIP, identity", False)],
)
def test_check_compressed_body_is_refused_by_its_header(coding: str, taken: bool) -> None:
    for kind in ("application/json", "multipart/form-data; boundary=x"):
        given = {"content_type": kind, "content_length": "2", "content_encoding": coding}
        code = code_of(PLAIN, "POST", keyless=True, takes="uploads", host="localhost", **given)
        assert code == (None if taken else UnsupportedMediaTypeError.code)


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data", FORM])
def test_check_upload_that_is_no_form_is_told_to_be_one(kind: str) -> None:
    given = {b"content-type": kind.encode(), b"content-length": b"2"}
    with pytest.raises(UnsupportedMediaTypeError, match="multipart/form-data"):
        PLAIN.check(b"POST", given, keyless=False, body=True, uploads=True)


@pytest.mark.parametrize(
    "server",
    [
        {"allowed_hosts": ["https://api.example.com"]},
        {"allowed_hosts": ["api.example.com:8000"]},
        {"allowed_hosts": ["a.*.com"]},
        {"allowed_hosts": [""]},
        {"cors_origins": ["https://chat.example.com/"]},
        {"cors_origins": ["chat.example.com"]},
        {"cors_origins": ["https://*.example.com"]},
    ],
)
def test_config_invalid_host_names_and_origins_are_refused(server: dict[str, list[str]]) -> None:
    with pytest.raises(ValidationError, match="input should be"):
        ServerConfig.model_validate(server)


labels = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=12)
foreign_names = st.builds(
    lambda parts, top: ".".join([*parts, top]),
    st.lists(labels | st.sampled_from(["127", "localhost", "svc"]), min_size=1, max_size=4),
    st.sampled_from(["com", "org", "io", "example", "dev", "xyz", "co.uk"]),
)


@given(foreign_names, st.sampled_from(["", ":80", ":8000", "."]))
def test_check_registrable_domain_without_keys_never_passes(name: str, more: str) -> None:
    assert code_of(PLAIN, host=name + more) == "host_not_allowed"
    origin = f"http://{name}{more}"
    assert code_of(PLAIN, host="127.0.0.1:8000", origin=origin) == "origin_not_allowed"


@given(
    st.dictionaries(
        st.sampled_from(
            [
                b"host",
                b"origin",
                b"content-type",
                b"sec-fetch-site",
                b"sec-fetch-mode",
                b"content-length",
                b"transfer-encoding",
            ]
        ),
        st.binary(max_size=40) | st.sampled_from([b"null", b"*", b"http://", b"://", b":", b"["]),
    ),
    st.sampled_from([b"GET", b"POST", b"OPTIONS", b"X"]),
    st.booleans(),
)
def test_check_any_headers_pass_or_raise_a_typed_error(
    headers: dict[bytes, bytes], method: bytes, keyless: bool
) -> None:
    text = "passed"
    try:
        RULES.check(method, headers, keyless=keyless, body=has_body(headers))
    except CoeError as error:
        text = error.message
    assert 0 < len(text) < 500
