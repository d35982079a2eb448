"""The command `coe`. Every command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import sys

import click

from service import __version__
from service.cli.lazy_group import LazyGroup
from service.errors import CoeError, ConfigError

# Where each command is, and the line that `coe --help` shows without importing it.
_COMMANDS = {
    "init": ("service.cli.init:init", "Look at this machine and write a config that fits it."),
    "serve": ("service.cli.serve:serve", "Start the service on this machine."),
    "check": ("service.cli.serve:check", "Validate a config and print its memory plan."),
    "config": ("service.cli.config:config", "What a config file may say."),
    "models": ("service.cli.models:models", "The models on this machine."),
    "chat": ("service.cli.chat:chat", "Talk to the experts; the route under each answer."),
    "top": ("service.cli.top:top", "Experts, queues, swaps and routes, live."),
    "route": ("service.cli.route:route", "Show which expert would answer a prompt, and why."),
    "experts": ("service.cli.experts:experts", "Where each expert's weights are; move them."),
    "keys": ("service.cli.keys:keys", "API keys: make, list, rotate, revoke."),
    "completion": ("service.cli.completion:completion", "Completion for bash, zsh or fish."),
    "moe": ("service.cli.moe:moe", "Mixtures of experts: look inside, steer, build, place."),
    "router": ("router_models.cli:group", "Fit and judge routers on recorded outcomes."),
}


@click.group(
    cls=LazyGroup, table=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="coe")
def cli() -> None:
    """Serve a composition of expert language models behind one OpenAI-compatible endpoint."""


def main() -> None:
    """The console script: errors of ours become one line each and exit status 2 or 1."""
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
            raise  # no file that somebody named
        click.echo(f"coe: {error.filename}: {error.strerror}", err=True)
        sys.exit(1)
