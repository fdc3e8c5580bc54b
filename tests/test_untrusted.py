"""Untrusted files: no code in them runs, nothing outside their folder is read, and errors name what does not fit."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
import zlib

import pytest
import torch
import trees
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from otseg.benchmarks import BenchmarkSource, load_benchmark
from otseg.checkpoints import read_tensors, write_tensors
from otseg.checks import check
from otseg.clip import load_clip
from otseg.descriptions import Description, Part, read_description
from otseg.folders import pairs
from otseg.images import Unreadable, read_image, read_label
from otseg.models import load_model, read_checkpoint
from otseg.official import official_report, read_official
from otseg.recipes import resolve
from otseg.training import fit

few = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SMALL = dict(
    clip="digits_clip",
    image_size=32,
    stride=32,
    train_short_side=32,
    train_long_side=64,
    test_short_side=32,
    max_iters=2,
    batch_size=2,
    warmup_iters=1,
    val_interval=9,
    val_images=1,
    visual_prompts=2,
    num_templates=2,
    depth=2,
)


class Bomb:
    "Whoever unpickles it makes a folder."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# pickles


@pytest.mark.parametrize(
    "write",
    [
        lambda content, path: torch.save(content, path),
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
    ],
    ids=["zip", "old", "plain"],
)
@pytest.mark.parametrize("place", ["state_dict", "meta", "optimizer"])
def test_no_pickle_is_run(tmp_path, write, place):
    "By whatever reader, wherever in the file it is."
    trap = tmp_path / "trap"
    content = {"state_dict": {"backbone.proj": torch.ones(2, 2)}, "meta": {}, "optimizer": {}}
    content[place]["x"] = Bomb(trap)
    write(content, tmp_path / "a.pth")
    readers = [
        read_tensors,
        read_checkpoint,
        load_model,
        read_official,
        official_report,
        lambda path: load_model(path, trained=resolve("voc")),
        lambda path: load_clip(pretrained=path),
    ]
    for read in readers:
        with pytest.raises(ValueError, match="a.pth"):
            read(tmp_path / "a.pth")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.pth").read_bytes())
    for read in (read_tensors, read_checkpoint, load_model):
        with pytest.raises(ValueError, match="b.safetensors is not a checkpoint"):
            read(tmp_path / "b.safetensors")
    assert not trap.exists()


# checkpoints that do not fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    trees.write_folder(root, n=3)
    out = tmp_path_factory.mktemp("run")
    fit(resolve("folder", **SMALL), out, root=root, workers=0, progress=False)
    return out / "last.safetensors", root


def altered(path, out, change):
    state, about = read_tensors(path)
    change(state, about)
    write_tensors(out, state, about)
    return out


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s, a: s.pop("descriptor.proj.bias"), "descriptor.proj.bias is missing in the file"),
        (lambda s, a: s.update(extra=torch.ones(3)), "extra is .3,. in the file but unknown"),
        (
            lambda s, a: s.update({"descriptor.proj.bias": torch.ones(7)}),
            "descriptor.proj.bias is .7,. in the file but .128,. in the model",
        ),
        (lambda s, a: a.pop("classes"), "its header lacks"),
        (lambda s, a: a.update(recipe=[1]), "its header lacks"),
        (lambda s, a: a["recipe"].update(lr="fast"), "lr = 'fast': input should be a valid number"),
        (lambda s, a: a["recipe"].update(colour="red"), "no field 'colour'"),
        (lambda s, a: a["recipe"].update(depth=10**9), "depth"),
        (lambda s, a: a["recipe"].pop("dataset"), "does not know"),
    ],
)
def test_headers_and_tensors_that_do_not_fit(trained, tmp_path, change, says):
    path = altered(trained[0], tmp_path / "a.safetensors", change)
    with pytest.raises(ValueError, match=says):
        load_model(path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("attention", "softmax"),
        ("image_size", 48),
        ("eps", 0.1),
        ("depth", 3),
        ("visual_prompts", 3),
        ("num_templates", 3),
    ],
)
def test_another_model_as_the_start(trained, tmp_path, name, value):
    "Also where the shapes agree."
    recipe = resolve("folder", "transductive", **SMALL | {name: value})
    with pytest.raises(ValueError, match=f"{name} = |does not fit this model"):
        fit(recipe, tmp_path, init=trained[0], root=trained[1], workers=0, progress=False)


def test_another_class_list_as_the_start(trained, tmp_path):
    trees.write_folder(tmp_path, classes=["brick", "page", "grass"], unseen=["grass"])
    with pytest.raises(ValueError, match="number 2, is 'tissue' in the file and 'grass' in the dataset"):
        fit(
            resolve("folder", "transductive", **SMALL),
            tmp_path / "run",
            init=trained[0],
            root=tmp_path,
            workers=0,
            progress=False,
        )


# images


def png_that_claims(width, height):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(10_001, 10_001), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 2**30)])
def test_decompression_bombs(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_claims(*size))
    for read in (read_image, read_label):
        with pytest.raises(Unreadable, match="bomb.png"):
            read(path)


@few
@given(
    content=st.binary(max_size=300),
    head=st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"BM", b"II*\0"]
    ),
)
def test_any_bytes_as_an_image(tmp_path_factory, content, head):
    path = tmp_path_factory.mktemp("image") / "a.png"
    path.write_bytes(head + content)
    for read in (read_image, read_label):
        try:
            read(path)
        except ValueError as e:
            assert "a.png" in str(e)


@few
@given(data=st.data())
def test_a_spoilt_image(tmp_path_factory, data):
    "A good file with some bytes changed or cut: an image, or an error that names it."
    root = tmp_path_factory.mktemp("image")
    trees.write_pair(data.draw(st.integers(0, 3)), root / "a.jpg", root / "a.png", (0, 1))
    path = root / data.draw(st.sampled_from(["a.jpg", "a.png"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    for read in (read_image, read_label):
        try:
            read(path)
        except ValueError as e:
            assert path.name in str(e)


# lists, links and descriptions


@few
@given(
    text=st.text(max_size=60)
    | st.lists(st.sampled_from(["..", ".", "/", "a", "../../x", "\\", "~", "\0"]), max_size=6).map("".join)
)
def test_any_list_of_names(tmp_path_factory, text):
    "Every file that a list leads to lies in the dataset."
    root = tmp_path_factory.mktemp("voc").resolve()
    (root / "val.txt").write_text(text, encoding="utf-8")
    try:
        found = pairs(Part(images="JPEGImages/{}.jpg", labels="SegmentationClass/{}.png", list="val.txt"), root)
    except (ValueError, FileNotFoundError) as e:
        assert "val.txt" in str(e) or "are missing" in str(e)
    else:
        assert found == []


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_links_out_of_the_folder(tmp_path, kind):
    trees.write_folder(tmp_path / "mine")
    secret = tmp_path / "secret.png"
    victim = sorted((tmp_path / "mine" / kind / "val").iterdir())[0]
    victim.rename(secret)
    victim.symlink_to(secret)
    with pytest.raises(ValueError, match='leads to .*secret.png, outside of .*"links": true'):
        load_benchmark(BenchmarkSource("folder", root=tmp_path / "mine")).images("val")
    assert any("outside of" in line for line in check("folder", tmp_path / "mine")[1])


def test_a_linked_folder_as_a_whole_is_fine(tmp_path):
    trees.write_folder(tmp_path / "disk")
    (tmp_path / "mine").symlink_to(tmp_path / "disk")
    assert len(load_benchmark(BenchmarkSource("folder", root=tmp_path / "mine")).images("val")) == 4


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: (
        st.lists(x, max_size=4)
        | st.dictionaries(st.sampled_from([*Description.model_fields, "background", "x"]), x, max_size=4)
    ),
    max_leaves=8,
)


@few
@given(content=nested.map(json.dumps) | st.text(max_size=40) | st.binary(max_size=40))
def test_any_description(tmp_path_factory, content):
    "A dataset.json of any content is a description or an error that names the file."
    path = tmp_path_factory.mktemp("folder") / "dataset.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        about = read_description(path)
    except ValueError as e:
        assert "dataset.json" in str(e)
    else:
        assert about.names and about.name and all(0 <= i < len(about.names) for i in about.unseen_indices)


# fuzz of the readers of checkpoints


def good_files():
    buffer = io.BytesIO()
    torch.save({"state_dict": {"backbone.proj": torch.ones(4, 4)}, "meta": {"CLASSES": ["a"]}}, buffer)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as f:
        f.writestr("a/data.pkl", pickle.dumps({"x": 1}))
    return [
        save({"w": torch.ones(3)}, {"otseg": "{}", "seal": "0"}),
        buffer.getvalue(),
        archive.getvalue(),
        pickle.dumps({"state_dict": {}}),
        b"",
    ]


@few
@given(data=st.data())
def test_spoilt_checkpoints(tmp_path_factory, data):
    "Whatever a file holds, the readers return or raise ValueError with its name."
    content = bytearray(data.draw(st.sampled_from(good_files())))
    for _ in range(data.draw(st.integers(0, 6)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))]) + data.draw(st.binary(max_size=20))
    for name in ("a.safetensors", "a.pth"):
        path = tmp_path_factory.mktemp("fuzz") / name
        path.write_bytes(content)
        for read in (read_tensors, read_checkpoint, official_report):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    read(path)
                except ValueError as e:
                    assert str(e)
