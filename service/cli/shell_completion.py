"""`coe completion`: shell completion of commands and options."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print SHELL's completion script.

    bash: put `eval "$(coe completion bash)"` into ~/.bashrc. zsh: the same into ~/.zshrc.
    fish: put `coe completion fish | source` into ~/.config/fish/config.fish.
    """
    from click.shell_completion import get_completion_class

    from service.cli import cli

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "coe", "_COE_COMPLETE").source())
