"""`coe moe upcycle`: joins dense experts of one family into a mixture of experts."""

from __future__ import annotations

import time
from pathlib import Path

import click


def _experts(_: click.Context, __: click.Parameter, value: str) -> dict[str, Path]:
    from router_models.experts.evaluate import ARTIFACTS
    from router_models.experts.training_texts import EXPERTS

    found: dict[str, Path] = {}
    for item in filter(None, (part.strip() for part in value.split(","))):
        name, equals, folder = item.partition("=")
        path = Path(folder if equals else name).expanduser()
        if not equals:
            name = path.resolve().name
            if not path.exists() and str(path) in EXPERTS:
                path = ARTIFACTS / name
        if name in found:
            raise click.BadParameter(f"two experts have the name {name!r}; write NAME=FOLDER")
        found[name] = path
    return found


@click.command()
@click.option("--base", required=True, help="A folder of full weights, or a stored model's name.")
@click.option(
    "--experts",
    required=True,
    callback=_experts,
    metavar="A,B,…",
    help="Folders of LoRA adapters or full weights, or NAME=FOLDER; "
    "math, intents and code name the demo's.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="New folder for the model.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of texts: NAME.jsonl for each expert, with rows of prompt and answer. "
    "The demo's experts need none.",
)
@click.option(
    "--top-k", type=click.IntRange(1), default=1, show_default=True, help="Experts for each token."
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def upcycle(
    base: str, experts: dict[str, Path], out: Path, data: Path | None, top_k: int, threads: int
) -> None:
    """Join dense experts into one mixture of experts, without training.

    The mixture takes attention, embeddings and norms from the base. The FFNs of the base and of
    each expert become the routed experts of each layer, and the gates are solved for. To extend
    such a mixture, give it as --base.
    """
    import torch

    from router_models.moe import upcycle as work
    from service.models import locate

    began_s = time.monotonic()
    folder = locate(base)
    if folder is None:
        raise click.ClickException(f"{base} is not on this machine: coe models pull {base}")
    torch.set_num_threads(threads)
    planned = work.plan(folder, experts, data)
    mixture = work.build(planned, out, top_k=top_k, say=lambda line: click.echo(line, err=True))
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    names = ", ".join(mixture.experts)
    took_s = time.monotonic() - began_s
    click.echo(f"{out}: {names}; {size / 1e9:.2f} GB, {took_s:.0f} s")
