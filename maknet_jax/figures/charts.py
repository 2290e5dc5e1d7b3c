"""Charts of results (matplotlib, drawn without a display)."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from maknet_jax import files


def write_label_chart(
    path: str | pathlib.Path,
    confidences: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
    *,
    title: str = "labels along the series",
    max_labels: int = 40,
) -> None:
    """Writes a PNG of the labels along a series: one row per label, one column per slice.

    Args:
      path: the PNG.
      confidences: `[Z, K]`, from head to feet; the shade of each cell.
      predicted: bool `[Z, K]`; only labels predicted in some slice are shown, with a line under the
        cells of those slices.
      names: the K label names.
      title: the title of the chart.
      max_labels: maximum number of labels; the most frequently predicted ones are shown.
    """
    slices = predicted.sum(axis=0)
    shown = [k for k in np.argsort(-slices, kind="stable") if slices[k]][:max_labels]
    # From head to feet by the mean slice, in the order of the body.
    shown.sort(key=lambda k: (np.flatnonzero(predicted[:, k]).mean(), k))
    figure = _figure((9, 1.6 + 0.22 * max(1, len(shown))))
    axes = figure.subplots()
    cells = confidences[:, shown].T if shown else np.zeros((1, len(confidences)))
    image = axes.imshow(cells, aspect="auto", vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    for row, label in enumerate(shown):
        for start, end in _runs(predicted[:, label]):
            axes.plot([start - 0.5, end + 0.5], [row + 0.36] * 2, color="#b33", linewidth=1.5)
    axes.set_yticks(range(len(shown)), [names[k] for k in shown], fontsize=8)
    axes.set_xlabel("slice, head to feet")
    axes.set_title(files.printable(title), fontsize=9, parse_math=False)
    figure.colorbar(image, ax=axes, label="confidence (red: predicted)", fraction=0.03, pad=0.01)
    _write(figure, path)


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
    figure = _figure((10, 2 + 0.17 * max(12, len(shown))))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.barh(range(len(shown)), [count for count, _ in shown], color="#47a")
    left.set_yticks(range(len(shown)), [name for _, name in shown], fontsize=7)
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
    figure = _figure((4.5 * len(metrics), 3.4))
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


def draw_curves(panels: Sequence[Mapping[str, Sequence[tuple[int, float]]]]) -> np.ndarray:
    """Draws curves against the step in panels side by side.

    Args:
      panels: for each panel its curves, title -> [(step, value), ...].

    Returns:
      The picture, uint8 `[H, W, 3]`.
    """
    figure = _figure((4.5 * len(panels), 3.2))
    for axes, curves in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for title, points in curves.items():
            axes.plot(*zip(*points, strict=True), ".-", label=title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if curves:
            axes.legend(fontsize=8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _figure(inches: tuple[float, float]) -> Figure:
    return Figure(figsize=inches, dpi=130, layout="constrained")


def _write(figure: Figure, path: str | pathlib.Path) -> None:
    with files.write_whole(path, "wb") as file:
        figure.savefig(file, format="png", metadata={"Software": files.PNG_SOFTWARE})


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """The (first, last) index of each stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(start, end - 1) for start, end in edges.reshape(-1, 2)]
