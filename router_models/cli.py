"""`coe router`: the commands that fit and evaluate routers.

The work is imported when a command runs, so that `coe --help` stays quick.
Also `python -m router_models.cli`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_FILE = click.Path(dir_okay=False, path_type=Path)


def _names(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names:
        raise click.BadParameter("expected names with commas between them")
    return names


def _numbers(_: click.Context, __: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        numbers = [float(part) for part in value.split(",") if part.strip()]
    except ValueError as error:
        raise click.BadParameter("expected numbers with commas between them") from error
    if not numbers or not all(math.isfinite(n) and n >= 0 for n in numbers):
        raise click.BadParameter("expected numbers >= 0 with commas between them")
    return numbers


class OutcomeFilesCommand(click.Command):
    """A command whose --outcomes takes every word up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        inside = False
        for i, word in enumerate(args):
            if word.startswith("-"):
                inside = word == "--outcomes"
                spread.append(word)
            elif inside and args[i - 1] != "--outcomes":
                spread += ["--outcomes", word]
            else:
                spread.append(word)
        return super().parse_args(ctx, spread)


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.option(
            "--outcomes",
            type=_FILE,
            multiple=True,
            required=True,
            metavar="FILE...",
            help="Recorded outcomes, one JSON object a line, gzipped or not.",
        ),
        click.option(
            "--costs",
            type=_FILE,
            help="JSON: {expert: cost of one call}. Default: the means of recorded costs.",
        ),
        click.option("--experts", callback=_names, help="Only these, with commas between."),
        click.option("--budgets", callback=_numbers, help="Mean costs to report at: 5,10,…"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _guarded(work: Callable[[], Any]) -> Any:
    """Run the command. An error that the user can correct becomes a single line."""
    from service.errors import CoeError

    try:
        return work()
    except CoeError as error:
        raise click.ClickException(error.message) from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _note(line: str) -> None:
    click.echo(line, err=True)


@click.group(name="router")
def group() -> None:
    """Fit and judge routers on recorded outcomes."""


@group.command(cls=OutcomeFilesCommand)
@_shared
@click.option("--folds", type=click.IntRange(0, 50), default=0, help="Judge out of K folds.")
@click.option("--seed", type=int, default=0, help="Draws the folds.")
@click.option("--encoder", help="A sentence encoder: a folder or a stored model's name.")
@click.option("--no-static", is_flag=True, help="Leave the static table out.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="NAME@VERSION folder.")
def fit(**options: Any) -> None:
    """Fit a router and write it as an artifact."""
    from router_models import router_fit as work

    options["outcomes"] = list(options["outcomes"])
    _guarded(lambda: work.run(**options, say=_note))


@group.command(cls=OutcomeFilesCommand)
@_shared
@click.option("--artifact", type=click.Path(path_type=Path), required=True, help="Its folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--plot", "plot_to", type=_FILE, help="Draw the frontier into this PNG.")
def evaluate(as_json: bool, **options: Any) -> None:
    """Judge an artifact on rows that it was not fitted on."""
    from router_models import evaluate_command as work

    options["outcomes"] = list(options["outcomes"])
    result = _guarded(lambda: work.run(**options, say=_note))
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))
    else:
        click.echo("\n".join(work.readable(result)))


@group.command()
@click.option(
    "--data",
    type=(str, _FILE, _FILE, str),
    multiple=True,
    required=True,
    metavar="NAME OUTCOMES COSTS EXPERTS",
    help="A pool of experts: its outcomes and costs; experts with commas between, or all.",
)
@click.option("--seed", type=int, default=0, help="Draws the folds and the halves.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibrate(data: tuple[tuple[str, Path, Path, str], ...], seed: int, as_json: bool) -> None:
    """Derive from recorded outcomes what a point of quality may cost in each preset."""
    from router_models import preset_calibration as work

    sets = [
        work.DataSet(name, outcomes, costs, None if experts == "all" else tuple(experts.split(",")))
        for name, outcomes, costs, experts in data
    ]
    result = _guarded(lambda: work.run(sets, seed=seed, say=_note))
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))
    else:
        click.echo("\n".join(work.readable(result)))


@group.command(name="add-map", cls=OutcomeFilesCommand)
@click.option(
    "--classifier",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="The artifact whose classifier and categories are kept.",
)
@click.option(
    "--outcomes",
    type=_FILE,
    multiple=True,
    required=True,
    metavar="FILE...",
    help="Recorded outcomes, in whatever categories: a prompt counts by the classifier's "
    "posterior on it.",
)
@click.option(
    "--costs",
    type=_FILE,
    help="JSON: {expert: cost of one call}. Default: the means of recorded costs.",
)
@click.option("--experts", callback=_names, help="Only these, with commas between.")
@click.option("--source", default="", help="Of the outcomes, and their licence, for the card.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="NAME@VERSION folder.")
def add_map(**options: Any) -> None:
    """Fit an expert map for the categories of an existing classifier."""
    from router_models import expert_map_for_classifier as work

    options["outcomes"] = list(options["outcomes"])
    _guarded(lambda: work.run(**options, say=_note))


@group.command(cls=OutcomeFilesCommand)
@click.option("--config", type=_FILE, required=True, help="The service's config.")
@click.option(
    "--outcomes",
    type=_FILE,
    multiple=True,
    required=True,
    metavar="FILE...",
    help="Files that `coe outcomes export` wrote.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="NAME@VERSION folder.")
@click.option(
    "--link",
    type=click.Path(path_type=Path),
    help="A symbolic link that leads to the candidate once it is promoted.",
)
@click.option("--seed", type=int, default=0, help="Draws the parts and the samples.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def refit(as_json: bool, outcomes: tuple[Path, ...], **options: Any) -> None:
    """Correct the expert map by outcomes from traffic; promote it only where it is better.

    It is judged on prompts that did not correct it. With `router.artifact` a symbolic link that is
    given as --link, the next reload puts a promoted candidate in force.
    """
    from router_models import refit_command as work

    result = _guarded(lambda: work.run(outcomes=outcomes, **options, say=_note))
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))


@group.command(name="fit-categories")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Labelled prompts: JSON lines with prompt, category and perhaps language, or a folder "
    "of such files. May be given several times.",
)
@click.option(
    "--test",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Prompts to judge on, in the same format. Prompts that stand in both are an error.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Prompts, best by another author, that only calibrate the stages.",
)
@click.option("--encoder", help="A sentence encoder: a folder or a stored model's name.")
@click.option("--no-static", is_flag=True, help="Leave the static table out.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="NAME@VERSION folder.")
def fit_categories(**options: Any) -> None:
    """Fit a classifier of categories to labelled prompts and write it as an artifact."""
    from router_models import fit_categories_command as work

    _guarded(lambda: work.run(**options, say=_note))


@group.command(name="try")
@click.argument("path", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--encoder", help="This encoder instead of the config's.")
@click.option(
    "--test",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Judge on these labelled prompts instead: JSON lines with prompt and category.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def try_categories(path: Path, encoder: str | None, test: tuple[Path, ...], as_json: bool) -> None:
    """Show how well the categories of the config FILE are told apart, from examples held out."""
    from router_models import try_categories_command as work

    result = _guarded(lambda: work.run(path, encoder=encoder, test=test))
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))
    else:
        click.echo("\n".join(work.readable(result)))


if __name__ == "__main__":
    group()
