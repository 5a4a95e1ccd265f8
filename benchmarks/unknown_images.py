"""How well a model tells images that show none of its classes from test images.

    python benchmarks/unknown_images.py --checkpoint model_cnn.pth

Prints a Markdown table with a row for each set of images: the AUROC of the file's score (how often
it is higher for such an image than for a test image: 100 % is perfect, 50 % chance), that of two
simple ones, confidence and energy, and the share that the model calls unknown. Below it: the share
of the test images that it calls unknown, and the accuracy on the others.

The score was chosen by the sets of the first group: digits, noise and patterns, which are
generated, and the model's own validation images in pieces. The second group judges it: crops of
photographs and textures, which were not looked at in choosing. It has scikit-learn's two
photographs, and more pictures if scikit-image is installed. The data set of the model has to be on
this machine.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import markdown_table

from classifier import rejection
from classifier.cli import run_tool, tool_parser
from classifier.errors import UserError
from classifier.metrics import predict
from inference import Classifier, load_dataset_of, load_model

NUM_IMAGES = 500  # of each set
MAX_TEST_IMAGES = 5000
PHOTOGRAPHS = {  # of scikit-image, by kind; none of them shows a class of CIFAR-10
    "textures": ["brick", "grass", "gravel"],
    "documents": ["page", "text"],
    "microscopy": ["immunohistochemistry", "cell", "microaneurysms", "retina"],
    "sky": ["moon", "hubble_deep_field"],
    "photographs": ["coffee", "astronaut", "coins", "colorwheel"],
}


# ---- Sets for choosing ---------------------------------------------------------------------------


def chosen_by(validation: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """The sets that the score was chosen by, uint8 (N, 3, S, S).

    validation: images of the model's data set, uint8 (N, 3, S, S).
    """
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(0, 256, (NUM_IMAGES, 3, size, size), generator=generator)
    return {
        "digits": digits(size),
        "noise": uniform.to(torch.uint8).numpy(),
        "pink noise": pink_noise(size, generator),
        "blobs": blobs(size, generator),
        "stripes": stripes(size, generator),
        "shuffled pieces": shuffled_pieces(validation[:NUM_IMAGES], generator),
    }


def digits(size: int) -> np.ndarray:
    """scikit-learn's handwritten digits, white on black."""
    from sklearn.datasets import load_digits

    grey = torch.tensor(load_digits().images[:NUM_IMAGES], dtype=torch.float32) / 16
    resized = F.interpolate(grey[:, None], (size, size), mode="bilinear")
    return to_uint8(resized.expand(-1, 3, -1, -1))


def pink_noise(size: int, generator: torch.Generator) -> np.ndarray:
    """Random images whose spectrum falls as that of photographs does, in grey or colour."""
    noise = torch.randn(NUM_IMAGES, 3, size, size, generator=generator)
    noise[: NUM_IMAGES // 2] = noise[: NUM_IMAGES // 2, :1]
    rows = torch.fft.fftfreq(size)[:, None]
    columns = torch.fft.fftfreq(size)[None, :]
    frequency = (rows**2 + columns**2).sqrt().clamp(min=1 / size)
    exponent = 0.5 + torch.rand(NUM_IMAGES, 1, 1, 1, generator=generator)
    filtered = torch.fft.ifft2(torch.fft.fft2(noise) / frequency**exponent).real
    deviation = filtered.std((1, 2, 3), keepdim=True)
    return to_uint8(0.5 + 0.2 * filtered / deviation)


def blobs(size: int, generator: torch.Generator) -> np.ndarray:
    """Smooth patches of colour."""
    coarse = torch.rand(NUM_IMAGES, 3, 4, 4, generator=generator)
    return to_uint8(F.interpolate(coarse, (size, size), mode="bicubic"))


def stripes(size: int, generator: torch.Generator) -> np.ndarray:
    """Waves of two colours in any direction, and crossed ones."""
    position = torch.arange(size) / size
    angle = torch.rand(NUM_IMAGES, 1, 1, generator=generator) * torch.pi
    waves = 1 + 9 * torch.rand(NUM_IMAGES, 1, 1, generator=generator)
    along = angle.cos() * position[:, None] + angle.sin() * position[None, :]
    across = angle.sin() * position[:, None] - angle.cos() * position[None, :]
    pattern = (2 * torch.pi * waves * along).sin()
    half = NUM_IMAGES // 2
    pattern[:half] *= (2 * torch.pi * waves * across).sin()[:half]
    first, second = torch.rand(2, NUM_IMAGES, 3, 1, 1, generator=generator)
    share = 0.5 + 0.5 * pattern[:, None]
    return to_uint8(share * first + (1 - share) * second)


def shuffled_pieces(images: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Images cut into 4 × 4 pieces, which are put together in another order."""
    size = images.shape[-1]
    piece = size // 4
    whole = torch.from_numpy(images[:, :, : 4 * piece, : 4 * piece])
    pieces = whole.unfold(2, piece, piece).unfold(3, piece, piece).flatten(2, 3)
    shuffled = []
    for image in pieces:
        order = torch.randperm(16, generator=generator)
        rows = image[:, order].unflatten(1, (4, 4)).transpose(2, 3)
        shuffled.append(rows.reshape(images.shape[1], 4 * piece, 4 * piece))
    together = torch.stack(shuffled).float()
    return to_uint8(F.interpolate(together, (size, size), mode="bilinear") / 255)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images in [0, 1] as uint8."""
    return (255 * images.clamp(0, 1)).round().to(torch.uint8).numpy()


# ---- Sets for judging ----------------------------------------------------------------------------


def judged_by(size: int) -> dict[str, np.ndarray]:
    """Crops of photographs and textures, uint8 (N, 3, S, S)."""
    from sklearn.datasets import load_sample_image

    pictures: dict[str, list[np.ndarray]] = {
        "china.jpg": [load_sample_image("china.jpg")],
        "flower.jpg": [load_sample_image("flower.jpg")],
    }
    try:
        from skimage import data
    except ImportError:
        print("note: more pictures with scikit-image: pip install scikit-image", file=sys.stderr)
    else:
        for kind, names in PHOTOGRAPHS.items():
            loaded = [load_picture(getattr(data, name)) for name in names]
            pictures[kind] = [picture for picture in loaded if picture is not None]
    random = np.random.default_rng(0)
    sets = {}
    for kind, of_kind in pictures.items():
        if of_kind:
            crops = [crop(of_kind[i % len(of_kind)], size, random) for i in range(NUM_IMAGES)]
            sets[kind] = np.stack(crops)
    return sets


def load_picture(load: Callable[[], np.ndarray]) -> np.ndarray | None:
    """A picture of scikit-image as uint8 (H, W, 3); None if it would have to be downloaded."""
    try:
        picture = np.asarray(load())
    except Exception:  # without a network, or without pooch, it raises one of many kinds
        return None
    if picture.dtype != np.uint8:
        picture = (255 * (picture / picture.max())).astype(np.uint8)
    if picture.ndim == 2:
        picture = np.stack([picture] * 3, axis=2)
    return picture[:, :, :3]


def crop(picture: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """A random square of a picture, of at least `size` pixels, resized: uint8 (3, S, S)."""
    height, width, _ = picture.shape
    smallest = min(size, height, width)
    side = round(smallest * (min(height, width) / smallest) ** random.random())
    top = random.integers(0, height - side + 1)
    left = random.integers(0, width - side + 1)
    square = Image.fromarray(picture[top : top + side, left : left + side])
    resized = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)


# ---- The table -----------------------------------------------------------------------------------


class Scores:
    """What a model says of a set of images.

    Attributes:
        logits: float32 (N, classes).
        unlikeness: float64 (N,), the share of validation images that are less unlike.
        by_name: scores, float64 (N,), that are higher for images that are less usual.
    """

    def __init__(self, model: Classifier, images: np.ndarray):
        assert model.compute_scores is not None and model.quantiles is not None  # see main
        self.logits, scores = model.compute_scores(images)
        self.unlikeness = rejection.unlikeness(scores, model.quantiles)
        largest = self.logits.max(1, keepdims=True)
        log_sum = np.log(np.exp(self.logits - largest).sum(1)) + largest[:, 0]
        confidences, _ = predict(self.logits)
        self.by_name = {"score": scores, "confidence": -confidences, "energy": -log_sum}


def auroc(usual: np.ndarray, unusual: np.ndarray) -> float:
    """How often an unusual image has the higher score, in [0, 1]; a tie counts half."""
    from sklearn.metrics import roc_auc_score

    is_unusual = np.repeat([0, 1], [len(usual), len(unusual)])
    return float(roc_auc_score(is_unusual, np.concatenate([usual, unusual])))


def rows_of(model: Classifier, sets: dict[str, np.ndarray], test: Scores) -> list[list[str]]:
    """A row for each set of images, and one with their means."""
    rows, values = [], []
    for name, images in sets.items():
        found = Scores(model, images)
        of_set = [auroc(test.by_name[key], found.by_name[key]) for key in test.by_name]
        of_set.append(float(rejection.is_unknown(found.unlikeness, model.reject).mean()))
        values.append(of_set)
        rows.append([name, *(f"{100 * value:.1f}" for value in of_set)])
    means = np.mean(values, axis=0)
    rows.append(["mean", *(f"{100 * value:.1f}" for value in means)])
    return rows


def main() -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("--data-dir", metavar="DIR", help="where the data set of the model is")
    options = parser.parse_args()
    model = load_model(options.checkpoint, options.device, options.model)
    if model.quantiles is None:
        raise UserError(f"{model.path} has no score of how unlike images are: train it anew")
    data = load_dataset_of(model, options.data_dir, may_download=False)
    test = data.test.first(MAX_TEST_IMAGES)
    usual = Scores(model, test.images.numpy())

    head = "images | AUROC of the score, % | of confidence, % | of energy, % | called unknown, %"
    validation = data.valid.first(NUM_IMAGES).images.numpy()
    for purpose, sets in {
        "Chosen by": chosen_by(validation, model.image_size),
        "Judged by": judged_by(model.image_size),
    }.items():
        print(f"{purpose}\n\n{markdown_table(head, rows_of(model, sets, usual))}\n")
    labels = test.labels.numpy()
    is_unknown = rejection.is_unknown(usual.unlikeness, model.reject)
    _, predictions = predict(usual.logits)
    is_right = predictions == labels
    print(
        f"Of {len(labels)} test images {100 * is_unknown.mean():.2f} % are called unknown; "
        f"accuracy on the others {100 * is_right[~is_unknown].mean():.2f} %, on all "
        f"{100 * is_right.mean():.2f} %"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
