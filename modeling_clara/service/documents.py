"""`/search` and `/documents`: what is in the corpus, and changes of it.

A change is answered when it is on the disk. An id is text: it names a row of the corpus and never a file.
"""

import errno
import uuid
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool

from ..corpus.changes import Changes
from ..corpus.tables import Cell
from ..manifest_clara import RESERVED_COLUMNS
from .asking import Service
from .engine import AskOptions
from .errors import ApiError, Json, told_to_client
from .limits import bounded
from .logs import logger, note
from .schemas import DocumentBody, DocumentsBody, PutBody, SearchBody
from .sources import json_value, source_row

T = TypeVar("T")
OURS = (*RESERVED_COLUMNS, "_id")  # a `memory` would be an embedding that is not made here
PASS = 4  # documents that are compressed at once: answers wait for it
RETRY_SECONDS = 5.0  # after which another writer may be done
# What the disk of the corpus may say, and what a client is told of it: its status, message, code.
DISK = {errno.EACCES: (403, "the folder of the corpus cannot be written.", "read_only")}
DISK |= dict.fromkeys((errno.EPERM, errno.EROFS), DISK[errno.EACCES])
DISK |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), (507, "the disk of the corpus is full.", "disk_full"))
router = APIRouter()


@router.post("/search", summary="Find documents")
async def search(body: SearchBody, request: Request):
    """The best documents, each by its best chunk, with its whole text."""
    service: Service = request.app.state.service
    service.check_question(body.query, "query")
    given = body.model_dump(exclude={"query", "where"})
    work = service.engine.search(body.query, AskOptions(**given, where=service.where_text(body.where)))
    sources = await bounded(request, work, service.limits.answer_seconds)
    note(request, sources=len(sources))
    return Json({"sources": [source_row(source, None) for source in sources]})


@router.post("/documents", summary="Add documents")
async def add(body: DocumentsBody, request: Request):
    """Compress and append; an id that is there already is rejected."""
    return await _change(request, body, "add")


@router.put("/documents", summary="Replace documents, or add them")
async def put(body: PutBody, request: Request):
    """Replace by id, or add what is not there; with `create: false` that is rejected."""
    return await _change(request, body, "upsert" if body.create else "update")


@router.get("/documents", summary="A document by its id, in the query")
async def get_by_query(request: Request, id: Annotated[str, Query()]):
    """For ids that a path cannot hold, such as `..`."""
    return await _get(request, id)


@router.get("/documents/{id:path}", summary="A document by its id")
async def get(request: Request, id: str):
    """Title, chunks with their texts, and metadata."""
    return await _get(request, id)


@router.delete("/documents", summary="Delete documents by their ids, in the query")
async def delete_by_query(request: Request, id: Annotated[list[str], Query(min_length=1, max_length=1000)]):
    """All of them or, if one is not there, none: `/documents?id=a&id=b`."""
    return await _delete(request, id)


@router.delete("/documents/{id:path}", summary="Delete a document by its id")
async def delete(request: Request, id: str):
    """Its memory is no longer found."""
    return await _delete(request, [id])


async def _get(request: Request, document_id: str) -> Json:
    corpus = request.app.state.service.engine.corpus
    try:
        async with told_to_client(request.app.state.service.limits.answer_seconds):
            (document,) = await run_in_threadpool(corpus.get, [document_id])
    except KeyError:
        raise _not_there() from None
    fields = {name: json_value(document[name]) for name in ("document_id", "title", "metadata")}
    chunks = [
        {"chunk": span["span"], "text": span["text"], "n_tokens": span["n_tokens"]} for span in document["spans"]
    ]
    return Json({**fields, "chunks": chunks})


async def _delete(request: Request, ids: list[str]) -> Json:
    service: Service = request.app.state.service
    try:
        n_deleted = await _write(service, lambda corpus: corpus.delete(ids))
    except KeyError:
        raise _not_there() from None
    service.metrics.changes.labels("delete").inc(n_deleted)
    note(request, deleted=n_deleted)
    return Json({"deleted": n_deleted, "documents": len(service.engine.corpus)})


async def _change(request: Request, body: DocumentsBody, mode: str) -> Json:
    service: Service = request.app.state.service
    if len(body.documents) > service.limits.documents:
        most, given = service.limits.documents, len(body.documents)
        message = f"`documents` must be at most {most}, got {given}. Send them in parts."
        raise ApiError(400, message, param="documents", code="too_long")
    kinds = service.engine.corpus.manifest.metadata
    rows = [_row(document, kinds, f"documents[{index}]") for index, document in enumerate(body.documents)]
    if mode != "update":  # which needs the id of what is there
        rows = [{"id": uuid.uuid4().hex, **row} for row in rows]
    changes: Changes = await _write(service, lambda corpus: getattr(corpus, mode)(rows, batch_size=PASS))
    rejected = [
        {"row": row["row"], "id": body.documents[row["row"]].id, "reason": row["reason"]} for row in changes.rejected
    ]
    refused = {row["row"] for row in rejected}
    ids = [None if number in refused else row["id"] for number, row in enumerate(rows)]
    counts = {"documents": changes.n_documents, "chunks": changes.n_spans, "unchanged": changes.n_unchanged}
    service.metrics.changes.labels(mode).inc(changes.n_documents)
    note(request, **counts, rejected=len(rejected))
    if rejected and not changes.n_documents + changes.n_unchanged:
        message = f"no document was taken: {rejected[0]['reason']}"
        raise ApiError(422, message, param="documents", code="rejected", more={"rejected": rejected})
    return Json({**counts, "ids": ids, "rejected": rejected})


def _row(document: DocumentBody, kinds: dict[str, str], place: str) -> dict:
    """A document as the corpus takes it; times, which JSON does not have, are read from text as in a CSV file."""
    fields = {name: value for name, value in document.model_dump(exclude={"metadata"}).items() if value is not None}
    for name, value in document.metadata.items():
        if name in OURS:
            message = f"`{place}.metadata` must not have the name {name!r}, which is ours. Rename it."
            raise ApiError(400, message, param=f"{place}.metadata", code="reserved_name")
        is_time = isinstance(value, str) and kinds.get(name, "").startswith(("date", "timestamp"))
        fields[name] = Cell(value) if is_time else value
    return fields


async def _write(service: Service, change: Callable[..., T]) -> T:
    """Run a change in the writer's thread. It goes on if the client leaves: it may be half way."""
    if service.engine.corpus.repo_id is not None:
        raise ApiError(403, "a corpus of the Hub cannot be changed here. Serve a folder.", code="read_only")
    if service.engine.n_writes >= service.limits.writes:
        message = "too many changes wait. Try again later."
        raise ApiError(429, message, code="overloaded", retry_after=RETRY_SECONDS)
    try:
        async with told_to_client(service.limits.write_seconds):
            return await service.engine.write(change)
    except RuntimeError as error:
        if "one writer at a time" not in str(error):
            raise
        message = "another process writes to the corpus. Try again later."
        raise ApiError(503, message, code="locked", retry_after=RETRY_SECONDS) from error
    except OSError as error:
        if error.errno not in DISK:
            raise
        status, message, code = DISK[error.errno]
        logger.error("disk", extra={"fields": {"problem": error.strerror}})
        raise ApiError(status, f"{message} Ask who runs the service.", code=code) from error


def _not_there() -> ApiError:
    return ApiError(404, "there is no document with this id. Check the id.", param="id", code="document_not_found")
