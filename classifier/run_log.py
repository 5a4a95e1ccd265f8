"""metrics.csv and TensorBoard's event files."""

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from classifier.config import Config
from classifier.files import write_csv
from classifier.plots import save_figure
from classifier.progress import COLUMNS, Row
from classifier.text import printable

if TYPE_CHECKING:  # both are slow to import
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

LOCKED_PAUSES = [0.2, 0.5]  # seconds to wait before each new try, if metrics.csv is locked
# Settings that say where a run is or how it was started: no hyperparameters.
NOT_HYPERPARAMETERS = {
    "data_dir",
    "mirror",
    "init_from",
    "device",
    "run_dir",
    "out",
    "resume",
    "fast_dev_run",
    "debug",
}


class RunLog:
    """The log of a run: metrics.csv, and TensorBoard's events once `open` was called.

    TensorBoard gets two writers, for training and validation, with the same tags, so that it draws
    both losses in one chart. Only the main process logs; in the others the methods do nothing.

    Attributes:
        run: the run folder.
        is_main: whether this is the main process (rank 0).
    """

    def __init__(
        self,
        run: Path,
        is_main: bool,
        first_epoch: int,
        draw_inputs: Callable[[], "Figure"],
        model: nn.Module,
        input_shape: tuple[int, ...],
    ):
        """Prepare the log.

        Args:
            first_epoch: the first epoch to be logged; TensorBoard then hides older events of this
                and later epochs, which a stopped run may have left.
            draw_inputs: draws samples.png.
            model: the network, whose graph TensorBoard shows.
            input_shape: (C, H, W).
        """
        self.run = run
        self.is_main = is_main
        self._first_epoch = first_epoch
        self._draw_inputs = draw_inputs
        self._model = model
        self._input_shape = input_shape
        self._train_writer: SummaryWriter | None = None
        self._valid_writer: SummaryWriter | None = None

    def open(self) -> None:
        """Open TensorBoard's writers and, once for each run, draw samples.png and the graph.

        Call it after the first epoch, because importing TensorBoard takes a second.
        """
        if self._train_writer is not None or not self.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        first_epoch = self._first_epoch
        self._train_writer = SummaryWriter(str(self.run), purge_step=first_epoch)
        self._valid_writer = SummaryWriter(str(self.run / "valid"), purge_step=first_epoch)
        samples_file = self.run / "samples.png"
        if not samples_file.exists():
            pixels = save_figure(self._draw_inputs(), samples_file)
            self._train_writer.add_image("training images", pixels, dataformats="HWC")
            self._add_graph(self._train_writer)

    def _add_graph(self, writer: "SummaryWriter") -> None:
        """Show the network's graph, or say that it cannot be drawn."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch deprecates the tracer that add_graph uses
                network = copy.deepcopy(self._model).cpu().eval()
                example = torch.zeros(1, *self._input_shape)
                # add_graph traces by itself, too, but checks the trace, which takes seconds
                traced = torch.jit.trace(network, example, check_trace=False)
                writer.add_graph(traced, example)
        except Exception as error:  # not every network can be traced
            print(f"note: no graph of this network in TensorBoard ({type(error).__name__})")

    def close(self) -> None:
        """Close TensorBoard's writers."""
        if self._train_writer is not None:
            self._train_writer.close()
        if self._valid_writer is not None:
            self._valid_writer.close()

    def end_epoch(self, history: list[Row], images_per_second: float) -> None:
        """Log the newest epoch.

        history: the rows of all epochs so far. images_per_second: speed of training.
        """
        if not self.is_main:
            return
        self.write_metrics(history)
        row = history[-1]
        if self._train_writer is not None:
            scalars = {
                "learning rate": row["learning_rate"],
                "images per second": images_per_second,
                "loss": row["train_loss"],
                "accuracy": row["train_accuracy"],
            }
            _add_scalars(self._train_writer, scalars, row["epoch"])
        if self._valid_writer is not None and row["valid_loss"] is not None:
            scalars = {"loss": row["valid_loss"], "accuracy": row["valid_accuracy"]}
            _add_scalars(self._valid_writer, scalars, row["epoch"])

    def write_metrics(self, history: list[Row]) -> None:
        """Write metrics.csv, a row for each epoch.

        A spreadsheet program may lock the file that it shows. After a few tries a note is printed
        instead; the next epoch writes the whole file again.
        """
        rows = [[row[name] for name in COLUMNS] for row in history]
        for pause in [*LOCKED_PAUSES, None]:
            try:
                write_csv(self.run / "metrics.csv", [COLUMNS, *rows])
                return
            except PermissionError as error:
                reason = error.strerror
                if pause is not None:
                    time.sleep(pause)
        print(f"note: metrics.csv cannot be written ({reason}): is it open in another program?")

    def report(
        self, config: Config, epoch: int, metrics: dict[str, float], pictures: dict[str, Any]
    ) -> None:
        """Log the results of the finished run: pictures, hyperparameters, and metrics beside them.

        Args:
            epoch: the last one.
            metrics: by their tags.
            pictures: pixels, uint8 (H, W, 3), by their tags.
        """
        if self._train_writer is None:
            return
        for tag, pixels in pictures.items():
            self._train_writer.add_image(tag, pixels, epoch, dataformats="HWC")
        hyperparameters = {}
        for name, value in asdict(config).items():
            if name not in NOT_HYPERPARAMETERS:
                # TensorBoard takes no path that is not UTF-8
                hyperparameters[name] = printable(value) if isinstance(value, str) else value
        # run_name: in this run, not in one below it
        self._train_writer.add_hparams(hyperparameters, metrics, run_name=".", global_step=epoch)


def _add_scalars(writer: "SummaryWriter", scalars: dict[str, float], epoch: int) -> None:
    """Add the points of an epoch to the charts."""
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, epoch)
    writer.flush()
