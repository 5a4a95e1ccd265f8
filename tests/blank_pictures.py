"""Runs that draw nothing: drawing takes half the time of a small run."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from classifier import plots
from classifier.run_log import RunLog


def draw_nothing(replace):
    """Keep figures blank, and TensorBoard without the network's graph, in this process.

    replace: setattr, or what undoes it later.
    """
    replace(FigureCanvasAgg, "draw", lambda canvas: canvas.get_renderer())
    for name in ("draw_curves", "draw_confusion_matrix", "draw_samples"):
        replace(plots, name, lambda *_, **__: Figure((1, 1), dpi=20))
    replace(RunLog, "_add_graph", lambda log, writer: None)
