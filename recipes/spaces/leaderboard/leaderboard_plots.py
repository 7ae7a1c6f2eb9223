"""Draws answer quality against what it costs: bytes of a stored span, milliseconds of a question.

It draws the rows that the table shows, thousands of them if need be; all text is escaped, because plotly reads HTML.
"""

import pandas as pd
import plotly.graph_objects as go
from leaderboard_text import escaped

MARKS = {  # colours told apart without red and green, on white and on black
    "clara": ("#2b8cd6", "circle"),
    "text": ("#e06c1f", "square"),
    "closed_book": ("#009e73", "diamond"),
    "control": ("#cc79a7", "x"),
    "external": ("#e69f00", "triangle-up"),
}
COSTS = {"bytes_per_span": "bytes per span", "p50": "latency p50 (ms)"}
HOVERED = {  # numbers that are told of a point if there are any
    "memory_size": "{:.0f} memory vectors",
    "bytes_per_span": "{:,.9g} bytes per span",
    "p50": "{:,.4g} ms p50",
}
MAX_ERROR_BARS = 300  # points; with more the bars hide each other
AXIS = {"gridcolor": "rgba(128, 128, 128, 0.25)", "zeroline": False, "automargin": True}


def cost_figure(frame: pd.DataFrame, metric: str | None, cost: str) -> go.Figure:
    """The metric of each row against `cost`, a key of `COSTS`, on a logarithmic axis; coloured by kind.

    Rows without the metric or with no cost above 0 are left out and counted below the axis.
    """
    known = frame[(frame[metric].notna()) & (frame[cost] > 0)] if metric in frame else frame[:0]
    has_bars = len(known) <= MAX_ERROR_BARS
    kinds = dict(list(known.groupby("kind")))
    figure = go.Figure([_points(kinds[kind], metric, cost, has_bars) for kind in MARKS if kind in kinds])
    figure.update_layout(
        template="plotly_white",
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        height=420,
        margin={"l": 60, "r": 20, "t": 56, "b": 72},
        font={"family": "ui-sans-serif, system-ui, sans-serif", "size": 13, "color": "#777777"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
        showlegend=True,
    )
    notes = [f"{len(frame) - len(known):,} without {COSTS[cost]} not drawn"] if len(known) < len(frame) else []
    notes += [] if has_bars else [f"no error bars above {MAX_ERROR_BARS} points"]
    title = f"{COSTS[cost]}, log scale<br><span style='font-size: 11px'>{'; '.join(notes)}</span>"
    figure.update_xaxes(type="log", title_text=title, tickformat=",.9~g", **AXIS)
    top = known[f"{metric} high"].max() if len(known) else 1.0
    figure.update_yaxes(title_text=escaped(metric or "quality"), range=[-0.03 * top, 1.04 * top + 1e-3], **AXIS)
    if known.empty:
        text = f"No result here has this metric and {COSTS[cost]}"
        figure.add_annotation(text=text, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    return figure


def _points(rows: pd.DataFrame, metric: str, cost: str, has_bars: bool) -> go.Scatter | go.Scattergl:
    """Points of one kind with error bars as SVG or, if they are too many for it and for bars, in WebGL."""
    value, kind = rows[metric], rows["kind"].iloc[0]
    color, symbol = MARKS[kind]
    bars = {"type": "data", "symmetric": False, "thickness": 1, "width": 3}
    bars |= {"array": rows[f"{metric} high"] - value, "arrayminus": value - rows[f"{metric} low"]}
    draw = go.Scatter if has_bars else go.Scattergl
    return draw(
        x=rows[cost],
        y=value,
        mode="markers",
        name=kind,
        marker={"color": color, "symbol": symbol, "size": 9 if has_bars else 6, "opacity": 0.85},
        error_y=bars if has_bars else None,
        text=_hovers(rows, metric),
        hoverinfo="text",
    )


def _hovers(rows: pd.DataFrame, metric: str) -> list[str]:
    """What is told of each point."""
    texts = []
    for row in rows.to_dict("records"):
        system, model, data, codec = (escaped(row[name]) for name in ("system", "model", "data", "codec"))
        value, low, high = (row[f"{metric}{end}"] for end in ("", " low", " high"))
        lines = [f"<b>{system}</b>", model, f"{data}, codec {codec}"]
        lines += [f"{escaped(metric)} {value:.3f} [{low:.3f}, {high:.3f}]"]
        lines += [form.format(row[name]) for name, form in HOVERED.items() if row[name] == row[name]]
        texts.append("<br>".join(lines))
    return texts
