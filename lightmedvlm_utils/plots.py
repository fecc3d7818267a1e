"""Figures that all notebooks share: one style, one color per system, readable at 100 dpi."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightmedvlm_utils.data.images import enlarge
from lightmedvlm_utils.files import atomic_path

if TYPE_CHECKING:
    from lightmedvlm_utils.evaluation.systems import Systems

# Okabe and Ito's palette: told apart with every common form of color blindness.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, GRAY, BLACK = "#56B4E9", "#CC79A7", "#8C8C8C", "#222222"
PALETTE = (BLUE, ORANGE, GREEN, RED, SKY, PINK, GRAY)
CONNECTOR_COLORS = (BLUE, ORANGE, GREEN, PINK, RED)
WIDTH = 8.0  # inches


def system_colors(systems: Systems) -> dict[str, str]:
    """One color for each connector, in their order, and a paler one for the final model; baselines are gray."""
    colors = cycle(CONNECTOR_COLORS)
    return {**{connector: next(colors) for connector in systems.connectors}, systems.final: SKY}


def set_style() -> None:
    """House style of all figures; call it once in a notebook's Setup cell."""
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.labelsize": 10,
            "legend.fontsize": 9,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E5E5E5",
            "legend.frameon": False,
            "image.cmap": "gray",
            "axes.prop_cycle": plt.cycler(color=PALETTE),
        }
    )


def save(figure: Figure, path: Path | str, dpi: int = 100) -> Path:
    """Write a figure as PNG, atomically; returns the path."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    return Path(path)


# -------------------------------------------------------------------------------------------------- images


def show_image(ax: Axes, image: np.ndarray, title: str = "", wrap: int = 40) -> None:
    """Draw a radiograph `(H, W)`, uint8 or 0..1, gray with fixed limits, so that images compare."""
    ax.imshow(image, cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1)
    ax.set_title(fill(title, wrap), fontsize=9)
    ax.set_axis_off()


def image_grid(images: Sequence[np.ndarray], captions: Sequence[str] = (), columns: int = 4, wrap: int = 26) -> Figure:
    """Radiographs in rows of `columns`, each under its caption."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    side = WIDTH / columns
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, rows * side * 1.2), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for index, (ax, image) in enumerate(zip(axes.flat, images, strict=False)):
        show_image(ax, image, captions[index] if captions else "", wrap)
    return figure


def attention_overlay(
    ax: Axes, image: np.ndarray, attention: np.ndarray, mask: np.ndarray | None = None, title: str = ""
) -> None:
    """An attention map `(h, w)` over its image `(H, W)`, and the contour of the boolean `mask` (any size).

    Color begins where a map exceeds its own mean and is full at four times that: a uniform map shows nothing.
    """
    show_image(ax, image, title, wrap=28)
    height, width = image.shape[:2]
    heat = enlarge(attention, (height, width))
    heat = np.clip((heat / max(heat.mean(), 1e-12) - 1) / 3, 0, 1)
    ax.imshow(heat, cmap="autumn", alpha=0.5 * heat, vmin=0, vmax=1)
    if mask is not None and mask.any():
        x = (np.arange(mask.shape[1]) + 0.5) * width / mask.shape[1] - 0.5
        y = (np.arange(mask.shape[0]) + 0.5) * height / mask.shape[0] - 0.5
        ax.contour(x, y, mask.astype(float), levels=[0.5], colors=[SKY], linewidths=1.5)


def attention_grid(panels: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | None, str]]) -> Figure:
    """Two rows of three `attention_overlay`s (image, map, mask or None, title); places without one stay empty."""
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 5.8))
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, panel in zip(axes.flat, panels, strict=False):
        attention_overlay(ax, *panel)
    return figure


def causes(
    films: Sequence[np.ndarray], maps: Sequence[np.ndarray], removed: Mapping[str, Any], hidden: pd.DataFrame
) -> Figure:
    """A film with a finding and without it, each under the finding's map, and what hiding a map's peak does.

    `removed` is a row of `causes.counterfactual_table`, `hidden` a `causes.occlusion_table`, whose falls of the logit
    are averaged by label.
    """
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH + 1, 3.2), width_ratios=(1, 1, 1.2))
    for ax, film, shown, which, when in zip(axes, films, maps, ("with", "without"), ("before", "after"), strict=False):
        attention_overlay(ax, film, shown, title=f"{which} {removed['label']}, probability {removed[when]:.2f}")
    falls = hidden.groupby("label")[["own", "shifted", "random"]].mean()
    places = np.arange(len(falls))[::-1]
    for column, color, marker in zip(falls, (BLUE, ORANGE, GRAY), "oDs", strict=True):
        axes[2].scatter(falls[column], places, color=color, marker=marker, s=24, label=column)
    axes[2].axvline(0, color=BLACK, linewidth=0.8)
    axes[2].set_yticks(places, list(falls.index))
    axes[2].set_xlabel("fall of the logit, square hidden at")
    axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, columnspacing=0.8, handletextpad=0.1)
    return figure


# -------------------------------------------------------------------------------------------------- curves


def calibration_curve(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Reliability of `{name: metrics.calibration_table(...)}`; a dot's area is its share of the questions."""
    figure, ax = plt.subplots(figsize=(4.4, 4))
    ax.plot([0, 1], [0, 1], "--", color=GRAY, label="perfect")
    for color, (name, table) in zip(PALETTE, tables.items(), strict=False):
        ax.plot(table["probability"], table["yes"], color=color, label=name)
        ax.scatter(table["probability"], table["yes"], s=10 + 150 * table["n"] / table["n"].sum(), color=color)
    ax.set(xlabel='probability of "yes"', ylabel='share of "yes"', xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.legend()
    return figure


# ---------------------------------------------------------------------------------------------------- bars


def label_bars(table: pd.DataFrame, xlabel: str = "studies", percent: bool = False) -> Figure:
    """Horizontal bars: a row of `table` per label, a column per group (at most seven)."""
    groups, height = table.columns, 0.8 / len(table.columns)
    figure, ax = plt.subplots(figsize=(WIDTH * 0.8, 0.9 + len(table) * (0.2 + 0.09 * len(groups))))
    places = np.arange(len(table))[::-1]
    for index, (group, color) in enumerate(zip(groups, PALETTE, strict=False)):
        shift = (len(groups) - 1) / 2 - index
        ax.barh(places + shift * height, table[group], height=height, color=color, label=str(group))
    ax.set_yticks(places, [str(label) for label in table.index])
    ax.set_xlabel(xlabel)
    ax.set_xlim(left=0)
    ax.grid(axis="y", visible=False)
    if percent:
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    if len(groups) > 1:
        figure.legend(loc="outside upper right", ncols=len(groups))
    return figure


def metric_bars(
    table: pd.DataFrame, metrics: Mapping[str, str], systems: Systems, chance: float | None = None
) -> Figure:
    """A panel per metric with a bar per system and its 95 % interval.

    `table`: metrics.json as a DataFrame, at most one row per system and metric; those of `systems` in it are drawn.
    `metrics`: `{metric: title}`. `chance` draws a dashed line.
    """
    there, colors = set(table["system"]), system_colors(systems)
    names = {system: name for system, name in systems.names().items() if system in there}
    size = (WIDTH, 0.9 + 0.32 * len(names))
    figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False)
    for ax, (metric, title) in zip(axes[0], metrics.items(), strict=True):
        rows = table[table["metric"] == metric].set_index("system").reindex(list(names))
        rows = rows[["value", "low", "high"]].astype(float)
        places = np.arange(len(names))[::-1]
        ax.barh(places, rows["value"], color=[colors.get(system, GRAY) for system in names], alpha=0.85)
        ax.hlines(places, rows["low"], rows["high"], color=BLACK, linewidth=1.5)
        for place, value, high in zip(places, rows["value"], rows["high"], strict=True):
            if np.isfinite(value):
                ax.text(np.nanmax([value, high]), place, f" {value:.2f}", va="center", fontsize=9)
        if chance is not None:
            ax.axvline(chance, color=RED, linestyle="--", linewidth=1)
        ax.set_yticks(places, list(names.values()))
        ax.set_title(title)
        ax.margins(x=0.2)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(plt.MaxNLocator(4))
        ax.grid(axis="y", visible=False)
    return figure


def ablation(records: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> Figure:
    """A panel per figure of an ablation, a row per arm: a small dot per seed, a large one their mean, filled where it
    differs from the first arm's, whose dot is black (the interval of their difference does not hold 0)."""
    arms = list(dict.fromkeys(record["arm"] for record in records))
    shown = [figure for figure in titles if any(record["figure"] == figure for record in records)]
    columns = 3
    rows = -(-len(shown) // columns)
    size = (WIDTH + 2, rows * (0.9 + 0.26 * len(arms)))
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, shown, strict=False):
        for record in [record for record in records if record["figure"] == name]:
            place = len(arms) - 1 - arms.index(record["arm"])
            differs = record.get("low") is not None and (record["low"] > 0 or record["high"] < 0)
            first = record["arm"] == arms[0]
            ax.plot(record["values"], [place] * len(record["values"]), ".", color=GRAY, markersize=4)
            face = BLUE if first or differs else "white"
            ax.plot(record["mean"], place, "o", color=BLACK if first else BLUE, markerfacecolor=face, markersize=7)
            if first:
                ax.axvline(record["mean"], color=BLACK, linewidth=0.8, linestyle=":")
        ax.set_yticks(range(len(arms)), arms[::-1])
        ax.set_title(titles[name])
        ax.margins(x=0.12, y=0.1)
        ax.xaxis.set_major_locator(plt.MaxNLocator(4))
    return figure


def confusion(ax: Axes, counts: np.ndarray, names: Sequence[str] = ("yes", "no"), title: str = "") -> None:
    """Confusion matrix `(k, k)`, rows the truth: numbers, shaded by their share of the row."""
    counts = np.asarray(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape):
        dark = share[row, column] > 0.6
        text = f"{counts[row, column]}\n{share[row, column]:.0%}"
        ax.text(column, row, text, ha="center", va="center", color="white" if dark else BLACK)
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="answer", ylabel="truth", title=title)
    ax.grid(visible=False)
