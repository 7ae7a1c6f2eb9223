"""What the Hub's refusals mean, in a sentence each with its remedy."""

import contextlib
from collections.abc import Iterator

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

FROM_HUB = (HTTPError, LocalEntryNotFoundError, LocalTokenNotFoundError, HFValidationError, RuntimeError)
LOG_IN = "Log in by `hf auth login`, or pass another one with `--token`"


class PublishError(RuntimeError):
    """Nothing was published, or not all of it; the message says why and what to do."""


@contextlib.contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Errors of the Hub's client become a `PublishError` of one sentence."""
    try:
        yield
    except PublishError:
        raise
    except FROM_HUB as error:
        if (known := _of_hub(error)) is None:
            raise
        raise PublishError(explain(known, repo_id)) from error


def _of_hub(error: BaseException | None) -> Exception | None:
    """The error of the Hub or its connection in a chain: an upload's is wrapped by the client."""
    while isinstance(error, RuntimeError) and not isinstance(error, HTTPError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, FROM_HUB) else None


def explain(error: Exception, repo_id: str) -> str:
    """What a refusal of the Hub means for somebody who publishes to a repo."""
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    told = getattr(error, "server_message", None) or str(error).strip().splitlines()[0]
    if isinstance(error, HFValidationError):
        return f"`--repo-id` must be ORG/NAME, got {repo_id}: {told} Correct it."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} must be open to the token, but is gated. Ask its owners for access, or use another id."
    if isinstance(error, LocalTokenNotFoundError) or (status == 401 and not _has_token()):
        return f"{repo_id} needs a token of the Hub, found none. {LOG_IN}."
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"the Hub must accept the token for {repo_id}, but does not: it is wrong or expired. {LOG_IN}."
    if isinstance(error, RevisionNotFoundError):
        return (
            f"a revision of {repo_id} must be there, but the Hub does not find it (any more). Run the command again."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo_id} must be a repo that the token can read, but the name is taken by one that it cannot. "
            "Choose another `--repo-id`, or a token of its owner."
        )
    if status == 403:
        return (
            f"the token must be allowed to write to {repo_id}, but is not ({told}). Use a token with write permission "
            "of a member, another `--repo-id`, or `--create-pr` to propose the change."
        )
    if status in (409, 412):
        return (
            f"{repo_id} has been changed by somebody else in the meantime: theirs is published, yours is not, and "
            "nothing is mixed. Look at their change, and run the command again to put yours after it."
        )
    if status is not None and status < 500 and status not in (408, 429):
        return (
            f"the Hub refuses what is published to {repo_id} ({status}): {told} Correct it, and run the command again."
        )
    reason = f"it answers {status}" if status else f"the connection failed ({told or type(error).__name__})"
    return (
        f"the Hub must be reached for {repo_id}, but {reason}. What is there is whole, the old state or the "
        "new one: run the same command again, it finishes what is left."
    )


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
