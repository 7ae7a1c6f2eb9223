"""The page of `clara ui`: a question, its answers from memory and from text, what was read, and own files.

It runs in the process of the model, one call at a time. What it does is in `page_session.py`.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr  # noqa: E402

from ..candidates_clara import least_score  # noqa: E402
from . import page_html as show  # noqa: E402
from .page_parts import CSS, LIVE, THEME, rate_plot, size_slider  # noqa: E402
from .page_rate import read_rates  # noqa: E402
from .page_session import Asked, Limits, Passage, Stopped, Visitors, ask, paraphrase  # noqa: E402

OWN = "Your files"
MAX_TOP_K = 10
SECONDS_BETWEEN = 1.0  # of two reports of a compression, which screen readers read out
ERRORS = (ValueError, TypeError, OSError, KeyError, RuntimeError)  # what is said to the visitor
ALONE = {"concurrency_id": "model", "concurrency_limit": 1}
QUIET = {"api_visibility": "private", "show_progress": "hidden"}


def launch_options(limits: Limits = Limits()) -> dict:  # noqa: B008, it cannot change
    """Of `Blocks.launch`: nothing of the page comes from another machine."""
    return {
        "theme": THEME,
        "css": CSS,
        "footer_links": [],
        "max_file_size": limits.file_bytes,
        "ssr_mode": False,
        "show_error": True,
        "run_history": False,
    }


def build_page(model, corpus, *, name: str, examples: Sequence[str] = (), limits: Limits = Limits()) -> gr.Blocks:  # noqa: B008
    """The page over a corpus that has its model attached; launch it with `launch_options`.

    Args:
        model: `CLaRaForRAG`, that made the corpus.
        corpus: an open `CompressedCorpus`.
        name: of the corpus, as it is shown.
        examples: questions on offer.
        limits: of what visitors may send.
    """
    return _Page(model, corpus, name, examples, limits).build()


class _Page:
    """One page: its components, and the functions behind them."""

    def __init__(self, model, corpus, name: str, examples: Sequence[str], limits: Limits):
        self.model, self.corpus, self.name, self.examples, self.limits = model, corpus, name, examples, limits
        self.sizes = [size for size in model.config.memory_sizes if size <= corpus.manifest.memory_size]
        self.visitors = Visitors(model, corpus, limits)

    # --- layout ------------------------------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        """The page; `Blocks.launch` serves it."""
        with gr.Blocks(title="Ask compressed documents", analytics_enabled=False, delete_cache=(600, 3600)) as app:
            n_tokens = self.model.config.document_max_length
            gr.HTML(show.intro_html(n_tokens, self.sizes[-1]))
            picture = gr.HTML(show.picture_html(n_tokens, self.sizes[-1]), elem_id="picture")
            self._question()
            self._own_files()
            self._answers()
            self._rates()
            self._events()
            self.size.input(lambda size: show.picture_html(n_tokens, size), self.size, picture, queue=False, **QUIET)
            app.unload(self.leave)
        app.queue(max_size=64)
        app.visitors = self.visitors  # to be closed by who launches
        return app

    def _question(self) -> None:
        self.where = gr.Radio([self.name], value=self.name, label="Documents", visible=False, elem_id="where")
        with gr.Row(equal_height=True):
            self.question = gr.Textbox(
                label="Question",
                placeholder="Ask something that the documents say",
                max_lines=1,
                autofocus=True,
                scale=8,
                min_width=280,
                elem_id="question",
            )
            self.button = gr.Button("Ask", variant="primary", scale=1, min_width=100, elem_id="ask")
        if self.examples:
            gr.Examples([[text] for text in self.examples], self.question, label="Examples", elem_id="examples")
        with gr.Row():
            self.size = size_slider(self.sizes, "Memory size", min_width=280, elem_id="size")
            options = {"step": 1, "precision": 0, "min_width": 220, "buttons": []}
            start = min(self.model.config.retrieval_top_k, MAX_TOP_K)
            self.top_k = gr.Slider(1, MAX_TOP_K, start, label="Passages to read", elem_id="top-k", **options)
            self.expand = gr.Slider(0, MAX_TOP_K, 0, label="Of these, read as text", elem_id="expand", **options)

    def _answers(self) -> None:
        self.told = gr.HTML(elem_id="told", **LIVE)
        with gr.Row():
            box = {"interactive": False, "lines": 2, "min_width": 280}
            self.memory = gr.Textbox(label="Answer from memory", elem_id="memory", **box)
            self.text = gr.Textbox(label="Answer from full text", elem_id="text", **box)
        self.costs = gr.HTML(visible=False, elem_id="costs", padding=True)
        self.words = gr.HTML(visible=False, elem_id="words", padding=True)
        self.shown = gr.State(0)  # counts answers, so that each draws its passages

        @gr.render(triggers=[self.shown.change], show_progress="hidden")
        def passages(request: gr.Request):
            asked = self.visitors.get(request.session_hash).asked
            if asked is not None:
                self._passages(asked)

    def _least(self, asked: Asked, passage: Passage | None = None) -> float | None:
        """The cosine at which the model answers from a passage, by default the nearest."""
        if not asked.passages:
            return None
        passage = passage or max(asked.passages, key=lambda one: one.source.score)
        return least_score(self.model.config, asked.question, passage.source)

    def _passages(self, asked: Asked) -> None:
        name = self.name if asked.corpus is self.corpus else OWN.lower()
        gr.HTML(show.passages_html(asked, self._least(asked), name), padding=True)
        for number, passage in enumerate(asked.passages, 1):
            with gr.Column(elem_classes="passage"):
                gr.HTML(show.passage_html(number, passage, self._least(asked, passage)))
                button = gr.Button(f"What does the memory of passage {number} say?", size="sm", scale=0)
                said = gr.Textbox(label=f"Passage {number}, from its memory alone", visible=False, interactive=False)

            def say(size: int, source=passage.source) -> Iterator[dict]:
                yield gr.Textbox(value="...", visible=True)
                try:
                    for text in paraphrase(self.model, asked.corpus, source, size):
                        yield gr.Textbox(value=text, visible=True)
                except ERRORS as error:
                    yield gr.Textbox(value=describe(error), visible=True)

            button.click(say, self.size, said, **ALONE, **QUIET)

    def _own_files(self) -> None:
        limits, size = self.limits, self.limits.file_bytes // 2**20
        minutes = f"{limits.keep_seconds / 60:.0f} minutes"
        with gr.Accordion("Ask your own files", open=False, elem_id="own"):
            gr.HTML(
                f"<p>Up to {limits.files} files of {size} MB: text, HTML, PDF, Word, PowerPoint, EPUB, Excel, CSV, "
                f"JSON or Parquet. They are compressed here, for you alone, and removed {minutes} after you leave.</p>"
            )
            self.files = gr.File(label="Files", file_count="multiple", height=160, elem_id="files")
            with gr.Row():
                self.compress_button = gr.Button("Compress", variant="primary", min_width=100, elem_id="compress")
                self.stop_button = gr.Button("Stop", min_width=100, elem_id="stop")
                self.remove_button = gr.Button("Remove my files", min_width=100, elem_id="remove")
            self.files_told = gr.HTML(elem_id="files-told", **LIVE)

    def _rates(self) -> None:
        rates = read_rates(self.model)
        with gr.Accordion("How much is lost at each memory size", open=False, elem_id="rates"):
            gr.HTML(show.rates_html(rates))
            if rates:
                rate_plot(rates)

    # --- events ------------------------------------------------------------------------------------------------------

    def _events(self) -> None:
        settings = [self.size, self.top_k, self.expand]
        answered = [self.told, self.memory, self.text, self.costs, self.words, self.shown]
        gr.on(
            [self.question.submit, self.button.click],
            self.ask,
            [self.question, self.where, *settings, self.shown],
            answered,
            **ALONE,
            **QUIET,
        ).then(self.compare, None, [self.told, self.text, self.costs], **ALONE, **QUIET)
        self.files.upload(self.note_uploads, self.files, None, queue=False, **QUIET)
        self.compress_button.click(
            self.compress,
            self.files,
            [self.files_told, self.where],
            concurrency_id="files",
            concurrency_limit=2,
            **QUIET,
        )
        self.stop_button.click(self.stop, None, None, queue=False, **QUIET)
        self.remove_button.click(self.remove, None, [self.files, self.files_told, self.where], queue=False, **QUIET)

    def ask(self, question, where, size, top_k, expand, shown, request: gr.Request) -> Iterator[dict]:
        """Answer from memory, as it is written; then what was read."""
        visitor = self.visitors.get(request.session_hash)
        corpus, question, is_cleared = visitor.corpus if where == OWN else self.corpus, question.strip(), False
        visitor.asked = replace(visitor.asked, is_new=False) if visitor.asked else None
        if problem := self._problem(question, corpus):
            yield {self.told: show.message_html(problem, kind="problem")}
            return
        yield {self.told: show.message_html("Searching and reading ...")}
        empty = {self.text: "", self.costs: gr.HTML(visible=False), self.words: gr.HTML(visible=False)}
        try:
            for part in ask(self.model, corpus.refresh(), question, memory_size=size, top_k=top_k, expand=expand):
                if isinstance(part, Asked):
                    words = self.model.explain_queries([question])[0]
                    visitor.asked = part
                    yield empty | self._answered(part, words) | {self.shown: shown + 1}
                else:
                    yield {self.memory: part} | ({} if is_cleared else empty)
                    is_cleared = True
        except ERRORS as error:
            yield {self.told: show.message_html(describe(error), kind="problem")}

    def _problem(self, question: str, corpus) -> str | None:
        """Why a question cannot be asked."""
        if not question:
            return "Write a question first."
        if len(question) > self.limits.question:
            return f"A question may have {self.limits.question:,} characters, this one has {len(question):,}."
        if corpus is None:
            return "Your files are no longer here. Choose them again below and press Compress."
        return None

    def _answered(self, asked: Asked, words: Sequence[str]) -> dict:
        """What an answer shows at once."""
        answer, text = asked.answer, asked.answer.text or show.NOTHING
        words = gr.HTML(show.words_html(words), visible=True)
        if answer.abstained:
            return {
                self.told: show.message_html(*show.abstained_lines(asked, self._least(asked))),
                self.memory: show.NO_ANSWER,
                self.text: show.NO_ANSWER,
                self.words: words,
            }
        return {
            self.told: show.message_html("Answered from memory. Now from the full text ...", heard=text),
            self.memory: text,
            self.costs: gr.HTML(show.costs_html(asked.cost, None, asked.corpus.manifest.codec), visible=True),
            self.words: words,
        }

    def compare(self, request: gr.Request) -> Iterator[dict]:
        """The question of `ask` once more, from the text of the same passages."""
        asked = self.visitors.get(request.session_hash).asked
        if asked is None or asked.answer.abstained or not asked.is_new:
            yield {self.told: gr.skip()}
            return
        options = {"memory_size": self.sizes[-1], "top_k": asked.top_k, "expand": asked.top_k}  # all as text
        try:
            for part in ask(self.model, asked.corpus, asked.question, **options):
                if isinstance(part, Asked):
                    costs = show.costs_html(asked.cost, part.cost, asked.corpus.manifest.codec)
                    text = part.answer.text or show.NOTHING
                    told = show.message_html("Answered from memory and from the full text.", heard=text)
                    yield {self.told: told, self.text: text, self.costs: costs}
                else:
                    yield {self.text: part}
        except ERRORS as error:
            yield {self.told: show.message_html(f"From the full text: {describe(error)}", kind="problem")}

    def compress(self, paths, request: gr.Request) -> Iterator[dict]:
        """A corpus of the visitor's own files; meanwhile what is done of it."""
        visitor, done = self.visitors.get(request.session_hash), [0, 0]
        visitor.stop.clear()

        def report(*counts: int) -> None:
            done[:] = counts

        with ThreadPoolExecutor(1) as pool:
            task = pool.submit(self.visitors.compress, visitor, paths or [], report)
            try:
                while wait([task], timeout=SECONDS_BETWEEN).not_done:
                    yield {self.files_told: show.progress_html(*done)}
            except GeneratorExit:  # the page is closed
                visitor.stop.set()
                raise
        try:
            problems = task.result()
        except Stopped:
            yield {self.files_told: show.message_html("Stopped. Nothing was changed.")}
        except ERRORS as error:
            yield {self.files_told: show.message_html(*describe(error).splitlines(), kind="problem")}
        else:
            told = show.message_html(*show.compressed_lines(visitor.corpus))
            told += show.message_html(*problems, kind="problem")
            yield {self.files_told: told, self.where: gr.Radio([self.name, OWN], value=OWN, visible=True)}

    def note_uploads(self, paths, request: gr.Request) -> None:
        """Remember what Gradio keeps of a visitor, to remove it."""
        self.visitors.get(request.session_hash).uploads.update(paths or [])

    def stop(self, request: gr.Request) -> None:
        """Stop the compression of this visitor."""
        self.visitors.get(request.session_hash).stop.set()

    def remove(self, request: gr.Request) -> dict:
        """Remove the visitor's files and their corpus."""
        self.visitors.remove_files(self.visitors.get(request.session_hash))
        where = gr.Radio([self.name], value=self.name, visible=False)
        return {self.files: None, self.files_told: show.message_html("Your files are removed."), self.where: where}

    def leave(self, request: gr.Request) -> None:
        """The page of a visitor is closed."""
        self.visitors.leave(request.session_hash)


def serve(app: gr.Blocks, show_address: Callable[[str], None], **options) -> None:
    """Serve a page until it is interrupted or terminated, then remove all files of visitors.

    `show_address` takes the page's address; `options` are further ones of `Blocks.launch`.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _, url, _ = app.launch(**launch_options(), **options, prevent_thread_lock=True, quiet=True)
        show_address(url)
        app.block_thread()
    finally:
        app.visitors.close()


def describe(error: Exception) -> str:
    """An error in words, without quotes around the text of a KeyError."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error) or type(error).__name__
