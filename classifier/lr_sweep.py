"""Find a learning rate: raise it step by step and see where the loss falls fastest.

Smith, 2015, https://arxiv.org/abs/1506.01186.
"""

import math
from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from classifier import plots
from classifier.errors import UserError

if TYPE_CHECKING:  # matplotlib is slow to import
    from matplotlib.figure import Figure


class Sweep(NamedTuple):
    """Losses over rising learning rates, up to where training diverges.

    Attributes:
        rates: learning rate of each step, from low to high.
        losses: training loss of each step.
        smoothed: the same losses, averaged over neighbouring steps.
        lowest: index of the lowest smoothed loss, at least 1.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    lowest: int

    def best_rate(self) -> float:
        """The learning rate at which the loss falls fastest, to two digits."""
        drops = [self.smoothed[i] - self.smoothed[i + 1] for i in range(self.lowest)]
        steepest = drops.index(max(drops))
        rate = math.sqrt(self.rates[steepest] * self.rates[steepest + 1])
        return float(f"{rate:.2g}")


def sweep_rates(train_step: Callable[[float], float], low: float, high: float, steps: int) -> Sweep:
    """Train for some steps while the learning rate rises from `low` to `high`.

    Ends early once the mean loss of five steps is above four times its lowest value, or not a
    number.

    train_step: trains one step with the learning rate it is given; returns the loss.

    Raises UserError if the loss never falls.
    """
    rates: list[float] = []
    losses: list[float] = []
    lowest_mean = math.inf
    for step in tqdm(range(steps), "Learning rates", unit="step", leave=False, disable=None):
        rate = low * (high / low) ** (step / (steps - 1))
        loss = train_step(rate)
        mean = fmean([*losses[-4:], loss])
        if math.isnan(mean) or mean > 4 * lowest_mean:
            break
        lowest_mean = min(lowest_mean, mean)
        rates.append(rate)
        losses.append(loss)

    reach = max(2, steps // 20)
    smoothed = smooth(smooth(losses, reach), reach)
    lowest = smoothed.index(min(smoothed)) if smoothed else 0
    if lowest == 0:
        raise UserError(
            f"the loss does not fall at any learning rate from {low:g} to {high:g}: "
            "try lower --learning-rates"
        )
    return Sweep(rates, losses, smoothed, lowest)


def smooth(values: list[float], reach: int) -> list[float]:
    """Moving average over up to `reach` values on either side."""
    smoothed = []
    for i in range(len(values)):
        neighbours = values[max(0, i - reach) : i + reach + 1]
        smoothed.append(fmean(neighbours))
    return smoothed


def draw_sweep(sweep: Sweep) -> "Figure":
    """Draw the loss over the learning rate, and the rate at which it falls fastest."""
    best_rate = sweep.best_rate()
    highest_loss = max(sweep.smoothed[: sweep.lowest])
    figure = plots.new_figure(1, 1, 7, 4)
    (axes,) = figure.axes
    axes.semilogx(sweep.rates, sweep.losses, alpha=0.3, label="each step")
    axes.semilogx(sweep.rates, sweep.smoothed, color="C0", label="smoothed")
    axes.axvline(best_rate, color="C3", linestyle="--", label=f"falls fastest: {best_rate:g}")
    axes.set(
        xlabel="learning rate",
        ylabel="training loss (cross-entropy)",
        ylim=(0, 1.5 * highest_loss),
    )
    axes.legend()
    return figure
