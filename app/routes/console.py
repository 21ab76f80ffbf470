"""`GET /`: the console, a page that calls `/v1` like any other client; its files are in `app/console`."""

import gzip
import hashlib
from functools import cache
from pathlib import Path

import plotly
from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from app.http.bodies import accepts_gzip
from app.http.problems import ApiError
from app.http.routing import Router

router = Router(strict_query=False, include_in_schema=False)

FILES = Path(__file__).parents[1] / "console"
PLOTLY = f"plotly-{plotly.__version__}.min.js"
"""Name of the charts' library; a new version has a new name, so that browsers may keep it for good."""
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data: blob:; frame-src 'self'; "
    # plotly uses a style element and style attributes
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FRAME_POLICY = (
    # a report brings its own scripts and has an origin of its own: it reaches neither the page nor any host
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
FRAME = "report-frame.html"
"""The page inside the frame that shows reports of `neuronlens evaluate`."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Vary": "Accept-Encoding",
}


class _File:
    """A file as it is sent, plain and packed with gzip, each form with an ETag of its own."""

    def __init__(self, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()[:32]
        self.plain = content, f'"{digest}"'
        self.gzipped = gzip.compress(content, 6, mtime=0), f'"{digest}-gzip"'


@cache
def _file(name: str) -> _File:
    """A file of the console, read once."""
    if name == PLOTLY:
        return _File((Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_bytes())
    if name == "index.html":
        return _File((FILES / name).read_text("utf-8").replace("{plotly}", f"/console/{PLOTLY}").encode())
    return _File((FILES / name).read_bytes())


_NAMES = frozenset(path.name for path in FILES.iterdir() if path.suffix in TYPES) | {PLOTLY}


@router.operation("GET", "/", key_scope=None)
async def console(request: Request) -> Response:
    """The page."""
    return await _reply(request, "index.html")


@router.operation("GET", "/console/{name}", key_scope=None)
async def console_file(request: Request, name: str) -> Response:
    """A file of the page."""
    if name not in _NAMES:
        raise ApiError("not_found", "no such path; see /docs")
    return await _reply(request, name)


async def _reply(request: Request, name: str) -> Response:
    file = await run_in_threadpool(_file, name)  # plotly takes a moment to compress
    cache_control = "public, max-age=31536000, immutable" if name == PLOTLY else "no-cache"
    zipped = accepts_gzip(request.headers)
    content, etag = file.gzipped if zipped else file.plain
    headers = {
        **_HEADERS,
        "Cache-Control": cache_control,
        "Content-Security-Policy": _FRAME_POLICY if name == FRAME else _POLICY,
        "ETag": etag,
    }
    named = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if named & {etag, "*"}:
        return Response(status_code=304, headers=headers)
    if zipped:
        headers["Content-Encoding"] = "gzip"
    return Response(content, headers=headers, media_type=TYPES[Path(name).suffix])
