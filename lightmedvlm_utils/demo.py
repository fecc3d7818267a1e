"""The demo form: choose or upload a radiograph, get a report, ask a question, see where the model looked."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from html import escape
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any, Protocol

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from lightmedvlm_utils import plots
from lightmedvlm_utils.config import NOT_FOR_CLINICAL_USE
from lightmedvlm_utils.data.images import read_image
from lightmedvlm_utils.data.questions import is_closed
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import FINDINGS, LABELS

NO_OVERLAY = "image only"
_BANNER = "background:#FFF3CD;color:#664D03;padding:6px 10px;border-left:4px solid #E69F00"
_MESSAGE = "color:#B00020;padding:2px 0"


class Reporter(Protocol):
    """What the form needs of `inference.Reporter`."""

    @property
    def model(self) -> Any: ...
    def report(self, images: list) -> list[str]: ...
    def answer(self, images: list, questions: list[str]) -> list[tuple[str, float]]: ...
    def attention(self, image: np.ndarray) -> dict[str, np.ndarray]: ...
    def findings(self, images: list) -> np.ndarray: ...


def read_upload(name: str, content: bytes) -> np.ndarray:
    """An uploaded file's pixels, as `read_image` gives them; its UserErrors name the file as the user does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (Path(name).name or "upload")
        path.write_bytes(content)
        try:
            return read_image(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), path.name)) from error


class Demo:
    """An ipywidgets form around a reporter: `display(Demo(reporter, examples).form)`.

    `examples` maps a name to an image file. The button handlers are the methods `report`, `ask` and
    `show_overlay`, so the form also works, and is tested, without a browser.
    """

    def __init__(self, reporter: Reporter, examples: Mapping[str, Path | str]):
        self.reporter = reporter
        self.image: np.ndarray | None = None
        self.maps: dict[str, np.ndarray] | None = None  # attention of the shown image, once asked for
        self.found: dict[str, float] = {}  # and how probable each finding is, where the connector says so
        self.said: dict[str, str] = {}
        self._build(examples)
        self._arrange()
        self._connect()
        self.choose_example()

    # Handlers

    def choose_example(self) -> None:
        """Show the chosen example, if there is any."""
        if self.example.value is None:
            return
        self._guard(lambda: self._show(read_image(self.example.value)), "Reading the image ...")

    def upload(self, name: str, content: bytes) -> None:
        """Show an uploaded file in place of the example."""
        self._guard(lambda: self._show(read_upload(name, content)), f"Reading {name} ...")

    def report(self) -> None:
        """Write the report of the shown image."""

        def write() -> None:
            self._say("report", self.reporter.report([self._shown()])[0])

        self._guard(write, "Writing the report ...")

    def ask(self) -> None:
        """Answer the typed question about the shown image."""

        def answer() -> None:
            question = self.question.value.strip()
            if not question:
                raise UserError("The question is empty; type one, for example: Is there a pleural effusion?")
            reply, probability = self.reporter.answer([self._shown()], [question])[0]
            of_what = "probability of yes" if is_closed(question) else "probability"
            self._say("answer", f"{question} {reply.capitalize()} ({of_what}: {probability:.2f}).")

        self._guard(answer, "Answering ...")

    def show_overlay(self) -> None:
        """Lay the chosen finding's attention over the image."""

        def draw() -> None:
            image, label = self._shown(), self.overlay.value
            if label != NO_OVERLAY and self.maps is None:
                self.maps = self.reporter.attention(image)
                if self.reporter.model.connector.has_disease_head:
                    self.found = dict(zip(LABELS, self.reporter.findings([image])[0].tolist(), strict=True))
            self.picture.value = _png(image, self._map())
            if label != NO_OVERLAY and self._map() is None:
                raise UserError(
                    f"The model finds no {label} (probability {self.found[label]:.2f}), so there is no place to show."
                )

        self._guard(draw, "Looking ...")

    def figure(self) -> Figure:
        """The form's present state as a static figure, for notebooks that run without a browser."""
        figure, (left, right) = plt.subplots(1, 2, figsize=(plots.WIDTH, 4.2), width_ratios=(1, 1.1))
        map_ = self._map()
        if map_ is not None:
            plots.attention_overlay(left, self._shown(), map_, title=self.overlay.value)
        else:
            plots.show_image(left, self._shown())
        right.set_axis_off()
        paragraphs = "\n".join(self.said.values()).replace("Impression:", "\nImpression:").split("\n")
        text = "\n\n".join(fill(paragraph, 58) for paragraph in paragraphs if paragraph.strip())
        right.text(0, 1, text, va="top", fontsize=9, transform=right.transAxes)
        figure.suptitle(NOT_FOR_CLINICAL_USE, fontsize=9, color=plots.RED)
        return figure

    # Parts

    def _build(self, examples: Mapping[str, Path | str]) -> None:
        wide = widgets.Layout(width="100%")
        self.banner = widgets.HTML(f"<div style='{_BANNER}'>{escape(NOT_FOR_CLINICAL_USE)}</div>")
        choices = [(name, str(path)) for name, path in examples.items()]
        self.example = widgets.Dropdown(options=choices, description="Example", layout=wide)
        self.file = widgets.FileUpload(accept=".png,.jpg,.jpeg,.dcm,.dicom", description="Your own file")
        self.overlay = widgets.Dropdown(options=[NO_OVERLAY, *FINDINGS], description="Attention", layout=wide)
        self.report_button = widgets.Button(description="Report", button_style="primary")
        self.ask_button = widgets.Button(description="Ask", button_style="primary")
        self.question = widgets.Text("Is there a pleural effusion?", description="Question", layout=wide)
        self.picture = widgets.Image(format="png", layout=widgets.Layout(width="384px"))
        self.texts = {kind: widgets.HTML(layout=wide) for kind in ("report", "answer")}
        self.message = widgets.HTML(layout=wide)

    def _arrange(self) -> None:
        asking = widgets.HBox([self.question, self.ask_button])
        controls = [self.example, self.file, self.overlay, self.report_button, self.texts["report"], asking]
        right = widgets.VBox([*controls, self.texts["answer"], self.message], layout=widgets.Layout(width="100%"))
        self.form = widgets.VBox([self.banner, widgets.HBox([self.picture, right])])

    def _connect(self) -> None:
        self.example.observe(lambda _: self.choose_example(), "value")
        self.overlay.observe(lambda _: self.show_overlay(), "value")
        self.report_button.on_click(lambda _: self.report())
        self.ask_button.on_click(lambda _: self.ask())
        self.file.observe(lambda change: self._uploaded(change["new"]), "value")

    def _uploaded(self, files: tuple) -> None:
        for file in files[-1:]:
            self.upload(file["name"], bytes(file["content"]))

    def _show(self, image: np.ndarray) -> None:
        """Take a new image; what was said about the last one must not stand beside it."""
        self.image, self.maps, self.found = image, None, {}
        self._say("report", "")
        self._say("answer", "")
        self.overlay.value = NO_OVERLAY
        self.picture.value = _png(image)

    def _map(self) -> np.ndarray | None:
        """The chosen finding's attention; None where none is chosen or the finding is not there: a softmax has its
        peak somewhere, also where there is nothing."""
        label = self.overlay.value
        if label == NO_OVERLAY or self.found.get(label, 1.0) < 0.5:
            return None
        return (self.maps or {}).get(label)

    def _say(self, kind: str, text: str) -> None:
        """Show the model's words as text: they never become markup of the page."""
        self.said[kind] = text
        html = escape(text)
        for heading in ("Findings:", "Impression:"):
            html = html.replace(heading, f"<br><b>{heading}</b>")
        self.texts[kind].value = html.removeprefix("<br>")

    def _shown(self) -> np.ndarray:
        if self.image is None:
            raise UserError("There is no image yet; choose an example or upload a file.")
        return self.image

    def _guard(self, action: Callable[[], None], progress: str) -> None:
        """Run a handler; the form shows what went wrong in one sentence instead of failing without a sign."""
        self.message.value = escape(progress)
        try:
            action()
            self.message.value = ""
        except UserError as error:
            self.message.value = f"<span style='{_MESSAGE}'>{escape(str(error))}</span>"
        except Exception as error:
            logging.getLogger(__name__).exception("The demo failed")
            sentence = f"That failed with an unexpected {type(error).__name__}: {error}"
            self.message.value = f"<span style='{_MESSAGE}'>{escape(sentence)}</span>"


def _png(image: np.ndarray, attention: np.ndarray | None = None) -> bytes:
    # The image fills it. Matplotlib's stub forgets that "none" is a layout.
    figure = Figure(figsize=(4.8, 4.8), layout="none")  # type: ignore[arg-type]
    ax = figure.add_axes((0, 0, 1, 1))
    if attention is None:
        plots.show_image(ax, image)
    else:
        plots.attention_overlay(ax, image, attention)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=100, facecolor="black")
    return buffer.getvalue()
