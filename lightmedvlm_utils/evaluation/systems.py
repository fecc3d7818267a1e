"""The systems of an evaluation: what each is called in records, and what in tables and figures."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import combinations

BASELINES = {
    "nearest_neighbour": "nearest neighbor",
    "finding_neighbour": "nearest by findings",
    "most_frequent": "most frequent",
    "text_only": "question's words",
    "mean_mask": "mean training mask",
    "center": "image center",
    "uniform": "uniform map",
}


MINUS = "_minus_"  # in the name of a paired difference


@dataclass(frozen=True)
class Systems:
    """`connectors` maps the names of a run's connectors to their titles; the first is the lesson's own, which also
    stands behind `shuffled_image`, `blind` and the final model."""

    connectors: dict[str, str]

    @property
    def first(self) -> str:
        return next(iter(self.connectors))

    @property
    def final(self) -> str:
        """The lesson's own connector after the last stage, asked for reports."""
        return f"{self.first}_stage3"

    def shuffled(self, connector: str) -> str:
        """A connector's model shown another patient's image."""
        return "shuffled_image" if connector == self.first else f"shuffled_image_{connector}"

    def pairs(self, available: Collection[str]) -> list[tuple[str, str]]:
        """The comparisons that a reader will ask for, as far as both systems are there: the lesson's own connector and
        the final model against each other and against retrieval, and every other connector."""
        first, final, rivals = self.first, self.final, list(self.connectors)[1:]
        pairs = [(first, rival) for rival in rivals]
        for neighbor in ("nearest_neighbour", "finding_neighbour"):
            pairs += [(system, neighbor) for system in (first, final, *rivals)]
        pairs += [(final, first), *combinations(rivals, 2)]
        return [pair for pair in pairs if set(pair) <= set(available)]

    @staticmethod
    def difference(one: str, other: str) -> str:
        """The name of the paired difference one - other."""
        return f"{one}{MINUS}{other}"

    def names(self) -> dict[str, str]:
        """Every system's name in figures, in the order of figures."""
        title = self.connectors[self.first]
        shuffled = {self.shuffled(c): f"{own}, another patient's image" for c, own in self.connectors.items()}
        return {
            self.first: title,
            self.final: f"{title} after stage 3",
            **self.connectors,
            **BASELINES,
            **shuffled,
            "blind": f"{title}, average image",
            f"{self.first}_reworded": f"{title}, asked in other words",
            f"{self.first}_held_out_words": f"{title}, asked in words held out",
        }
