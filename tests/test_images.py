"""The readers of images and label maps: every mode of Pillow in every format that holds it, and errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from otseg.images import from_array, open_image, read_image, read_label

RAMP = np.linspace(0, 255, 60).astype(np.uint8).reshape(6, 10)
GREY = Image.fromarray(RAMP)
COLOUR = Image.merge("RGB", [GREY, GREY.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.new("L", GREY.size, 90)])
SIXTEEN = Image.fromarray(RAMP.astype(np.uint16) * 257)
UNIT = Image.fromarray(RAMP.astype(np.float32) / 255)
MODES = {  # mode -> image, the same in 8-bit RGB
    "1": (GREY.point(lambda v: 255 * (v > 99), "1"), GREY.point(lambda v: 255 * (v > 99)).convert("RGB")),
    "L": (GREY, GREY.convert("RGB")),
    "LA": (GREY.convert("LA"), GREY.convert("RGB")),
    "P": (COLOUR.quantize(256), COLOUR),
    "RGB": (COLOUR, COLOUR),
    "RGBA": (COLOUR.convert("RGBA"), COLOUR),
    "CMYK": (COLOUR.convert("CMYK"), COLOUR),
    "I;16": (SIXTEEN, GREY.convert("RGB")),
    "I": (SIXTEEN.convert("I"), GREY.convert("RGB")),
    "F in [0, 1]": (UNIT, GREY.convert("RGB")),
    "F in [0, 255]": (Image.fromarray(RAMP.astype(np.float32)), GREY.convert("RGB")),
}
LOSSY = {"jpg": 60, "webp": 60}  # largest difference of a small picture, of 255
ENDINGS = ("png", "tif", "bmp", "gif", "webp", "jpg")


def written(image, path):
    "Whether Pillow writes the image in the format, without changing its mode."
    try:
        image.save(path)
    except (OSError, KeyError, ValueError):
        return False
    with Image.open(path) as again:
        return again.mode == image.mode


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_every_format(mode, tmp_path):
    image, want = MODES[mode]
    want, formats = np.asarray(want, int), []
    for ending in ENDINGS:
        if not written(image, path := tmp_path / f"a.{ending}"):
            continue
        formats.append(ending)
        tensor = read_image(path)
        ours = (255 * tensor).round().permute(1, 2, 0).numpy().astype(int)
        assert np.abs(ours - want).max() <= LOSSY.get(ending, 40 if mode == "P" else 2), ending
        assert (np.asarray(open_image(path)) == ours).all()  # training and prediction read the same
    assert formats, mode


def test_transparent_pixels_are_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 200, 0))
    image.save(tmp_path / "a.png")
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    for name in ("a.png", "p.png"):
        assert (255 * read_image(tmp_path / name)).round().int().flatten(1).T.tolist() == [[200, 0, 0], [255] * 3]


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (9, 5)), (6, (5, 0)), (8, (0, 9))])
def test_images_are_upright(tmp_path, orientation, corner):
    "The marked first pixel of the file is where a viewer shows it."
    image, exif = Image.new("RGB", (10, 6)), Image.Exif()
    image.putpixel((0, 0), (255, 255, 255))
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    upright = open_image(tmp_path / "a.png")
    assert upright.getpixel(corner) == (255, 255, 255) and np.asarray(upright).sum() == 3 * 255


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_label_maps_of_few_bits(tmp_path, bits):
    "Pillow stretches their values to 0..255; the ids stay."
    ids = torch.arange(2**bits).expand(3, -1)
    image = Image.fromarray(ids.numpy().astype(np.uint8))
    if bits == 1:
        image = image.point(lambda v: 255 * v, "1")
    image.save(tmp_path / "ids.png", bits=bits)
    assert read_label(tmp_path / "ids.png").tolist() == ids.tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_label_maps_keep_their_ids(tmp_path, dtype, ending):
    ids = np.array([[0, 1, 7], [200, 254, 255]], dtype)
    Image.fromarray(ids).save(tmp_path / f"ids.{ending}")
    label = read_label(tmp_path / f"ids.{ending}")
    assert label.dtype == torch.int64 and label.tolist() == ids.tolist()


def test_label_maps_with_a_palette(tmp_path):
    image = Image.fromarray(np.array([[0, 3], [15, 255]], np.uint8)).convert("P")
    image.putpalette([v for i in range(256) for v in (i, 255 - i, 0)])
    image.save(tmp_path / "ids.png")
    assert read_label(tmp_path / "ids.png").tolist() == [[0, 3], [15, 255]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_pictures_are_no_label_maps(tmp_path, mode):
    Image.new(mode, (2, 2)).save(tmp_path / "ids.png")
    with pytest.raises(ValueError, match=f"ids.png is a {mode} picture, but one channel of class ids is expected"):
        read_label(tmp_path / "ids.png")


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 2, 5)), r"shape \(2, 2, 5\)"),
        (np.array([["a"]]), "an image of type <U1"),
        (np.array([[-1.0]]), "values from -1 to -1"),
        (np.array([[300.0]]), "values from 300 to 300, but 0 to 255"),
        (np.array([[70_000]]), "0 to 65535 is possible"),
        (np.array([[np.nan]]), "undo a normalisation"),
        (torch.zeros(0, 4), r"shape \(0, 4\)"),
    ],
)
def test_arrays_that_are_no_images(array, message):
    with pytest.raises(ValueError, match=message):
        from_array(array)
