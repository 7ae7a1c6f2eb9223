"""The leaderboard: a page with a tab for each setting, one to submit, one for refused files and one of explanations.

It is a Space of the Hub or, with `python app.py --results PLACE`, stands anywhere. Text arrives here escaped.
"""

import argparse
import math
import os
from collections.abc import Callable
from functools import partial

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr  # noqa: E402
import leaderboard_pages as pages  # noqa: E402
import leaderboard_table as tables  # noqa: E402
import pandas as pd  # noqa: E402
from leaderboard_plots import COSTS, cost_figure  # noqa: E402
from leaderboard_source import Source  # noqa: E402
from leaderboard_submit import Outcome, check_upload, submit  # noqa: E402
from validation import MAX_BYTES, REPO_ID  # noqa: E402

PAGE_ROWS = 100  # a browser takes seconds for a table of thousands
FILTERS = {"data": "Data", "kind": "Kind", "codec": "Codec", "memory_size": "k read"}
IN_A_SPACE = "SPACE_ID" in os.environ  # only there does the Hub sign users in
PRIVATE = {"api_visibility": "private"}
LAUNCH = {  # of `Blocks.launch`: nothing of the page comes from another machine
    "theme": pages.THEME,
    "css": pages.CSS,
    "head": pages.HEAD,
    "footer_links": [],
    "max_file_size": MAX_BYTES,
    "ssr_mode": False,
    "show_error": True,
    "run_history": False,
}


class Board:
    """What the page shows now: the newest read of the source and its frames, one of each setting."""

    def __init__(self, source: Source, submit_to: str | None) -> None:
        self.source, self.submit_to = source, submit_to or (source.place if source.is_repo else None)
        self.refresh()

    def refresh(self) -> None:
        """Reads the source anew; whoever asks meanwhile sees what was there before."""
        loaded = self.source.load()
        frame = tables.make_frame(loaded.entries)
        self.frames = {setting: frame[frame["setting"] == setting] for setting in tables.SETTINGS}
        self.loaded = loaded

    def labels(self) -> list[str]:
        """Of the tabs of the settings, and of that of refused files."""
        counts = {name: len(frame) for name, frame in self.frames.items()} | {"Invalid": len(self.loaded.refused)}
        return [f"{name} ({count:,})" for name, count in counts.items()]


def build_app(source: Source, submit_to: str | None = None) -> gr.Blocks:
    """The page on the results of `source`, which is read here and at each refresh; launch it with `LAUNCH`.

    `submit_to` is the dataset repo that gets pull requests, by default the one that results are read from.
    """
    board = Board(source, submit_to)
    *labels, invalid_label = board.labels()
    with gr.Blocks(title="CLaRa leaderboard", analytics_enabled=False, fill_width=True) as app:
        with gr.Row(equal_height=True):
            intro = gr.HTML(pages.intro_html(board.loaded), elem_id="intro", scale=8)
            refresh = gr.Button("Refresh", scale=0, min_width=110, elem_id="refresh")
        with gr.Tabs():
            tabs, fills = [], []
            for setting, label in zip(tables.SETTINGS, labels, strict=True):
                with gr.Tab(label, id=setting) as tab:
                    fills.append(_fill_setting(board, setting))
                tabs.append(tab)
            with gr.Tab("Submit", id="submit"):
                _fill_submit(board)
            with gr.Tab(invalid_label, id="invalid") as invalid:
                gr.Markdown("Files of the results repository that are not shown, and why.")
                refused = gr.Dataframe(
                    pages.refused_table(board.loaded),
                    headers=["File", "Reason"],
                    datatype="str",
                    interactive=False,
                    wrap=True,
                    buttons=[],
                    column_widths=["35%", "65%"],
                    elem_id="refused",
                    elem_classes="board",
                )
            with gr.Tab("About", id="about"):
                gr.Markdown(pages.ABOUT, elem_id="about-text")

        def show_all() -> list:
            updates = [gr.Tab(label=label) for label in board.labels()]
            return [pages.intro_html(board.loaded), pages.refused_table(board.loaded), *updates]

        def read_again() -> list:
            board.refresh()
            return show_all()

        shown = [intro, refused, *tabs, invalid]
        reading = refresh.click(read_again, None, shown, **PRIVATE)
        app.load(show_all, None, shown, show_progress="hidden", **PRIVATE)
        app.load(*fills[0], show_progress="minimal", **PRIVATE)
        for tab, fill in zip(tabs, fills, strict=True):
            reading = reading.then(*fill, show_progress="hidden", **PRIVATE)
            tab.select(*fill, show_progress="minimal", **PRIVATE)
    return app


def _fill_setting(board: Board, setting: str) -> tuple[Callable, list, list]:
    """A tab's filters, table and plots. Returns the function that fills them anew, its inputs and its outputs."""
    choice = partial(gr.Dropdown, filterable=False, min_width=110)
    with gr.Row():
        hint = "system, model, backbone ..."
        text = gr.Textbox(label="Search", placeholder=hint, scale=3, elem_id=f"search-{setting}")
        boxes = {
            key: choice([tables.ALL], value=tables.ALL, label=label, elem_id=f"{key}-{setting}")
            for key, label in FILTERS.items()
        }
        metric = choice([], value=None, label="Metric", elem_id=f"metric-{setting}")
        page = gr.Number(1, label="Page", precision=0, min_width=100, elem_id=f"page-{setting}")
    order = gr.Textbox(visible="hidden", elem_id=f"order-{setting}")
    table = gr.Dataframe(
        **_columns(tables.columns_of([])),
        headers=[column.header for column in tables.columns_of([])],
        interactive=False,
        label="Results",
        show_label=True,
        max_height=520,
        buttons=["fullscreen"],
        elem_id=f"table-{setting}",
        elem_classes="board",
    )
    with gr.Row():
        by_size = gr.Plot(label="Quality and size of memories", elem_id=f"size-{setting}")
        by_time = gr.Plot(label="Quality and time", elem_id=f"time-{setting}")

    def rows_of(text: str | None, metric: str | None, *values: str) -> pd.DataFrame:
        """What the filters leave of the setting, by the metric."""
        wanted = dict(zip(FILTERS, values, strict=True))
        return tables.ranked(tables.filtered(board.frames[setting], text, **wanted), metric)

    def show_page(number: int | None, order: str | None, *given) -> list:
        return _page(board.frames[setting], rows_of(*given), order, number)

    def show(order: str | None, text: str | None, metric: str | None, *values: str) -> list:
        rows = rows_of(text, metric, *values)
        return [*_page(board.frames[setting], rows, order, 1), *(cost_figure(rows, metric, cost) for cost in COSTS)]

    def fill(order: str | None, text: str | None, metric: str | None, *values: str) -> list:
        """As `show`, after giving filters and metrics the choices that there are now."""
        frame = board.frames[setting]
        names = tables.metric_names(frame)
        metric = metric if metric in names else next(iter(names), None)
        found = [tables.choices(frame, key) for key in FILTERS]
        values = [value if value in there else tables.ALL for value, there in zip(values, found, strict=True)]
        updates = [gr.Dropdown(there, value=value) for value, there in zip(values, found, strict=True)]
        return [*updates, gr.Dropdown(names, value=metric), *show(order, text, metric, *values)]

    wanted, shown = [text, metric, *boxes.values()], [page, table, by_size, by_time]
    options = {"show_progress": "minimal", "trigger_mode": "always_last", **PRIVATE}
    gr.on([text.change, *(box.input for box in boxes.values())], show, [order, *wanted], shown, **options)
    metric.input(lambda *given: ["", *show("", *given)], wanted, [order, *shown], **options)
    order.change(lambda *given: show_page(1, *given), [order, *wanted], [page, table], **options)
    page.change(show_page, [page, order, *wanted], [page, table], **options)
    return fill, [order, *wanted], [*boxes.values(), metric, *shown]


def _columns(columns: list[tables.Column]) -> dict:
    """What gr.Dataframe is told of its columns."""
    return {"datatype": [column.datatype for column in columns], "column_widths": [column.width for column in columns]}


def _page(frame: pd.DataFrame, rows: pd.DataFrame, order: str | None, number: int | None) -> list:
    """The page's number and one page of the rows that the filters left of a setting's frame."""
    columns = tables.columns_of(tables.metric_names(frame))
    by = tables.parse_order(order, columns)
    rows = tables.ordered(rows, columns[by[0]], by[1]) if by else rows
    n_pages = max(1, math.ceil(len(rows) / PAGE_ROWS))
    number = min(max(1, number or 1), n_pages)
    table = gr.Dataframe(
        value=tables.layout(rows[(number - 1) * PAGE_ROWS : number * PAGE_ROWS], columns, by),
        label=f"{len(rows):,} of {len(frame):,} results" + (f", page {number} of {n_pages}" if n_pages > 1 else ""),
        **_columns(columns),
    )
    return [gr.Number(value=number, label=f"Page of {n_pages}"), table]


def _fill_submit(board: Board) -> None:
    """Upload, the reasons or the place of the file, and the button that opens a pull request."""
    gr.HTML(pages.submit_html(board.submit_to))
    if IN_A_SPACE:
        gr.LoginButton()
    file = gr.File(label="results.json", file_types=[".json"], type="binary", elem_id="upload", height=140)
    told = gr.HTML(elem_id="checked")
    button = gr.Button("Open a pull request", variant="primary", interactive=False, elem_id="open-request")
    answer = gr.HTML(elem_id="answer")

    def check(content: bytes | None) -> tuple:
        if content is None:
            return "", gr.Button(interactive=False), ""
        checked = check_upload(content, board.loaded.data_files, board.source.checker)
        can_send = not checked.problems and board.submit_to is not None
        return pages.checked_html(checked, board.submit_to), gr.Button(interactive=can_send), ""

    def send(content: bytes | None, token: str | None) -> str:
        if content is None or board.submit_to is None:
            return ""
        checked = check_upload(content, board.loaded.data_files, board.source.checker)
        if checked.problems:
            return pages.outcome_html(Outcome(message="The file has problems now; upload it again to see them."))
        return pages.outcome_html(submit(checked, board.submit_to, token))

    def send_as_user(content: bytes | None, token: gr.OAuthToken | None) -> str:
        return send(content, token.token if token else None)

    def send_as_owner(content: bytes | None) -> str:
        return send(content, os.environ.get("HF_TOKEN"))

    file.change(check, file, [told, button, answer], **PRIVATE)
    button.click(send_as_user if IN_A_SPACE else send_as_owner, file, answer, concurrency_limit=1, **PRIVATE)


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and serves the page until it is stopped."""
    parser = argparse.ArgumentParser(description="Shows results.json files of recipes.evaluate side by side.")
    place = os.environ.get("RESULTS_REPO")
    told = "a folder, or a dataset repo as owner/name; by default the environment's RESULTS_REPO"
    parser.add_argument("--results", default=place, required=not place, help=told)
    parser.add_argument("--submit-to", metavar="REPO", help="dataset repo for pull requests; by default --results")
    parser.add_argument("--host", help="address to serve on; by default this machine only")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument("--no-revision-check", action="store_true", help="do not look models up on the Hub")
    given = parser.parse_args(arguments)
    if given.submit_to and REPO_ID.fullmatch(given.submit_to) is None:
        parser.error(f"`--submit-to` must be a dataset repo as owner/name, got {given.submit_to!r}. Name the repo.")
    try:
        source = Source(given.results, check_revisions=not given.no_revision_check)
    except ValueError as error:
        parser.error(str(error))
    app = build_app(source, given.submit_to)
    app.queue(default_concurrency_limit=4)
    app.launch(server_name=given.host, server_port=given.port, **LAUNCH)


if __name__ == "__main__":
    main()
