"""Charts of results (matplotlib, drawn without a display)."""

import math
import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from maknet_jax import files

_BLUE, _RED, _AMBER = "#1f5f9e", "#b51218", "#8a4b00"
# Inches: the slices of a label chart, a label, a line of text.
_CHART_HEIGHT, _SMALLEST_VIEW, _PITCH, _LINE = 4.2, 1.6, 0.18, 0.17


def write_label_chart(
    path: str | pathlib.Path,
    confidences: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
    *,
    title: str = "labels along the series",
    notes: Sequence[str] = (),
    coronal: np.ndarray | None = None,
    spacing: tuple[float, float] = (math.nan, math.nan),
    max_labels: int = 40,
    outside: np.ndarray | None = None,
) -> None:
    """Writes a PNG of the labels along a series, from head to feet, beside a coronal view.

    Args:
      path: the PNG.
      confidences: `[Z, K]`, from head to feet; the shade of each cell.
      predicted: bool `[Z, K]`; only labels predicted in some slice are shown, with a line beside
        the cells of those slices.
      names: the K label names.
      title: the title of the chart.
      notes: lines below the title. Long lines are wrapped.
      coronal: uint8 `[Z, W]`, see `picture.coronal`; None draws none.
      spacing: mm between slices and between the columns of `coronal`; nan if unknown.
      max_labels: maximum number of labels; the most frequently predicted ones are shown.
      outside: bool `[Z]`, the slices outside the domain of the network, which are hatched.
    """
    count, slices = len(confidences), predicted.sum(axis=0)
    shown = [k for k in np.argsort(-slices, kind="stable") if slices[k]][:max_labels]
    # From head to feet by the mean slice, in the order of the body.
    shown.sort(key=lambda k: (np.flatnonzero(predicted[:, k]).mean(), k))
    across, height = 0.0, _CHART_HEIGHT
    if coronal is not None:
        across, height = _view_size(coronal.shape, spacing)
    cells_width = max(2.4, _PITCH * len(shown))
    widths = [across, cells_width] if across else [cells_width]
    lines = _wrap((title, *notes), int(11 * (1.3 + sum(widths))))
    figure = _figure((1.3 + sum(widths), height + 1.7 + _LINE * len(lines)))
    grid = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    axes = grid[-1]
    extent = (-0.5, max(1, len(shown)) - 0.5, count - 0.5, -0.5)
    cells = confidences[:, shown] if shown else np.zeros((count, 1))
    image = axes.imshow(
        cells, aspect="auto", vmin=0, vmax=1, cmap="Blues", interpolation="nearest", extent=extent
    )
    for column, label in enumerate(shown):
        axes.axvspan(column + 0.2, column + 0.5, color="white")
        for start, end in _runs(predicted[:, label]):
            axes.plot([column + 0.34] * 2, [start - 0.5, end + 0.5], color=_RED, linewidth=2)
    hatched = [] if outside is None else list(_runs(outside))
    for start, end in hatched:
        place = {"ymin": start - 0.5, "ymax": end + 0.5, "linewidth": 0, "alpha": 0.6}
        axes.axhspan(**place, facecolor="none", edgecolor=_AMBER, hatch="//")
    axes.set_xticks(range(len(shown)), [names[k] for k in shown], rotation=90, fontsize=10)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False, length=2)
    if coronal is not None:
        view = grid[0]
        view.imshow(coronal, aspect="auto", cmap="gray", extent=(0, 1, count - 0.5, -0.5))
        # PNGs store neither spacing nor directions.
        sides = ["R", "L"] if math.isfinite(spacing[1]) else ["", ""]
        view.set_xticks([0.04, 0.96], sides, fontsize=10)
        view.tick_params(axis="x", length=0)
    grid[0].set_ylabel("slice, head to feet", fontsize=10)
    grid[0].tick_params(axis="y", labelsize=10)
    ticks = max(2, min(7, int(2.5 * height)))
    grid[0].yaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    if math.isfinite(spacing[0]):
        mm = axes.secondary_yaxis(
            "right", functions=(lambda z: z * spacing[0], lambda mm: mm / spacing[0])
        )
        mm.set_ylabel("mm below the first slice", fontsize=10)
        mm.tick_params(labelsize=10)
        mm.yaxis.set_major_locator(MaxNLocator(ticks))
    bar = figure.colorbar(image, ax=list(grid), orientation="horizontal", fraction=0.04, pad=0.03)
    meaning = "confidence; red line: predicted" + "\nhatched: outside the domain" * bool(hatched)
    bar.set_label(meaning, fontsize=10)
    bar.ax.tick_params(labelsize=10)
    figure.suptitle("\n".join(lines), fontsize=10, x=0.02, ha="left", parse_math=False)
    if coronal is not None and math.isfinite(spacing[0] + spacing[1]):
        _set_scale(figure, grid[0], (count * spacing[0], coronal.shape[1] * spacing[1]))
    _write(figure, path)


def _set_scale(figure: Figure, view: Axes, mm: tuple[float, float]) -> None:
    """Sets the height of a figure so that a view is to scale, or says how it is stretched.

    The layout gives the view what colour bar, names and title leave. A series so short that its
    slices would have no space keeps `_SMALLEST_VIEW`.

    Args:
      figure: the figure.
      view: its axes.
      mm: the lengths that the view shows, (along z, across).
    """
    stretch = 1.0
    for _ in range(3):
        figure.draw_without_rendering()
        box = view.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        height = max(_SMALLEST_VIEW, box.width * mm[0] / mm[1])
        width, whole = figure.get_size_inches()
        figure.set_size_inches(width, whole + height - box.height)
        stretch = height / box.width * mm[1] / mm[0]
        view.set_xlabel(f"stretched {stretch:.1f} x along z" if stretch > 1.05 else "", fontsize=10)


def _view_size(shape: tuple[int, int], spacing: tuple[float, float]) -> tuple[float, float]:
    """(inches across, inches along z) of a coronal view, approximately to scale."""
    length, width = (count * mm for count, mm in zip(shape, spacing, strict=True))
    share = width / length if math.isfinite(width / length) else 0.8
    height = float(np.clip(3.2 / share, _SMALLEST_VIEW, _CHART_HEIGHT))
    return float(np.clip(height * share, 1.0, 3.2)), height


def _wrap(texts: Iterable[str], letters: int) -> list[str]:
    """The words of texts in lines of at most `letters`; the middle of a longer word is left out."""
    return [
        _shorten(line, letters)
        for text in texts
        for line in textwrap.wrap(
            files.printable(text), letters, break_long_words=False, break_on_hyphens=False
        )
    ]


def _shorten(text: str, letters: int) -> str:
    """Leaves out the middle of a text; ids differ at their ends."""
    if len(text) <= letters:
        return text
    return f"{text[: letters // 3]}…{text[-(letters - letters // 3 - 1) :]}"


def write_histograms(
    path: str | pathlib.Path,
    counts: Sequence[tuple[int, str]],
    confidences: Sequence[int],
    *,
    max_labels: int = 50,
) -> None:
    """Writes a PNG of pseudo-labels: images per label, and the histogram of confidences.

    Args:
      path: the PNG.
      counts: (images, label name), the most frequent label first.
      confidences: number of pseudo-labels in each of equal bins over [0, 1].
      max_labels: maximum number of labels.
    """
    shown = [row for row in counts if row[0]][:max_labels]
    figure = _figure((8, 2 + 0.2 * max(12, len(shown))))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.barh(range(len(shown)), [count for count, _ in shown], color="#47a")
    left.set_yticks(range(len(shown)), [name for _, name in shown], fontsize=9)
    left.invert_yaxis()
    left.set_xlabel("images with the label")
    unused = len(counts) - sum(1 for count, _ in counts if count)
    left.set_title(f"{len(shown)} labels shown, {unused} labels have no image", fontsize=9)
    edges = np.linspace(0, 1, len(confidences) + 1)
    right.bar(edges[:-1], confidences, width=np.diff(edges), align="edge", color="#47a")
    right.set_xlabel("confidence of a pseudo-label")
    right.set_ylabel("pseudo-labels")
    _write(figure, path)


def write_rounds(
    path: str | pathlib.Path,
    measured: Mapping[str, Sequence[Mapping[str, float | None]]],
    paper: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    metrics: Sequence[str],
) -> None:
    """Writes a PNG of metrics over the rounds of a noisy student.

    Args:
      path: the PNG.
      measured: split -> one dict of metrics per round; None where a metric is undefined.
      paper: split -> the paper's metrics, drawn pale and dashed.
      metrics: the names to draw, one panel each.
    """
    figure = _figure((3.8 * len(metrics), 3.2))
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        for number, (split, rounds) in enumerate(measured.items()):
            colour = f"C{number}"
            values = [np.nan if row[metric] is None else row[metric] for row in rounds]
            axes.plot(values, "o-", color=colour, label=split)
            if split in paper:
                published = [row[metric] for row in paper[split]]
                axes.plot(published, "s--", color=colour, alpha=0.35, label=f"{split}, paper")
        axes.set_xticks(range(len(next(iter(measured.values())))))
        axes.set_xlabel("round (0: teacher)")
        axes.set_title({"auc": "AUC", "f1": "F1"}.get(metric, metric), fontsize=10)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _write(figure, path)


def draw_curve(
    title: str, points: Sequence[tuple[int, float]], *, marked: int | None = None
) -> np.ndarray:
    """Draws a curve against the step, readable on a phone.

    Args:
      title: the title of the chart.
      points: at least two of (step, value).
      marked: a step to mark: that of the checkpoint.

    Returns:
      The picture, uint8 `[H, W, 3]`.
    """
    figure = _figure((4.0, 2.8))
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), ".-", color=_BLUE)
    if marked is not None and points[0][0] <= marked <= points[-1][0]:
        axes.axvline(marked, color=_RED, linewidth=1, linestyle="--")
        axes.text(
            marked,
            1.01,
            "checkpoint",
            color=_RED,
            ha="center",
            fontsize=9,
            transform=axes.get_xaxis_transform(),
        )
    axes.set_title(title, fontsize=11, loc="left", pad=16)
    axes.set_xlabel("step", fontsize=10)
    axes.tick_params(labelsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _figure(inches: tuple[float, float]) -> Figure:
    return Figure(figsize=inches, dpi=160, layout="constrained")


def _write(figure: Figure, path: str | pathlib.Path) -> None:
    with files.write_whole(path, "wb") as file:
        figure.savefig(file, format="png", metadata={"Software": files.PNG_SOFTWARE})


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """The (first, last) index of each stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(start, end - 1) for start, end in edges.reshape(-1, 2)]
