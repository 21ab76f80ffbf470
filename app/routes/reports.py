"""`/v1/reports`: reports of `neuronlens evaluate`, from the directory of reports on this server."""

import os
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, BinaryIO

from anyio import to_thread
from fastapi import Path, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.http.problems import ApiError
from app.http.responses import QUERY, header
from app.http.routing import Router
from app.routes.dependencies import ServiceDep
from app.schemas.replies import ReportOut, ReportsOut
from app.serving.reports import FileName, Report, UnknownReport, list_reports, open_file, read_report

router = Router("reports")

Name = Annotated[str, Path(description="Id of a report.")]

PIECE = 262144
"""Bytes that are read at once."""
MEDIA_TYPES: dict[FileName, str] = {
    "report.html": "text/html; charset=utf-8",
    "results.csv": "text/csv; charset=utf-8",
    "run.json": "application/json",
}
POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
)
"""A report is a page with an origin of its own that reaches no host: its inline script draws the figures."""
FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file.",
        "content": {kind.partition(";")[0]: {} for kind in MEDIA_TYPES.values()},
        "headers": header("Content-Security-Policy", "Lets a page run its own script, and reach no host."),
    }
}


@router.operation("GET", "/v1/reports", key_scope="read", errors=QUERY, feature="reports")
async def list_evaluations(service: ServiceDep) -> ReportsOut:
    """The newest 200 reports, newest first, with those that are incomplete or unreadable."""
    found = await to_thread.run_sync(list_reports, service.settings.reports)
    return ReportsOut(reports=[_out(each) for each in found])


@router.operation("GET", "/v1/reports/{report}", key_scope="read", errors=QUERY)
async def show_report(service: ServiceDep, report: Name) -> ReportOut:
    """One report."""
    try:
        return _out(await to_thread.run_sync(read_report, service.settings.reports, report))
    except UnknownReport:
        raise _unknown() from None


@router.operation(
    "GET", "/v1/reports/{report}/{file}", key_scope="read", errors=QUERY, responses=FILE, response_class=Response
)
async def show_report_file(service: ServiceDep, report: Name, file: FileName) -> Response:
    """A file of a report: the page, the numbers, or the settings that they were made with."""
    try:
        stream = await to_thread.run_sync(open_file, service.settings.reports, report, file)
    except UnknownReport:
        raise _unknown() from None
    headers = {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
    }
    return FileStream(stream, headers=headers, media_type=MEDIA_TYPES[file])


class FileStream(StreamingResponse):
    """An open file as a reply: as long as it is now, read in pieces on threads, and closed at the end."""

    def __init__(self, stream: BinaryIO, headers: Mapping[str, str], media_type: str) -> None:
        size = os.fstat(stream.fileno()).st_size
        super().__init__(self._pieces(size), headers={**headers, "Content-Length": str(size)}, media_type=media_type)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stream:
            await super().__call__(scope, receive, send)

    async def _pieces(self, left: int) -> AsyncIterator[bytes]:
        while left and (piece := await to_thread.run_sync(self._stream.read, min(left, PIECE))):
            left -= len(piece)
            yield piece


def _unknown() -> ApiError:
    return ApiError("unknown_report", "no such report, or no such file in it: see GET /v1/reports")


def _out(report: Report) -> ReportOut:
    run = report.run
    return ReportOut(
        id=report.id,
        state=report.state,
        created_at=report.created_at,
        files=list(report.files),
        model=run.model.id if run else None,
        data=run.test.name if run else None,
        texts=run.test.rows if run else None,
        targets=run.settings.targets if run else [],
        methods=run.settings.methods if run else [],
    )
