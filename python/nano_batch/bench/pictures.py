"""The pictures of a result: each a function of its JSON alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nano_batch.bench import style
from nano_batch.bench.result import COMMITTED, Result
from nano_batch.bench.style import COLOR, ERROR, caption, new_figure, to_svg
from nano_batch.bench.summary import rates, spread
from nano_batch.bench.tables import behind_p99, queued, readable

_ERRORS = "Error bars: least and most of the runs."


def draw(result: Result, data: str, peer: Result | None = None) -> dict[str, str]:
    """Return SVGs by name, for a result whose JSON is called `data`.

    `peer` holds figures that were measured elsewhere, on such a card.
    """
    kinds: dict[str, Callable[..., str]]
    if result["benchmark"] == "latency":
        kinds = {"latency": _latency}
    else:
        kinds = {"throughput": _throughput, "scaling": _scaling, "steps": _steps}
    where = f"{COMMITTED}/{Path(data).name}"
    with style.style():
        return {
            f"{result['preset']}-{name}": picture(result, where, peer)
            for name, picture in kinds.items()
        }


def _rate(result: Result, side: str, key: str, tokens: int) -> tuple[float, float, float]:
    """The median of a rate, and how far the least and most are from it."""
    seconds = result[side][f"{key}_s"]
    if key == "serial":
        seconds = [sum(run) / len(run) for run in seconds]
    return spread(rates(tokens, seconds))


def _throughput(result: Result, data: str, peer: Result | None) -> str:
    static = result["workload"]["static_batch"]
    out = result["workload"]["output_len"]
    counts = result["workload"]["concurrency"]
    shown = sorted({1, static, counts[-1]} & set(counts))
    bars: list[tuple[str, tuple[float, float, float], str, int]] = [
        ("transformers\none at a time", _rate(result, "transformers", "serial", out), "other", 1),
        (
            f"transformers\none batch of {static}",
            _rate(result, "transformers", f"static{static}", static * out),
            "other",
            static,
        ),
    ]
    for side, color in (("llama.cpp", "third"), ("nano_batch", "nano")):
        if side in result:
            bars += [
                (f"{side}\n{n} at once", _rate(result, side, f"scale{n}", n * out), color, n)
                for n in shown
            ]
    figure, (axes,) = new_figure("Throughput", 0.46 * len(bars) + 1.9)
    y = range(len(bars))
    values = [bar[1][0] for bar in bars]
    errors = [[bar[1][side] for bar in bars] for side in (1, 2)]
    colors = [COLOR[bar[2]] for bar in bars]
    axes.barh(y, values, height=0.62, color=colors, xerr=errors, error_kw=ERROR)
    limits = [result["limit"].get(f"scale{bar[3]}_toks") for bar in bars]
    known = [(limit, at) for at, limit in enumerate(limits) if limit]
    for limit, at in known:
        axes.vlines(limit, at - 0.36, at + 0.36, color=COLOR["quiet"], linewidth=2)
    axes.set_yticks(y, [bar[0].replace("\n", ", ") for bar in bars])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    furthest = max([limit for limit, _ in known] + [sum(bar[1][::2]) for bar in bars])
    for at, (_, (value, _, above), *_) in enumerate(bars):
        end, limit = value + above, limits[at]
        if limit and -0.02 < (limit - end) / furthest < 0.1:
            end = max(end, limit)
        axes.text(end + furthest * 0.012, at, f"{value:,.0f}", va="center", weight="bold")
    axes.set_xlim(0, furthest * 1.06)
    axes.set_xlabel("tokens a second")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    note = f"Upright marks: the hardware's limit for that many at once. {_ERRORS}"
    caption(figure, result, data, note)
    return to_svg(figure, "Throughput of nano_batch beside transformers")


def _scaling(result: Result, data: str, peer: Result | None) -> str:
    out, static = result["workload"]["output_len"], result["workload"]["static_batch"]
    counts = result["workload"]["concurrency"]
    figure, (axes,) = new_figure("Throughput by the number of requests at once", 4.3)
    ours = [_rate(result, "nano_batch", f"scale{n}", n * out) for n in counts]
    limit = [result["limit"][f"scale{n}_toks"] for n in counts]
    serial, *_ = _rate(result, "transformers", "serial", out)
    batch, *around = _rate(result, "transformers", f"static{static}", static * out)
    axes.plot(counts, limit, color=COLOR["quiet"], linestyle=(0, (2, 2)), label="hardware's limit")
    if peer:
        points = [(n, peer[f"scale{n}_toks"]) for n in counts if f"scale{n}_toks" in peer]
        axes.plot(
            *zip(*points, strict=True),
            color=COLOR["third"],
            marker="s",
            markersize=4,
            linewidth=1.3,
            label=f"{peer['name']} {peer['version']}, {peer['date']}",
        )
    _errorbar(axes, counts, ours, "nano_batch", "nano", marker="o", linewidth=2.2)
    if "llama.cpp" in result:
        theirs = [_rate(result, "llama.cpp", f"scale{n}", n * out) for n in counts]
        _errorbar(axes, counts, theirs, "llama.cpp", "third", marker="s", linewidth=1.3)
    axes.errorbar(
        [static],
        [batch],
        yerr=[[around[0]], [around[1]]],
        color=COLOR["other"],
        marker="D",
        linestyle="none",
        label=f"transformers, one batch of {static}",
    )
    axes.axhline(serial, color=COLOR["other"], linewidth=1.8, label="transformers, one at a time")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.set_ylim(0, 1.05 * max(*limit, *(sum(rate[::2]) for rate in ours)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("requests at once")
    axes.set_ylabel("tokens a second")
    axes.legend(loc="upper left")
    caption(figure, result, data, _ERRORS)
    return to_svg(figure, "Throughput of nano_batch by the number of requests at once")


def _errorbar(axes: Any, x: list[int], y: list[Any], label: str, color: str, **how: Any) -> None:
    errors = [[value[side] for value in y] for side in (1, 2)]
    values = [value[0] for value in y]
    axes.errorbar(
        x, values, yerr=errors, label=label, color=COLOR[color], markersize=5, elinewidth=1, **how
    )


def _latency(result: Result, data: str, peer: Result | None) -> str:
    figure, panels = new_figure("Latency under load", 4.5, columns=2, legend=True)
    loads = result["workload"]["load"]
    for axes, (key, title) in zip(
        panels,
        (("ttft_ms", "Time to the first token"), ("latency_per_token_ms", "Time per token")),
        strict=True,
    ):
        # Sides are left and right of a load's middle, with their labels to the right of them.
        for side, color, offset in (("transformers", "other", -0.34), ("nano_batch", "nano", 0.1)):
            x = [index + offset for index in range(len(loads))]
            load = [result[side]["load"][str(n)][key] for n in loads]
            _dots(axes, x, load, "p99", f"{side}, p99", COLOR[f"{color}-light"], "D")
            _dots(axes, x, load, "p50", f"{side}, p50", COLOR[color], "o")
            for at, it in zip(x, load, strict=True):
                axes.annotate(
                    readable(it["p50"]),
                    (at, it["p50"]),
                    (7, 0),
                    textcoords="offset points",
                    va="center",
                    size=8,
                )
        axes.set_title(title)
        axes.set_xlim(-0.55, len(loads) - 0.3)
        axes.set_xticks(range(len(loads)), [str(n) for n in loads])
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("requests that arrive at once")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: readable(value))
        axes.minorticks_off()
        least, most = axes.get_ylim()
        axes.set_ylim(least / 1.3, most * 1.3)
    panels[0].set_ylabel("time, on a logarithmic axis")
    below_title = 1 - 0.33 / figure.get_size_inches()[1]
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0, below_title),
        ncols=4,
        fontsize=8.5,
        columnspacing=1,
        handletextpad=0.2,
        borderaxespad=0,
    )
    note = (
        f"Per token: (end - arrival) / tokens. transformers {queued(result)}; {behind_p99(result)} "
        f"{_ERRORS}"
    )
    caption(figure, result, data, note)
    return to_svg(figure, "Latency of nano_batch beside transformers, by load")


def _dots(
    axes: Any, x: list[float], load: list[Any], key: str, label: str, color: str, marker: str
) -> None:
    values = [it[key] for it in load]
    runs = [[run[key] for run in it["runs"]] for it in load]
    errors = [
        [max(0.0, v - min(r)) for v, r in zip(values, runs, strict=True)],
        [max(0.0, max(r) - v) for v, r in zip(values, runs, strict=True)],
    ]
    axes.errorbar(
        x,
        values,
        yerr=errors,
        label=label,
        color=color,
        linestyle="none",
        marker=marker,
        markersize=5,
        elinewidth=1,
    )


def _steps(result: Result, data: str, peer: Result | None) -> str:
    steps = result["steps"]
    figure, (axes,) = new_figure("Where the time of a decode step goes", 4.3)
    x = range(len(steps))
    beyond = [max(0.0, s["bound_ms"] - s["weights_ms"] - s["kv_cache_ms"]) for s in steps]
    rest = [max(0.0, s["measured_ms"] - s["bound_ms"]) for s in steps]
    parts = [
        ("weights read", [s["weights_ms"] for s in steps], "nano"),
        ("keys and values read", [s["kv_cache_ms"] for s in steps], "nano-light"),
        ("arithmetic beyond memory's time", beyond, "other-light"),
        ("the rest", rest, "rest"),
    ]
    bottom = [0.0] * len(steps)
    for label, values, color in parts:
        axes.bar(x, values, 0.62, bottom=bottom, color=COLOR[color], label=label)
        bottom = [below + value for below, value in zip(bottom, values, strict=True)]
    measured = [spread(result["nano_batch"][f"scale{s['num_seqs']}_step_ms"]) for s in steps]
    axes.errorbar(
        x,
        [it[0] for it in measured],
        yerr=[[it[1] for it in measured], [it[2] for it in measured]],
        color=COLOR["ink"],
        linestyle="none",
        marker="_",
        markersize=16,
        label="measured",
    )
    for at, step in enumerate(steps):
        bound = step["bound_ms"]
        label = "roofline" if at == 0 else "_"
        axes.hlines(
            bound,
            at - 0.42,
            at + 0.42,
            color=COLOR["ink"],
            linewidth=1.4,
            linestyle=(0, (3, 1.5)),
            label=label,
        )
        top = max(bound, measured[at][0] + measured[at][2])
        axes.annotate(
            f"{100 * bound / step['measured_ms']:.0f} %",
            (at, top),
            (0, 5),
            textcoords="offset points",
            ha="center",
            size=8.5,
        )
    axes.set_xticks(x, [str(step["num_seqs"]) for step in steps])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 1.12 * max(it[0] + it[2] for it in measured))
    axes.set_xlabel("requests at once")
    axes.set_ylabel("milliseconds")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=3)
    note = f"Above each bar: the roofline's share of the measured time. {_ERRORS}"
    caption(figure, result, data, note)
    return to_svg(figure, "Parts of a decode step of nano_batch beside the roofline")
