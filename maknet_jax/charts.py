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
    figure = Figure(figsize=(9, 1.6 + 0.22 * max(1, len(shown))), layout="constrained")
    FigureCanvasAgg(figure)
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
    with files.write_whole(path, "wb") as file:
        figure.savefig(file, format="png", dpi=130)


def _runs(flags):
    """The (first, last) of each stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(start, end - 1) for start, end in edges.reshape(-1, 2)]
