"""The config of a running service: kept in a file of its run folder, and exchanged there.

Who starts the service writes the file. Whoever reloads reads the user's config anew, holds it
against what runs, and replaces the file in one step; every gateway and pool looks at it
twice a second and goes on as it says. A replica that Serve starts later begins with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.capabilities import with_capabilities
from service.config import Config, PoolConfig, load_config
from service.errors import CoeError, ConfigError
from service.gateway.auth import configured
from service.gateway.routing.setup import RoutingSetup
from service.models import inspect_model, locate, pull
from service.models.expert_folders import file_versions
from service.moe.profiles import profile_digests
from service.pool.memory_plan import check_plan, folders_of, plan_pool

log = logging.getLogger("coe.app")

_LOOK_S = 0.5
# Between attempts to put a config in force that failed: doubled from the first to the last.
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 30.0
# Of a config, and of one of its pools: what may change while it runs.
_FREE = {"experts", "pools", "router", "recipes", "tenants", "keys", "budgets"}
_FREE_OF_POOL = {"experts", "swap"}

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class RunningConfig:
    """What runs: the user's file, what it said at first, and the config made of it.

    profiles: what the virtual experts' files held then, as sha256. files: the version of those that
    each local expert is loaded from, as seen from here.
    """

    source: str
    read: Config
    config: Config
    profiles: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> RunningConfig:
        """Raises OSError, ValueError."""
        told = json.loads(file.read_text())
        read, config = (Config.model_validate(told[name]) for name in ("read", "config"))
        return cls(told["source"], read, config, told.get("profiles", {}), told.get("files", {}))

    def save(self, file: Path) -> None:
        """In one step: nobody sees half of it. Its owner's alone. Raises ConfigError."""
        told = {
            "source": self.source,
            "read": self.read.model_dump(mode="json"),
            "config": self.config.model_dump(mode="json"),
            "profiles": profile_digests(self.config),
            "files": _files(self.config),
        }
        # Two may reload at the same time.
        new = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
                json.dump(told, out)
            new.replace(file)
        except OSError as error:
            raise ConfigError(f"the config can't be kept: {error.strerror}") from None
        finally:
            new.unlink(missing_ok=True)


def config_file(secret_path: Path) -> Path:
    """Where the config in force is kept: beside the secret, in the run folder."""
    return secret_path.parent / "config.json"


def current_config(file: Path, given: str) -> Config:
    """The config in force; where nobody keeps a file of it, the one that was given, as JSON."""
    try:
        return RunningConfig.load(file).config
    except FileNotFoundError:
        return Config.model_validate_json(given)


def reload(file: Path) -> dict[str, list[str]]:
    """Read the user's config anew and put it in force: experts added, removed and changed.

    Fetches models that are missing. Raises ConfigError, ArtifactError or ModelStoreError, and
    then all goes on as it was.
    """
    before = RunningConfig.load(file)
    read = load_config(Path(before.source))
    _check_fixed(before.read, read)
    configured(read)  # each of its keys can be had
    RoutingSetup(read)  # and its router
    with_capabilities(read)  # nothing is declared that a model can't do
    # What the command line said instead of the file stays.
    config = read.model_copy(update={"server": before.config.server})
    root = Path(config.models_dir) if config.models_dir else None
    sources = set(config.model_sources().values())
    found = {
        source: Path(locate(source, root=root) or pull(source, dest_root=root))
        for source in sources
    }
    folders = folders_of(config, found) if sources else {}
    for kind in config.pools:
        check_plan(plan_pool(config, kind, lambda name: inspect_model(folders[name])), None)
    profiles, files = profile_digests(config), _files(config)
    RunningConfig(before.source, read, config).save(file)
    old, new = before.config.experts, config.experts
    exchanged = {name for name in new if before.profiles.get(name) != profiles.get(name)}
    # What was not here yet when it was last looked at has been fetched since, not changed.
    exchanged |= {name for name, was in before.files.items() if was and files.get(name, was) != was}
    return {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "changed": [
            name for name in new if name in old and (new[name] != old[name] or name in exchanged)
        ],
    }


def _files(config: Config) -> dict[str, str]:
    local = [name for name, expert in config.experts.items() if expert.remote is None]
    return file_versions(config, local)


def _check_fixed(old: Config, new: Config) -> None:
    """Raises ConfigError where something has changed that can't while it runs."""
    for name in _differing(old, new) - _FREE:
        raise ConfigError(f"{name}: can't be changed while the service runs; restart it")
    if old.pools.keys() != new.pools.keys():
        kinds = sorted(old.pools.keys() ^ new.pools.keys())
        raise ConfigError(f"pools.{kinds[0]}: pools can't come or go while the service runs")
    for kind, pool in new.pools.items():
        for name in _differing(old.pools[kind], pool) - _FREE_OF_POOL:
            raise ConfigError(
                f"pools.{kind}.{name}: can't be changed while the service runs; only "
                f"{' and '.join(sorted(_FREE_OF_POOL))} of a pool can"
            )
        slots = pool.slots
        if slots is not None and len(old.groups(kind)) <= slots < len(new.groups(kind)):
            raise ConfigError(
                f"pools.{kind}.slots: each expert was given a slot of its own, and now there "
                f"are more than {slots}; restart the service"
            )


def _differing(old: Config | PoolConfig, new: Config | PoolConfig) -> set[str]:
    fields = type(old).model_fields
    return {name for name in fields if getattr(old, name) != getattr(new, name)}


async def follow(
    file: Path, seen: Version | None, apply: Callable[[Config], Awaitable[None]]
) -> None:
    """Put each config that comes into force in force here, by `apply`, until cancelled.

    A config whose application fails is tried again, after 1 s at first and every 30 s at last,
    until it succeeds or a newer one takes its place: it is in force everywhere else.

    Args:
        file: Where the config in force is kept.
        seen: The `version` before the config was read that is in force here.
        apply: Puts a config in force. It should not wait for what ends in its own time, such as
            running requests: no newer config is heard of until it returns.
    """
    failures = 0
    retry_at_s = math.inf
    while True:
        await asyncio.sleep(_LOOK_S)
        now = version(file)
        if now is None or (now == seen and time.monotonic() < retry_at_s):
            continue
        if now != seen:
            failures = 0
        seen = now
        try:
            await apply((await asyncio.to_thread(RunningConfig.load, file)).config)
        except Exception as error:
            # Whatever it was: the next one must be heard of.
            wait_s = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2**failures)
            failures += 1
            retry_at_s = time.monotonic() + wait_s
            log.error(
                "a new config could not be put in force; trying again in %.0f s: %s",
                wait_s,
                error.message if isinstance(error, CoeError) else type(error).__name__,
                exc_info=failures == 1,
            )
        else:
            failures, retry_at_s = 0, math.inf


def version(file: Path) -> Version | None:
    """Another one whenever the file was replaced; None where there is none."""
    try:
        told = file.stat()
    except OSError:
        return None  # the service is stopping
    return told.st_mtime_ns, told.st_ino, told.st_size
