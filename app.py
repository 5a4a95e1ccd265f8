"""A web page that classifies pictures, and shows where the network sees their class.

    python app.py                                  then open http://127.0.0.1:7860
    python app.py --checkpoint model_cnn.pth --examples holiday/
    python app.py --host 0.0.0.0                   for other machines in the network, too

Nothing leaves this machine: no telemetry, and the page loads nothing from the internet.
"""

import argparse
import contextlib
import errno
import html
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

if __name__ == "__main__":  # PYTHONSAFEPATH and python -P leave out the folder of this file
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

try:
    import gradio as gr
    import numpy as np
    import safehttpx  # fetches files for Gradio
    import torch
    import torch.nn.functional as F
    from PIL import Image

    from classifier.cli import end_process, run_tool, tool_parser
    from classifier.datasets.decode import decode
    from classifier.errors import Stopped, UserError
    from classifier.rejection import UNKNOWN, parse_reject
    from classifier.text import pluralize, printable
    from explain import grad_cam, overlay
    from inference import (
        Classifier,
        dataset_available,
        find_images,
        load_dataset_of,
        load_model,
        print_note,
        read_image,
        top_classes,
    )
except (ImportError, OSError) as error:  # OSError: a library that cannot be loaded
    if __name__ != "__main__":
        raise
    sys.exit(
        f"error: {error}: pip install -r requirements-extras.txt, and keep classifier/ and the "
        "other tools beside this file"
    )
except KeyboardInterrupt:
    sys.exit(130)

MAX_FILE_SIZE = "30mb"
MAX_PIXELS = 80_000_000  # of an image
PICTURE_SIZE = 384  # pixels, of the picture that is shown with its heat map
MAX_EXAMPLES = 20  # of a user's folder
MAX_EXAMPLE_CLASSES = 10  # whose test images are shown
EVERY_ADDRESS = "0.0.0.0"  # of this machine
CSS = "#picture img { width: 100%; height: 100%; object-fit: contain; }"  # enlarge small images


def classify(
    model: Classifier, path: str | None
) -> tuple[dict[str, float] | str | None, str, np.ndarray | None]:
    """Classify a picture.

    path: None if there is no picture; then there is no result either.

    Returns the confidence of each class, or "unknown"; for an unknown picture a sentence on how
    unknown it is, otherwise an empty text; and the picture with a heat map of what speaks for the
    likeliest class, uint8 (S, S, 3). Raises gr.Error, which the page shows, for a file that is not
    an image.
    """
    if path is None:
        return None, "", None
    try:
        pixels = read_image(model, path)
    except UserError as error:
        reason = str(error).replace(f"{path}: ", "").replace(f" {path!r}", "")[:200]
        message = f"This is not a picture that can be read: {reason}"
        raise gr.Error(message, print_exception=False) from None
    (classes,) = top_classes(model, pixels[None], len(model.classes))
    picture = decode(Path(path), PICTURE_SIZE, model.pixel_ranges, model.fit).pixels.copy()
    with contextlib.suppress(UserError):  # a network without feature maps: the picture alone
        picture = add_heat_map(model, picture, pixels, model.classes.index(classes[0][0]))
    if classes.is_unknown:
        closest = html.escape(classes.list_confidences(3))
        note = f"It is {classes.describe_unlikeness()}. The closest classes: {closest}."
        return UNKNOWN, note, picture
    return dict(classes), "", picture


def add_heat_map(
    model: Classifier, picture: np.ndarray, pixels: np.ndarray, label: int
) -> np.ndarray:
    """Put Grad-CAM over a picture, uint8 (S, S, 3).

    pixels: the same picture at the network's size, uint8 (3, H, W). label: the class to explain.
    Raises UserError for a network without feature maps.
    """
    image = torch.from_numpy(pixels)[None]
    heat = grad_cam(model.require_network(), image, torch.tensor([label]))
    heat = F.interpolate(heat[None], picture.shape[:2], mode="bilinear")[0]
    background = torch.from_numpy(picture).permute(2, 0, 1)[None]
    return overlay(background, heat)[0].permute(1, 2, 0).numpy()


def example_pictures(folder: str) -> list[str]:
    """The first pictures in a folder. Raises UserError if there are none.

    Prints a note on each file there that is a picture, but of a format that is not read.
    """
    paths, problems = find_images([folder])
    names = []
    for path in paths:
        if path.exists():
            names.append(str(path.resolve()))
        else:
            problems.append(f"{path}: there is no such file or folder")
    if not names:
        raise UserError(problems[0])
    for problem in problems:
        print_note(f"left out: {problem}")
    usable = [name for name in names if name == printable(name)]  # Gradio takes no others
    if len(usable) < len(names):
        count = pluralize(len(names) - len(usable), "picture")
        print_note(f"{count} in {folder} left out: the names are not UTF-8")
    return usable[:MAX_EXAMPLES]


def write_test_images(model: Classifier, data_dir: str | None, folder: Path) -> list[str]:
    """Write a test image of each class, if the data set is on this machine; returns their paths.

    data_dir: where the user says that it is, if anywhere. Raises UserError if it is not there.
    """
    if not data_dir and not dataset_available(model):
        return []
    try:
        test = load_dataset_of(model, data_dir, may_download=False).test
    except UserError:
        if data_dir:
            raise
        return []
    _, first_of_class = np.unique(test.labels.numpy(), return_index=True)
    images = test.images[torch.from_numpy(first_of_class[:MAX_EXAMPLE_CLASSES])]
    paths = []
    for number, image in enumerate(images):
        path = folder / f"{number}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        paths.append(str(path))
    return paths


async def refuse_to_fetch(address: str, *args: Any, **options: Any) -> NoReturn:
    """Stands in for what looks up an address and fetches files for Gradio."""
    raise ValueError(f"this page fetches nothing, not from {address} either")


def uploaded_path(image: gr.Image, payload: gr.FileData | None) -> str | None:
    """Where Gradio has put an uploaded file; None if there is none."""
    return None if payload is None else payload.path


def restrict_gradio() -> None:
    """Let Gradio, in this process, fetch no files and hand on an uploaded file as it is.

    `classify` reads the file, and reports what is wrong with it. Gradio would decode it in another
    way: it drops transparency and more than 8 bits. Of a single component the method does not last,
    as a click on an example replaces it.
    """
    safehttpx.async_validate_url = refuse_to_fetch
    safehttpx.get = refuse_to_fetch  # addresses of Hugging Face are not looked up
    gr.Image.preprocess = uploaded_path  # type: ignore[method-assign,assignment]


def build_page(model: Classifier, examples: list[str]) -> gr.Blocks:
    """The page.

    examples: paths of pictures to click on.
    """
    with gr.Blocks(
        title="Image classification", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        description = html.escape(model.describe())
        gr.HTML(f"<h1>What does this picture show?</h1><p>{description}</p>", padding=False)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    label="Drop, paste or take a picture",
                    sources=["upload", "clipboard", "webcam"],
                    type="filepath",
                    height=PICTURE_SIZE,
                    elem_id="picture",
                )
                if examples:
                    rows = [[path] for path in examples]
                    gr.Examples(rows, picture, label="Or click on one of these")
            with gr.Column():
                answer = gr.Label(
                    label="It shows",
                    num_top_classes=min(5, len(model.classes)),
                    elem_id="answer",
                )
                note = gr.HTML(elem_id="note")
                heat_map = gr.Image(
                    label="Grad-CAM: red is where the network found what speaks for it",
                    interactive=False,
                    height=PICTURE_SIZE,
                    buttons=["download", "fullscreen"],
                    elem_id="seen",
                )
        picture.change(
            lambda path: classify(model, path),
            picture,
            [answer, note, heat_map],
            api_name="classify",
        )
    return page


def check_address(host: str, port: int) -> None:
    """Raise UserError unless a page can be served at this address."""
    try:
        with socket.socket() as probe:
            if os.name == "posix":  # on Windows it would take the port from another program
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except socket.gaierror:
        raise UserError(f"--host {host}: there is no such IPv4 address or name") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"--port {port} is in use: choose another"
        elif error.errno == errno.EADDRNOTAVAIL:
            message = f"--host {host} is not an address of this machine"
        else:
            message = f"--host {host} --port {port}: {error.strerror}: choose others"
        raise UserError(message) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return socket.gethostbyname(host).startswith("127.")


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until the program is stopped.

    Raises UserError if the address is not available, and Stopped at SIGTERM.
    """
    check_address(host, port)
    signal.signal(signal.SIGTERM, stop)
    # a proxy for the internet would get Gradio's request to itself
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join([os.environ.get(name, ""), "localhost", "127.0.0.1", host])
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            show_error=True,
            prevent_thread_lock=True,
            max_file_size=MAX_FILE_SIZE,
            footer_links=[],
            ssr_mode=False,
            css=CSS,
        )
        shown_host = "127.0.0.1" if host == EVERY_ADDRESS else host
        print(f"Open http://{shown_host}:{port} in a browser. Ctrl-C ends it.")
        if host == EVERY_ADDRESS:
            print(f"On other machines: http://{socket.gethostname()}:{port}")
        if not is_loopback(host):
            print("note: whoever reaches this machine can use the page")
        while True:
            time.sleep(0.5)  # short, because Windows delays Ctrl-C until it is over
    finally:
        page.close()


def stop(signum: int, frame: Any) -> NoReturn:
    """Handle a signal: the page is closed, and pictures that were uploaded are deleted."""
    raise Stopped(signum)


def parse_port(text: str) -> int:
    """The number of a port; ValueError for any other text."""
    port = int(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not from 1 to 65535")
    return port


def parse_options() -> argparse.Namespace:
    """The options of this process; ends it with status 2 if they are wrong."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=parse_port, default=7860, help="(default: 7860)")
    examples = parser.add_mutually_exclusive_group()
    examples.add_argument(
        "--examples", metavar="FOLDER", help="pictures to click on (default: test images)"
    )
    examples.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where the data set with these test images is (default: data/, else where it was in "
        "training)",
    )
    parser.add_argument(
        "--reject",
        type=parse_reject,
        metavar="F",
        help="share of ordinary pictures that may be called unknown, as of inference.py",
    )
    return parser.parse_args()


def main() -> int:
    """Run as from the command line; serves until it is stopped."""
    options = parse_options()
    model = load_model(options.checkpoint, options.device, options.model, options.reject)
    model.require_network()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses images of twice as many
    restrict_gradio()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "gradio")  # uploads go with the page
        if options.examples:
            examples = example_pictures(options.examples)
        else:
            examples = write_test_images(model, options.data_dir, Path(folder))
        serve(build_page(model, examples), options.host, options.port)
    return 0


if __name__ == "__main__":
    end_process(run_tool(main))
