"""The demo form, worked through its handlers as a browser would."""

from io import BytesIO
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
from PIL import Image

from lightmedvlm_utils.config import NOT_FOR_CLINICAL_USE
from lightmedvlm_utils.demo import Demo
from lightmedvlm_utils.observations import FINDINGS, LABELS


class BrightnessReporter:
    """A reporter that really depends on its image: it knows one thing, how bright it is."""

    model = SimpleNamespace(connector=SimpleNamespace(has_disease_head=True))

    def report(self, images):
        return [f"Findings: Brightness <b>{image.mean():.2f}</b>. Impression: Measured." for image in images]

    def answer(self, images, questions):
        means = [float(image.mean()) for image in images]
        return [("yes" if mean > 0.5 else "no", mean) for mean in means]

    def attention(self, image):
        return {label: np.eye(4) / 4 for label in FINDINGS}

    def findings(self, images):
        return np.array([[0.9 if label == "Edema" else 0.1 for label in LABELS] for _ in images])


def png(low, high):
    buffer = BytesIO()
    ramp = np.tile(np.linspace(low, high, 64), (64, 1)).astype(np.uint8)
    Image.fromarray(ramp).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def demo(tmp_path):
    for name, content in (("dark", png(0, 60)), ("bright", png(190, 250))):
        (tmp_path / f"{name}.png").write_bytes(content)
    return Demo(BrightnessReporter(), {name: tmp_path / f"{name}.png" for name in ("dark", "bright")})


def test_banner_stands_in_the_form(demo):
    assert demo.form.children[0] is demo.banner and NOT_FOR_CLINICAL_USE in demo.banner.value


def test_report_and_answer_follow_the_chosen_image(demo):
    demo.report_button.click()
    demo.ask_button.click()
    assert "0.12" in demo.said["report"] and "No" in demo.said["answer"]
    demo.example.index = 1
    assert demo.said == {"report": "", "answer": ""}  # nothing stale beside a new image
    demo.ask_button.click()
    assert "Yes" in demo.said["answer"] and demo.message.value == ""


def test_model_text_is_escaped(demo):
    demo.report()
    assert "&lt;b&gt;" in demo.texts["report"].value


def test_upload_replaces_the_example(demo):
    demo.upload("mine.png", png(190, 250))
    demo.ask()
    assert "Yes" in demo.said["answer"]


@pytest.mark.parametrize("content", [b"", b"not an image", png(0, 60)[:80]], ids=["empty", "text", "truncated"])
def test_a_bad_upload_is_one_sentence_that_names_the_file(demo, content):
    before = demo.picture.value
    demo.upload("my file.png", content)
    assert "my file.png" in demo.message.value and "Traceback" not in demo.message.value
    assert "tmp" not in demo.message.value
    assert demo.picture.value == before


def test_an_empty_question_is_refused(demo):
    demo.question.value = "  "
    demo.ask_button.click()
    assert "question is empty" in demo.message.value and demo.said["answer"] == ""


def test_without_examples_the_form_asks_for_an_image():
    form = Demo(BrightnessReporter(), {})
    assert form.message.value == ""
    form.report()
    assert "no image yet" in form.message.value


def test_overlay_changes_the_picture_and_back(demo):
    plain = demo.picture.value
    demo.overlay.value = "Edema"
    assert demo.picture.value != plain and demo.maps is not None
    demo.overlay.value = demo.overlay.options[0]
    assert demo.picture.value == plain


def test_what_is_not_there_has_no_map(demo):
    plain = demo.picture.value
    demo.overlay.value = "Fracture"
    assert demo.picture.value == plain and "finds no Fracture (probability 0.10)" in demo.message.value


def test_static_figure_shows_banner_and_text(demo):
    demo.report()
    figure = demo.figure()
    words = " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))
    assert NOT_FOR_CLINICAL_USE in words and "Brightness" in words
