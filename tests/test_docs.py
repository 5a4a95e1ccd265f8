"""The documents: links lead somewhere, pictures exist, and the script is as they say."""

import importlib.util
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, SCRIPT

import image_classification as ic
from classifier.datasets.dataset import Split

DOCS = REPOSITORY / "docs"
PAGES = [
    *REPOSITORY.glob("*.md"),
    *DOCS.glob("*.md"),
    REPOSITORY / "benchmarks" / "README.md",
]
TOOLS = ["inference", "explain", "export", "app", "tune", "compare"]
RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*.json"))
DRAWN = ("stages", "receptive_fields", "learning_rate", "whitening")  # by draw_pictures.py


def without_code(text):
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def links(page):
    """The targets of a page's links and pictures, those to other sites aside."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page):
    """The names that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    names = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        names.add(kept.replace(" ", "-"))
    return names


@pytest.fixture(scope="session")
def draw_pictures():
    path = DOCS / "draw_pictures.py"
    spec = importlib.util.spec_from_file_location("draw_pictures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values_of(content, key):
    """All values under this key, anywhere in the content of a JSON file."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from [value] if name == key else values_of(value, key)
    if isinstance(content, list):
        for value in content:
            yield from values_of(value, key)


# ---- Pages ----


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert path.is_relative_to(REPOSITORY), target
        if anchor:
            assert anchor in anchors(path), target


def test_links_are_found():
    assert "docs/install.md" in links(REPOSITORY / "README.md")
    assert "from-python" in anchors(REPOSITORY / "README.md")


def test_readme_is_short():
    assert (REPOSITORY / "README.md").stat().st_size <= 10 * 1024


def test_readme_or_a_page_that_it_names_leads_to_every_page():
    reached = {REPOSITORY / "README.md"}
    for _ in range(2):
        for page in list(reached):
            names = [target.partition("#")[0] for target in links(page)]
            reached |= {(page.parent / name).resolve() for name in names if name.endswith(".md")}
    assert set(PAGES) <= reached


def test_pages_begin_with_what_the_reader_can_do_after_them():
    for page in PAGES:
        title, introduction = page.read_text("utf-8").split("\n\n")[:2]
        if page.name not in ("CHANGELOG.md", "options.md") and page.parent != REPOSITORY:
            assert title.startswith("# "), page
            assert introduction.startswith("After reading this page"), page


def test_every_picture_is_shown():
    shown = set()
    for page in PAGES:
        shown |= {(page.parent / target).resolve() for target in links(page)}
    assert set(DOCS.glob("*.png")) <= shown


@pytest.mark.parametrize("tool", TOOLS)
def test_commands_of_tools_use_options_that_exist(tool, tool_inside):
    used = set()
    for page in PAGES:
        for command in re.findall(rf"python {tool}\.py([^\n`#|>]*)", page.read_text("utf-8")):
            used |= set(re.findall(r"(?<=\s)--[a-z][\w-]*", command))
    text, _ = tool_inside(tool)("--help")
    assert used <= set(re.findall(r"--[a-z][\w-]*", text))


# ---- How it works ----


def test_sections_of_the_script_are_explained_in_their_order():
    story = re.findall(r"^# ---- (.+?) -+$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    story.remove("From Python and from the command line")
    page = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
    explained = [title for title in re.findall(r"^## (.+)$", page, re.MULTILINE) if title in story]
    assert explained == story


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_commits_of_the_measured_results_are_named(file):
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for commit in values_of(json.loads(file.read_text(encoding="utf-8")), "commit"):
        assert commit is None or commit[:7] in text


def test_functions_that_are_explained_exist():
    page = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
    names = re.findall(r"\(`(\w+)`\)", page)
    assert len(names) >= 10
    source = SCRIPT.read_text(encoding="utf-8")
    for name in names:
        assert re.search(rf"(def|class) {name}\b", source), name


def test_receptive_fields_are_those_of_the_network(draw_pictures):
    """Which pixels change a value in the middle: by the gradient, over many images."""
    model = ic.CNN(width=0.25).double().eval()
    model.stages.requires_grad_(False)
    for weight in model.stages.parameters():
        weight.uniform_(0.1, 1)  # they start as the identity, which sees one pixel
    images = torch.randn(30, 3, 96, 96, dtype=torch.float64)
    for number, size in enumerate(draw_pictures.receptive_fields()):
        x = images.clone().requires_grad_()
        maps = model.stages[:number](model.whiten(x))
        middle = maps.shape[-1] // 2
        maps[:, :, middle, middle].sum().backward()
        rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
        assert rows.max() - rows.min() + 1 == size

    page = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
    for size in draw_pictures.receptive_fields():
        assert f"{size} by {size}" in page


def test_pictures_can_be_drawn_and_are_small(draw_pictures):
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    split = Split(images, torch.zeros(20, dtype=torch.int64))
    data = SimpleNamespace(train=split, test=split, classes=["cat", "dog"])
    model = ic.CNN(classes=2).eval()
    model.register_buffer("pixel_mean", torch.full((1, 3, 1, 1), 127.0))
    model.register_buffer("pixel_scale", torch.full((1, 3, 1, 1), 1 / 64))
    figures = draw_pictures.draw_all(model, data, 0)
    assert set(figures) == set(DRAWN)
    for name in DRAWN:
        assert (DOCS / f"{name}.png").stat().st_size < 100_000
