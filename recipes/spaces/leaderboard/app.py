"""The leaderboard: a page with a tab for each setting, one to submit, one for refused files and one of explanations.
It stands on top of the files beside it, as a Space of the Hub or, with `python app.py --results PLACE`, anywhere.
It does not know how results are checked or made; everything that strangers wrote is escaped before it gets here.
"""

import argparse
import math
import os
import threading
from collections.abc import Callable

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr  # noqa: E402
import pandas as pd  # noqa: E402
from leaderboard_pages import (  # noqa: E402
    ABOUT,
    CSS,
    HEAD,
    THEME,
    checked_html,
    intro_html,
    outcome_html,
    refused_table,
    submit_html,
)
from leaderboard_plots import COSTS, cost_figure  # noqa: E402
from leaderboard_source import Loaded, Source  # noqa: E402
from leaderboard_submit import Outcome, check_upload, submit  # noqa: E402
from leaderboard_table import (  # noqa: E402
    ALL,
    SETTINGS,
    Column,
    choices,
    columns_of,
    datatypes,
    filtered,
    layout,
    make_frame,
    metric_names,
    ordered,
    parse_order,
    ranked,
    widths,
)
from validation import MAX_BYTES, REPO_ID  # noqa: E402

PAGE_ROWS = 100
FILTERS = {"data": "Data", "kind": "Kind", "codec": "Codec", "memory_size": "k read"}
IN_A_SPACE = "SPACE_ID" in os.environ  # only there does the Hub sign users in
PRIVATE = {"api_visibility": "private"}


class Board:
    """What the page shows now: the newest read of the source and its frames, one of each setting."""

    def __init__(self, source: Source, submit_to: str | None) -> None:
        self.source, self.submit_to = source, submit_to
        self.lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Reads the source anew; whoever asks meanwhile sees what was there before."""
        with self.lock:
            loaded = self.source.load()
            frame = make_frame(loaded.entries)
            self.state: tuple[Loaded, dict[str, pd.DataFrame]] = (
                loaded,
                {setting: frame[frame["setting"] == setting] for setting in SETTINGS},
            )

    @property
    def loaded(self) -> Loaded:
        return self.state[0]

    def frame(self, setting: str) -> pd.DataFrame:
        return self.state[1][setting]


def build_app(source: Source, submit_to: str | None = None) -> gr.Blocks:
    """The page on the results of `source`; launch it with `launch_options()`.

    Args:
        source: where results are read; it is read once here and at each refresh.
        submit_to: the dataset repo that gets pull requests; by default the one that results are read from.
    """
    board = Board(source, submit_to or (source.place if source.is_repo else None))
    with gr.Blocks(title="CLaRa leaderboard", analytics_enabled=False, fill_width=True) as app:
        with gr.Row(equal_height=True):
            intro = gr.HTML(intro_html(board.loaded), elem_id="intro", scale=8)
            refresh = gr.Button("Refresh", scale=0, min_width=110, elem_id="refresh")
        with gr.Tabs():
            tabs = [_setting_tab(board, setting) for setting in SETTINGS]
            with gr.Tab("Submit", id="submit"):
                _submit_tab(board)
            with gr.Tab(_invalid_label(board), id="invalid") as invalid_tab:
                gr.Markdown("Files of the results repository that are not shown, and why.")
                refused = gr.Dataframe(
                    refused_table(board.loaded),
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
                gr.Markdown(ABOUT, elem_id="about-text")

        def read_again() -> list:
            board.refresh()
            return show_all()

        def show_all() -> list:
            labels = [gr.Tab(label=_setting_label(board, setting)) for setting in SETTINGS]
            head = [intro_html(board.loaded), refused_table(board.loaded), gr.Tab(label=_invalid_label(board))]
            return [*head, *labels]

        shown = [intro, refused, invalid_tab, *(tab for tab, _, _ in tabs)]
        reading = refresh.click(read_again, None, shown, **PRIVATE)
        app.load(show_all, None, shown, show_progress="hidden", **PRIVATE)
        for index, (tab, fill, outputs) in enumerate(tabs):
            reading = reading.then(fill, outputs[1], outputs[0], show_progress="hidden", **PRIVATE)
            tab.select(fill, outputs[1], outputs[0], show_progress="minimal", **PRIVATE)
            if index == 0:
                app.load(fill, outputs[1], outputs[0], show_progress="minimal", **PRIVATE)
    return app


def _setting_label(board: Board, setting: str) -> str:
    return f"{setting} ({len(board.frame(setting)):,})"


def _invalid_label(board: Board) -> str:
    return f"Invalid ({len(board.loaded.refused):,})"


def _setting_tab(board: Board, setting: str) -> tuple[gr.Tab, Callable, tuple[list, list]]:
    """One tab: filters, table and plots. Returns it with the function that fills it anew, its outputs and inputs."""
    with gr.Tab(_setting_label(board, setting), id=setting) as tab:
        with gr.Row():
            hint = "system, model, backbone ..."
            text = gr.Textbox(label="Search", placeholder=hint, scale=3, elem_id=f"search-{setting}")
            boxes = {key: _choice(label, [ALL], f"{key}-{setting}") for key, label in FILTERS.items()}
            metric = _choice("Metric", [], f"metric-{setting}")
            page = gr.Number(1, label="Page", precision=0, min_width=100, elem_id=f"page-{setting}")
        order = gr.Textbox(visible="hidden", elem_id=f"order-{setting}")
        table = _table(setting)
        with gr.Row():
            by_size = gr.Plot(label="Quality and size of memories", elem_id=f"size-{setting}")
            by_time = gr.Plot(label="Quality and time", elem_id=f"time-{setting}")

    def show_page(number: int | None, order: str | None, text: str | None, metric: str | None, *values: str) -> list:
        frame = board.frame(setting)
        columns = columns_of(metric_names(frame))
        rows = _rows(frame, text, metric, values)
        return _shown(rows, len(frame), columns, parse_order(order, columns), number)

    def show(order: str | None, text: str | None, metric: str | None, *values: str) -> list:
        rows = _rows(board.frame(setting), text, metric, values)
        plots = [cost_figure(rows, metric, cost) for cost in COSTS]
        return [*show_page(1, order, text, metric, *values), *plots]

    def fill(order: str | None, text: str | None, metric: str | None, *values: str) -> list:
        """As `show`, after giving filters and metrics the choices that there are now."""
        frame = board.frame(setting)
        names = metric_names(frame)
        metric = metric if metric in names else next(iter(names), None)
        found = {key: choices(frame, key) for key in boxes}
        values = [value if value in found[key] else ALL for key, value in zip(found, values, strict=True)]
        updates = [gr.Dropdown(found[key], value=value) for key, value in zip(found, values, strict=True)]
        return [*updates, gr.Dropdown(names, value=metric), *show(order, text, metric, *values)]

    wanted, shown = [text, metric, *boxes.values()], [page, table, by_size, by_time]
    options = {"show_progress": "minimal", "trigger_mode": "always_last", **PRIVATE}
    gr.on([text.change, *(box.input for box in boxes.values())], show, [order, *wanted], shown, **options)
    metric.input(lambda *given: ["", *show("", *given)], wanted, [order, *shown], **options)
    order.change(lambda *given: show_page(1, *given), [order, *wanted], [page, table], **options)
    page.change(show_page, [page, order, *wanted], [page, table], **options)
    return tab, fill, ([*boxes.values(), metric, *shown], [order, *wanted])


def _choice(label: str, values: list[str], name: str) -> gr.Dropdown:
    value = values[0] if values else None
    return gr.Dropdown(values, value=value, label=label, filterable=False, min_width=110, elem_id=name)


def _table(setting: str) -> gr.Dataframe:
    columns = columns_of([])
    return gr.Dataframe(
        interactive=False,
        label="Results",
        show_label=True,
        headers=[column.header for column in columns],
        datatype=datatypes(columns),
        column_widths=widths(columns),
        max_height=520,
        buttons=["fullscreen"],
        elem_id=f"table-{setting}",
        elem_classes="board",
    )


def _rows(frame: pd.DataFrame, text: str | None, metric: str | None, values: tuple[str, ...]) -> pd.DataFrame:
    """What the filters leave of a setting, by the metric."""
    return ranked(filtered(frame, text, **dict(zip(FILTERS, values, strict=True))), metric)


def _shown(
    rows: pd.DataFrame, n_all: int, columns: list[Column], order: tuple[int, bool] | None, number: int | None
) -> list:
    """The page's number and one page of the rows; a browser takes seconds for a table of thousands."""
    n_pages = max(1, math.ceil(len(rows) / PAGE_ROWS))
    number = min(max(1, number or 1), n_pages)
    rows = ordered(rows, columns[order[0]], order[1]) if order else rows
    part = rows[(number - 1) * PAGE_ROWS : number * PAGE_ROWS]
    table = gr.Dataframe(
        value=layout(part, columns, order),
        label=f"{len(rows):,} of {n_all:,} results" + (f", page {number} of {n_pages}" if n_pages > 1 else ""),
        datatype=datatypes(columns),
        column_widths=widths(columns),
    )
    return [gr.Number(value=number, label=f"Page of {n_pages}"), table]


def _submit_tab(board: Board) -> None:
    """Upload, the reasons or the place of the file, and the button that opens a pull request."""
    gr.HTML(submit_html(board.submit_to))
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
        return checked_html(checked, board.submit_to), gr.Button(interactive=can_send), ""

    def send(content: bytes | None, token: str | None) -> str:
        if content is None or board.submit_to is None:
            return ""
        checked = check_upload(content, board.loaded.data_files, board.source.checker)
        if checked.problems:
            return outcome_html(Outcome(message="The file has problems now; upload it again to see them."))
        return outcome_html(submit(checked, board.submit_to, token))

    def send_as_user(content: bytes | None, token: gr.OAuthToken | None) -> str:
        return send(content, token.token if token else None)

    def send_as_owner(content: bytes | None) -> str:
        return send(content, os.environ.get("HF_TOKEN"))

    file.change(check, file, [told, button, answer], **PRIVATE)
    button.click(send_as_user if IN_A_SPACE else send_as_owner, file, answer, concurrency_limit=1, **PRIVATE)


def launch_options() -> dict:
    """What `Blocks.launch` needs for this page: nothing of it comes from another machine."""
    return {
        "theme": THEME,
        "css": CSS,
        "head": HEAD,
        "footer_links": [],
        "max_file_size": MAX_BYTES,
        "ssr_mode": False,
        "show_error": True,
        "run_history": False,
    }


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and serves the page until it is stopped."""
    parser = argparse.ArgumentParser(description="Shows results.json files of recipes.evaluate side by side.")
    place = os.environ.get("RESULTS_REPO")
    parser.add_argument(
        "--results",
        default=place,
        required=not place,
        help="a folder, or a dataset repo as owner/name; by default the environment's RESULTS_REPO",
    )
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
    app.launch(server_name=given.host, server_port=given.port, **launch_options())


if __name__ == "__main__":
    main()
