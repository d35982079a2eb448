"""`coe moe profile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.cli.table_output import size, table

if TYPE_CHECKING:
    from router_models.moe.profile_learning import LearnedProfile

_FILE = click.Path(dir_okay=False, path_type=Path)


def _places(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> list[tuple[int, int]]:
    found = []
    for text in value:
        layer, _colon, expert = text.partition(":")
        if not (layer.isdecimal() and expert.isdecimal()):
            raise click.BadParameter(f"expected LAYER:EXPERT, such as 3:17, not {text!r}")
        found.append((int(layer), int(expert)))
    return found


@click.command()
@click.option("--model", required=True, help="A mixture of experts: a catalogue name or a folder.")
@click.option("--prompts", type=_FILE, required=True, help="Texts of the domain, one per line.")
@click.option("--out", type=_FILE, required=True, help="New file for the profile.")
@click.option(
    "--keep", type=float, default=0.5, show_default=True, help="Share of routed experts to keep."
)
@click.option("--others", type=_FILE, help="Texts of other domains, for evaluation only.")
@click.option(
    "--protect", multiple=True, callback=_places, help="LAYER:EXPERT to keep; may be repeated."
)
@click.option(
    "--top-p",
    type=float,
    help="Of a token's experts, only the first whose probabilities reach this sum.",
)
@click.option(
    "--null",
    type=float,
    help="Share of the choices, those of the smallest logits, that null experts take.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(8, 1 << 20),
    default=512,
    show_default=True,
    help="Longer texts are cut; longer conversations are left out.",
)
@click.option(
    "--threads", type=click.IntRange(1), help="Number of threads. Default: one for each core."
)
@click.option("--models-dir", type=click.Path(path_type=Path), help="Folder of the model store.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def profile(
    model: str,
    prompts: Path,
    out: Path,
    keep: float,
    others: Path | None,
    protect: list[tuple[int, int]],
    top_p: float | None,
    null: float | None,
    max_tokens: int,
    threads: int | None,
    models_dir: Path | None,
    as_json: bool,
) -> None:
    """Learn a steering profile from a few dozen prompts of a domain.

    A file of prompts has one prompt per line, or JSON lines with "text", or with "prompt" and
    optionally "answer".
    """
    from router_models.moe.profile_learning import as_json as plain
    from router_models.moe.profile_learning import learn

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    result = learn(
        model=model,
        prompts=prompts,
        out=out,
        keep=keep,
        others=others,
        protect=protect,
        top_p=top_p,
        null=null,
        max_tokens=max_tokens,
        models_dir=models_dir,
        say=lambda line: click.echo(line, err=True),
    )
    if as_json:
        click.echo(json.dumps(plain(result), allow_nan=False))
    else:
        _print(result)


def _print(result: LearnedProfile) -> None:
    protected = ", ".join(f"{layer}:{e}" for layer, ids in result.protected.items() for e in ids)
    click.echo(
        f"{result.profile}: {result.kept} of {result.experts} experts stay in each of "
        f"{result.layers} layers, with {result.importance_kept:.1%} of the importance (in "
        f"the worst layer {result.importance_kept_least:.1%})"
    )
    if result.top_p is not None or result.null is not None:
        click.echo(f"{result.dropped:.1%} of the choices are dropped on the held-out texts")
    click.echo(f"learned from {result.learned_texts} texts, {result.learned_tokens} tokens")
    click.echo(f"protected (layer:expert): {protected or 'none'}\n")
    table(
        ("bits per byte", "texts", "unsteered", "steered", "lost"),
        [
            (
                name,
                str(loss.texts),
                f"{loss.unsteered:.4f}",
                f"{loss.steered:.4f}",
                f"{loss.lost:+.4f} ± {loss.lost_error:.4f}",
            )
            for name, loss in (("held out", result.domain), ("others", result.others))
            if loss is not None
        ],
    )
    click.echo()
    table(
        ("tokens at once", "experts of a layer", "steered", "weights read", "steered"),
        [
            (
                str(reads.batch),
                f"{reads.experts_unsteered:.2f}",
                f"{reads.experts_steered:.2f}",
                size(reads.bytes_unsteered),
                size(reads.bytes_steered),
            )
            for reads in result.reads
        ],
    )
