"""Read one chest radiograph from a PNG, JPEG or DICOM file, or say in one sentence why it cannot be read; and bring a
map over it to its size."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from textwrap import shorten

import numpy as np
from PIL import Image, ImageFile, ImageOps

from lightmedvlm_utils.errors import UserError

MIN_SIDE = 16  # pixels; below this there is nothing to read
MAX_PIXELS = 64_000_000  # the largest detectors give about 20 million; more is damage or a decompression bomb
MIN_CONTRAST = 2 / 255  # two grey levels of an 8-bit image
_RASTER_MARKS = (b"\x89PNG", b"\xff\xd8\xff")
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_EXPORT_HINT = "export it again as PNG, JPEG or DICOM"


def read_image(path: str | Path, smallest: int = 0) -> np.ndarray:
    """Read a radiograph as float32 `(height, width)` in 0..1, bone bright and air dark (MONOCHROME2).

    The file's content decides, not its suffix. A JPEG may be read at a half, a quarter or an eighth of its size, as
    long as both sides keep `smallest` pixels (0: at its full size): it is then decoded so much faster. Raises UserError
    for everything that cannot be shown as a radiograph; an image is never replaced by another one.
    """
    path = Path(path)
    head = _first_bytes(path)
    if _looks_like_dicom(head):
        image = _read_dicom(path)
    elif head.startswith(_RASTER_MARKS):
        image = _read_raster(path, smallest)
    else:
        raise UserError(f"{path} is not a PNG, JPEG or DICOM image; {_EXPORT_HINT}.")
    if float(np.ptp(image)) < MIN_CONTRAST:
        raise UserError(f"{path} is blank (every pixel has the same gray value); choose another image.")
    return image


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of what `read_image` returns; of a PNG or JPEG without decoding it."""
    path = Path(path)
    if not _first_bytes(path).startswith(_RASTER_MARKS):
        height, width = read_image(path).shape
        return height, width
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF's orientation: rows and columns are swapped
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} is damaged ({_reason(error)}); copy or {_EXPORT_HINT}.") from error


def enlarge(attention: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map `(h, w)` brought to `shape` by bilinear interpolation between cell centers."""
    from scipy.ndimage import zoom

    factors = np.divide(shape, attention.shape)
    return zoom(np.asarray(attention, float), factors, order=1, mode="nearest", grid_mode=True)


def _first_bytes(path: Path) -> bytes:
    """The first 132 bytes, after the checks that need no decoder."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one image file in it.")
    if not path.exists():
        raise UserError(f"{path} does not exist; check the name of the image file.")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; name a PNG, JPEG or DICOM file.")
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    if not head:
        raise UserError(f"{path} is empty (0 bytes); copy or {_EXPORT_HINT}.")
    return head


def _looks_like_dicom(head: bytes) -> bool:
    """True for the DICM mark behind the preamble, or a data set that starts without one: old archives begin
    with a low element of group 2 or 8, little-endian."""
    bare = head[:2] in (b"\x02\x00", b"\x08\x00") and head[2:4] <= b"\x20\x00" and head[3:4] == b"\x00"
    return head[128:132] == b"DICM" or bare


def _check_size(path: Path, width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise UserError(
            f"{path} is only {width} x {height} pixels; a radiograph needs at least {MIN_SIDE} on each side."
        )
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{path} claims {width} x {height} pixels, more than the {MAX_PIXELS // 10**6} million we open; "
            "scale it down or check that it is a radiograph."
        )


def _read_raster(path: Path, smallest: int = 0) -> np.ndarray:
    """A PNG or JPEG file as float32 0..1; `smallest` as in `read_image`."""
    # Another library may have switched this on for the whole process; half an image must not pass for one.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
            image = Image.open(path, formats=("PNG", "JPEG"))
        with image:
            _check_size(path, *image.size)
            if smallest:
                image.draft(None, (smallest, smallest))  # the scaling that JPEG's transform has for nothing
            image.load()
            return _to_gray(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} claims far more pixels than a radiograph has; check that it is one, or scale it down."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is damaged or incomplete ({_reason(error)}); {_EXPORT_HINT}.") from error


def _to_gray(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float32)
        # 16-bit files often carry 10, 12 or 14 bits: the full scale is the smallest one that holds the image.
        return pixels / (2.0 ** np.ceil(np.log2(max(float(pixels.max()), 255.0) + 1)) - 1)
    if image.has_transparency_data:
        # What lies under transparent pixels is arbitrary; film around the collimated field is black.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return np.asarray(image.convert("L"), dtype=np.float32) / 255


def _read_dicom(path: Path) -> np.ndarray:
    """A single-frame DICOM image as float32 0..1, through its modality LUT and VOI window."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's remarks on harmless deviations from the standard
            dataset = pydicom.dcmread(path, force=True)
            _check_dicom(path, dataset)
            _name_transfer_syntax(dataset)
            return _dicom_pixels(dataset)
    except (InvalidDicomError, EOFError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is a damaged or incomplete DICOM file ({_reason(error)}); {_EXPORT_HINT}.") from error
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{path} cannot be decompressed ({_reason(error)}); export it uncompressed, or as PNG."
        ) from error


def _check_dicom(path: Path, dataset) -> None:
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise UserError(
            f"{path} is a DICOM file without pixel data (another kind of object, or cut off in transfer); "
            "choose the radiograph itself or copy it again."
        )
    photometric = dataset.get("PhotometricInterpretation", "MONOCHROME2")
    if dataset.get("SamplesPerPixel", 1) == 1 and photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise UserError(f"{path} is a {photometric} image, not a grayscale radiograph; choose the original.")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise UserError(f"{path} holds {frames} frames; export the one radiograph that you mean.")
    _check_size(path, int(dataset.Columns), int(dataset.Rows))


def _name_transfer_syntax(dataset) -> None:
    """Files without a meta header do not say how they are encoded; pydicom has found out while parsing."""
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, _ = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian


def _dicom_pixels(dataset) -> np.ndarray:
    """Stored values -> modality LUT -> VOI -> stretched to 0..1 -> inverted for MONOCHROME1 (PS3.3 C.11)."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    stored = dataset.pixel_array
    if stored.ndim == 3:  # color, as in scanned films; pydicom has turned YBR into RGB
        return (stored @ _LUMINANCE / (2**dataset.BitsStored - 1)).astype(np.float32)
    shown = apply_voi_lut(apply_modality_lut(stored, dataset), dataset).astype(np.float32)
    inside = ~_padding(dataset, stored)
    low, high = (shown[inside].min(), shown[inside].max()) if inside.any() else (0, 0)
    if high <= low:
        return np.zeros_like(shown)  # blank: read_image refuses it
    image = np.clip((shown - low) / (high - low), 0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        image = 1 - image
    return np.where(inside, image, np.float32(0))


def _padding(dataset, stored: np.ndarray) -> np.ndarray:
    """Mask of the pixels outside the detector, which must neither be windowed nor stretch the gray scale."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = dataset.get("PixelPaddingRangeLimit", value)
    return (stored >= min(value, limit)) & (stored <= max(value, limit))


def _reason(error: Exception) -> str:
    """The gist of a decoder's message, short enough for a sentence."""
    lines = str(error).strip().splitlines()
    return shorten(lines[0].split(" - ")[0], 120, placeholder=" ...").rstrip(".") if lines else type(error).__name__
