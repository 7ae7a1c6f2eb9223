"""Metrics for Prometheus, in a registry of the app's own.

Documents, queue and running requests are read from the engine when they are asked for.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """What is counted; `text` gives it as Prometheus reads it."""

    def __init__(self, engine):
        self.registry = registry = CollectorRegistry()
        options = {"registry": registry}
        labels = ("route", "method", "status")
        self.requests = Counter("clara_requests", "Requests by route, method and status.", labels, **options)
        self.seconds = Histogram(
            "clara_request_seconds", "Until a response was complete.", ("route",), buckets=SECONDS, **options
        )
        self.answers = Counter("clara_answers", "Answers that were generated, and those that abstained.", **options)
        self.abstained = Counter("clara_abstained", "Answers that abstained: no document was near enough.", **options)
        self.prompt_tokens = Counter("clara_prompt_tokens", "Positions that the generator read.", **options)
        self.completion_tokens = Counter("clara_completion_tokens", "Tokens of answers.", **options)
        self.changes = Counter("clara_document_changes", "Documents changed, by the change.", ("change",), **options)
        batches = Histogram("clara_batch_size", "Requests of one pass of the model.", buckets=SIZES, **options)
        engine.on_pass = batches.observe
        for name, text, value in (
            ("clara_waiting_requests", "Requests in the queue.", lambda: engine.n_waiting),
            ("clara_running_requests", "Requests that the model works on.", lambda: engine.n_running),
            ("clara_documents", "Documents of the corpus.", lambda: len(engine.corpus)),
            ("clara_chunks", "Chunks of the corpus.", lambda: engine.corpus.manifest.n_spans),
        ):
            Gauge(name, text, **options).set_function(value)
        ProcessCollector(**options)

    def count_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """A response was sent."""
        self.requests.labels(route, method, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def count_answer(self, abstained: bool, prompt_tokens: int, completion_tokens: int) -> None:
        """An answer is complete."""
        self.answers.inc()
        self.abstained.inc(abstained)
        self.prompt_tokens.inc(prompt_tokens)
        self.completion_tokens.inc(completion_tokens)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)
