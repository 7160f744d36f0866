"""The runbooks at ``/runbooks/``: what to do about each alert, as the annotations of the alerts link to it.

Guarantees: what is served is public text that came with the package; a name of a request is looked up in the list of
those there are and never becomes part of a path; raw HTML and links to elsewhere do not get into a page.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt
from markdown_it.token import Token
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from gradiometer_monitor.web.page import HEADERS
from gradiometer_monitor.web.roles import needs

__all__ = ["INDEX", "routes", "runbooks"]

INDEX = "README"
PREFIX = "gradiometer"
"""What the names of alerts begin with, and those of pages do not."""
NONE_HERE = "This monitor was installed without its runbooks; they are in docs/runbooks of gradiometer's repository.\n"
PAGE_LINK = re.compile(r"([A-Za-z]+)\.md(#[a-z0-9-]+)?|(#[a-z0-9-]+)")
"""A link to another runbook, or within the page: the only ones that are followed from here."""
LAYOUT = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title · gradiometer</title>
<link rel="icon" href="../static/favicon.svg" type="image/svg+xml">
<link rel="stylesheet" href="../static/style.css">
<link rel="stylesheet" href="../static/runbooks.css">
<script src="../static/theme.js"></script>
<script src="../static/switch.js" defer></script>
</head>
<body>
<header class="top">
  <a class="brand" href="../" aria-label="gradiometer, all runs">
    <svg viewBox="0 0 32 32" aria-hidden="true"><path d="M2 21h6l3-6 3 6 4-16 4 16h8"/></svg>
    <span>gradiometer</span>
  </a>
  <nav class="books"><a href="./">Runbooks</a></nav>
  <button type="button" class="quiet" id="theme" aria-label="Switch between light and dark"><svg viewBox="0 0 24 24" \
aria-hidden="true"><circle cx="12" cy="12" r="8.5"/><path class="half" d="M12 3.5a8.5 8.5 0 0 1 0 17z"/></svg></button>
</header>
<main class="card prose">
$body</main>
</body>
</html>
""")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Page:
    content: bytes
    tag: str


def routes() -> list[BaseRoute]:
    """Make the routes; pages are rendered when they are first asked for."""
    return [Route("/runbooks", _to_index), Route("/runbooks/", _serve), Route("/runbooks/{name}", _serve)]


@needs("nothing")
async def _to_index(_: Request) -> Response:
    return RedirectResponse("runbooks/", 308)  # relative, so that it holds behind a proxy's sub path too


@needs("nothing")
async def _serve(request: Request) -> Response:
    """Answer with the page of an alert, with or without ``Gradiometer``, in whatever case; else 404 and the index."""
    if not runbooks():
        return PlainTextResponse(NONE_HERE, 404, headers=HEADERS)
    name = str(request.path_params.get("name", INDEX))
    known = {each.lower(): each for each in runbooks()}
    found = known.get(name.lower()) or known.get(name.lower().removeprefix(PREFIX))
    page = _render(found or INDEX)
    headers = {**HEADERS, "etag": page.tag}
    if found is None:
        return Response(page.content, 404, media_type="text/html; charset=utf-8", headers=HEADERS)
    if request.headers.get("if-none-match") == page.tag:
        return Response(status_code=304, headers=headers)
    return Response(page.content, media_type="text/html; charset=utf-8", headers=headers)


@cache
def runbooks() -> dict[str, str]:
    """Read the Markdown of every page that came with the package, by name; of :data:`INDEX` and each alert.

    Without the index, as in a checkout that has lost its documentation, there are none.
    """
    folder = _folder()
    if not folder.joinpath(f"{INDEX}.md").is_file():
        return {}
    return {
        file.name.removesuffix(".md"): file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".md")
    }


def _folder() -> Traversable:
    """Return where the pages are: in the wheel beside the code, in a checkout among the documentation."""
    packaged = files("gradiometer_monitor").joinpath("runbooks")
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "docs" / "runbooks"


@cache  # of a fixed list of names
def _render(name: str) -> _Page:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(runbooks()[name])
    for token, following in pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", _slug(following.content))
        if following.type == "inline":
            following.children = _linked(following.children or [])
    title = next(after.content for token, after in pairwise(tokens) if token.tag == "h1")
    body = parser.renderer.render(tokens, parser.options, {})
    content = LAYOUT.substitute(title=html.escape(title), body=body).encode()
    return _Page(content=content, tag=f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _slug(heading: str) -> str:
    """Make the anchor of a heading, as code hosts make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _linked(children: Iterable[Token]) -> list[Token]:
    """Point links at the pages as they are served; of one to other documentation leave the text, and name its file."""
    made: list[Token] = []
    elsewhere = ""
    for token in children:
        if token.type == "link_open":
            link = str(token.attrs["href"])
            target = _target(link)
            elsewhere = "" if target is not None else f" [{link.partition('#')[0].replace('../', 'docs/')}]"
            token.attrs["href"] = target or ""
        if token.type == "link_close" and elsewhere:
            made.append(Token("text", "", 0, content=elsewhere))
        elif not (token.type == "link_open" and elsewhere):
            made.append(token)
    return made


def _target(link: str) -> str | None:
    """Return where a link leads among the pages that are served, None if it does not."""
    found = PAGE_LINK.fullmatch(link)
    if found is None or (found[1] and found[1] not in runbooks()):
        return None
    page = "" if found[1] is None else "./" if found[1] == INDEX else found[1]
    return page + (found[2] or found[3] or "")
