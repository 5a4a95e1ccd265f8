"""app.py: the web page, in a real browser."""

import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import socket
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import quote

import pytest
from conftest import REPOSITORY, save, tool
from mirror import Mirror
from PIL import Image
from playwright import sync_api as playwright

import inference
from classifier.datasets.cifar10 import MD5
from classifier.errors import UserError

BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
BROWSER = next((found for found in map(shutil.which, BROWSERS) if found), None)
TIMEOUT = 60  # s, for an answer of the page
NOT_A_PICTURE = "not a picture that can be read"


@contextlib.contextmanager
def serve(folder, model, host, *options, environment=None):
    """The page of a model, served by app.py in a process of its own: its address, the process."""
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    # some of the ordinary images would be called unknown
    arguments = ["--checkpoint", model.path, "--port", port, "--reject", "0", *options]
    process = tool("app", folder).start(*arguments, env=environment or {})
    try:
        if not any(line.startswith("Open ") for line in process.stdout):
            pytest.fail(process.stderr.read())
        yield f"http://{host}:{port}", process
    finally:
        process.terminate()
        process.communicate(timeout=TIMEOUT)


@pytest.fixture(scope="session")
def app():
    """The module, which takes seconds to import."""
    import app

    return app


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("app"), model, "127.0.0.1") as (address, _):
        yield address


@pytest.fixture
def page(address):
    """A browser on the page; requests to other machines are refused and make the test fail."""
    if not BROWSER:
        assert not os.environ.get("CI"), "CI is to have a browser"
        pytest.skip("no Chromium: apt-get install chromium")
    elsewhere = []

    def route(route):
        url = route.request.url
        if url.startswith((address, "data:", "blob:")):
            return route.continue_()
        elsewhere.append(url)
        return route.abort()

    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(1000 * TIMEOUT)
        page.route("**/*", route)
        page.goto(address)
        page.wait_for_selector("#picture")
        yield page
        browser.close()
    assert not elsewhere


def top_class(page, expected=""):
    """What the page says that a picture shows, once it says so, or says what is expected."""
    heading = page.locator("#answer [data-testid='label-output-value']")
    text = re.compile(expected or r"\S")
    playwright.expect(heading).to_have_text(text, timeout=1000 * TIMEOUT)
    return heading.inner_text().strip()


def upload(page, path):
    """Put a file in the place of the picture that is there."""
    button = "#picture button[{}='Remove Image']"
    remove = page.locator(f"{button.format('aria-label')}, {button.format('title')}")
    if remove.count():
        remove.first.click()
    page.set_input_files("#picture input[type=file]", str(path))


# ---- in the browser ----


@pytest.mark.slow
def test_picture_rubbish_and_picture_again(page, folder, model, data):
    predicted = inference.predict(model, data.test.images[:30].numpy(), top_k=1)
    answers = [name for ((name, _),) in predicted]
    second = next(i for i, answer in enumerate(answers) if answer != answers[0])

    upload(page, save(data.test.images[0], folder / "first.png"))
    assert top_class(page, answers[0]) == answers[0]
    playwright.expect(page.locator("#seen img").first).to_be_visible()

    (folder / "rubbish.jpg").write_text("no image at all")
    upload(page, folder / "rubbish.jpg")
    playwright.expect(page.get_by_text(NOT_A_PICTURE).first).to_be_visible()

    upload(page, save(data.test.images[second], folder / "second.png"))
    assert top_class(page, answers[second]) == answers[second]
    page.screenshot(path=os.environ.get("SCREENSHOT") or folder / "page.png")


@pytest.mark.slow
def test_too_large_a_file_is_refused_and_the_page_goes_on(page, folder, model, data):
    (folder / "big.png").write_bytes(os.urandom(31 * 2**20))
    upload(page, folder / "big.png")
    message = page.get_by_text(re.compile("exceeds|maximum|too large", re.IGNORECASE))
    playwright.expect(message.first).to_be_visible()
    page.reload()
    page.wait_for_selector("#picture")
    upload(page, save(data.test.images[0], folder / "first.png"))
    assert top_class(page) in model.classes


@pytest.mark.slow
def test_examples_are_there_to_click_on(page, model, folder):
    page.locator(".gallery button, .gallery-item").first.click()
    assert top_class(page) in model.classes
    # and pictures that are uploaded afterwards are decoded as before
    picture = Image.effect_noise((64, 64), 200).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(folder / "transparent.png")
    upload(page, folder / "transparent.png")
    ((classes),) = inference.predict(model, folder / "transparent.png")
    name, confidence = classes[0]
    assert top_class(page, name) == name
    playwright.expect(page.locator("#answer")).to_contain_text(f"{100 * confidence:.0f}%")


# ---- what is served ----


def status_and_body(port, path):
    """The answer to a request for a path, which is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.slow
def test_only_this_machine_is_served(address):
    port = int(address.rpartition(":")[2])
    assert status_and_body(port, "/")[0] == 200
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=2)


@pytest.mark.slow
def test_no_other_file_is_served(address):
    port = int(address.rpartition(":")[2])
    up = "../" * 12
    files = ["/etc/passwd", f"{up}etc/passwd", str(REPOSITORY / "app.py")]
    files += [f"http://127.0.0.1:{port}/", "https://example.com/", "%2e%2e/" * 12 + "etc/passwd"]
    paths = [f"/gradio_api/file={file}" for file in files]
    for route in ("static", "assets", "gradio_api/deep_link", "svelte", "theme.css"):
        paths.append(f"/{route}/{up}etc/passwd")
    for path in paths:
        status, body = status_and_body(port, path)
        assert status >= 400 and b"root:" not in body, path


@pytest.mark.slow
def test_own_examples_and_another_address(folder, model, data):
    if sys.platform == "darwin":
        pytest.skip("macOS has no address 127.0.0.2 unless told")
    mine = folder / "mine"
    mine.mkdir()
    names = {save(data.test.images[i], mine / f"{i}.png").name for i in range(3)}
    options = ["--host", "127.0.0.2", "--examples", mine]
    with serve(folder, model, "127.0.0.2", *options) as (address, _):
        config = json.load(urllib.request.urlopen(f"{address}/config", timeout=TIMEOUT))
        (examples,) = (each for each in config["components"] if each["type"] == "dataset")
        paths = [sample[0]["path"] for sample in examples["props"]["samples"]]
        assert {os.path.basename(path) for path in paths} == names
        url = f"{address}/gradio_api/file={quote(paths[0])}"
        picture = urllib.request.urlopen(url, timeout=TIMEOUT).read()
        assert picture == (mine / os.path.basename(paths[0])).read_bytes()


# ---- as the page's JavaScript asks ----


def answer_to_path(address, path):
    """The page's answer to a picture at a path."""
    url = f"{address}/gradio_api/call/classify"
    body = json.dumps({"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request, timeout=TIMEOUT))["event_id"]
    return urllib.request.urlopen(f"{url}/{event}", timeout=TIMEOUT).read().decode()


def answer_to_content(address, content):
    """The page's answer to the content of a file, which is uploaded first."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="p.png"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    body = head + content + b"\r\n--x--\r\n"
    request = urllib.request.Request(f"{address}/gradio_api/upload", body, headers)
    (path,) = json.load(urllib.request.urlopen(request, timeout=TIMEOUT))
    return answer_to_path(address, path)


@pytest.mark.slow
def test_page_fetches_nothing(address):
    """Asked to classify what lies at an address elsewhere, it does not go there."""
    with Mirror(b"") as elsewhere:
        answer = answer_to_path(address, f"{elsewhere.url}/cat.png")
    assert "fetches nothing" in answer and not elsewhere.requests


@pytest.mark.slow
def test_fifty_requests_at_once_and_rubbish_among_them(address, model, data, folder):
    images = []
    for i in range(5):
        images.append(save(data.test.images[i], folder / f"{i}.png").read_bytes())
    chance = random.Random(0)
    noise = bytes(chance.randrange(256) for _ in range(5000))
    rubbish = [b"", b"x" * 1000, images[0][:50], noise, b"GIF89a" + bytes(20)]
    contents = (images + rubbish) * 5
    with ThreadPoolExecutor(len(contents)) as pool:
        answers = list(pool.map(lambda content: answer_to_content(address, content), contents))

    predicted = inference.predict(model, data.test.images[:5].numpy(), top_k=1)
    expected = [name for ((name, _),) in predicted]
    for i, answer in enumerate(answers):
        kind = i % 10
        if kind < 5:
            assert f'"label": "{expected[kind]}"' in answer
        else:
            assert "event: error" in answer and NOT_A_PICTURE in answer


# ---- without a server ----


@pytest.mark.slow
def test_confidences_and_heat_map(model, folder, app):
    Image.new("RGB", (300, 200), "green").save(folder / "green.png")
    confidences, note, picture = app.classify(replace(model, reject=0), str(folder / "green.png"))
    assert note == ""
    (expected,) = inference.predict(model, folder / "green.png", top_k=len(model.classes))
    assert confidences == pytest.approx(dict(expected), abs=1e-5)
    assert picture.shape == (app.PICTURE_SIZE, app.PICTURE_SIZE, 3) and picture.dtype == "uint8"
    assert len({tuple(pixel) for pixel in picture.reshape(-1, 3)}) > 10  # no longer plain green


def test_unknown_picture_is_called_so(model, folder, app):
    Image.effect_noise((64, 64), 200).convert("RGB").save(folder / "noise.png")
    answer, note, _ = app.classify(model, str(folder / "noise.png"))
    (expected,) = inference.predict(model, folder / "noise.png", top_k=len(model.classes))
    assert expected.is_unknown
    assert answer == "unknown" and expected.describe_unlikeness() in note
    assert expected.list_confidences(3) in note


def test_names_of_classes_are_no_html(model, folder, app):
    Image.effect_noise((64, 64), 200).convert("RGB").save(folder / "noise.png")
    names = [f"<b>{name}</b>" for name in model.classes]
    answer, note, _ = app.classify(replace(model, classes=names), str(folder / "noise.png"))
    assert answer == "unknown" and "&lt;b&gt;" in note and "<" not in note


def test_network_without_feature_maps_shows_the_picture(model, folder, monkeypatch, app):
    def no_feature_maps(*arguments):
        raise UserError("no feature maps")

    monkeypatch.setattr(app, "grad_cam", no_feature_maps)
    Image.new("RGB", (300, 200), "green").save(folder / "green.png")
    confidences, _, picture = app.classify(replace(model, reject=0), str(folder / "green.png"))
    assert sum(confidences.values()) == pytest.approx(1)
    assert {tuple(pixel) for pixel in picture.reshape(-1, 3)} == {(0, 128, 0)}


def test_picture_is_shown_as_the_network_sees_it(model, folder, monkeypatch, app):
    """The picture and the heat map over it are of the same part of the image."""
    monkeypatch.setattr(app, "add_heat_map", lambda model, picture, *rest: picture)
    Image.new("RGB", (300, 100), "green").save(folder / "green.png")
    corners = {}
    for fit in ("crop", "pad"):
        *_, picture = app.classify(replace(model, fit=fit), str(folder / "green.png"))
        corners[fit] = tuple(picture[0, 0].tolist())
    assert corners == {"crop": (0, 128, 0), "pad": (114, 114, 114)}


def test_no_picture_has_no_answer(model, app):
    assert app.classify(model, None) == (None, "", None)
    assert app.uploaded_path(None, None) is None


def test_rubbish_is_an_error_without_the_path(model, folder, app):
    (folder / "rubbish.jpg").write_text("no image")
    with pytest.raises(app.gr.Error, match=NOT_A_PICTURE) as caught:
        app.classify(model, str(folder / "rubbish.jpg"))
    assert "rubbish" not in str(caught.value)  # it is a temporary name


def test_example_of_each_class(model, data, folder, app):
    paths = app.write_test_images(model, None, folder)
    labels = data.test.labels.tolist()
    for label, path in enumerate(paths):
        with Image.open(path) as picture:
            expected = data.test.images[labels.index(label)].permute(1, 2, 0).numpy()
            assert (expected == picture).all()
    assert len(paths) == len(model.classes)


def test_no_examples_where_the_data_set_is_not(model, folder, app):
    elsewhere = replace(model, settings={"dataset": "cifar10", "data_dir": "nowhere"})
    assert app.write_test_images(elsewhere, None, folder) == []
    (folder / "nowhere").mkdir()
    for name in MD5:
        (folder / "nowhere" / name).write_text("damaged")
    assert app.write_test_images(elsewhere, None, folder) == []


def test_typed_folder_without_the_data_set_is_an_error(model, folder, app):
    for dataset in ("cifar10", "photos"):
        elsewhere = replace(model, settings={"dataset": dataset})
        with pytest.raises(UserError, match="wrong"):
            app.write_test_images(elsewhere, "wrong", folder)


def test_picture_that_is_not_read_leaves_the_others(folder, capsys, app):
    (folder / "mine").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "mine" / "a.png")
    (folder / "mine" / "b.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"></svg>')
    assert app.example_pictures("mine") == [str((folder / "mine" / "a.png").resolve())]
    assert "b.svg" in capsys.readouterr().err
    (folder / "mine" / "a.png").unlink()
    with pytest.raises(UserError, match="b.svg"):
        app.example_pictures("mine")


def test_own_examples(folder, app):
    (folder / "many").mkdir()
    for i in range(25):
        Image.new("RGB", (2, 2)).save(folder / "many" / f"{i:02}.png")
    paths = app.example_pictures("many")
    assert paths == [str((folder / "many" / f"{i:02}.png").resolve()) for i in range(20)]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_examples_whose_names_are_not_utf_8(folder, model, capsys, app):
    (folder / "mine").mkdir()
    for name in (b"a.png", b"caf\xe9.png"):
        Image.new("RGB", (2, 2)).save(folder / "mine" / os.fsdecode(name))
    paths = app.example_pictures("mine")
    assert paths == [str((folder / "mine" / "a.png").resolve())]
    assert "note: 1 picture" in capsys.readouterr().err
    app.build_page(model, paths)


@pytest.fixture
def unchanged(app, monkeypatch):
    """What the program sets for its process is afterwards as before."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    for name in ("get", "async_validate_url"):
        monkeypatch.setattr(app.safehttpx, name, getattr(app.safehttpx, name))
    monkeypatch.setattr(app.gr.Image, "preprocess", app.gr.Image.preprocess)
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ.get("GRADIO_TEMP_DIR", ""))


def test_nothing_is_looked_up_or_fetched(app, unchanged):
    """Not from Hugging Face either, which Gradio trusts."""
    from gradio.processing_utils import async_ssrf_protected_get

    app.restrict_gradio()
    for address in ("https://example.com/cat.png", "https://huggingface.co/cat.png"):
        with pytest.raises(ValueError, match="fetches nothing"):
            asyncio.run(async_ssrf_protected_get(address))
    with pytest.raises(ValueError, match=r"example\.com"):
        asyncio.run(app.safehttpx.async_validate_url("example.com"))


# ---- the program ----


def test_what_is_not_available_is_named(model, folder, tool_inside, unchanged):
    run = tool_inside("app")
    assert "nowhere" in run.error("--checkpoint", model.path, "--examples", "nowhere")
    (folder / "empty").mkdir()
    assert "empty" in run.error("--checkpoint", model.path, "--examples", "empty")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = run.error("--checkpoint", model.path, "--port", port)
        assert f"--port {port}" in error and "GRADIO" not in error
    for host in ("192.0.2.1", "no.such.name.invalid", "::1"):
        assert f"--host {host}" in run.error("--checkpoint", model.path, "--host", host)


@pytest.mark.parametrize("port", ["0", "-1", "99999", "http"])
def test_ports_that_do_not_exist(tool_inside, port):
    assert "--port" in tool_inside("app").error(f"--port={port}", status=2)


def test_examples_are_a_folder_or_of_the_data_set(tool_inside):
    error = tool_inside("app").error("--examples", "mine", "--data-dir", "data", status=2)
    assert "--examples" in error and "--data-dir" in error


def test_addresses_that_only_this_machine_reaches(app):
    assert app.is_loopback("localhost") and app.is_loopback("127.0.0.2")
    assert not app.is_loopback("0.0.0.0") and not app.is_loopback("192.0.2.1")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_page_behind_a_proxy_starts_and_sigterm_deletes_the_pictures(model, data, folder):
    proxy = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {**proxy, "TMPDIR": str(temporary)}
    with serve(folder, model, "127.0.0.1", environment=environment) as (address, process):
        picture = save(data.test.images[0], folder / "first.png").read_bytes()
        assert "event: complete" in answer_to_content(address, picture)
        assert list(temporary.rglob("p.png"))
    assert process.returncode == 143
    assert not list(temporary.rglob("*.png"))


def test_help(tool_inside):
    text, _ = tool_inside("app")("--help")
    assert "python app.py" in text and "--checkpoint" in text


def test_missing_package_is_named(folder):
    (folder / "gradio.py").write_text("raise ModuleNotFoundError('no gradio here', name='gradio')")
    error = tool("app", folder).error(env={"PYTHONPATH": str(folder)})
    assert "gradio" in error and "pip install -r requirements-extras.txt" in error
