"""The systems of an evaluation: what each is called in records, and what in tables and figures."""

from __future__ import annotations

from dataclasses import dataclass

BASELINES = {
    "nearest_neighbour": "nearest neighbor",
    "most_frequent": "most frequent",
    "center": "image center",
    "uniform": "uniform map",
}


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

    def difference(self, connector: str) -> str:
        """The paired difference between the lesson's own connector and another."""
        return f"{self.first}_minus_{connector}"

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
        }
