"""`coe router refit`: a candidate artifact from traffic, promoted only where it is better."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from router_models.outcome_reader import OutcomeError
from router_models.traffic_refit import MapColumns, mean_costs, read_rows, split
from service.classifier.artifact_presets import presets_of
from service.classifier.expert_map import ExpertMap
from service.classifier.router_artifact import load_artifact, save_artifact
from service.config import load_config
from service.errors import ArtifactError

Say = Callable[[str], None]

# What `save_artifact` writes itself.
_OWN_FIELDS = {"kind", "schema_version", "name", "weights"}


def run(
    *,
    config: Path,
    outcomes: Sequence[Path],
    out: Path,
    link: Path | None = None,
    seed: int = 0,
    say: Say = print,
) -> dict[str, Any]:
    """Correct the config's artifact by outcomes from traffic, write the candidate, and judge it.

    Where it is better, the symbolic link `link` leads to it then.

    Raises:
        ConfigError: The config can't be used.
        ArtifactError: Its artifact can't be used, or has no expert map.
        OutcomeError: The outcomes can't be used, or are too few.
        OSError: A file can't be read or written.
    """
    given = load_config(config)
    if given.router.artifact is None:
        raise ArtifactError("router.artifact: name the artifact that is to be corrected")
    where = Path(given.router.artifact)
    artifact = load_artifact(where)
    if "map" not in artifact.manifest:
        raise ArtifactError(f"{where}: has no expert map; `coe router fit` makes one")
    if link is not None and link.exists() and not link.is_symlink():
        raise OutcomeError(f"{link}: is no symbolic link; it is not replaced")
    if out.exists():
        raise OutcomeError(f"{out} exists; a candidate needs a name of its own")
    present = ExpertMap.from_artifact(artifact)
    columns, promote = MapColumns(present.categories, present.recipes), given.shadow.promote
    rng = np.random.default_rng(seed)
    rows = columns.usable(read_rows(outcomes))
    correcting, judging = split(rows, rng)
    if (prompts := len({row.prompt for row in judging})) < promote.min_rows:
        raise OutcomeError(
            f"{prompts} prompts are left to judge on, {promote.min_rows} are needed "
            "(shadow.promote.min_rows); two fifths of the prompts judge"
        )
    by_category, overall = columns.correction(present.score, correcting)
    candidate = np.clip(present.score + by_category, 0.0, 1.0)
    found = columns.judge(
        present.score,
        candidate,
        judging,
        mean_costs(correcting),
        presets_of(given.router.presets, artifact).auto.cost_weight,
        rng,
    )
    promoted = found.gain > 0 and found.better >= promote.confidence
    tensors = dict(artifact.tensors)
    tensors["map.score"] = candidate.astype(tensors["map.score"].dtype)
    if "map.direct_score" in tensors:
        direct = tensors["map.direct_score"]
        tensors["map.direct_score"] = (direct + overall).astype(direct.dtype)
    result = {
        "candidate": str(out),
        "present": artifact.name,
        "rows": len(rows),
        "judged_on": found.prompts,
        "changed": found.changed,
        "gain": found.gain,
        "better": found.better,
        "confidence": promote.confidence,
        "promoted": promoted,
        "linked": False,
    }
    manifest = {k: v for k, v in artifact.manifest.items() if k not in _OWN_FIELDS}
    save_artifact(out, {**manifest, "refit": result}, tensors, _card(out.name, result))
    say(
        f"{found.prompts} prompts judge: chooses otherwise on {100 * found.changed:.1f} % of them, "
        f"{100 * found.gain:+.2f} points, better in {100 * found.better:.1f} % of the samples"
    )
    if not promoted:
        say(f"not promoted: {100 * promote.confidence:g} % are needed; {artifact.name} stays")
    elif link is not None:
        _lead(link, out)
        result["linked"] = True
        say(f"promoted: {link} leads to {out}; reload the service")
    else:
        say(f"promoted: set router.artifact to {out}, and reload the service")
    return result


def _lead(link: Path, to: Path) -> None:
    """Let a symbolic link lead elsewhere, at once."""
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.symlink_to(to.resolve())
    os.replace(fresh, link)


def _card(name: str, result: dict[str, Any]) -> str:
    verdict = "promoted" if result["promoted"] else "not promoted"
    return f"""# {name}

The router artifact {result["present"]}, its expert map corrected by {result["rows"]} outcomes from
traffic. The classifier is unchanged, and there is no text of a prompt in it.

| on {result["judged_on"]} prompts that did not correct it | |
| --- | --- |
| chooses another expert | {100 * result["changed"]:.1f} % |
| score less priced cost, in points | {100 * result["gain"]:+.2f} |
| better in samples of the paired bootstrap | {100 * result["better"]:.1f} % |
| needed | {100 * result["confidence"]:g} % |
| verdict | {verdict} |

Scores are agreement with other experts, or a judge's preference; both can be wrong in the same way.
"""
