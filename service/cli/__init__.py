"""The command `coe`. Each command imports its modules when it runs, so that help is quick."""

from __future__ import annotations

import sys

import click

from service import __version__
from service.cli.lazy_group import LazyGroup
from service.errors import CoeError, ConfigError

# Each command's module and attribute, and its line in `coe --help`.
_COMMANDS = {
    "init": ("service.cli.init:init", "Write a config that fits this machine."),
    "serve": ("service.cli.serve:serve", "Start the service on this machine."),
    "check": ("service.cli.check:check", "Validate a config and print its memory plan."),
    "doctor": (
        "service.cli.doctor.command:doctor",
        "Prove the methods of swaps on this machine.",
    ),
    "config": ("service.cli.config:config", "Describe the config file."),
    "compose": (
        "service.cli.compose.command:compose",
        "Buy the best composition for some memory and cost, as a config.",
    ),
    "models": ("service.cli.models:models", "List and fetch models."),
    "chat": ("service.cli.chat:chat", "Chat with the experts; shows the route of each answer."),
    "top": ("service.cli.top:top", "Watch experts, queues, swaps and routes live."),
    "route": ("service.cli.route:route", "Show which expert would answer a prompt, and why."),
    "experts": ("service.cli.experts:experts", "Show where experts' weights are, and move them."),
    "aliases": (
        "service.cli.aliases:aliases",
        "Show how aliases share requests, and undo roll-backs.",
    ),
    "batch": (
        "service.cli.batch.command:batch",
        "Plan, submit, watch and fetch batches of requests.",
    ),
    "keys": ("service.cli.keys:keys", "Create, list, rotate and revoke API keys."),
    "completion": (
        "service.cli.shell_completion:completion",
        "Print completion for bash, zsh or fish.",
    ),
    "moe": ("service.cli.moe:moe", "Inspect, steer, build and place mixtures of experts."),
    "outcomes": (
        "router_models.outcome_recording.cli:group",
        "Record what your own experts answer, and how well.",
    ),
    "router": ("router_models.cli:group", "Fit and evaluate routers on recorded outcomes."),
}


@click.group(
    cls=LazyGroup, table=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="coe")
def cli() -> None:
    """Serve a composition of expert language models behind one OpenAI-compatible endpoint."""


def main() -> None:
    """Run the console script. A `CoeError` becomes one line, and exit status 2 or 1."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except CoeError as error:
        click.echo(f"coe: {error.message}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        if error.filename is None:
            raise  # not about a file that the user named
        click.echo(f"coe: {error.filename}: {error.strerror}", err=True)
        sys.exit(1)
