"""uvicorn for the app: bounded headers, and a stop that finishes what runs.

h11 is the parser, though it is not the fastest: it bounds the size of what a client sends before a body.
"""

import uvicorn
from fastapi import FastAPI

HEADER_BYTES = 2**16
CONNECTIONS = 1000  # more are told 503


def build_server(app: FastAPI, stop_seconds: float = 121, **options) -> uvicorn.Server:
    """A server of an app; when it is stopped, requests have `stop_seconds` to finish."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            h11_max_incomplete_event_size=HEADER_BYTES,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=int(stop_seconds) + 1,
            log_config=None,
            access_log=False,
            server_header=False,
            **options,
        )
    )
