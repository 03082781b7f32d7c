"""`ncfm db`: the schema. SQLAlchemy is slow to import: each command loads it for itself."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.terminal import as_json, results
from service.settings import load_settings

db = typer.Typer(help="The database's schema.", no_args_is_help=True)


@db.command()
def upgrade() -> None:
    """Bring the database to this release's schema; every row is kept. Make a copy before: `ncfm backup`."""
    from service.database import open_unchecked

    with open_unchecked(load_settings().database) as database:
        before, after = database.upgrade()
    if before == after:
        results.print(f"schema {after}: nothing to do")
    else:
        results.print(f"schema {before or 'none'} -> {after}")


@db.command()
def check(json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False) -> None:
    """Whether this release can work with the database; exit code 1 where it cannot, with the way out."""
    from service.database import NoDatabase, open_unchecked
    from service.schema import SCHEMA, SchemaState, state_of

    try:
        with open_unchecked(load_settings().database, is_look=True) as database, database.reading() as connection:
            shown, found = database.shown_url, state_of(connection)
    except NoDatabase as error:
        [problem] = error.problems
        shown, found = problem.value, SchemaState(None, problem.message, problem.hint)
    if json:
        as_json(
            {"database": shown, "schema": found.schema, "needs": SCHEMA, "problem": found.problem, "hint": found.hint}
        )
    else:
        results.print(f"{shown}: schema {found.schema or 'none'}, this release needs {SCHEMA}")
        results.print(f"{found.problem}. {found.hint}" if found.problem else "ok")
    raise typer.Exit(1 if found.problem else 0)


@db.command(name="downgrade")
def downgrade_(
    revision: Annotated[str, typer.Argument(help="Of an older release, such as 0001.")],
    yes: Annotated[bool, typer.Option("--yes", help="What the older schema has no place for is lost: needed.")] = False,
) -> None:
    """Take the database back to an older release's schema. What that has no place for is lost."""
    from service.database import open_unchecked
    from service.schema import downgrade, revision_of

    if not yes:
        raise typer.BadParameter("what the older schema has no place for is lost: make a copy, then give --yes")
    url = load_settings().database
    open_unchecked(url, is_look=True).close()
    with open_unchecked(url) as database, database.writing() as connection:
        before = revision_of(connection)
        downgrade(connection, revision)
    results.print(f"schema {before or 'none'} -> {revision}")
