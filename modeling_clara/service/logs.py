"""Structured logs: one JSON object a line, without a question, an answer, a document or a key.

Errors are logged by their type and where they were raised: their messages may quote text.
"""

import json
import logging
import re
import sys
import time
import traceback
import uuid
from typing import TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics

logger = logging.getLogger("modeling_clara.service")
REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class JsonLines(logging.Formatter):
    """A record as JSON; `extra={"fields": {...}}` are fields of their own."""

    def format(self, record: logging.LogRecord) -> str:
        row = {"time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"}
        row |= {"level": record.levelname.lower(), "event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info and record.exc_info[1] is not None:
            frames = traceback.extract_tb(record.exc_info[2])
            row["error"] = type(record.exc_info[1]).__name__
            row["where"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-8:]]
        return json.dumps(row, default=str)


def log_to(stream: TextIO = sys.stdout) -> None:
    """Write the logs of the service and of uvicorn as JSON lines; uvicorn's access log is ours."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name, level in ((logger.name, logging.INFO), ("uvicorn.error", logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)


def note(request, **fields) -> None:
    """Add fields to the log line of a request."""
    request.scope["state"]["log"].update(fields)


class RequestLog:
    """ASGI middleware: gives each request an id, logs it when its response is complete, and counts it.

    The id is the client's `X-Request-ID`, if it is a short word, else a new one.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], state["log"] = request_id, {}
        start, status = time.perf_counter(), 499  # of a client that leaves before it has asked

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "none")  # as it is declared: a path may hold an id
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.count_request(route, method, status, seconds)
            fields = {"request_id": request_id, "method": method, "route": route, "status": status}
            fields |= {"ms": round(1e3 * seconds, 1), **state["log"]}
            logger.log(logging.ERROR if status >= 500 else logging.INFO, "request", extra={"fields": fields})


METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
