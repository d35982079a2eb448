"""The composition that `coe init` writes where a map of public models is shipped.

Such a map is a router artifact `public@VERSION` with a file `experts.yaml` in it: the base config
of the models that the map knows. `sizes.json` beside it has the bytes of their weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from service.cli.machine_resources import Machine
from service.errors import ConfigError

if TYPE_CHECKING:
    from router_models.composition.composition_value import Composition

EXPERTS = "experts.yaml"
SIZES = "sizes.json"
_NAME = "public@"
# Other programs need memory, too.
_MEMORY_SHARE = 0.75
_DISK_SHARE = 0.8
# The size that a model is given which is not to be bought, in bytes.
_FITS_NOWHERE = 10**13
_TIME_LIMIT_S = 20


def shipped_map(artifacts: Path) -> Path | None:
    """Return the newest shipped artifact with a map of public models; None where there is none."""
    found = [
        folder
        for folder in artifacts.glob(f"{_NAME}*")
        if folder.name.removeprefix(_NAME).isdigit() and (folder / EXPERTS).is_file()
    ]
    return max(found, key=lambda folder: int(folder.name.removeprefix(_NAME)), default=None)


def write_composed(shipped: Path, machine: Machine, output: Path) -> str | None:
    """Write the best composition of the shipped models for a machine.

    GPUs of another size than the largest one are left out. Models whose files do not fit the disk
    are left out as well, the largest first.

    Returns:
        A line that describes it, or None where none of the models fits.
    """
    if not machine.gpus and _too_slow(shipped, machine):
        return None
    sizes = _sizes(shipped)
    with tempfile.TemporaryDirectory(prefix="coe-init-") as folder:
        while True:
            if (bought := _buy(shipped, sizes, machine, Path(folder), output)) is None:
                output.unlink(missing_ok=True)
                return None
            used = {name: sizes.get(name, 0) for name in bought.experts}
            if sum(used.values()) <= _DISK_SHARE * machine.disk_bytes:
                break
            sizes[max(used, key=lambda name: used[name])] = _FITS_NOWHERE
    return (
        f"{len(bought.experts)} public models, {100 * bought.quality:.0f} % expected quality by "
        f"{shipped.name}"
    )


def _buy(
    shipped: Path, sizes: dict[str, int], machine: Machine, folder: Path, output: Path
) -> Composition | None:
    """Write the best composition of models with these sizes; None where none fits the memory."""
    import yaml

    from service.cli.compose.command import compose, run

    base = yaml.safe_load((shipped / EXPERTS).read_text(encoding="utf-8"))
    # The map belongs to this installation, and the config may be moved.
    base["router"]["artifact"] = str(shipped.resolve())
    (folder / EXPERTS).write_text(yaml.safe_dump(base, sort_keys=False), encoding="utf-8")
    words = ["--map", str(shipped), "--config", str(folder / EXPERTS), "--out", str(output)]
    if sizes:
        (folder / SIZES).write_text(json.dumps(sizes), encoding="utf-8")
        words += ["--sizes", str(folder / SIZES)]
    words += ["--analysis-s", "0", "--time-limit", str(_TIME_LIMIT_S)]
    if machine.gpus:
        largest = max(gpu.memory_bytes for gpu in machine.gpus)
        words += ["--accelerators", f"{len(machine.largest_gpus)}x{largest}"]
    # Beside GPUs this is for weights that wait in host memory.
    words += ["--memory", str(int(_MEMORY_SHARE * machine.memory_bytes))]
    options = compose.make_context("compose", words).params
    try:
        return run({**options, "quiet": True, "use_idle": True})
    except (ConfigError, ValueError):
        return None


def _sizes(shipped: Path) -> dict[str, int]:
    """Return the bytes of each expert's weights, as far as they are known."""
    if not (shipped / SIZES).is_file():
        return {}
    found: dict[str, int] = json.loads((shipped / SIZES).read_text(encoding="utf-8"))
    return found


def _too_slow(shipped: Path, machine: Machine) -> bool:
    """Whether the machine's cores are too few for the fallback, in 16 bits a parameter."""
    import yaml

    from service.cli.init_proposals import PARAMETERS_PER_CORE

    if not (shipped / SIZES).is_file():
        return False
    base = yaml.safe_load((shipped / EXPERTS).read_text(encoding="utf-8"))
    sizes = _sizes(shipped)
    size_bytes = sizes[base["router"]["fallback"]]
    return bool(size_bytes / 2 > PARAMETERS_PER_CORE * machine.cores)
