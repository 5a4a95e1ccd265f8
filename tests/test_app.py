"""The web page, in a real browser."""

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
from urllib.parse import quote

import pytest
from conftest import REPOSITORY, save, tool
from mirror import Mirror
from PIL import Image
from playwright import sync_api as playwright

import inference

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def served(folder, model, host, *options):
    """The page of a model, served by app.py in a process of its own."""
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    process = tool("app", folder).start("--checkpoint", model.path, "--port", port, *options)
    try:
        if not any(line.startswith("Open ") for line in process.stdout):
            pytest.fail(process.stderr.read())
        yield f"http://{host}:{port}", process
    finally:
        process.terminate()
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    with served(tmp_path_factory.mktemp("app"), model, "127.0.0.1") as (address, _):
        yield address


@pytest.fixture
def page(address):
    """A browser on the page; what it asks other machines for is refused and counted."""
    if not BROWSER:
        assert not os.environ.get("CI"), "CI is to have a browser"
        pytest.skip("no Chromium: apt-get install chromium")
    elsewhere = []

    def route(request):
        if request.request.url.startswith((address, "data:", "blob:")):
            return request.continue_()
        elsewhere.append(request.request.url)
        return request.abort()

    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(20_000)
        page.route("**/*", route)
        page.goto(address)
        page.wait_for_selector("#picture")
        yield page
        browser.close()
    assert not elsewhere


def top(page, text=""):
    """What the page says that a picture shows, once it says so."""
    heading = page.locator("#answer [data-testid='label-output-value']")
    playwright.expect(heading).to_have_text(re.compile(text or r"\S"), timeout=20_000)
    return heading.inner_text().strip()


def upload(page, path):
    remove = page.locator("#picture button[aria-label='Remove Image'], #picture button[title='Remove Image']")
    if remove.count():
        remove.first.click()
    page.set_input_files("#picture input[type=file]", str(path))


def test_picture_rubbish_and_picture_again(page, folder, model, data):
    answers = [classes[0][0] for classes in inference.predict(model, data.test.images[:30].numpy())]
    second = next(i for i, answer in enumerate(answers) if answer != answers[0])
    upload(page, save(data.test.images[0], folder / "first.png"))
    assert top(page, answers[0]) == answers[0]
    playwright.expect(page.locator("#seen img").first).to_be_visible()
    (folder / "rubbish.jpg").write_text("no image at all")
    upload(page, folder / "rubbish.jpg")
    playwright.expect(page.get_by_text("no picture that can be read").first).to_be_visible()
    upload(page, save(data.test.images[second], folder / "second.png"))
    assert top(page, answers[second]) == answers[second]
    page.screenshot(path=os.environ.get("SCREENSHOT") or folder / "page.png")


def test_too_large_a_file_is_refused_and_the_page_goes_on(page, folder, model, data):
    (folder / "big.png").write_bytes(os.urandom(31 * 2**20))
    upload(page, folder / "big.png")
    playwright.expect(page.get_by_text(re.compile("exceeds|maximum|too large", re.IGNORECASE)).first).to_be_visible()
    page.reload()
    page.wait_for_selector("#picture")
    upload(page, save(data.test.images[0], folder / "first.png"))
    assert top(page) in model.classes


def test_examples_are_there_to_click_on(page, model):
    page.locator(".gallery button, .gallery-item").first.click()
    assert top(page) in model.classes


def test_only_this_machine_and_only_what_is_meant_is_served(address):
    port = int(address.rpartition(":")[2])
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=2)
    up = "../" * 12
    files = ["/etc/passwd", f"{up}etc/passwd", str(REPOSITORY / "app.py"), f"http://127.0.0.1:{port}/"]
    routes = [f"gradio_api/file={path}" for path in [*files, "https://example.com/", "%2e%2e/" * 12 + "etc/passwd"]]
    routes += [f"{kind}/{up}etc/passwd" for kind in ("static", "assets", "gradio_api/deep_link", "svelte", "theme.css")]
    for route in routes:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)  # sends the path as it is
        connection.request("GET", f"/{route}")
        answer = connection.getresponse()
        assert answer.status >= 400 and b"root:" not in answer.read(), route


def test_own_examples_and_another_address(folder, model, data):
    if sys.platform == "darwin":
        pytest.skip("macOS has no address 127.0.0.2 unless told")
    (folder / "mine").mkdir()
    pictures = {save(data.test.images[i], folder / "mine" / f"{i}.png").name for i in range(3)}
    with served(folder, model, "127.0.0.2", "--host", "127.0.0.2", "--examples", folder / "mine") as (address, process):
        assert "whoever reaches this machine" in process.stdout.readline()
        components = json.load(urllib.request.urlopen(f"{address}/config", timeout=20))["components"]
        (shown,) = (each["props"]["samples"] for each in components if each["type"] == "dataset")
        paths = [sample[0]["path"] for sample in shown]
        assert {os.path.basename(path) for path in paths} == pictures
        served_picture = urllib.request.urlopen(f"{address}/gradio_api/file={quote(paths[0])}", timeout=20).read()
        assert served_picture == (folder / "mine" / os.path.basename(paths[0])).read_bytes()


def answer_to(address, path, seconds=60):
    """The page's answer to a picture at a path, as its own JavaScript asks for it."""
    call = f"{address}/gradio_api/call/classify"
    body = json.dumps({"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}).encode()
    request = urllib.request.Request(call, body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request, timeout=seconds))["event_id"]
    return urllib.request.urlopen(f"{call}/{event}", timeout=seconds).read().decode()


def ask(address, picture):
    """The page's answer to the content of a file."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="p.png"\r\n\r\n' + picture + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", body, headers)
    (path,) = json.load(urllib.request.urlopen(request, timeout=60))
    return answer_to(address, path)


def test_page_fetches_nothing(address):
    """Asked to classify what lies at an address elsewhere, it does not go there."""
    with Mirror(b"") as elsewhere:
        answer = answer_to(address, f"{elsewhere.url}/cat.png", seconds=20)
    assert "this page fetches nothing, not from 127.0.0.1 either" in answer and not elsewhere.requests


def test_fifty_requests_at_once_and_rubbish_among_them(address, model, data, folder):
    images = [save(data.test.images[i], folder / f"{i}.png").read_bytes() for i in range(5)]
    whole, chance = images[0], random.Random(0)
    rubbish = [b"", b"x" * 1000, whole[:50], bytes(chance.randrange(256) for _ in range(5000)), b"GIF89a" + bytes(20)]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda picture: ask(address, picture), (images + rubbish) * 5))
    expected = [classes[0][0] for classes in inference.predict(model, data.test.images[:5].numpy())]
    for place, answer in enumerate(answers):
        if place % 10 < 5:
            assert f'"label": "{expected[place % 10]}"' in answer
        else:
            assert "event: error" in answer and "no picture that can be read" in answer


def test_what_cannot_be_had_is_named(address, model, tool_inside):
    app = tool_inside("app")
    assert "--port" in app.error("--checkpoint", model.path, "--port", address.rpartition(":")[2])
    assert "there is no such" in app.error("--checkpoint", model.path, "--examples", "nowhere")


def test_page_without_a_browser(model, folder):
    import app

    Image.new("RGB", (300, 200), "green").save(folder / "green.png")
    shares, picture = app.classify(model, str(folder / "green.png"))
    assert sum(shares.values()) == pytest.approx(1) and picture.shape == (app.SIDE, app.SIDE, 3)
    assert app.classify(model, None) == (None, None)
