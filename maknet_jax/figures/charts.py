"""Charts of results (matplotlib, drawn without a display)."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from maknet_jax import files


def write_label_chart(path, confidences, chosen, names, *, title="", most=40):
    """Writes a PNG of the labels along a series: a row a label, a column a slice, head to feet.

    Args:
      path: the PNG.
      confidences: `[Z, K]`; the shade of each cell.
      chosen: bool `[Z, K]`; labels that were given anywhere are shown, and given cells are marked
        by a line under them.
      names: the K label names.
      title: above the chart.
      most: labels shown at most, those given most often.
    """
    given = chosen.sum(axis=0)
    shown = [k for k in np.argsort(-given, kind="stable") if given[k]][:most]
    # In the order in which they begin, so that the chart reads as the body does.
    shown.sort(key=lambda k: (np.flatnonzero(chosen[:, k]).mean(), k))
    figure = _figure((9, 1.6 + 0.22 * max(1, len(shown))))
    axes = figure.subplots()
    cells = confidences[:, shown].T if shown else np.zeros((1, len(confidences)))
    image = axes.imshow(cells, aspect="auto", vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    for row, label in enumerate(shown):
        for start, end in _runs(chosen[:, label]):
            axes.plot([start - 0.5, end + 0.5], [row + 0.36] * 2, color="#b33", linewidth=1.5)
    axes.set_yticks(range(len(shown)), [names[k] for k in shown], fontsize=8)
    axes.set_xlabel("slice, head to feet")
    axes.set_title(title or "labels along the series", fontsize=9)
    figure.colorbar(image, ax=axes, label="confidence (red: given)", fraction=0.03, pad=0.01)
    _write(figure, path)


def write_histograms(path, counts, confidences, *, most=50):
    """Writes a PNG of pseudo-labels: images a label, and labels by their confidence.

    Args:
      path: the PNG.
      counts: (images, label name) from the most frequent down.
      confidences: labels in each of equal bins over [0, 1].
      most: labels shown at most.
    """
    shown = [row for row in counts if row[0]][:most]
    figure = _figure((10, 2 + 0.17 * max(12, len(shown))))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.barh(range(len(shown)), [count for count, _ in shown], color="#47a")
    left.set_yticks(range(len(shown)), [name for _, name in shown], fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("images with the label")
    without = len(counts) - sum(1 for count, _ in counts if count)
    left.set_title(f"{len(shown)} labels shown, {without} were given to no image", fontsize=9)
    edges = np.linspace(0, 1, len(confidences) + 1)
    right.bar(edges[:-1], confidences, width=np.diff(edges), align="edge", color="#47a")
    right.set_xlabel("confidence of a given label")
    right.set_ylabel("labels")
    _write(figure, path)


def write_rounds(path, reached, paper, *, metrics):
    """Writes a PNG of metrics over the rounds of a noisy student.

    Args:
      path: the PNG.
      reached: split -> a dict of metrics a round.
      paper: split -> the same from the paper, drawn pale and dashed.
      metrics: a panel each.
    """
    figure = _figure((4.5 * len(metrics), 3.4))
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        for number, (split, rounds) in enumerate(reached.items()):
            colour = f"C{number}"
            values = [np.nan if row[metric] is None else row[metric] for row in rounds]
            axes.plot(values, "o-", color=colour, label=split)
            if split in paper:
                theirs = [row[metric] for row in paper[split]]
                axes.plot(theirs, "s--", color=colour, alpha=0.35, label=f"{split}, paper")
        axes.set_xticks(range(len(next(iter(reached.values())))))
        axes.set_xlabel("round (0: teacher)")
        axes.set_title({"auc": "AUC", "f1": "F1"}.get(metric, metric), fontsize=10)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _write(figure, path)


def draw_curves(panels):
    """Draws a panel each, side by side.

    Args:
      panels: for each its curves, title -> [(step, value), ...].

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


def _figure(inches):
    return Figure(figsize=inches, dpi=130, layout="constrained")


def _write(figure, path):
    with files.write_whole(path, "wb") as file:
        figure.savefig(file, format="png")


def _runs(flags):
    """The (first, last) of each stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(start, end - 1) for start, end in edges.reshape(-1, 2)]
