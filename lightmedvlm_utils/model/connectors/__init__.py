"""Connectors turn image tokens into language-model tokens: `(B, N, vision_dim) -> (B, Q, llm_dim)`.

`"sasa"` is the thesis' Spatially-Aware Semantic Abstractor, `"mlp"` its baseline projector; `"c-abstractor"` and
`"resampler"` are what the literature compares most. A new one is one class (see `Connector`) and one line: an entry of
CONNECTORS here, or `register("name", Class)` in a module of your own that the setting `plugins` names.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

from lightmedvlm_utils.config import Profile
from lightmedvlm_utils.errors import UserError, no_such
from lightmedvlm_utils.model.connectors.base import Connector
from lightmedvlm_utils.model.connectors.c_abstractor import CAbstractor
from lightmedvlm_utils.model.connectors.losses import STATES
from lightmedvlm_utils.model.connectors.mlp import MLPConnector
from lightmedvlm_utils.model.connectors.resampler import Resampler
from lightmedvlm_utils.model.connectors.sasa import SASA

CONNECTORS: dict[str, type[Connector]] = {
    "sasa": SASA,
    "mlp": MLPConnector,
    "c-abstractor": CAbstractor,
    "resampler": Resampler,
}

__all__ = ["CONNECTORS", "SASA", "STATES", "Connector", "build_connector", "connector_class", "register"]


def register(name: str, connector: type[Connector]) -> None:
    """Make a connector known by name, so that profiles, notebooks and checkpoints can ask for it."""
    if CONNECTORS.get(name, connector) is not connector:
        raise UserError(f"There is a connector {name!r} already; register {connector.__name__} by another name.")
    CONNECTORS[name] = connector


def connector_class(name: str) -> type[Connector]:
    """The class of that name; raises UserError for any other."""
    if name not in CONNECTORS:
        known = no_such("connector", name, CONNECTORS)
        raise UserError(f"{known} Your own is registered by its module: name that as --plugin, or in plugins.")
    return CONNECTORS[name]


def connector_titles(names: list[str]) -> dict[str, str]:
    """What the connectors are called in tables and figures, by name."""
    return {name: connector_class(name).title or name for name in names}


def options_of(name: str) -> list[str]:
    """The options of a connector: the keyword arguments of its class behind the three that all have."""
    return list(signature(connector_class(name)).parameters)[3:]


def build_connector(name: str, vision_dim: int, llm_dim: int, grid: tuple[int, int], **options: Any) -> Connector:
    """A connector by its name; `options` are keyword arguments of its class."""
    known = options_of(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(
            f"The connector {name!r} has no option {unknown[0]!r}; its options are {', '.join(known) or 'none'}."
        )
    make: Callable[..., Connector] = connector_class(name)
    return make(vision_dim, llm_dim, grid, **options)


def profile_options(name: str, profile: Profile) -> dict[str, Any]:
    """The options that a profile gives a connector: its number of queries where the connector chooses it, and what
    stands under its name."""
    queries = {"num_queries": profile.num_queries} if "num_queries" in options_of(name) else {}
    return queries | profile.connector_options.get(name, {})


def check_options(name: str, profile: Profile) -> None:
    """Raises UserError where a connector cannot be built with the profile's options; builds shapes, no weights."""
    options = profile_options(name, profile)
    try:
        with torch.device("meta"):
            build_connector(name, 960, 960, (7, 7), **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"The connector {name!r} cannot be built with {options} ({error}); correct them.") from error
