"""What has to hold for whatever is given: the settings, the split, the augmentations, the samplers."""

import contextlib
import io
import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import image_classification as ic
from alternatives import augmentations, sampling

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=300).map(torch.tensor)
settings.register_profile("quick", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("quick")


@given(st.sampled_from([name for name, kind in ic.KINDS.items() if kind is not bool]),
       st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str)))  # fmt: skip
@example("epochs", "0")
@example("val_fraction", "nan")
@example("lr", "1e400")
@settings(max_examples=300)
def test_settings_are_in_range_or_refused(name, text):
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            config = ic.Config(**ic.parse([f"{ic.option(name)}={text}"])[1])
    except (SystemExit, ic.UsageError) as error:
        assert not isinstance(error, SystemExit) or error.code == 2
        return
    value, rule = getattr(config, name), ic.Config.__dataclass_fields__[name].metadata
    assert type(value) is ic.KINDS[name]
    assert not isinstance(value, (int, float)) or rule["low"] <= value < rule["below"]
    assert ic.Config(**json.loads(json.dumps(asdict(config)))) == config  # as config.json keeps it


@given(LABELS, st.floats(0, 1, exclude_max=True))
def test_split_is_disjoint_complete_stratified_and_repeatable(labels, fraction):
    kept, held_out = ic.split_off(labels, fraction)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(len(labels)))
    wanted = [round(count * fraction) for count in labels.bincount(minlength=7).tolist()]
    assert labels[held_out].bincount(minlength=7).tolist() == wanted
    assert torch.equal(ic.split_off(labels, fraction)[1], held_out)


@given(st.integers(1, 60), st.integers(0, 5), st.integers(4, 9), st.integers(4, 9), st.integers(0, 3), st.booleans())
def test_every_image_comes_once_an_epoch_mirrored_and_shifted(count, epoch, height, width, most, mirror):
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
    augment = f"{'flip,' * mirror}crop={most}"
    order, flips, shifts = ic.plan_epoch(count, 1, epoch, augment, torch.device("cpu"))
    assert sorted(order.tolist()) == list(range(count)) and int(shifts.abs().max()) <= most
    assert mirror or not flips.any()
    got = ic.gather(images, order, flips, shifts)
    assert got.dtype == torch.uint8 and got.shape == images.shape
    for one, image, flip, (down, right) in zip(got, images[order], flips, shifts.tolist(), strict=True):
        padded = torch.nn.functional.pad(image.float(), [most] * 4, mode="reflect")
        moved = padded[:, most - down : most - down + height, most - right : most - right + width]
        assert torch.equal(one.float(), moved.flip(-1) if flip else moved)


@pytest.mark.parametrize("name", augmentations.STRENGTHS)
@given(share=st.floats(0.05, 1), size=st.integers(8, 40), seed=st.integers(0, 1000))
@settings(max_examples=8)
def test_augmented_images_stay_images_and_each_has_its_own_draw(name, share, size, seed):
    torch.manual_seed(seed)
    labels = torch.arange(12) % 5
    mixed = name in augmentations.MIXES
    images = torch.randint(0, 256, (12 if mixed else 1, 3, size, size), dtype=torch.uint8).expand(12, -1, -1, -1)
    strength = max(0.3, share) * augmentations.STRENGTHS[name][1]
    got, targets = augmentations.build({name: str(strength)}, 5)(images, labels)
    assert got.shape == images.shape and got.dtype == torch.float32
    assert float(got.min()) >= -0.01 and float(got.max()) <= 255.01
    if mixed:
        assert targets.shape == (12, 5) and torch.allclose(targets.sum(1), torch.ones(12))
        assert (targets[torch.arange(12), labels] >= 0).all()
    else:
        assert torch.equal(targets, labels)
        if name != "cutout" or size * strength < size - 1:  # one that leaves no room for another place
            assert len({tuple(image.flatten().tolist()) for image in got}) > 1  # equal images, made different


@given(LABELS, st.sampled_from(["oversample", "undersample"]), st.integers(0, 100))
def test_balanced_classes_come_equally_often(labels, how, seed):
    chosen = sampling.balanced(labels, how, torch.Generator().manual_seed(seed))
    counts, there = labels[chosen].bincount(minlength=7), labels.bincount(minlength=7)
    size = there.max() if how == "oversample" else there[there > 0].min()
    assert counts.tolist() == [int(size) * bool(count) for count in there]
    times = chosen.bincount(minlength=len(labels))
    for label in labels.unique():  # as evenly as possible
        of_class = times[labels == label]
        assert int(of_class.max() - of_class.min()) <= 1


@given(LABELS, st.floats(0.01, 1))
def test_imbalanced_classes_shrink_and_none_is_lost(labels, share):
    kept = sampling.imbalanced(labels, share)
    counts, there = labels[kept].bincount(minlength=7), labels.bincount(minlength=7)
    assert torch.equal(kept, kept.sort().values.unique())
    assert ((counts > 0) == (there > 0)).all() and (counts <= there).all()
    rest = [int(count) / int(all_of_it) for count, all_of_it in zip(counts, there, strict=True) if all_of_it > 50]
    assert all(later <= earlier + 0.02 for earlier, later in zip(rest, rest[1:], strict=False))
