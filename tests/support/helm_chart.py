"""Helm charts rendered and judged: pods wherever they stand, custom resources, network policies."""

from __future__ import annotations

import functools
import os
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
HELMS = ("helm3", "helm4")
TOOLS = ROOT / ".cache" / "tools"
VALUES = sorted(path.name for path in (CHART / "ci").glob("*-values.yaml"))

Object = dict[str, Any]


def tool(name: str, program: str) -> Path | None:
    """A program that `deploy/chart_tools.sh` has fetched, or None."""
    path = TOOLS / name / program
    return path if os.access(path, os.X_OK) else None


def helm(version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm 3 or 4 (`helm3`, `helm4`) in the repository's root."""
    return subprocess.run(
        [str(TOOLS / version / "helm"), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HELM_NO_PLUGINS": "1"},
    )


@functools.cache
def rendered(version: str, values: str) -> tuple[Object, ...]:
    """What a value file of helm/ci makes."""
    ran = helm(version, "template", "rel", "helm", "-n", "coe", "-f", f"helm/ci/{values}")
    assert ran.returncode == 0, ran.stderr
    return tuple(item for item in yaml.safe_load_all(ran.stdout) if item)


def of_kind(objects: Sequence[Object], kind: str) -> list[Object]:
    """Those of a kind."""
    return [item for item in objects if item["kind"] == kind]


def pods(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """Every pod or pod template (its metadata and spec), with a name for people."""
    for item in objects:
        name = f"{item['kind']}/{item['metadata']['name']}"
        if item["kind"] == "Pod":
            yield name, item
        elif item["kind"] in ("Deployment", "StatefulSet"):
            yield name, item["spec"]["template"]
        elif item["kind"] == "RayService":
            cluster = item["spec"]["rayClusterConfig"]
            yield f"{name}/head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"{name}/{group['groupName']}", group["template"]


# --- custom resources


def crd_archive() -> Path | None:
    """The archive of CRDs: $COE_CRDS, or one beside the repository."""
    named = os.environ.get("COE_CRDS")
    path = Path(named) if named else ROOT.parent / "shared" / "k8s" / "crds.tar.gz"
    return path if path.is_file() else None


@functools.cache
def crd_schemas(archive: Path) -> dict[tuple[str, str], Object]:
    """Schemas by apiVersion and kind, unknown fields refused."""
    schemas = {}
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            content = files.extractfile(member)
            if content is None:
                continue
            spec = yaml.load(content, yaml.CSafeLoader)["spec"]
            for version in spec["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                for key in ("metadata", "apiVersion", "kind"):
                    schema["properties"][key] = {}
                schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return schemas


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: _strict(part) for key, part in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and not open_ended:
        made.setdefault("additionalProperties", False)
    return made


def crd_faults(schema: Object, one: Object) -> list[str]:
    """What does not fit."""
    return [
        f"{'.'.join(map(str, error.path))}: {error.message[:200]}"
        for error in Draft202012Validator(schema).iter_errors(one)
    ]


# --- network policies


def may_reach(
    objects: Sequence[Object],
    source: Mapping[str, str],
    target: Mapping[str, str],
    port: int,
    *,
    namespace: str = "",
) -> bool:
    """Whether policies let a pod of these labels reach another's port.

    Both in the release's namespace, or `source` in another `namespace`, or without labels:
    somebody elsewhere.
    """
    closing = [
        policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy")
        if "Ingress" in policy["spec"]["policyTypes"]
        and _selects(policy["spec"]["podSelector"], target)
    ]
    if not closing:
        return True
    return any(
        _peer(rule.get("from"), source, namespace) and _port(rule.get("ports"), port)
        for spec in closing
        for rule in spec.get("ingress") or ()
    )


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    wanted = selector.get("matchLabels") or {}
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    for item in selector.get("matchExpressions") or ():
        assert item["operator"] == "In", item
        if labels.get(item["key"]) not in item["values"]:
            return False
    return True


def _peer(
    peers: Sequence[Mapping[str, Any]] | None, labels: Mapping[str, str], namespace: str
) -> bool:
    if not peers:
        return True
    name = {"kubernetes.io/metadata.name": namespace}
    return any(
        "podSelector" in peer
        and _selects(peer["podSelector"], labels)
        # Without a selector of namespaces: the policy's own.
        and (
            _selects(peer["namespaceSelector"], name)
            if "namespaceSelector" in peer
            else not namespace
        )
        for peer in peers
    )


def _port(ports: Sequence[Mapping[str, Any]] | None, port: int) -> bool:
    if not ports:
        return True
    return any(item["port"] <= port <= item.get("endPort", item["port"]) for item in ports)
