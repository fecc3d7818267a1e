"""The 14 CheXpert observations (Irvin et al. 2019, arXiv 1901.07031): their names, their order, their hierarchy."""

from __future__ import annotations

# In the order of SASA's queries (thesis).
LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
FINDINGS = tuple(label for label in LABELS if label != "No Finding")

# A statement about a child says something about its parent too.
CHILDREN = {
    "Lung Opacity": ("Atelectasis", "Consolidation", "Edema", "Lung Lesion", "Pneumonia"),
    "Enlarged Cardiomediastinum": ("Cardiomegaly",),
}
OPACITIES = CHILDREN["Lung Opacity"]  # where one of these is present, so is an opacity
