"""What experts can be asked for: as the config declares it, or as their model folders tell."""

from __future__ import annotations

from pathlib import Path

from service.config import Config, ExpertConfig
from service.errors import CoeError, ConfigError
from service.models.expert_folders import folder_here
from service.models.input_modalities import Senses, senses_of


def with_capabilities(config: Config) -> Config:
    """The config with what each expert can do and what media cost it, where its model folder tells.

    What the config says stands. An expert without weights of ours, or whose model is not on this
    machine, has what the config declares. Raises ConfigError where an expert is declared to see
    or hear, and its model does neither.
    """
    found = {}
    for name, expert in config.experts.items():
        if expert.remote is None and (senses := _senses(config, name)) is not None:
            _check_declared(name, expert, senses)
            found[name] = _filled(expert, senses)
        else:
            found[name] = expert
    return config.model_copy(update={"experts": found})


def _senses(config: Config, expert: str) -> Senses | None:
    try:
        folder = folder_here(config, expert)
    except (OSError, CoeError):
        return None
    return senses_of(Path(folder)) if folder is not None else None


def _check_declared(name: str, expert: ExpertConfig, senses: Senses) -> None:
    for capability, has in (("vision", senses.vision), ("audio", senses.audio)):
        if capability in expert.capabilities and not has:
            raise ConfigError(
                f"experts.{name}.capabilities: {capability!r} is declared, but the model's "
                f"config.json has no {capability}_config: it takes text only"
            )


def _filled(expert: ExpertConfig, senses: Senses) -> ExpertConfig:
    changed: dict[str, object] = {}
    if "capabilities" not in expert.model_fields_set:
        found_senses = (("vision", senses.vision), ("audio", senses.audio))
        more = tuple(name for name, has in found_senses if has)
        changed["capabilities"] = (*expert.capabilities, *more)
    found = {"image_tokens": senses.image_tokens, "image_edge": senses.image_edge}
    media = {
        key: value
        for key, value in found.items()
        if value is not None and key not in expert.media.model_fields_set
    }
    if media:
        changed["media"] = expert.media.model_copy(update=media)
    return expert.model_copy(update=changed) if changed else expert
