"""Loads the profiles of virtual experts, checks them, and prepares them for engines."""

from __future__ import annotations

import hashlib
from pathlib import Path

from service.config import Config
from service.engine.steering_data import SteeredLayer, Steering
from service.errors import ConfigError, InvalidProfileError
from service.moe.steering_profile import (
    SteeringProfile,
    check_profile,
    moe_shape,
    read_profile,
    why_not_steerable,
)


def profile_of(config: Config, expert: str, folder: Path) -> SteeringProfile:
    """Read a virtual expert's profile and check it against its base in `folder`.

    Raises:
        InvalidProfileError: The profile is invalid or does not fit. The message names the expert,
            the layer and the numbers.
        ConfigError: The base can't be steered.
    """
    settings = config.experts[expert]
    assert settings.profile is not None
    shape = moe_shape(folder)
    if shape is None:
        raise ConfigError(
            f"experts.{expert}.base: {settings.base!r} is no mixture of experts; it has no gates "
            "that a profile could steer"
        )
    if (why := why_not_steerable(folder)) is not None:
        raise ConfigError(f"experts.{expert}.base: {settings.base!r} can't be steered: {why}")
    where = f"experts.{expert}.profile: "
    try:
        profile = read_profile(settings.profile)
    except InvalidProfileError as error:
        raise InvalidProfileError(where + error.message) from None
    try:
        check_profile(profile, shape)
    except InvalidProfileError as error:
        raise InvalidProfileError(f"{where}{settings.profile}: {error.message}") from None
    return profile


def steering_of(config: Config, expert: str, folder: Path) -> Steering:
    """Return a virtual expert's steering for an engine. It raises the errors of `profile_of`."""
    profile = profile_of(config, expert, folder)
    layers = tuple(
        SteeredLayer(
            index,
            tuple(map(bool, layer.mask)),
            tuple(map(float, layer.bias)),
            tuple(map(float, layer.boost)),
            layer.top_k,
            layer.top_p,
            layer.null,
        )
        for index, layer in sorted(profile.layers.items())
        if not layer.is_neutral
    )
    shape = profile.shape
    base = config.needs(expert)
    assert base is not None
    return Steering(base, shape.experts, shape.top_k, shape.renormalize, layers)


def profile_digests(config: Config) -> dict[str, str]:
    """Return the SHA-256 of each virtual expert's profile in hex; empty if unreadable."""
    digests = {}
    for name, expert in config.experts.items():
        if expert.profile is not None:
            try:
                digests[name] = hashlib.sha256(Path(expert.profile).read_bytes()).hexdigest()
            except OSError:
                digests[name] = ""
    return digests


def profile_bytes(config: Config, expert: str) -> int:
    """Return the size of a virtual expert's profile in bytes; 0 if there is none."""
    profile = config.experts[expert].profile
    try:
        return Path(profile).stat().st_size if profile is not None else 0
    except OSError:
        return 0
