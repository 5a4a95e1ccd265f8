"""The learning rate and the size of images over a run: as functions, and in its steps."""

import pytest
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import image_classification as ic

PEAK = 0.12
STEPS = 20  # of two epochs
TINY = {
    "dataset": "digits",
    "device": "cpu",
    "precision": "fp32",
    "width": 0.25,
    "subset": 200,
    "batch_size": 20,
    "epochs": 2,
}


# ---- functions ----


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.0, 0.1), (0.05, 0.55), (0.1, 1.0), (0.55, 0.5), (0.91, 0.1), (1.0, 0.0)],
)
def test_linear_schedule_goes_up_for_a_tenth_and_down_for_the_rest(fraction, expected):
    assert ic.lr_factor("linear", fraction, []) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [("none", 1.0), ("cosine", 0.5), ("step", 0.1), ("plateau", 0.1)],
)
def test_other_schedules_at_half_of_the_run(scheduler, expected):
    three_without_progress = [3.0, 2.0, 2.5, 2.1, 2.0]
    factor = ic.lr_factor(scheduler, 0.5, three_without_progress)
    assert factor == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fraction", "progressive_resizing", "expected"),
    [
        (0.0, 0.7, 0.5),
        (0.34, 0.7, 0.5),
        (0.35, 0.7, 0.75),
        (0.69, 0.7, 0.75),
        (0.7, 0.7, 1.0),
        (0.99, 0.7, 1.0),
        (0.0, 0.0, 1.0),
        (0.5, 0.0, 1.0),
    ],
)
def test_scale_schedule(fraction, progressive_resizing, expected):
    assert ic.scale_schedule(fraction, progressive_resizing) == expected


# ---- what a run does ----


def train_and_record(**settings):
    """Train for STEPS steps; returns learning rates by optimiser and sizes of training images."""
    rates, sizes = {}, []

    def record_rate(optimizer, arguments, options):
        rate = float(optimizer.param_groups[0]["lr"])
        rates.setdefault(type(optimizer).__name__, []).append(rate)

    def record_size(module, inputs):
        if isinstance(module, ic.CNN) and module.training:
            sizes.append(inputs[0].shape[-1])

    handles = [
        register_optimizer_step_pre_hook(record_rate),
        register_module_forward_pre_hook(record_size),
    ]
    config = ic.Config(**TINY, **settings)
    try:
        ic.train(config)
    finally:
        for handle in handles:
            handle.remove()
    return rates, sizes


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        return train_and_record(lr=PEAK, progressive_resizing=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "share_of_peak"),
    [
        (0, 0.1),
        (1, 0.55),
        (2, 1.0),
        (STEPS // 2, 0.5 / 0.9),
        (STEPS - 1, 0.05 / 0.9),
    ],
)
def test_learning_rate_in_five_steps(default_run, step, share_of_peak):
    rates, _ = default_run
    assert len(rates["Muon"]) == len(rates["AdamW"]) == STEPS
    assert rates["Muon"][step] == pytest.approx(PEAK * share_of_peak, rel=1e-6)
    assert rates["AdamW"][step] == pytest.approx(PEAK / 12 * share_of_peak, rel=1e-6)


@pytest.mark.slow
def test_images_grow_during_the_run(default_run):
    _, sizes = default_run
    assert sizes == [16] * 5 + [24] * 5 + [32] * 10


def test_other_schedules_reach_the_optimiser(folder):
    settings = {"optimizer": "sgd", "lr": 0.01, "scheduler": "step", "progressive_resizing": 0.0}
    rates, sizes = train_and_record(**settings)
    assert rates == {"SGD": pytest.approx([0.01] * 10 + [0.001] * 5 + [0.0001] * 5)}
    assert sizes == [32] * STEPS
