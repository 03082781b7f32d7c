"""`ncfm keys`: who may call the API. Works on the database itself, so that the first key needs no key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from service.cli.terminal import as_json, messages, results
from service.scopes import scope_of
from service.settings import load_settings
from worker.records import now

if TYPE_CHECKING:
    from service.keys import Key, Keys

AsJson = Annotated[bool, typer.Option("--json", help="As JSON, one object.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="Of the key; `ncfm keys list` shows all.")]

app = typer.Typer(help="Keys of the API: make, list, end and renew them.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Who or what will use it.")],
    scope: Annotated[
        str, typer.Option(help="read looks; submit also posts, and changes what is its own; admin changes everything.")
    ] = "submit",
    days: Annotated[
        float | None, typer.Option(min=0.001, max=36_500, help="Until it expires; never by default.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Make a key. It is shown once: only a digest of it is kept."""
    expires_at = None if days is None else now() + timedelta(days=days)
    with _keys(may_make=True) as keys:
        key, token = keys.create(name, scope_of(scope), expires_at=expires_at)
    _show_secret(key, token, json)


@app.command(name="list")
def list_keys(json: AsJson = False) -> None:
    """Show all keys, without their secrets."""
    with _keys(is_look=True) as keys:
        found = keys.list()
    if json:
        as_json({"items": [_plain(key) for key in found]})
        return
    table = Table("id", "name", "scope", "state", "created", "last used", box=None)
    for key in found:
        table.add_row(key.id, key.name, key.scope, _state(key), _time(key.created_at), _time(key.used_at))
    results.print(table)


@app.command()
def revoke(key_id: KeyId, json: AsJson = False) -> None:
    """End a key. Its jobs stay, and go on."""
    with _keys() as keys:
        key = keys.revoke(key_id)
    if json:
        as_json(_plain(key))
    else:
        results.print(f"key {key.id} is {_state(key)}", markup=False)


@app.command()
def rotate(
    key_id: KeyId,
    grace_hours: Annotated[float, typer.Option(min=0, max=8760, help="How long the old secret still works.")] = 24.0,
    json: AsJson = False,
) -> None:
    """Give a key a new secret. It keeps its id, and with it its jobs."""
    with _keys() as keys:
        key, token = keys.rotate(key_id, grace=timedelta(hours=grace_hours))
    _show_secret(key, token, json)


@contextmanager
def _keys(*, may_make: bool = False, is_look: bool = False) -> Iterator[Keys]:
    """The keys of the database; where there is none, the first key alone makes one."""
    # Half a second to import, which other commands do without.
    from service.database import Database, open_unchecked
    from service.keys import Keys

    url = load_settings().database
    if not may_make:
        open_unchecked(url, is_look=True).close()
    with open_unchecked(url, is_look=True) if is_look else Database(url) as database:
        database.check_schema()
        yield Keys(database)


def _show_secret(key: Key, token: str, json: bool) -> None:
    if json:
        as_json(_plain(key) | {"key": token})
        return
    messages.print(f"key {key.id} ({key.name}, {key.scope}); it is shown this once:", markup=False)
    results.print(token, markup=False)


def _plain(key: Key) -> dict[str, object]:
    times = ("created_at", "expires_at", "revoked_at", "used_at", "previous_until")
    plain: dict[str, object] = {"id": key.id, "name": key.name, "scope": key.scope, "state": _state(key)}
    return plain | {name: at.isoformat() if (at := getattr(key, name)) else None for name in times}


def _state(key: Key) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if not key.is_valid(now()):
        return "expired"
    return "valid" if key.expires_at is None else f"valid until {_time(key.expires_at)}"


def _time(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M}"
