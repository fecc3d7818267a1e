"""Where radiologists saw a finding: the boxes that are published for MIMIC-CXR, as masks in the encoder's frame.

MS-CXR (Boecking et al. 2022, PhysioNet) boxes what a sentence speaks of; Chest ImaGenome (Wu et al. 2021, PhysioNet)
boxes the anatomical regions of each film and says which findings they have. `read_boxes` takes either.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from lightmedvlm_utils.data.sources import read_csv
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.observations import FINDINGS

COLUMNS = ["dicom_id", "label", "left", "top", "right", "bottom"]
_MS_CXR = ["dicom_id", "category_name", "x", "y", "w", "h", "image_width", "image_height"]
_CORNERS = ["original_x1", "original_y1", "original_x2", "original_y2"]  # pixels of the image as published
# What Chest ImaGenome calls the 14 labels' findings, apart from those whose name is a label's own.
_IMAGENOME = {
    "linear/patchy atelectasis": "Atelectasis",
    "lobar/segmental collapse": "Atelectasis",
    "enlarged cardiac silhouette": "Cardiomegaly",
    "pulmonary edema/hazy opacity": "Edema",
    "mediastinal widening": "Enlarged Cardiomediastinum",
    "superior mediastinal mass/enlargement": "Enlarged Cardiomediastinum",
    "rib fracture": "Fracture",
    "clavicle fracture": "Fracture",
    "spinal fracture": "Fracture",
    "mass/nodule (not otherwise specified)": "Lung Lesion",
    "multiple masses/nodules": "Lung Lesion",
    "airspace opacity": "Lung Opacity",
    "pleural/parenchymal scarring": "Pleural Other",
}
_LABEL_OF = {label.lower(): label for label in FINDINGS} | _IMAGENOME
_DEVICES = ("tubesandlines", "device")  # categories


def read_boxes(path: Path | str, films: Iterable[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The boxes of these films (their dicom_id), and what was skipped: file or film, reason.

    `path` is MS-CXR's table (`MS_CXR_Local_Alignment_*.csv`) or its folder, or Chest ImaGenome's folder, of which only
    the scene graphs of `films` are opened. Boxes are COLUMNS, corners as shares of the image's width and height, or in
    its pixels where the source does not know its size (`is_pixels`). UserError where `path` is neither.
    """
    path, wanted = Path(path).expanduser(), set(films)
    tables = sorted(path.glob("MS_CXR_Local_Alignment_*.csv")) if path.is_dir() else [path]
    graphs = [folder for folder in (path / "silver_dataset/scene_graph", path / "scene_graph", path) if folder.is_dir()]
    if path.is_file() or (path.is_dir() and tables):
        rows, skipped = _ms_cxr(tables[-1], wanted)
    elif graphs and any(graphs[0].glob("*_SceneGraph.json")):
        rows, skipped = _imagenome(graphs[0], wanted)
    else:
        raise UserError(
            f"{path} holds neither MS-CXR's table nor Chest ImaGenome's scene graphs; give the folder of one of them."
        )
    boxes = pd.DataFrame(rows, columns=[*COLUMNS, "is_pixels"])
    return boxes, pd.DataFrame(skipped, columns=["file", "reason"])


def _ms_cxr(path: Path, wanted: set[str]) -> tuple[list[tuple], list[tuple[str, str]]]:
    table = read_csv(path, _MS_CXR, dtype={"dicom_id": str})
    numbers = table[_MS_CXR[2:]].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    rows, skipped = [], []
    for film, name, (x, y, w, h, width, height) in zip(table["dicom_id"], table["category_name"], numbers, strict=True):
        if film not in wanted:
            continue
        label = _LABEL_OF.get(str(name).lower())
        if label is None:
            skipped.append((film, f"no label is called {name!r}"))
        elif not (np.isfinite([x, y, w, h, width, height]).all() and min(w, h, width, height) > 0):
            skipped.append((film, "a box without a size"))
        else:
            rows.append((film, label, x / width, y / height, (x + w) / width, (y + h) / height, False))
    return rows, skipped


def _imagenome(folder: Path, wanted: set[str]) -> tuple[list[tuple], list[tuple[str, str]]]:
    rows, skipped = [], []
    for film in sorted(wanted):
        path = folder / f"{film}_SceneGraph.json"
        if not path.is_file():
            continue
        try:
            graph = json.loads(path.read_text(encoding="utf-8"))
            corners = {one["bbox_name"]: [float(one[name]) for name in _CORNERS] for one in graph["objects"]}
            found = [(one["bbox_name"], said) for one in graph["attributes"] for said in _said(one["attributes"])]
        except (OSError, ValueError, KeyError, TypeError) as error:
            skipped.append((path.name, f"no readable scene graph ({type(error).__name__})"))
            continue
        for region, label in dict.fromkeys(found):
            left, top, right, bottom = corners.get(region, [0.0] * 4)
            if right > left and bottom > top:
                rows.append((film, label, left, top, right, bottom, True))
            else:
                skipped.append((path.name, f"no box for {region}"))
    return rows, skipped


def _said(phrases: list[list[str]]) -> Iterable[str]:
    """The labels that a region is said to have: of "category|yes|name" those whose name is one's."""
    for attribute in (one for phrase in phrases for one in phrase):
        category, said, name = (*attribute.split("|"), "", "")[:3]
        if said == "yes" and category in _DEVICES:
            yield "Support Devices"
        elif said == "yes" and name in _LABEL_OF:
            yield _LABEL_OF[name]


def box_masks(boxes: pd.DataFrame, size: tuple[int, int], side: int, pad: bool = True) -> dict[str, np.ndarray]:
    """The boxes of one film of `size` (height, width) as masks: label -> (side, side) bool, true in every cell that a
    box touches.

    The grid covers what a square encoder sees: the film padded to a square as `Processor.transform` does it, or
    stretched to one.
    """
    height, width = size
    tall, wide = (max(size),) * 2 if pad else size
    above, before = (tall - height) // 2, (wide - width) // 2
    found: dict[str, np.ndarray] = {}
    for box in boxes.itertuples():
        across, down = (1, 1) if box.is_pixels else (width, height)
        left, right = ((edge * across + before) / wide * side for edge in (box.left, box.right))
        top, bottom = ((edge * down + above) / tall * side for edge in (box.top, box.bottom))
        rows = slice(max(0, math.floor(top)), max(0, math.ceil(bottom)))
        columns = slice(max(0, math.floor(left)), max(0, math.ceil(right)))
        found.setdefault(box.label, np.zeros((side, side), bool))[rows, columns] = True
    return found
