"""Settings: their types, ranges and choices, and the steps of --augment."""

import dataclasses
import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from classifier.config import FIELD_TYPES, Config, flag, is_custom_model, parse_augment
from classifier.errors import UsageError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("epochs", True),
        ("batch_size", 0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("minutes", math.nan),
        ("val_fraction", 1.0),
        ("val_fraction", -0.1),
        ("label_smoothing", 1.0),
        ("progressive_resizing", 1),
        ("seed", 2**40),
        ("image_size", 7),
        ("debug", 1),
        ("dataset", None),
        ("minutes", None),
        ("optimizer", "lion"),
        ("scheduler", "onecycle"),
        ("tta", 3),
        ("mirror", "teacher:8000"),
    ],
)
def test_invalid_value_names_its_option(name, value):
    with pytest.raises(UsageError, match=flag(name)):
        Config(**{name: value})


def test_error_says_what_is_accepted():
    with pytest.raises(UsageError, match="at least 0 and below 1"):
        Config(val_fraction=1.0)
    with pytest.raises(UsageError, match="adam"):
        Config(optimizer="adams")
    with pytest.raises(UsageError, match="float"):
        Config(lr="fast")


def test_early_stopping_needs_validation_images():
    with pytest.raises(UsageError, match="--early-stopping"):
        Config(early_stopping=2, val_fraction=0)
    assert Config(early_stopping=0, val_fraction=0).val_fraction == 0.0


def test_whole_number_becomes_a_float_where_one_is_expected():
    lr = Config(lr=1).lr
    assert lr == 1.0 and type(lr) is float


def test_defaults_are_valid_and_undecided_ones_are_none():
    config = Config()
    assert config.scheduler is None and config.label_smoothing is None
    for name in ("lr", "momentum", "weight_decay", "optimizer", "epochs", "batch_size", "width"):
        assert getattr(config, name) is None, name
    assert Config(**dataclasses.asdict(config)) == config


def test_every_field_has_a_type_and_a_line_of_help():
    for entry in dataclasses.fields(Config):
        assert FIELD_TYPES[entry.name] in (bool, int, float, str)
        help_text = entry.metadata["help"]
        assert help_text and help_text[-1] != "." and "\n" not in help_text, entry.name
        assert entry.default is None or type(entry.default) is FIELD_TYPES[entry.name], entry.name


@given(
    st.sampled_from(sorted(FIELD_TYPES)),
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
)
@example("lr", 1e400)
@settings(deadline=None, max_examples=300, derandomize=True, database=None)
def test_value_is_in_range_or_refused(name, value):
    entry = Config.__dataclass_fields__[name]
    try:
        config = Config(**{name: value})
    except UsageError:
        return
    accepted = getattr(config, name)
    assert accepted == value
    if accepted is None:
        assert entry.default is None
        return
    assert type(accepted) is FIELD_TYPES[name]
    if FIELD_TYPES[name] in (int, float):
        assert entry.metadata["minimum"] <= accepted < entry.metadata["less_than"]
    assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_custom_model_is_a_file_and_a_factory():
    assert is_custom_model("mine.py:net") and is_custom_model(r"C:\nets.py:small")
    for model in ("cnn", "resnet18", "torchvision:resnet18", "mine.py"):
        assert not is_custom_model(model)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, (False, 0, {})),
        ("none", (False, 0, {})),
        ("", (False, 0, {})),
        ("flip", (True, 0, {})),
        ("flip=", (True, 0, {})),
        ("crop", (False, 4, {})),
        ("crop=0", (False, 0, {})),
        (" flip , crop=2", (True, 2, {})),
        ("rotate=20,flip,erase,crop=1", (True, 1, {"rotate": "20", "erase": ""})),
        ("turn=x", (False, 0, {"turn": "x"})),  # refused where it is built
    ],
)
def test_augment_is_parsed(text, expected):
    assert parse_augment(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "flip,flip",
        "crop,crop=2",
        "rotate,flip,rotate=10",
        "none,flip",
        "none=3",
        "flip=2",
        "crop=1.5",
        "crop=-1",
        "crop=x",
    ],
)
def test_wrong_augment_is_refused(text):
    with pytest.raises(UsageError, match=f"--augment {text}"):
        parse_augment(text)
