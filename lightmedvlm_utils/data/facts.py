"""interim, replaced"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from lightmedvlm_utils.data.labels import label_sentence


class Fact(NamedTuple):
    finding: str
    kind: str
    state: float
    side: str
    zone: str
    grade: str


DEV = (
    "endotracheal tube",
    "central line",
    "central venous catheter",
    "nasogastric tube",
    "chest tube",
    "pacemaker",
    "sternal wires",
    "sternotomy wires",
)


@lru_cache(maxsize=100_000)
def read_facts(report: str) -> tuple[Fact, ...]:
    out = []
    for section in re.split(r"Impression:", report)[:1]:
        for s in re.split(r"(?<=[a-z]\.)\s+(?=[A-Z0-9])", section.replace("Findings:", "")):
            s = s.lower().strip()
            for label, state in label_sentence(s):
                if label in ("Other Finding",):
                    continue
                side = (
                    "both"
                    if re.search(r"\bboth\b|bilateral", s)
                    else "left"
                    if "left" in s
                    else "right"
                    if re.search(r"\bright (?!atrium|ventricle|heart)", s)
                    else ""
                )
                z = re.search(r"\b(upper|middle|mid|lingula|lower|base|bases|apex|apices|apical)\b", s)
                zone = (
                    {
                        "middle": "mid",
                        "lingula": "mid",
                        "base": "basal",
                        "bases": "basal",
                        "apex": "apical",
                        "apices": "apical",
                    }.get(z[1], z[1])
                    if z
                    else ""
                )
                g = re.search(r"\b(minimal|mild|moderate|severe|tiny|small|large)", s)
                kind = ""
                if label == "Support Devices":
                    kind = next((d for d in DEV if d in s), "")
                    kind = {"central venous catheter": "central line", "sternotomy wires": "sternal wires"}.get(
                        kind, kind
                    )
                out.append(Fact(label, kind, state, side, zone, g[1] if g else ""))
    return tuple(out)
