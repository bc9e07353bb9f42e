"""`trenchcoat completion`: completion of commands, options and settings by the shell."""

from __future__ import annotations

import argparse
from typing import Any

from trenchcoat.cli.command import Command

SHELLS = ("bash", "zsh", "fish")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell to complete in")


def _run(args: argparse.Namespace) -> Any:
    """Completion for bash, zsh or fish.

    Print what your shell must read to complete commands, options, recipes and settings with the Tab key. Add this line:

      bash, in ~/.bashrc                   eval "$(trenchcoat completion bash)"
      zsh, in ~/.zshrc                     eval "$(trenchcoat completion zsh)"
      fish, in ~/.config/fish/config.fish  trenchcoat completion fish | source
    """
    import argcomplete

    return (argcomplete.shellcode(["trenchcoat"], shell=args.shell).rstrip(),)


COMMAND = Command(_run, _options, examples=("completion bash",), libraries=False)
