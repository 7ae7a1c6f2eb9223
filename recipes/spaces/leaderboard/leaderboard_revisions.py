"""Says of models on the Hub whether they exist at the commit that a results.json names.

A Hub that cannot be reached makes a model unchecked, never invalid.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

EXISTS, MISSING, UNCHECKED = "exists", "missing", "unchecked"
Model = tuple[str, str]  # repo id and commit
MAX_CHECKS = 500  # asked in one go; what remains is asked at the next refresh
MAX_FAILURES = 8  # after so many the Hub is taken to be out of reach
N_THREADS = 16
TIMEOUT = 10.0  # seconds, of one question


class RevisionChecker:
    """Asks without a token, as a reader would, and remembers what exists; a missing commit may be published later."""

    def __init__(self, max_checks: int = MAX_CHECKS) -> None:
        self.max_checks = max_checks
        self.existing: set[Model] = set()

    def check(self, models: Iterable[Model]) -> dict[Model, str]:
        """EXISTS, MISSING or UNCHECKED for each of the models."""
        outcomes = {model: EXISTS if model in self.existing else UNCHECKED for model in models}
        asked = sorted(model for model, outcome in outcomes.items() if outcome == UNCHECKED)[: self.max_checks]
        failed: list[Model] = []

        def ask(model: Model) -> str:
            outcome = ask_hub(*model) if len(failed) < MAX_FAILURES else UNCHECKED
            if outcome == UNCHECKED:
                failed.append(model)
            return outcome

        with ThreadPoolExecutor(N_THREADS) as pool:
            outcomes |= dict(zip(asked, pool.map(ask, asked), strict=True))
        self.existing.update(model for model, outcome in outcomes.items() if outcome == EXISTS)
        return outcomes


def ask_hub(repo: str, revision: str) -> str:
    """Whether everybody can find this model at this commit: EXISTS, MISSING or UNCHECKED."""
    try:
        HfApi(token=False).repo_info(repo, revision=revision, timeout=TIMEOUT)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        return MISSING
    except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled, OSError):
        return UNCHECKED
    return EXISTS
