"""Reloading the config of a running service, by a file in its run folder.

The supervisor writes the file at the start. A reload reads the user's config again, checks it
against the running one, and replaces the file atomically. Every gateway and pool polls the file
twice a second and applies changes. Replicas that Serve starts later begin with it. The supervisor
polls it, too: it lets Serve add, remove, replace and scale pools.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.config import Config, load_config
from service.deployment.live_changes import check_fixed, check_resources, pool_changes
from service.errors import CoeError, ConfigError
from service.expert_capabilities import with_capabilities
from service.gateway.auth import configured
from service.gateway.routing.routing_setup import RoutingSetup
from service.gpu_devices import largest_gpu_bytes
from service.models import inspect_model, locate, pull
from service.models.expert_folders import file_versions
from service.moe.virtual_expert_profiles import profile_digests
from service.pool.memory_plan import check_plan, folders_of, plan_pool

log = logging.getLogger("coe.app")

_POLL_S = 0.5
_ATTEMPTS = 5
# The delays before a failed config is applied again. The delay doubles from the first to the last.
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 30.0

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class RunningConfig:
    """The config in force.

    Attributes:
        source: Path of the user's file.
        read: The config as that file held it.
        config: `read` with the changes of the command line.
        profiles: SHA-256 of each virtual expert's profile.
        files: Version of the files that each local expert is loaded from, as seen on this machine.
    """

    source: str
    read: Config
    config: Config
    profiles: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> RunningConfig:
        """Read the file.

        Raises:
            OSError: The file can't be read.
            ValueError: The file is invalid.
        """
        data = json.loads(file.read_text())
        read, config = (Config.model_validate(data[name]) for name in ("read", "config"))
        return cls(data["source"], read, config, data.get("profiles", {}), data.get("files", {}))

    def save(self, file: Path) -> None:
        """Write the file atomically, readable by its owner only.

        Raises:
            ConfigError: The file can't be written.
        """
        # Whether a key was set decides where the model's folder is asked, as for capabilities.
        data = {
            "source": self.source,
            "read": self.read.model_dump(mode="json", exclude_unset=True),
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "profiles": profile_digests(self.config),
            "files": _files(self.config),
        }
        # Two may reload at the same time.
        new = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
                json.dump(data, out)
            new.replace(file)
        except OSError as error:
            raise ConfigError(f"cannot write the config in force: {error.strerror}") from None
        finally:
            new.unlink(missing_ok=True)


def config_file(secret_path: Path) -> Path:
    """Return the path of the config in force, which is beside the secret in the run folder."""
    return secret_path.parent / "config.json"


def current_config(file: Path, given: str) -> Config:
    """Return the config in force, or `given` (as JSON) if there is no file."""
    try:
        return RunningConfig.load(file).config
    except FileNotFoundError:
        return Config.model_validate_json(given)


def reload(file: Path, resources: Mapping[str, float] | None = None) -> dict[str, list[str]]:
    """Read the user's config again and put it in force; fetches missing models.

    If it raises, the present config stays in force. Where another reload was faster, it reads
    again: it may have fetched models for minutes, and must not put an older config in force.

    Args:
        file: The config in force.
        resources: Ray's resources, which the pools must fit into; None does not check.

    Returns:
        Names of experts under `added`, `removed` and `changed`; and, where kinds of pools change,
        sentences under `pools`.

    Raises:
        ConfigError: The config is wrong, needs more than there is, or changes a section that needs
            a restart; or others reload all the time.
        ArtifactError: The router's artifact is wrong.
        ModelStoreError: A model can't be fetched.
    """
    for _ in range(_ATTEMPTS):
        if (told := _reload_once(file, resources)) is not None:
            return told
    raise ConfigError("the config was put in force by others at the same time: try again")


def _reload_once(file: Path, resources: Mapping[str, float] | None) -> dict[str, list[str]] | None:
    """Reload as `reload` does; None where another reload was faster."""
    seen = version(file)
    before = RunningConfig.load(file)
    read = load_config(Path(before.source))
    check_fixed(before.read, read)
    changes = pool_changes(before.read, read)
    if changes and resources is not None:
        check_resources(read, resources)
    configured(read)  # checks that each API key is available
    RoutingSetup(read)  # checks the router's artifact
    with_capabilities(read)  # checks the declared capabilities against the models
    # Changes by the command line stay.
    config = read.model_copy(update={"server": before.config.server})
    root = Path(config.models_dir) if config.models_dir else None
    sources = set(config.model_sources().values())
    found = {
        source: Path(locate(source, root=root) or pull(source, dest_root=root))
        for source in sources
    }
    folders = folders_of(config, found) if sources else {}
    on_gpu = any(pool.gpus > 0 for pool in config.pools.values())
    gpu_bytes = largest_gpu_bytes() if on_gpu else None
    for kind in config.pools:
        plan = plan_pool(
            config, kind, lambda name: inspect_model(folders[name]), gpu_bytes=gpu_bytes
        )
        check_plan(plan, None)
    profiles, files = profile_digests(config), _files(config)
    with _locked(file):
        if version(file) != seen:
            return None
        RunningConfig(before.source, read, config).save(file)
    old, new = before.config.experts, config.experts
    exchanged = {name for name in new if before.profiles.get(name) != profiles.get(name)}
    # Files that were missing at the last check have been fetched since, and did not change.
    exchanged |= {name for name, was in before.files.items() if was and files.get(name, was) != was}
    told = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "changed": [
            name for name in new if name in old and (new[name] != old[name] or name in exchanged)
        ],
    }
    return {**told, "pools": changes.sentences()} if changes else told


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of the config in force, against other processes and threads."""
    try:
        lock = os.open(file.with_name(f"{file.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write the config in force: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _files(config: Config) -> dict[str, str]:
    local = [name for name, expert in config.experts.items() if expert.remote is None]
    return file_versions(config, local)


async def follow(
    file: Path, seen: Version | None, apply: Callable[[Config], Awaitable[None]]
) -> None:
    """Apply each new config in this process until cancelled.

    A config that fails is applied again until it succeeds or a newer config replaces it, because
    other processes may have applied it already. The delay grows from 1 s to 30 s.

    Args:
        file: The config in force.
        seen: `version` of the file before this process read its present config.
        apply: Applies a config. It should not wait for running requests to end, because no newer
            config is read until it returns.
    """
    failures = 0
    retry_at_s = math.inf
    while True:
        await asyncio.sleep(_POLL_S)
        now = version(file)
        if now is None or (now == seen and time.monotonic() < retry_at_s):
            continue
        if now != seen:
            failures = 0
        seen = now
        try:
            await apply((await asyncio.to_thread(RunningConfig.load, file)).config)
        except Exception as error:
            # The loop must survive any error, because it has to read the next config.
            wait_s = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2**failures)
            failures += 1
            retry_at_s = time.monotonic() + wait_s
            log.error(
                "applying the new config failed; trying again in %.0f s: %s",
                wait_s,
                error.message if isinstance(error, CoeError) else type(error).__name__,
                exc_info=failures == 1,
            )
        else:
            failures, retry_at_s = 0, math.inf


def version(file: Path) -> Version | None:
    """Return a value that changes whenever the file is replaced; None if there is no file."""
    try:
        status = file.stat()
    except OSError:
        return None  # the service is stopping
    return status.st_mtime_ns, status.st_ino, status.st_size
