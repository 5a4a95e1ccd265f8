"""Settings that a run folder or a recipe holds, which may be somebody else's."""

from pathlib import Path

from classifier.config import Config, flag, is_custom_model
from classifier.datasets.load import NAMES, data_dir_to_reuse, dataset_available
from classifier.errors import UserError
from classifier.foreign_paths import format_option, refuse_network_path
from classifier.recipes import Settings


def without_foreign_places(settings: Settings, typed: Settings, source: str) -> Settings:
    """The settings of a file, without the places where it would write, or whom it would ask.

    A folder for data sets stays if the data set is there already. Prints a note about what is left
    out, if it is needed.

    Args:
        settings: by name; some may be missing.
        typed: settings that the user has typed, and so decides on.
        source: the run folder or the recipe file.

    Raises UserError where the user has to type a setting: the file of a network, which would be
    executed, a network path, and a model file elsewhere. UsageError for values of the wrong type.
    """
    Config(**settings)
    settings = dict(settings)
    model = settings.get("model", Config.model)
    if is_custom_model(model) and "model" not in typed:
        raise UserError(f"{source} uses a network of your own: add {format_option('model', model)}")
    for name in ("dataset", "labels", "init_from"):
        if name not in typed:
            refuse_network_path(settings.get(name) or "", source, name)
    out = settings.get("out", "")
    is_plain_name = Path(out).name == out and Path(out).suffix == ".pth"
    if out and not is_plain_name and "out" not in typed:
        raise UserError(
            f"{source} writes its model to {out}: add {format_option('out', out)}, or another "
            "FILE.pth"
        )

    dataset = str(typed.get("dataset", settings.get("dataset", Config.dataset)))
    named = {"mirror": settings.pop("mirror", Config.mirror)}
    kept = {"mirror": Config.mirror}
    if "data_dir" in settings:
        named["data_dir"] = settings["data_dir"]
        kept["data_dir"] = data_dir_to_reuse(dataset, settings["data_dir"])
        settings["data_dir"] = kept["data_dir"]
    left_out = [name for name in named if named[name] != kept[name] and name not in typed]
    place = {**settings, **typed}.get("data_dir", Config.data_dir)
    _print_left_out(left_out, dataset, place, source)
    return settings


def _print_left_out(left_out: list[str], dataset: str, data_dir: str, source: str) -> None:
    """Tell which settings are not used, where something is downloaded or decoded for want of them.

    data_dir: the folder for data sets that is used.
    """
    dataset = "cifar10" if dataset == "auto" else dataset
    if dataset not in NAMES:
        left_out = [name for name in left_out if name != "mirror"]  # nothing is downloaded
    elif dataset_available({"dataset": dataset}, 0, data_dir):
        return
    for name in left_out:
        print(
            f"note: {source} may be somebody else's, and its {flag(name)} is not used: type "
            f"{flag(name)} if you need it"
        )
