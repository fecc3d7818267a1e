"""Boxes of real data sets become masks of the frame that the encoder sees."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation

from lightmedvlm_utils.data.boxes import box_masks, read_boxes
from lightmedvlm_utils.data.images import image_size, read_image
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.model.processing import Processor

MS_CXR = """category_name,label_text,path,x,y,w,h,image_width,image_height,dicom_id,split
Pneumothorax,left apical,files/a.jpg,300,40,60,80,400,600,a,train
Pleural Effusion,right,files/a.jpg,0,500,100,100,400,600,a,train
Pneumonia,other film,files/z.jpg,0,0,10,10,400,600,z,train
Rib,what,files/a.jpg,1,1,5,5,400,600,a,train
Edema,no size,files/a.jpg,1,1,none,5,400,600,a,train
"""


def scene_graph(**boxes):
    objects = [
        dict(zip(("original_x1", "original_y1", "original_x2", "original_y2"), box, strict=True), bbox_name=name)
        for name, box in boxes.items()
    ]
    attributes = [
        {"bbox_name": "left", "attributes": [["anatomicalfinding|yes|pneumothorax", "nlp|yes|abnormal"]]},
        {"bbox_name": "right", "attributes": [["anatomicalfinding|no|pneumothorax"], ["tubesandlines|yes|picc"]]},
        {"bbox_name": "nowhere", "attributes": [["disease|yes|pneumonia"]]},
    ]
    return {"objects": objects, "attributes": attributes}


def test_ms_cxr(tmp_path):
    (tmp_path / "MS_CXR_Local_Alignment_v1.1.0.csv").write_text(MS_CXR)
    boxes, skipped = read_boxes(tmp_path, ["a", "b"])
    assert boxes.label.tolist() == ["Pneumothorax", "Pleural Effusion"] and set(boxes.dicom_id) == {"a"}
    assert sorted(skipped.reason) == ["a box without a size", "no label is called 'Rib'"]
    masks = box_masks(boxes, (600, 400), 60)  # the film is padded to 600 x 600 pixels: a cell has 10
    rows, columns = np.nonzero(masks["Pneumothorax"])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 11, 40, 45)
    assert np.nonzero(masks["Pleural Effusion"])[1].min() == 10, "the padding is no part of the film"


def test_chest_imagenome(tmp_path):
    folder = tmp_path / "silver_dataset" / "scene_graph"
    folder.mkdir(parents=True)
    (folder / "a_SceneGraph.json").write_text(json.dumps(scene_graph(left=(300, 40, 360, 120), right=(0, 0, 100, 60))))
    (folder / "b_SceneGraph.json").write_text("{")
    boxes, skipped = read_boxes(tmp_path, ["a", "b", "c"])
    assert dict(zip(boxes.label, boxes.left, strict=True)) == {"Pneumothorax": 300, "Support Devices": 0}
    assert set(skipped.file) == {"a_SceneGraph.json", "b_SceneGraph.json"}
    shares = boxes.assign(is_pixels=False, left=boxes.left / 400, right=boxes.right / 400)
    shares = shares.assign(top=boxes.top / 600, bottom=boxes.bottom / 600)
    for label, mask in box_masks(boxes, (600, 400), 60).items():
        assert np.array_equal(mask, box_masks(shares, (600, 400), 60)[label])


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256)])
@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_a_mask_lies_where_the_encoder_sees_the_box(size, fit, tiny_tokenizer):
    """A bright box in a film is bright in the encoder's image where its mask is true."""
    image = np.zeros(size, np.float32)
    image[30:90, 100:180] = 1
    processor = Processor(tiny_tokenizer, (64, 64), (0.0,), (1.0,), num_image_tokens=1, fit=fit)
    seen = processor.transform(image)[0].numpy() > 0.5
    box = pd.DataFrame([("a", "Edema", 100, 30, 180, 90, True)],
                       columns=["dicom_id", "label", "left", "top", "right", "bottom", "is_pixels"])  # fmt: skip
    mask = box_masks(box, size, 64, pad=fit == "pad")["Edema"]
    assert mask[seen].all() and binary_dilation(seen, np.ones((3, 3)))[mask].all(), "off by more than a cell"


def test_what_is_no_set_of_boxes_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither MS-CXR's table nor Chest ImaGenome's"):
        read_boxes(tmp_path, ["a"])
    (tmp_path / "MS_CXR_Local_Alignment_v1.1.0.csv").write_text("dicom_id,x\na,1\n")
    with pytest.raises(UserError, match="has no column"):
        read_boxes(tmp_path, ["a"])


@pytest.mark.parametrize("orientation", [1, 6])
def test_size_without_decoding(tmp_path, orientation):
    image = Image.fromarray(np.arange(30 * 40, dtype=np.uint16).reshape(30, 40).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == read_image(tmp_path / "a.jpg").shape
