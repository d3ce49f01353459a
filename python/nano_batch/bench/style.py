"""How pictures look: SVG that follows light and dark, with text as text, the same on every run."""

import io
import re
import textwrap
from collections.abc import Iterable
from contextlib import AbstractContextManager
from datetime import datetime

import matplotlib as mpl

mpl.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from nano_batch.bench.result import Result, device_name, memory_rates

# Each color that is drawn, its name in the SVG, and what it is where the page is dark.
_ROLES = {
    "#1f2328": ("ink", "#e6edf3"),
    "#59636e": ("quiet", "#9aa4af"),
    "#d1d9e0": ("grid", "#3d444d"),
    "#0969da": ("nano", "#4493f8"),
    "#80b4ed": ("nano-light", "#25508a"),
    "#bf6a1f": ("other", "#e09b4f"),
    "#dfb48e": ("other-light", "#74522c"),
    "#8250df": ("third", "#ab7df8"),
    "#8c959f": ("rest", "#656c76"),
}
COLOR = {name: light for light, (name, _) in _ROLES.items()}
_FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nano_batch",
    "font.size": 10,
    "text.color": COLOR["ink"],
    "axes.labelcolor": COLOR["ink"],
    "axes.edgecolor": COLOR["quiet"],
    "axes.titlecolor": COLOR["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": COLOR["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": COLOR["quiet"],
    "ytick.color": COLOR["quiet"],
    "xtick.labelcolor": COLOR["ink"],
    "ytick.labelcolor": COLOR["ink"],
    "legend.frameon": False,
    "errorbar.capsize": 3,
}
ERROR = {"ecolor": COLOR["ink"], "elinewidth": 1, "capsize": 3}

_WIDTH_INCHES, _CAPTION_INCHES, _TITLE_INCHES, _LEGEND_INCHES = 7.4, 0.78, 0.5, 0.2
_CAPTION_CHARS = 122


def style() -> AbstractContextManager[None]:
    """Return the settings under which a picture is drawn and written."""
    context: AbstractContextManager[None] = mpl.rc_context(_STYLE)
    return context


def new_figure(
    title: str, height: float, columns: int = 1, legend: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with room for a title, perhaps for a legend under it, and for a caption below."""
    below = _CAPTION_INCHES / height
    above = (_TITLE_INCHES + legend * _LEGEND_INCHES) / height
    layout = ConstrainedLayoutEngine(rect=(0, below, 1, 1 - below - above), wspace=0.06)
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout=layout)
    figure.patch.set_alpha(0)
    figure.text(0.012, 1 - 0.28 / height, title, size=12.5, weight="bold", va="baseline")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.patch.set_alpha(0)
    return figure, list(axes)


def caption(figure: Figure, result: Result, data: str, note: str) -> None:
    """Say what was measured, where and when, and where the numbers are."""
    workload, versions = result["workload"], result["versions"]
    day = datetime.fromisoformat(result["time"]).date().isoformat()
    model = result["model"]["name"]
    text = (
        f"{note} {model[0].upper()}{model[1:]}, bfloat16; {workload['prompt_len']} tokens in, "
        f"{workload['output_len']} out, greedy; median of {result['runs']} runs. "
        f"{device_name(result)}, memory {memory_rates(result)} GB/s; torch "
        f"{versions['torch']}, transformers {versions['transformers']}; {day}. Data: {data}"
    )
    height = figure.get_size_inches()[1]
    for index, line in enumerate(textwrap.wrap(text, _CAPTION_CHARS, break_on_hyphens=False)):
        y = (_CAPTION_INCHES - 0.17 * (index + 1)) / height
        figure.text(0.012, y, line, size=8, color=COLOR["quiet"], va="baseline")


def to_svg(figure: Figure, description: str) -> str:
    """The SVG, with its colors named, once for light pages and once for dark ones."""
    file = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    for light, (name, _) in _ROLES.items():
        svg = svg.replace(light, f"var(--{name})")
    # Black is what matplotlib draws where nothing was said.
    svg = re.sub(r"font: (bold )?([\d.]+)px [^;\"]*", rf"font: \1\2px {_FONTS}", svg)
    head, body = svg[svg.index("<svg") :].split(">", 1)
    return f'{head} role="img">\n <title>{description}</title>\n{_css()}{body}'


def _css() -> str:
    def variables(values: Iterable[tuple[str, str]]) -> str:
        return " ".join(f"--{name}: {color};" for name, color in values)

    light = variables((name, color) for color, (name, _) in _ROLES.items())
    dark = variables(_ROLES.values())
    return (
        f" <style>\n  svg {{ {light} }}\n"
        f"  @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}\n </style>"
    )
