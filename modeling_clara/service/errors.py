"""Errors of the service in the shape of OpenAI's, which its clients turn into their own exceptions.

What the service did not foresee is "internal error" to a client: its message may hold text of a document.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Mapping

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from .engine import Overloaded, Stopping
from .remote import GeneratorError

logger = logging.getLogger("modeling_clara.service")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Json(JSONResponse):
    """JSON that can always be written: a lone surrogate, which UTF-8 cannot hold, becomes a question mark."""

    def render(self, content) -> bytes:
        return to_json(content).encode("utf-8", "replace")


def to_json(content) -> str:
    """Compact JSON; NaN is refused, see `sources.json_value`."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def to_event(content, event: str | None = None) -> dict:
    """A server-sent event."""
    data = to_json(content).encode("utf-8", "replace").decode()
    return {"data": data} if event is None else {"event": event, "data": data}


class ApiError(Exception):
    """An error that a client is told.

    Args:
        status: of HTTP.
        message: name, rule, value, remedy.
        param: the field that is wrong.
        code: for programs.
        retry_after: seconds after which the same request may work.
        more: further fields of the body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        more: Mapping | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.more = retry_after, dict(more or {})

    def body(self) -> dict:
        """What is sent."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}, **self.more}

    def response(self) -> Json:
        """The whole response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Json(self.body(), self.status, headers)


@contextlib.asynccontextmanager
async def told_to_client(seconds: float) -> AsyncIterator[None]:
    """Around a call of the engine: what its caller did wrong, a full queue or `seconds` that were not enough."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except Stopping as error:
        raise ApiError(503, "the service is stopping. Try another one.", retry_after=error.retry_after) from error
    except Overloaded as error:
        raise ApiError(
            429, "the queue is full. Try again later.", code="overloaded", retry_after=error.retry_after
        ) from error
    except TimeoutError as error:
        raise ApiError(
            504,
            f"the request must be done in {seconds:g} seconds, and was not. Try again, or ask for less.",
            code="timeout",
        ) from error
    except GeneratorError as error:  # its message is for us: it names the server and says what it answered
        logger.error("generator", extra={"fields": {"problem": str(error)}})
        message = "the generator's server failed. Try again later."
        raise ApiError(error.status, message, code="generator", retry_after=5) from error
    except (ValueError, TypeError) as error:
        if "are broken: reload" in str(error):  # weights, which are no client's fault
            raise
        raise ApiError(400, str(error), code="invalid_value") from error


def add_handlers(app: FastAPI) -> None:
    """Give all errors of an app this shape."""

    async def on_api_error(request: Request, error: ApiError) -> Json:
        return error.response()

    async def on_invalid(request: Request, error: RequestValidationError) -> Json:
        return _invalid(error.errors()[0]).response()

    async def on_http_error(request: Request, error: HTTPException) -> Json:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    async def on_fault(request: Request, error: Exception) -> Json:
        response = ApiError(500, "internal error. The log of the service names it by the request's id.").response()
        response.headers["Connection"] = "close"  # as the server does after a fault: nobody shall ask on it again
        if "request_id" in request.scope["state"]:
            response.headers["X-Request-ID"] = request.scope["state"]["request_id"]
        return response

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_fault)


def _invalid(error: Mapping) -> ApiError:
    """The first thing that is wrong with a body, by pydantic."""
    place = [part for part in error["loc"] if part != "body"]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    kind, message = error["type"], error["msg"]
    if kind.startswith("unsupported"):
        return ApiError(400, message, param=name or error["ctx"]["param"], code=kind)
    if kind == "json_invalid":
        reason = error["ctx"]["error"]
        return ApiError(400, f"the body must be JSON: {reason} (character {place[0]}).", code="invalid_json")
    if not name:
        return ApiError(400, "the body must be a JSON object, with `Content-Type: application/json`.")
    if kind == "extra_forbidden":
        return ApiError(400, f"`{name}` is no parameter here. Leave it out.", param=name, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"`{name}` must be given. Add it.", param=name, code="missing_parameter")
    return ApiError(400, f"`{name}`: {message[0].lower()}{message[1:]}.", param=name, code="invalid_value")
