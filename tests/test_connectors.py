"""A connector is one class and one line: what all of them promise, and what one of your own needs."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightmedvlm_utils.config import PROFILES
from lightmedvlm_utils.data.descriptions import WORDS
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.inference import Reporter
from lightmedvlm_utils.model import connectors
from lightmedvlm_utils.model.connectors import CONNECTORS, Connector, build_connector, profile_options, register
from lightmedvlm_utils.model.connectors.base import Known

PACKAGE = Path(connectors.__file__).parents[2]
C, D = 24, 32


@pytest.mark.parametrize("name", CONNECTORS)
@pytest.mark.parametrize("grid", [(7, 7), (4, 6)])
@pytest.mark.parametrize("queries", [20, 17])
def test_every_connector_turns_any_grid_into_as_many_tokens_as_it_says(name, grid, queries):
    torch.manual_seed(0)
    options = {"num_queries": queries} if "num_queries" in connectors.options_of(name) else {}
    connector = build_connector(name, C, D, grid, **options).eval()
    features = torch.randn(3, grid[0] * grid[1], C, requires_grad=True)
    tokens = connector(features)
    assert tokens.shape == (3, connector.num_output_tokens, D)
    assert connector.num_output_tokens == options.get("num_queries", grid[0] * grid[1])
    torch.testing.assert_close(connector(features[1:2]), tokens[1:2], atol=1e-5, rtol=1e-5)  # alone as in a batch
    tokens.square().sum().backward()
    assert (features.grad.abs().sum(-1) > 0).all(), "a token of the image is not looked at"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in connector.parameters())


@pytest.mark.parametrize("name", CONNECTORS)
def test_every_connector_learns_and_survives_the_disk(name, make_model, tmp_path):
    model, processor = make_model(name)
    batch = processor.for_training([processor.report_prompt()] * 2, ["No pneumothorax.", "Left pleural effusion."])
    batch["image_features"] = torch.randn(2, 49, 16)
    optimizer = torch.optim.Adam(model.connector.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(**batch).loss, model.eval()(**batch).loss)


@pytest.mark.parametrize("name", CONNECTORS)
def test_what_a_connector_lacks_it_says_in_a_sentence(name, make_model):
    model, processor = make_model(name)
    reporter, image = Reporter(model, processor, precision="float32"), torch.randn(49, 16)
    for has, ask, words in (
        (model.connector.has_attention_maps, lambda: reporter.attention(image), "no attention maps"),
        (model.connector.has_disease_head, lambda: reporter.findings([image]), "no disease head"),
    ):
        if has:
            assert len(ask()) in (1, 14)
        else:
            with pytest.raises(UserError, match=words):
                ask()


@pytest.mark.parametrize("name", ["mlp", "c-abstractor", "resampler"])
def test_a_connector_without_disease_tokens_can_be_taught_the_labels(name, make_model):
    """The head reads the labels from the tokens, so what it learns is in what the language model gets."""
    torch.manual_seed(0)
    model, _ = make_model(name, labels=True)
    connector, features = model.connector, torch.randn(6, 49, 16)
    states = (torch.rand(6, 14) < 0.3).float()
    known = Known(states, torch.zeros(6, 14, len(WORDS)))
    before, optimizer = connector(features), torch.optim.Adam(connector.parameters(), 1e-2)
    for _ in range(60):
        connector.disease_loss(features, known).backward()
        optimizer.step()
        optimizer.zero_grad()
    connector.eval()
    assert ((connector.disease_logits(features) > 0) == states.bool()).float().mean() > 0.95
    assert not torch.allclose(connector(features), before, atol=1e-2)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", CONNECTORS)
def test_profiles_fit_every_connector(name, profile):
    connectors.check_options(name, PROFILES[profile])
    assert "num_queries" not in profile_options("mlp", PROFILES[profile])


def test_a_pooled_grid_keeps_the_order_of_places():
    """What the C-Abstractor pools stays where it was: a mark in a corner moves the token of that corner most."""
    torch.manual_seed(0)
    connector = build_connector("c-abstractor", C, D, (8, 8), num_queries=16, depth=1).eval()
    features = torch.zeros(1, 8, 8, C)
    for row, column, token in ((0, 0, 0), (0, 7, 3), (7, 0, 12), (7, 7, 15)):
        marked = features.clone()
        marked[0, row, column] = 5.0
        moved = (connector(marked.flatten(1, 2)) - connector(features.flatten(1, 2))).norm(dim=-1)[0]
        assert moved.argmax() == token


class Mean(Connector):
    """The mean of all tokens, projected."""

    def __init__(self, vision_dim, llm_dim, grid):
        super().__init__()
        self.num_output_tokens, self.project = 1, nn.Linear(vision_dim, llm_dim)

    def forward(self, features):
        return self.project(features.mean(1, keepdim=True))


def test_one_class_and_one_line(monkeypatch, make_model):
    monkeypatch.setattr(connectors, "CONNECTORS", dict(CONNECTORS))
    register("mean", Mean)
    register("mean", Mean)  # a module may be imported twice
    model, processor = make_model("mean")
    assert isinstance(model.connector, Mean) and len(Reporter(model, processor).report([torch.randn(49, 16)])) == 1
    assert connectors.connector_titles(["mean", "sasa"]) == {"mean": "mean", "sasa": "SASA"}
    with pytest.raises(UserError, match="another name"):
        register("sasa", Mean)


def test_no_code_outside_asks_which_connector_it_has():
    """Names stand where something is chosen by default; nothing branches on one, and nothing probes for a method."""
    probing = re.compile(
        r'(?:==|!=|\bin\b) ?\(?"(?:sasa|mlp)"|isinstance\([^)]*SASA|hasattr\([^)]*(?:disease|attention)'
    )
    sources = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "connectors"]
    sources += [PACKAGE.parent / "notebooks" / name for name in ("04_stage1_alignment.ipynb", "07_evaluation.ipynb")]
    found = [f"{path.name}: {match[0]}" for path in sources for match in probing.finditer(path.read_text())]
    assert not found, found
