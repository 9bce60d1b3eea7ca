"""The suite of commands that plugins add to ``pyseg``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from ..registry import commands
from .checking import Check, check_import

_HELP = """
import json, sys
from typer.core import TyperGroup
from typer.testing import CliRunner
from pyseg.cli import app
from typer.main import get_command
whole, name = get_command(app), sys.argv[1]
own = name in super(type(whole), whole).list_commands(None)
faults, runner = [], CliRunner()
def walk(command, path):
    if isinstance(command, TyperGroup):
        for part in command.list_commands(None):
            walk(command.get_command(None, part), [*path, part])
    if not (command.help or "").strip():
        faults.append(f"pyseg {' '.join(path)} has no help text: give its function a docstring")
    shown = runner.invoke(app, [*path, "--help"])
    if shown.exit_code:
        faults.append(f"pyseg {' '.join(path)} --help fails: {shown.output or shown.exception!r}")
    odd = runner.invoke(app, [*path, "--no-such-option"])
    if odd.exit_code != 2:
        faults.append(f"pyseg {' '.join(path)} accepts --no-such-option")
if own:
    faults.append(f"pyseg has a command {name!r} itself, which goes first: choose another name")
else:
    walk(whole.get_command(None, name), [name])
heavy = sorted({"torch", "torchvision"} & set(sys.modules))
if heavy:
    faults.append(f"--help imports {heavy[0]}: import what only some calls need within functions")
print(json.dumps(faults))
"""


def check_command(name: str) -> None:
    """Checks a command: it loads, helps without torch, and refuses options that it lacks.

    Args:
        name: of the entry point in ``pyseg.commands``, as in ``pyseg NAME``.

    Raises:
        UnknownName: nothing is called ``name``.
        AssertionError: what is wrong, also of its subcommands.
    """
    check = Check(f"command {name}")
    commands.info(name)
    with check.offline("loading it"):
        commands.get(name)
    check_import(check, commands, name)
    done = subprocess.run(
        [sys.executable, "-c", _HELP, name],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
    )
    check(done.returncode == 0, f"pyseg {name} --help fails: {done.stderr.strip()[-300:]}")
    faults = json.loads(done.stdout.splitlines()[-1])
    check(not faults, "; ".join(faults))


__all__ = ["check_command"]
