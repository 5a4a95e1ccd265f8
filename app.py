"""A web page that says what a picture shows, and where it sees that.

    python app.py                                  then open http://127.0.0.1:7860
    python app.py --checkpoint model_cnn.pth --examples holiday/
    python app.py --host 0.0.0.0                   for other machines in the network, too

Nothing leaves this machine: no telemetry, and the page loads nothing from the internet.
"""

import contextlib
import html
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr
    import numpy as np
    import safehttpx  # by which Gradio fetches files
    import torch
    from PIL import Image

    import image_classification as ic
    import inference
    from alternatives.datasets import decode
    from explain import grad_cam, overlay
    from inference import Classifier, InferenceError, run
except ImportError as problem:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {problem}: install what this program needs with: pip install -r requirements-extras.txt")
except KeyboardInterrupt:
    sys.exit(130)

LARGEST_FILE, LARGEST_IMAGE = "30mb", 80_000_000  # pixels
SIDE = 384  # pixels, of the picture that is shown with its heat map
STYLE = "#picture img { width: 100%; height: 100%; object-fit: contain; }"  # small images, too, fill their frame


def classify(model: Classifier, path: str | None) -> tuple[dict[str, float] | None, np.ndarray | None]:
    """The probability of each class, and the picture with what speaks for the likeliest one: uint8 (S, S, 3).

    Raises gr.Error, which the page shows, for a file that is no image.
    """
    if path is None:
        return None, None
    try:
        pixels = inference.read_one(model, path)
    except InferenceError as error:
        why = str(error).replace(f"{path}: ", "").replace(f" {path!r}", "")[:200]
        raise gr.Error(f"This is no picture that can be read: {why}", print_exception=False) from None
    shares = inference.probabilities(model, pixels[None])[0]
    large = torch.from_numpy(decode(Path(path), SIDE).pixels.copy()).permute(2, 0, 1)[None]
    with contextlib.suppress(InferenceError):  # a network without feature maps: the picture alone
        heat = grad_cam(model.network, torch.from_numpy(pixels)[None], torch.tensor([int(shares.argmax())]))
        large = overlay(large, torch.nn.functional.interpolate(heat[None], (SIDE, SIDE), mode="bilinear")[0])
    return dict(zip(model.classes, shares.tolist(), strict=True)), large[0].permute(1, 2, 0).numpy()


def examples(model: Classifier, folder: str | None, data_dir: str | None, scratch: Path) -> list[str]:
    """Pictures to click on: those in `folder`, or a test image of each of 10 classes if the data set is at hand."""
    if folder:
        paths, problems = inference.find([folder])
        problems += [f"{path}: there is no such file or folder" for path in paths if not path.exists()]
        if problems:
            raise InferenceError(problems[0])
        return [str(path.resolve()) for path in paths[:20]]
    written: list[str] = []
    if inference.at_hand(model, data_dir):
        with contextlib.suppress(ic.UserError, InferenceError):
            test = inference.load_its_data(model, data_dir).test
            firsts = np.unique(test.labels, return_index=True)[1][:10]  # of each class
            for number, image in enumerate(test.images[firsts]):
                written.append(str(scratch / f"{number}.png"))
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(written[-1])
    return written


async def refuse(hostname: str) -> str:
    """In place of what looks up the address of a file that Gradio is asked to fetch from elsewhere."""
    raise ValueError(f"this page fetches nothing, not from {hostname} either")


def build(model: Classifier, pictures: list[str]) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Image classification", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(f"<h1>What does this picture show?</h1><p>{html.escape(model.about())}</p>", padding=False)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    label="Drop, paste or take a picture", sources=["upload", "clipboard", "webcam"], type="filepath",
                    height=SIDE, elem_id="picture",
                )  # fmt: skip
                # it is handed on as it was uploaded: reading it, with all that can be wrong, is left to classify
                picture.preprocess = lambda payload: payload.path if payload else None  # type: ignore[method-assign]
                if pictures:
                    gr.Examples([[path] for path in pictures], picture, label="Or click on one of these")
            with gr.Column():
                answer = gr.Label(label="It shows", num_top_classes=min(5, len(model.classes)), elem_id="answer")
                seen = gr.Image(
                    label="Grad-CAM: red is where the network found what speaks for it", interactive=False, height=SIDE,
                    buttons=["download", "fullscreen"], elem_id="seen",
                )  # fmt: skip
        picture.change(lambda path: classify(model, path), picture, [answer, seen], api_name="classify")
    return page


def main() -> int:
    """Run as from the command line; serves until it is stopped."""
    arguments = inference.parser(__doc__)
    arguments.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1, this machine only)")
    arguments.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    arguments.add_argument("--examples", metavar="FOLDER", help="pictures to click on (default: test images)")
    arguments.add_argument("--data-dir", metavar="DIR", help="where its data set is, for these (default: as trained)")
    options = arguments.parse_args()
    model = inference.load_model(options.checkpoint, options.device, options.model)
    if not model.network:
        raise InferenceError(f"{model.path}: the page needs the .pth")
    Image.MAX_IMAGE_PIXELS = LARGEST_IMAGE // 2  # Pillow refuses twice as much
    safehttpx.async_validate_url = refuse
    with tempfile.TemporaryDirectory() as scratch:
        page = build(model, examples(model, options.examples, options.data_dir, Path(scratch)))
        try:
            page.launch(
                server_name=options.host, server_port=options.port, share=False, quiet=True, show_error=True,
                prevent_thread_lock=True, max_file_size=LARGEST_FILE, footer_links=[], ssr_mode=False, css=STYLE,
            )  # fmt: skip
        except OSError as error:
            raise InferenceError(f"port {options.port} cannot be had ({error}): --port N for another") from None
        print(f"Open http://{options.host}:{options.port} in a browser. Ctrl-C ends it.")
        if options.host != "127.0.0.1":
            print("note: whoever reaches this machine can use the page")
        try:
            while True:
                time.sleep(0.5)  # in pieces: Windows hears no Ctrl-C in a long one
        finally:
            page.close()


if __name__ == "__main__":
    sys.exit(run(main))
