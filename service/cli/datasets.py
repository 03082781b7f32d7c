"""`ncfm datasets`: upload archives of images, list them, remove them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from service.cli.jobs import AsJson, Url, connect
from service.cli.terminal import as_json, messages, results

app = typer.Typer(help="Your own images: upload, list and remove them.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def upload(
    archive: Annotated[Path, typer.Argument(metavar="FILE", help=".tar, .tar.gz or .zip: one folder for each class.")],
    name: Annotated[str | None, typer.Option(help="What people will know it by; the file's name by default.")] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Send an archive to the service. Sending it again is safe."""
    with connect(url) as client:
        sent = client.upload(archive, name or archive.name[:128])
    if json:
        as_json(sent.model_dump(mode="json"))
        return
    messages.print(
        f"{sent.num_classes} classes, {sent.num_train} images for training and {sent.num_test} for testing; "
        "submit with --set dataset.name=imagefolder --set dataset.image_size=SIZE and --set dataset.uri=",
        markup=False,
    )
    results.print(sent.uri, markup=False)


@app.command(name="list")
def list_uploads(
    limit: Annotated[int, typer.Option(min=1, max=200, help="At most so many, newest first.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Where to go on: `next` of the page before.")] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Show what was uploaded."""
    with connect(url) as client:
        uploads, following = client.uploads(limit=limit, cursor=cursor)
    if json:
        as_json({"items": [each.model_dump(mode="json") for each in uploads], "next": following})
        return
    table = Table("id", "name", "classes", "images", "MiB", "uploaded", box=None)
    for each in uploads:
        images, size = str(each.num_train + each.num_test), f"{each.size / 2**20:.1f}"
        table.add_row(each.id, each.name, str(each.num_classes), images, size, f"{each.created_at:%Y-%m-%d %H:%M}")
    results.print(table)
    if following:
        messages.print(f"more: ncfm datasets list --cursor {following}")


@app.command()
def remove(
    upload_id: Annotated[str, typer.Argument(metavar="ID", help="Of the upload; `ncfm datasets list` shows all.")],
    url: Url = None,
) -> None:
    """Remove an upload that no job needs, for yourself; its bytes go with its last owner."""
    with connect(url) as client:
        client.remove_upload(upload_id)
