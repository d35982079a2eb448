"""Locates experts' weights on this machine, and fetches missing ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from service.config import Config
from service.config.effective_config import is_hub_adapter
from service.errors import CoeError, ConfigError, DisallowedFieldError
from service.models import inspect_model, locate, model_root, pull
from service.models.pull import hub_name
from service.models.weights_version import version_of


def _source(config: Config, expert: str) -> tuple[str | None, Path | None]:
    """Return the source of an expert's full weights, and the model store's root.

    The source is None where a server of somebody else's has the weights.
    """
    settings = config.experts[config.owner_of(expert)]
    source = settings.model if settings.base is None else config.experts[settings.base].model
    return source, Path(config.models_dir) if config.models_dir is not None else None


def folder_here(config: Config, expert: str) -> Path | None:
    """Return the folder of an expert's full weights, or None if there is none on this machine."""
    source, root = _source(config, expert)
    return locate(source, root=root) if source is not None else None


def adapter_folder(config: Config, adapter: str) -> str:
    """Return the folder of an added expert's adapter, which may be in the model store or not yet.

    Args:
        config: The config.
        adapter: An absolute path, or a name of the hub with its commit.
    """
    if not is_hub_adapter(adapter):
        return adapter
    root = Path(models_folder(config))
    try:
        return str(locate(adapter, root=root) or root / hub_name(adapter))
    except CoeError:
        return str(root / hub_name(adapter))


def allowed_adapter_folder(config: Config, adapter: str) -> str:
    """Return the folder of an added expert's adapter, as `adapter_folder` does.

    Raises:
        ConfigError: It lies below none of the folders that the config allows, also when links are
            followed.
    """
    folder = adapter_folder(config, adapter)
    roots = (models_folder(config), *config.added_experts.roots)
    allowed = [Path(root).expanduser().resolve() for root in roots]
    try:
        found = Path(folder).resolve()
    except (OSError, RuntimeError, ValueError):
        found = Path("/")  # a loop of links, or a path that no system has, lies nowhere
    if not any(found.is_relative_to(root) and found != root for root in allowed):
        # The same words whether there is such a folder or not.
        raise ConfigError(
            f"the folder lies below none of {', '.join(map(str, allowed))}; added_experts.roots of "
            "the config names more"
        )
    return folder


def check_adapter_folder(config: Config, name: str, adapter: str | None) -> None:
    """Check that an added expert's adapter, if it has one, may lie where it does.

    Raises:
        DisallowedFieldError: It may not.
    """
    try:
        if adapter is not None:
            allowed_adapter_folder(config, adapter)
    except ConfigError as error:
        message = f"expert {name!r}: adapter: {error.message}"
        raise DisallowedFieldError(message, param="adapter") from None


def models_folder(config: Config) -> str:
    """Return the model store's folder."""
    return str(config.models_dir if config.models_dir is not None else model_root())


def file_versions(config: Config, experts: Iterable[str]) -> dict[str, str]:
    """Return the version of each local expert's files. It is empty where the files are missing."""
    versions = {}
    for name in experts:
        try:
            folder = folder_here(config, name)
            adapter = config.experts[config.owner_of(name)].adapter
            versions[name] = version_of(str(folder), adapter, 1.0) if folder is not None else ""
        except (OSError, CoeError):
            versions[name] = ""
    return versions


def folder_of(config: Config, expert: str) -> str:
    """Return the folder of an expert's full weights. Missing weights are fetched first."""
    source, root = _source(config, expert)
    if source is None:
        raise ConfigError(f"experts.{expert}: it has no model folder")
    folder = locate(source, root=root) or pull(source, dest_root=root)
    # The inspection reports a fault of the files better than an engine that fails to start.
    inspect_model(Path(folder))
    return str(folder)
