"""Commands of whoever runs the service: copies, checks, and what is no longer needed. None needs a running API.

SQLAlchemy is slow to import: each command loads what it needs for itself.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.terminal import as_json, results
from service.settings import STORAGE_PATIENCE_S, load_settings
from worker.records import now
from worker.storage import Storage

if TYPE_CHECKING:
    from service.retention import Removed

Json = Annotated[bool, typer.Option("--json", help="As one JSON object.")]


def backup(
    file: Annotated[Path, typer.Argument(help="The .tar to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    json: Json = False,
) -> None:
    """Copy the database into one file, also while the service runs. The storage root is copied by its own means."""
    from service.backup import as_document, described
    from service.backup import backup as make_backup

    manifest = make_backup(load_settings().database, file, overwrite=force)
    as_json(as_document(manifest)) if json else results.print(f"{file}: {described(manifest)}")


def restore(
    file: Annotated[Path, typer.Argument(help="A .tar that `ncfm backup` wrote.")],
    force: Annotated[bool, typer.Option("--force", help="Also over a database that has jobs.")] = False,
    json: Json = False,
) -> None:
    """Put a copy in the database's place, and compare. Stop the service first; then `ncfm db upgrade` and `ncfm doctor`."""
    from service.backup import as_document, described
    from service.backup import restore as restore_backup

    manifest = restore_backup(load_settings().database, file, force=force)
    as_json(as_document(manifest)) if json else results.print(f"restored: {described(manifest)}")


def doctor(
    deep: Annotated[bool, typer.Option("--deep", help="Read every file and compare its sha256.")] = False,
    json: Json = False,
) -> None:
    """Whether database, storage root and disk agree. Changes nothing; exit code 1 where something is wrong."""
    from service.doctor import diagnose

    settings = load_settings()
    found = list(diagnose(settings.database, settings.storage_url, deep=deep))
    errors = sum(finding.level == "error" for finding in found)
    if json:
        as_json({"ok": not errors, "errors": errors, "findings": [asdict(finding) for finding in found]})
    else:
        for each in found:
            hint = f" {each.hint}" if each.hint else ""
            results.print(f"{each.level}: {each.check}: {each.subject}: {each.message}.{hint}", markup=False)
        results.print(f"{errors} errors, {len(found) - errors} notes")
    raise typer.Exit(1 if errors else 0)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    json: Json = False,
) -> None:
    """Remove what is older than NCFM_KEEP_*, and what nothing refers to. The controller does the first part every hour."""
    from service.database import open_unchecked
    from service.retention import Limits, sweep_storage, tidy

    settings = load_settings()
    limits = Limits.from_settings(settings)
    # To a database that is not the right one, everything in the storage root would be what nobody needs.
    open_unchecked(settings.database, is_look=True).close()
    storage = Storage(settings.storage_url, is_look=True, patience=STORAGE_PATIENCE_S)
    with open_unchecked(settings.database, is_look=dry_run) as database:
        database.check_schema()
        removed = tidy(database, storage, now(), limits, dry_run=dry_run)
        swept = sweep_storage(database, storage, now(), limits, dry_run=dry_run)
    for kind, count in swept.counts.items():
        removed.add(kind, count, swept.sizes[kind])
    _show_removed(removed, dry_run=dry_run, json=json)


def _show_removed(removed: Removed, *, dry_run: bool, json: bool) -> None:
    if json:
        as_json({"dry_run": dry_run, "counts": removed.counts, "bytes": removed.sizes})
        return
    verb = "would remove" if dry_run else "removed"
    for kind, count in removed.counts.items():
        size = f", {removed.sizes[kind] / 2**20:.1f} MiB" if removed.sizes[kind] else ""
        results.print(f"{verb} {count} {kind}{size}")
    if not removed.counts:
        results.print("nothing to remove")


def register(app: typer.Typer) -> None:
    """Put the commands into the `ncfm` command."""
    for command in (backup, restore, doctor, gc):
        app.command()(command)
