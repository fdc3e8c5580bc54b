"""Miniature datasets, each in its exact layout on disk, with the odd files that real ones have."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((61, 37), (48, 48), (40, 90), (53, 70))  # (H, W), pixels
MODES = ("RGB", "L", "CMYK", "RGB")


def write_pair(i, image, label, ids, ignored=False, size=None, void=255):
    """An image and its label map: blocks of two of the given ids, or of `void` alone."""
    rng, (H, W) = np.random.default_rng(i), size or SIZES[i % len(SIZES)]
    blocks = rng.choice(rng.choice(ids, 2, replace=False), (3, 3)) if not ignored else np.full((3, 3), void)
    mask = np.kron(blocks, np.ones((H // 3 + 1, W // 3 + 1)))[:H, :W].astype(np.uint8)
    mask[:2] = void
    colours = np.random.default_rng(9).integers(0, 256, (256, 3), dtype=np.uint8)
    picture = (colours[mask] * 0.8 + rng.integers(0, 50, (H, W, 3))).astype(np.uint8)
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    mode = MODES[i % len(MODES)] if image.suffix.lower() != ".png" else "RGB"
    Image.fromarray(picture).convert(mode).save(image)
    Image.fromarray(mask).save(label)


def write_list(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def pascal(root, lists, labels, ids):
    for j, (split, label) in enumerate(zip(lists, labels)):
        names = [f"2007_{j}{i:05d}" for i in range(4)]
        write_list(root / f"{lists[split]}", names)
        for i, name in enumerate(names):
            write_pair(10 * j + i, root / f"JPEGImages/{name}.jpg", root / f"{label}/{name}.png", ids, ignored=i == 3)


def write_voc(root: Path):
    lists = {split: f"ImageSets/Segmentation/{split}.txt" for split in ("train", "trainaug", "val")}
    pascal(
        root / "VOCdevkit/VOC2012",
        lists,
        ("SegmentationClass", "SegmentationClassAug", "SegmentationClass"),
        (0, 1, 2, 16, 20),
    )


def write_context(root: Path):
    pascal(
        root / "VOCdevkit/VOC2010",
        {"train": "train.txt", "val": "val.txt"},
        ("SegmentationClassContext",) * 2,
        (0, 1, 5, 20, 59),
    )


def write_coco(root: Path, ids=(0, 7, 19, 170)):
    for j, split in enumerate(("train2017", "val2017")):
        for i in range(4):
            name, base = f"{1000 * j + i:012d}", root / "coco_stuff164k"
            write_pair(
                10 * j + i,
                base / f"{split}/{name}.jpg",
                base / f"annotations/{split}/{name}_labelTrainIds.png",
                ids,
                ignored=i == 3,
            )


def write_ade(root: Path, ids=(0, 1, 2, 3, 150), n=4, void=0):
    for j, split in enumerate(("training", "validation")):
        for i in range(n):
            name, base = f"ADE_{j}_{i:08d}", root / "ade/ADEChallengeData2016"
            write_pair(
                10 * j + i,
                base / f"images/{split}/{name}.jpg",
                base / f"annotations/{split}/{name}.png",
                ids,
                ignored=i == 3,
                void=void,
            )


def write_cityscapes(root: Path):
    for j, split in enumerate(("train", "val")):
        for i, town in enumerate(("aachen", "aachen", "bremen", "ulm")):
            base, name = root / "cityscapes", f"{split}/{town}/{town}_{i:06d}_000019"
            label = base / f"gtFine/{name}_gtFine_labelTrainIds.png"
            write_pair(10 * j + i, base / f"leftImg8bit/{name}_leftImg8bit.png", label, (0, 5, 18), ignored=i == 3)
            Image.open(label).save(base / f"gtFine/{name}_gtFine_labelIds.png")


def write_camvid(root: Path):
    for j, split in enumerate(("train", "val")):
        for i in range(4):
            base, name = root / "CamVid", f"{split}/0001TP_{i:06d}.png"
            write_pair(10 * j + i, base / name, base / name.replace("/", "annot/"), (0, 3, 10, 11), i == 3, void=11)


def write_folder(root: Path, ids=(0, 1, 2), size=None, n=4, **about):
    about = {"classes": ["brick", "page", "tissue"], "unseen": ["tissue"]} | about
    for j, split in enumerate(("train", "val")):
        for i in range(n):
            ending = ("jpg", "png", "JPG", "png")[i % 4] if i != 2 else "jpg"
            write_pair(
                10 * j + i,
                root / f"images/{split}/photo {i}.{ending}"
                if MODES[i % 4] != "CMYK"
                else root / f"images/{split}/photo {i}.jpg",
                root / f"labels/{split}/photo {i}.png",
                ids,
                size=size,
            )
    (root / "dataset.json").write_text(json.dumps(about))


WRITERS = {
    "voc": write_voc,
    "context": write_context,
    "coco": write_coco,
    "ade": write_ade,
    "cityscapes": write_cityscapes,
    "camvid": write_camvid,
    "folder": write_folder,
}
