"""Where the adapters of added experts may lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.config import Config
from service.errors import DisallowedFieldError
from service.models.expert_folders import check_adapter_folder


def config(root: Path) -> Config:
    """A config that allows adapters below a folder."""
    return Config.model_validate(
        {
            "models_dir": str(root.parent / "models"),
            "experts": {"general": {"model": "m"}},
            "pools": {"p": {"engine": "simulated"}},
            "added_experts": {"roots": [str(root)]},
        }
    )


@pytest.mark.parametrize("inside", ["x", "x/y", "link-inside"])
def test_root_takes_what_lies_below_it(tmp_path: Path, inside: str) -> None:
    root = tmp_path / "root"
    (root / "x" / "y").mkdir(parents=True)
    (root / "link-inside").symlink_to(root / "x")
    check_adapter_folder(config(root), "n", str(root / inside))


@pytest.mark.parametrize(
    "outside", [".", "..", "../other", "link", "x/../../other", "/", "loop", "a\0b"]
)
def test_root_refuses_everything_else(tmp_path: Path, outside: str) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    (root / "link").symlink_to(other)
    (root / "loop").symlink_to(root / "pool")
    (root / "pool").symlink_to(root / "loop")
    with pytest.raises(DisallowedFieldError, match="lies below none of"):
        check_adapter_folder(config(root), "n", str(root / outside))
