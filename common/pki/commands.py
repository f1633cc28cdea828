"""Passphrases of private keys, as commands ask for them."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from privet.common.errors import StateError

ROOT_KEY = "the root's key"
_LEAST_PASSPHRASE = 12


def read_passphrase(file: Path | None) -> bytes | None:
    """Return the passphrase in a file; None if no file is given. Raises `StateError` if it cannot be read."""
    if file is None:
        return None
    try:
        found = file.read_bytes().strip()
    except OSError as error:
        raise StateError(f"{file} cannot be read ({error.strerror})", "check the path in --passphrase-file") from None
    if not found:
        raise StateError(f"the passphrase file {file} is empty", "write the passphrase into it")
    return found


def new_passphrase(file: Path | None, what: str = ROOT_KEY, *, optional: bool = True) -> bytes:
    """Return a passphrase for a new key: that of a file, or what a person types twice.

    Args:
        file: The file, if one is given.
        what: The key.
        optional: Whether the command can do without a passphrase.

    Raises:
        StateError: It is too short; or there is no file and no terminal.
    """
    found = read_passphrase(file)
    if found is None:
        spared = ", or --no-passphrase for a demonstration" if optional else ""
        _need_terminal(f"--passphrase-file FILE{spared}", what)
        typed = typer.prompt(f"New passphrase of {what}", hide_input=True, confirmation_prompt=True, err=True)
        found = str(typed).strip().encode()
    if len(found) < _LEAST_PASSPHRASE:
        raise StateError(
            f"the passphrase of {what}: expected {_LEAST_PASSPHRASE} bytes or more, found {len(found)}",
            "choose a longer one, for example six random words",
        )
    return found


def ask_passphrase(what: str = ROOT_KEY) -> bytes:
    """Return the passphrase of a key as a person types it.

    Raises:
        StateError: There is no terminal.
    """
    _need_terminal("--passphrase-file FILE", what)
    return str(typer.prompt(f"Passphrase of {what}", hide_input=True, err=True)).strip().encode()


def _need_terminal(option: str, what: str) -> None:
    if not sys.stdin.isatty():
        raise StateError(
            f"{what} needs a passphrase, and there is no terminal to type it", f"add {option} to the command"
        )
