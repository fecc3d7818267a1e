"""The SASA that notebook 03 builds in front of the reader computes what the package computes."""

import ast
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lightmedvlm_utils.model.connectors import build_connector

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "03_building_sasa.ipynb"
WRITTEN_OUT = ("refinement", "sine_positions", "SASA")
DISEASE_READER = {"state_words"}  # the package's extra part, not among the thesis' formulas
C, D = 24, 32


@pytest.fixture(scope="module")
def lesson():
    """The notebook's own definitions, executed on their own."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = [node for node in ast.parse(code).body if getattr(node, "name", "") in WRITTEN_OUT]
    assert [node.name for node in found] == list(WRITTEN_OUT)
    names = {"math": math, "nn": nn, "torch": torch}
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
