"""The SASA and the detector that notebook 03 builds in front of the reader compute what the package computes."""

import ast
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from lightmedvlm_utils.model.connectors import build_connector
from lightmedvlm_utils.model.connectors import evidence as package_evidence

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "03_building_sasa.ipynb"
WRITTEN_OUT = ("refinement", "sine_positions", "SASA", "Detector")
DISEASE_READER = {"state_words"}  # words that the package keeps, not among the thesis' formulas
C, D = 24, 32


@pytest.fixture(scope="module")
def lesson():
    """The notebook's own definitions, executed on their own."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = [node for node in ast.parse(code).body if getattr(node, "name", "") in WRITTEN_OUT]
    assert [node.name for node in found] == list(WRITTEN_OUT)
    names = {"interpolate": interpolate, "math": math, "nn": nn, "torch": torch}
    exec(compile(ast.Module(found, []), str(NOTEBOOK), "exec"), names)
    return names


def pair(lesson, grid, **options):
    """A connector of the package with random weights everywhere, and the notebook's with the same ones."""
    torch.manual_seed(0)
    package = build_connector("sasa", C, D, grid, **options)
    with torch.no_grad():
        for value in package.parameters():
            value.add_(0.1 * torch.randn_like(value))  # so that no bias is zero and no scale one
    positions = lesson["sine_positions"](grid, D) if options.pop("key_positions", False) else 0.0
    mine = lesson["SASA"](C, D, grid, positions=positions, **options)
    weights = package.state_dict()
    assert set(weights) - set(mine.state_dict()) == DISEASE_READER
    mine.load_state_dict({name: value for name, value in weights.items() if name not in DISEASE_READER})
    return package, mine


CONFIGURATIONS = [
    {},  # the thesis'
    {"num_queries": 20, "key_positions": True, "output_scale": 0.02},  # as the small profiles have it
    {"num_queries": 14, "num_heads": 4},
]


@pytest.mark.parametrize("options", CONFIGURATIONS)
@pytest.mark.parametrize("grid", [(7, 7), (4, 6)])
@pytest.mark.parametrize("batch", [1, 3])
def test_equal_weights_give_equal_outputs(lesson, grid, batch, options):
    package, mine = pair(lesson, grid, **options)
    features = torch.randn(batch, grid[0] * grid[1], C)
    expected = package.eval()(features)
    assert expected.shape == (batch, options.get("num_queries", 64), D)
    torch.testing.assert_close(mine.eval()(features), expected)


def test_they_learn_alike(lesson):
    """In training mode too: batch statistics, dropout and every gradient."""
    package, mine = pair(lesson, (7, 7))
    features, gradients = torch.randn(3, 49, C), []
    for connector in (package.train(), mine.train()):
        torch.manual_seed(1)  # the same dropout for both
        connector(features).square().mean().backward()
        gradients.append({n: p.grad for n, p in connector.named_parameters() if n not in DISEASE_READER})
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(mine.refine[1].running_mean, package.refine[1].running_mean)


def test_positions_tell_places_apart(lesson):
    codes = lesson["sine_positions"]((4, 6), D)
    assert codes.shape == (24, D)
    distances = torch.cdist(codes, codes) + torch.eye(24)
    assert distances.min() > 0.1
    torch.testing.assert_close(codes, build_connector("sasa", C, D, (4, 6), key_positions=True).positions)


@pytest.mark.parametrize("grids", [((28, 28), (14, 14), (7, 7)), ((12, 8), (6, 4), (3, 2))])
def test_the_detector_finds_alike(lesson, grids):
    """Logits, attention and their gradients by every weight that both have."""
    torch.manual_seed(0)
    widths = (8, 16, C)
    package = package_evidence.Detector(widths, D, num_labels=14, num_words=5)
    with torch.no_grad():
        for value in package.parameters():
            value.add_(0.1 * torch.randn_like(value))
    mine = lesson["Detector"](widths, torch.zeros(14, D))
    shared = mine.state_dict().keys()
    mine.load_state_dict({name: value for name, value in package.state_dict().items() if name in shared})
    stages = tuple(torch.randn(2, *grid, width) for grid, width in zip(grids, widths, strict=True))
    expected, (scores, logits, attention) = package(stages), mine(stages)
    torch.testing.assert_close(scores, expected.scores.flatten(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention, expected.attention.flatten(2), rtol=1e-4, atol=1e-6)
    for found in (logits, expected.logits):
        found.square().sum().backward()
    gradients = {name: value.grad for name, value in package.named_parameters() if name in shared}
    torch.testing.assert_close(
        {name: value.grad for name, value in mine.named_parameters()}, gradients, rtol=1e-3, atol=1e-4
    )
