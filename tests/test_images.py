"""read_image: every format gives the same picture, and every failure one sentence that names the file."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)

from lightmedvlm_utils.data.images import MIN_SIDE, read_image
from lightmedvlm_utils.errors import UserError


def radiograph(height=48, width=40) -> np.ndarray:
    """An asymmetric test picture in 0..1: a ramp with a bright block in the upper left."""
    image = np.linspace(0, 0.7, height * width).reshape(height, width)
    image[4:12, 3:9] = 1.0
    image[0, 0] = 0.0
    return image


def dicom(stored: np.ndarray, syntax=ExplicitVRLittleEndian, **elements) -> Dataset:
    """A minimal DX object around unsigned 16-bit stored values."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PixelData = stored.astype("<u2").tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    if syntax in (RLELossless, JPEG2000Lossless):
        dataset.compress(syntax, generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def twelve_bits() -> np.ndarray:
    return np.round(radiograph() * 4095).astype(np.uint16)


def save(dataset: Dataset, path):
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize(
    "mode, suffix",
    [(m, ".png") for m in ("L", "RGB", "RGBA", "LA", "P")] + [(m, ".jpg") for m in ("L", "RGB", "CMYK")],
)
def test_raster_modes_give_the_same_picture(tmp_path, mode, suffix):
    gray = Image.fromarray(np.round(radiograph() * 255).astype(np.uint8))
    # A palette of its own keeps 256 gray levels; convert("P") would map to web colors.
    picture = gray.quantize(256) if mode == "P" else gray.convert(mode)
    picture.save(tmp_path / f"image{suffix}", quality=95)
    image = read_image(tmp_path / f"image{suffix}")
    assert image.dtype == np.float32 and image.shape == (48, 40)
    assert np.abs(image - radiograph()).mean() < 0.02
    assert image[8, 6] > 0.95 and image[1, 20] < 0.1


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_sixteen_bit_png_uses_the_bits_that_the_file_uses(tmp_path, bits):
    Image.fromarray(np.round(radiograph() * (2**bits - 1)).astype(np.uint16)).save(tmp_path / "image.png")
    np.testing.assert_allclose(read_image(tmp_path / "image.png"), radiograph(), atol=1 / 255)


def test_transparent_pixels_are_black_and_orientation_is_applied(tmp_path):
    rgba = np.full((20, 30, 4), 200, np.uint8)
    rgba[:, :10, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "alpha.png")[:, :10].max() == 0
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    Image.fromarray(np.round(radiograph() * 255).astype(np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (40, 48)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_dicom_transfer_syntaxes(tmp_path, syntax):
    path = save(dicom(twelve_bits(), syntax), tmp_path / "image.png")  # the suffix lies, the content counts
    np.testing.assert_allclose(read_image(path), radiograph(), atol=1e-3)


def test_monochrome1_is_inverted(tmp_path):
    path = save(dicom(4095 - twelve_bits(), PhotometricInterpretation="MONOCHROME1"), tmp_path / "image.dcm")
    np.testing.assert_allclose(read_image(path), radiograph(), atol=1e-3)


def test_window_clips_and_rescale_comes_before_it(tmp_path):
    elements = dict(RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=2 * 1024 - 1000, WindowWidth=2048)
    image = read_image(save(dicom(twelve_bits(), **elements), tmp_path / "image.dcm"))
    np.testing.assert_allclose(image, np.clip((radiograph() * 4095 - 512) / 1024, 0, 1), atol=5e-3)


def test_first_of_several_windows_counts(tmp_path):
    one = dicom(twelve_bits(), WindowCenter=1000, WindowWidth=500)
    two = dicom(twelve_bits(), WindowCenter=[1000, 3000], WindowWidth=[500, 4000])
    images = [read_image(save(d, tmp_path / f"{i}.dcm")) for i, d in enumerate((one, two))]
    np.testing.assert_array_equal(*images)


def test_voi_lut_is_applied(tmp_path):
    lut = Dataset()
    lut.LUTDescriptor, lut.LUTExplanation = [4096, 0, 16], "square root"
    lut.LUTData = np.round(np.sqrt(np.linspace(0, 1, 4096)) * 65535).astype("<u2").tobytes()
    path = save(dicom(twelve_bits(), VOILUTSequence=[lut]), tmp_path / "image.dcm")
    np.testing.assert_allclose(read_image(path), np.sqrt(radiograph()), atol=1e-2)


def test_padding_neither_stretches_nor_shines(tmp_path):
    stored = 4095 - np.round(1000 + radiograph() * 1000).astype(np.uint16)
    stored[:, -5:] = 0  # outside the detector: as "air" it would be white after the inversion
    elements = dict(PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0)
    image = read_image(save(dicom(stored, **elements), tmp_path / "image.dcm"))
    assert image[:, -5:].max() == 0
    np.testing.assert_allclose(image[:, :-5], radiograph()[:, :-5], atol=2e-3)


def test_color_dicom_becomes_gray(tmp_path):
    rgb = np.repeat(np.round(radiograph() * 255).astype(np.uint8)[..., None], 3, axis=2)
    elements = dict(SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB")
    bits = dict(BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=rgb.tobytes())
    path = save(dicom(twelve_bits(), **elements, **bits), tmp_path / "image.dcm")
    np.testing.assert_allclose(read_image(path), radiograph(), atol=1 / 255)


def test_dicom_without_preamble_or_meta_header(tmp_path):
    dataset = dicom(twelve_bits(), ImplicitVRLittleEndian)
    del dataset.file_meta
    dataset.save_as(tmp_path / "old.dcm", implicit_vr=True, little_endian=True)
    assert (tmp_path / "old.dcm").read_bytes()[128:132] != b"DICM"
    np.testing.assert_allclose(read_image(tmp_path / "old.dcm"), radiograph(), atol=1e-3)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def bad_files(folder):
    """(file, words that its sentence must hold) for every way a file can be wrong."""
    gray = Image.fromarray(np.round(radiograph(200, 160) * 255).astype(np.uint8))
    for suffix in ("png", "jpg"):
        whole = folder / f"whole.{suffix}"
        gray.save(whole)
        for share in (0.02, 0.5, 0.9):
            cut = folder / f"cut-{share}.{suffix}"
            cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
            yield cut, "damaged"
    yield folder / "missing.png", "does not exist"
    yield folder, "is a folder"
    for name, content, words in (
        ("empty.png", b"", "is empty"),
        ("report.txt", b"Findings: the lungs are clear.\n" * 20, "is not a PNG, JPEG or DICOM"),
        ("renamed.jpg", b"%PDF-1.7\n" * 50, "is not a PNG, JPEG or DICOM"),
        ("bomb.png", png_header(60_000, 60_000), "pixels"),
        ("large.png", png_header(9_000, 9_000), "million"),
        ("huge.png", png_header(2**31 - 1, 2**31 - 1), "pixels"),
        ("zeros.bin", bytes(5000), "is not a PNG, JPEG or DICOM"),
    ):
        (folder / name).write_bytes(content)
        yield folder / name, words
    for name, shape, words in (("one.png", (1, 1), "1 x 1"), ("thin.png", (400, MIN_SIDE - 1), "at least")):
        Image.fromarray(np.full(shape, 90, np.uint8)).save(folder / name)
        yield folder / name, words
    for level in (0, 128, 255):
        path = folder / f"constant-{level}.jpg"
        Image.fromarray(np.full((64, 64), level, np.uint8)).save(path)
        yield path, "blank"
    yield from bad_dicoms(folder)


def bad_dicoms(folder):
    without = dicom(twelve_bits())
    del without.PixelData
    yield save(without, folder / "structured.dcm"), "without pixel data"
    for name, dataset, words in (
        ("frames.dcm", dicom(twelve_bits(), NumberOfFrames=2), "2 frames"),
        ("palette.dcm", dicom(twelve_bits(), PhotometricInterpretation="PALETTE COLOR"), "PALETTE COLOR"),
        ("tiny.dcm", dicom(np.ones((1, 1), np.uint16)), "1 x 1"),
        (
            "flat.dcm",
            dicom(np.full((32, 32), 7, np.uint16), PhotometricInterpretation="MONOCHROME1"),
            "blank",
        ),
        ("short.dcm", dicom(twelve_bits(), PixelData=bytes(100)), "damaged"),
    ):
        yield save(dataset, folder / name), words
    for syntax in (ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless):
        whole = save(dicom(twelve_bits(), syntax), folder / "whole.dcm").read_bytes()
        for share in (0.3, 0.7):
            cut = folder / f"cut-{syntax.name[:12]}-{share}.dcm"
            cut.write_bytes(whole[: int(len(whole) * share)])
            yield cut, str(cut)
    unknown = dicom(twelve_bits())
    unknown.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.103"  # MPEG-4, which no radiograph uses
    unknown.PixelData = b"\xfe\xff\x00\xe0\x00\x00\x00\x00\xfe\xff\x00\xe0\x04\x00\x00\x00abcd"
    unknown["PixelData"].is_undefined_length = True
    yield save(unknown, folder / "video.dcm"), "cannot be decompressed"


def test_every_bad_file_gives_one_sentence(tmp_path):
    for path, words in bad_files(tmp_path):
        with pytest.raises(UserError) as caught:
            read_image(path)
        sentence = str(caught.value)
        assert str(path) in sentence and words in sentence, sentence
        assert "\n" not in sentence and sentence.endswith("."), sentence


def test_truncated_images_stay_refused_when_another_library_allows_them(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    Image.fromarray(np.round(radiograph(200, 160) * 255).astype(np.uint8)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged"):
        read_image(tmp_path / "cut.jpg")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_file_without_read_permission(tmp_path):
    path = tmp_path / "secret.png"
    Image.fromarray(np.round(radiograph() * 255).astype(np.uint8)).save(path)
    path.chmod(0)
    with pytest.raises(UserError, match="permissions"):
        read_image(path)
