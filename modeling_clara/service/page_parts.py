"""Looks of the page, and two of its parts: the slider over memory sizes and the chart.

The slider is HTML, because those of Gradio have even steps.
"""

from collections.abc import Sequence

import gradio as gr
import pandas as pd

from .page_html import escaped
from .page_rate import Rate

THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="slate",
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)

CSS = """
.gradio-container { --clara-faint: color-mix(in srgb, var(--body-text-color) 68%, transparent); }
.gradio-container .prose h1 { font-size: 1.5rem; font-weight: 650; margin: 0 0 .25rem; }
.gradio-container .prose h2 { font-size: 1.1rem; font-weight: 650; margin: .5rem 0 0; }
.clara-picture { width: 100%; max-width: 40rem; height: auto; display: block; margin: .25rem 0; }
.clara-picture .faint { fill: var(--clara-faint); }
.clara-picture .strong { fill: var(--primary-500); }
.clara-picture .line { fill: none; stroke: var(--body-text-color); stroke-width: 1.5; }
.clara-picture text { fill: var(--body-text-color); font-size: 12px; }
@media (max-width: 480px) { .clara-picture text { font-size: 18px; } }
.clara-note, .clara-problem { border-left: 4px solid var(--primary-500); padding: .35rem .8rem; }
.clara-problem { border-color: #d97706; }
.clara-note p, .clara-problem p { margin: .1rem 0; overflow-wrap: anywhere; }
.clara-note progress { width: 100%; max-width: 24rem; accent-color: var(--primary-500); }
.clara-passage h3 { font-size: 1rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.clara-passage .score { display: flex; gap: .6rem; align-items: center; font-variant-numeric: tabular-nums; }
.clara-passage .score span { white-space: nowrap; }
.clara-passage .bar { position: relative; width: 16rem; max-width: 55%; height: .6rem; border-radius: .3rem;
  background: var(--border-color-primary); }
.clara-passage .bar b { display: block; height: 100%; border-radius: .3rem; background: var(--primary-500); }
.clara-passage .bar i { position: absolute; top: -.2rem; height: 1rem; width: 2px;
  background: var(--body-text-color); }
.prose .place { color: var(--clara-faint); font-size: .85rem; margin: .2rem 0;
  overflow-wrap: anywhere; }
.clara-passage .text { white-space: pre-line; overflow-wrap: anywhere; max-width: 75ch; margin: .2rem 0; }
.clara-passage mark { background: color-mix(in srgb, var(--primary-500) 22%, transparent); color: inherit;
  padding: .05rem 0; }
.clara-passage .near { color: var(--clara-faint); }
.clara-words { display: flex; flex-wrap: wrap; gap: .3rem; list-style: none; padding: 0; margin: .25rem 0; }
.clara-words li { border: 1px solid var(--border-color-primary); border-radius: .4rem; padding: .05rem .5rem;
  margin: 0; overflow-wrap: anywhere; }
.prose table.clara-costs.clara-costs { width: 100%; max-width: 40rem; border: 0; border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
.prose .clara-costs.clara-costs tr { border: 0; }
.prose .clara-costs.clara-costs tr > * { border: 0; border-bottom: 1px solid var(--border-color-primary);
  padding: .25rem .4rem; text-align: right; white-space: nowrap; font-weight: 400; color: var(--body-text-color); }
.prose .clara-costs.clara-costs tr > th:first-child { text-align: left; white-space: normal; padding-left: 0; }
.prose .clara-costs.clara-costs thead th { font-weight: 600; }
.passage { border: 1px solid var(--border-color-primary); border-radius: var(--block-radius); padding: .8rem; }
.passage .html-container { padding: 0; }
.passage button { align-self: flex-start; }
.clara-heard { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.clara-size { display: block; }
.clara-size .head { display: flex; justify-content: space-between; font-size: var(--block-title-text-size);
  color: var(--block-title-text-color); }
.clara-size input { width: 100%; accent-color: var(--slider-color); margin: .6rem 0 .2rem; }
.clara-size .marks { display: flex; justify-content: space-between; font-size: .8rem;
  color: var(--clara-faint); }
.gradio-container :is(button, input, textarea, summary, [tabindex="0"]):focus-visible {
  outline: 3px solid var(--primary-500); outline-offset: 2px; }
"""

# Of `gr.HTML`: what changes while one waits is read out by screen readers.
LIVE = {"html_template": "<div role='status' aria-live='polite'>${value}</div>", "value": ""}

SLIDE = """
element.addEventListener("input", event => {
  props.value = props.sizes[event.target.value];
  trigger("input");
});
"""


def size_slider(sizes: Sequence[int], label: str, **options) -> gr.HTML:
    """A slider over memory sizes; its value is a size. It is no subclass, for which Gradio would write a file."""
    marks = "".join(f"<span>{size}</span>" for size in sizes)
    template = (
        f"<label class='clara-size'><span class='head'><span>{escaped(label)}</span>"
        "<output>${value} vectors</output></span>"
        f"<input type='range' min='0' max='{len(sizes) - 1}' step='1' value='${{sizes.indexOf(Number(value))}}' "
        f"aria-label='{escaped(label)}' aria-valuetext='${{value}} vectors'>"
        f"<span class='marks' aria-hidden='true'>{marks}</span></label>"
    )
    props = {"html_template": template, "js_on_load": SLIDE, "sizes": list(sizes), "container": True}
    return gr.HTML(value=sizes[-1], **props, **options)


def rate_plot(rates: Sequence[Rate]) -> gr.LinePlot:
    """F1 against the memory size; of data that were also read as text a level line."""
    sizes = sorted({rate.memory_size for rate in rates if not rate.is_text})
    rows = []
    for rate in rates:
        for size in sizes if rate.is_text else [rate.memory_size]:
            rows.append({"vectors": str(size), "F1": rate.value, "data": rate.data + " as text" * rate.is_text})
    return gr.LinePlot(
        pd.DataFrame(rows),
        x="vectors",
        y="F1",
        color="data",
        x_title="memory vectors",
        y_title="F1 of answers",
        y_lim=[0, 1],
        sort=[str(size) for size in sizes],
        height=320,
        buttons=[],
        elem_id="rate",
    )
