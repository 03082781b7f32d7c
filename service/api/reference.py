"""Routes: the description of this API, and a page about it.

The page is small and without script; nothing of it comes from elsewhere, so it is there offline too.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, JSONResponse

router = APIRouter()

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
code { font: 0.95em ui-monospace, monospace; }
""".strip()
_STYLE_SUM = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_SUM}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


@router.get("/openapi.json", include_in_schema=False)
def get_document(request: Request) -> JSONResponse:
    """The whole description, OpenAPI 3.1."""
    return JSONResponse(request.app.openapi())


@router.get("/docs", include_in_schema=False)
def get_page(request: Request) -> HTMLResponse:
    """Every route with its summary, and where the whole description is."""
    return HTMLResponse(_page(request.app.openapi()), headers=HEADERS)


def _page(document: dict[str, Any]) -> str:
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>The whole description, with every field and error, is <a href="/openapi.json">/openapi.json</a> (OpenAPI 3.1).
Where this service asks for a key, send <code>Authorization: Bearer ncfm_...</code>.</p>
<table>
<thead><tr><th>Method</th><th>Path</th><th>What it does</th></tr></thead>
<tbody>
{chr(10).join(_rows(document))}
</tbody>
</table>
</body>
</html>
"""


def _rows(document: dict[str, Any]) -> Iterator[str]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            text = " - ".join(part for part in (operation.get("summary"), _first_line(operation)) if part)
            yield f"<tr><td><code>{method.upper()}</code></td><td><code>{escape(path)}</code></td><td>{escape(text)}</td></tr>"


def _first_line(operation: dict[str, Any]) -> str:
    return str(operation.get("description", "")).strip().partition("\n")[0]
