"""metrics.csv and what TensorBoard shows."""

import csv

import pytest
import torch
from torch import nn

from classifier import run_log
from classifier.config import Config
from classifier.plots import draw_images
from classifier.progress import COLUMNS
from classifier.run_log import RunLog


def make_row(epoch, has_validation=True):
    row = dict.fromkeys(COLUMNS)
    row |= {"epoch": epoch, "train_loss": 2.0 - epoch, "train_accuracy": 0.25 * epoch}
    row |= {"learning_rate": 0.125, "seconds": 1.5, "image_scale": 1.0}
    if has_validation:
        row |= {"valid_loss": 3.0 - epoch, "valid_accuracy": 0.5}
    return row


@pytest.fixture
def make_log(folder):
    """A function that makes a log; the fixture's logs are closed at the end."""
    (folder / "run").mkdir()
    logs = []

    def make(is_main=True, first_epoch=0, draw_inputs=None, model=None):
        def draw():
            return draw_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["cat"], 1)

        model = model or nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
        log = RunLog(
            folder / "run", is_main, first_epoch, draw_inputs or draw, model.train(), (3, 8, 8)
        )
        logs.append(log)
        return log

    yield make
    for log in logs:
        log.close()


def read_events(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(path), size_guidance={"images": 0}).Reload()


def read_metrics(log):
    with open(log.run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def values_of(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_epochs_are_logged(make_log):
    log = make_log()
    log.open()
    history = []
    for epoch in range(2):
        history.append(make_row(epoch))
        log.end_epoch(history, 1000.0 + epoch)
        assert [int(row["epoch"]) for row in read_metrics(log)] == list(range(epoch + 1))
    log.close()
    assert list(read_metrics(log)[0]) == COLUMNS
    assert float(read_metrics(log)[1]["valid_loss"]) == 2.0

    train, valid = read_events(log.run), read_events(log.run / "valid")
    expected = {"loss", "accuracy", "learning rate", "images per second"}
    assert set(train.Tags()["scalars"]) == expected
    assert set(valid.Tags()["scalars"]) == {"loss", "accuracy"}
    assert values_of(train, "loss") == [(0, 2.0), (1, 1.0)]
    assert values_of(valid, "loss") == [(0, 3.0), (1, 2.0)]
    assert values_of(train, "accuracy") == [(0, 0.0), (1, 0.25)]
    assert values_of(train, "images per second") == [(0, 1000), (1, 1001)]
    assert values_of(train, "learning rate") == [(0, 0.125), (1, 0.125)]


def test_without_validation_images(make_log):
    log = make_log()
    log.open()
    log.end_epoch([make_row(0, has_validation=False)], 1.0)
    log.close()
    assert read_metrics(log)[0]["valid_loss"] == ""
    assert values_of(read_events(log.run), "loss") == [(0, 2.0)]
    assert read_events(log.run / "valid").Tags()["scalars"] == []


def test_metrics_are_written_before_tensorboard_is_open(make_log):
    log = make_log()
    log.end_epoch([make_row(0)], 1.0)
    assert [path.name for path in log.run.iterdir()] == ["metrics.csv"]


@pytest.mark.pictures
def test_inputs_and_graph_are_drawn_once(make_log):
    drawn = []

    def draw():
        drawn.append(1)
        return draw_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["cat"], 1)

    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2), nn.BatchNorm1d(2))
    log = make_log(draw_inputs=draw, model=model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    log.open()
    log.open()
    log.close()
    events = read_events(log.run)
    assert drawn == [1] and (log.run / "samples.png").exists()
    assert events.Tags()["images"] == ["training images"] and events.Tags()["graph"]
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])

    again = make_log(draw_inputs=draw)  # as on resuming
    again.open()
    assert drawn == [1]


class Untraceable(nn.Module):
    def forward(self, images):
        raise ValueError("not today")


@pytest.mark.pictures
def test_network_that_cannot_be_traced_is_noted(make_log, capsys):
    log = make_log(model=Untraceable())
    log.open()
    assert "no graph" in capsys.readouterr().out
    log.end_epoch([make_row(0)], 1.0)
    log.close()
    assert not read_events(log.run).Tags()["graph"]


def test_resumed_epoch_is_once_in_tensorboard(make_log, monkeypatch):
    log = make_log()
    log.open()
    log.end_epoch([make_row(0)], 1.0)
    log.end_epoch([make_row(0), make_row(1)], 1.0)  # and then it is killed, before it is saved
    log.close()
    from tensorboard.summary.writer import event_file_writer

    # event files are named by the second
    now = event_file_writer.time.time()
    monkeypatch.setattr(event_file_writer.time, "time", lambda: now + 5)
    resumed = make_log(first_epoch=1)
    resumed.open()
    resumed.end_epoch([make_row(0), make_row(1)], 2.0)
    resumed.close()
    for path in (log.run, log.run / "valid"):
        assert [step for step, _ in values_of(read_events(path), "loss")] == [0, 1]
    assert values_of(read_events(log.run), "images per second") == [(0, 1.0), (1, 2.0)]


def test_other_processes_log_nothing(make_log):
    log = make_log(is_main=False, draw_inputs=lambda: pytest.fail("drawn"))
    log.open()
    log.end_epoch([make_row(0)], 1.0)
    log.report(Config(), 0, {"test accuracy": 0.5}, {})
    assert list(log.run.iterdir()) == []


@pytest.mark.parametrize(("num_failures", "is_noted"), [(2, False), (3, True)])
def test_locked_metrics_do_not_stop_a_run(make_log, monkeypatch, capsys, num_failures, is_noted):
    failures = iter([PermissionError(13, "locked")] * num_failures)
    write_csv = run_log.write_csv

    def write(path, rows):
        for failure in failures:
            raise failure
        write_csv(path, rows)

    monkeypatch.setattr(run_log, "write_csv", write)
    monkeypatch.setattr(run_log, "LOCKED_PAUSES", [0.0, 0.01])
    log = make_log()
    log.end_epoch([make_row(0)], 1.0)
    out = capsys.readouterr().out
    assert ("metrics.csv" in out and "locked" in out) == is_noted
    assert (log.run / "metrics.csv").exists() != is_noted
    log.end_epoch([make_row(0), make_row(1)], 1.0)
    assert len(read_metrics(log)) == 2  # complete an epoch later


def test_other_errors_do(make_log, monkeypatch):
    def fail(path, rows):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(run_log, "write_csv", fail)
    with pytest.raises(OSError, match="No space left"):
        make_log().end_epoch([make_row(0)], 1.0)


def test_report_is_logged_beside_its_hyperparameters(make_log):
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    log = make_log()
    log.open()
    pixels = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
    config = Config(lr=0.25, data_dir="somewhere", tta=6)
    log.report(config, 4, {"test accuracy": 0.5, "test loss": 2.0}, {"worst mistakes": pixels})
    log.close()
    events = read_events(log.run)
    assert values_of(events, "test accuracy") == [(4, 0.5)]
    assert values_of(events, "test loss") == [(4, 2.0)]
    assert [image.step for image in events.Images("worst mistakes")] == [4]
    assert sorted(path.name for path in log.run.iterdir() if path.is_dir()) == ["valid"]

    start = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    saved = HParamsPluginData.FromString(start).session_start_info.hparams
    assert saved["lr"].number_value == 0.25 and saved["tta"].number_value == 6
    assert not run_log.NOT_HYPERPARAMETERS & set(saved)
