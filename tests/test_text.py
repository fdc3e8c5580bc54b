"""Class embeddings: sentences, cache, files of other classes."""

import copy

import numpy as np
import open_clip
import pytest
import torch
from clips import Bomb, register_architectures
from safetensors.torch import save_file

from otseg import text as otseg_text
from otseg.clip import load_clip
from otseg.text import TEMPLATES, cached_class_embeddings, class_embeddings, read_embeddings


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    register_architectures(tmp_path_factory.mktemp("clip"))
    torch.manual_seed(0)
    return load_clip("test-quickgelu", None)


def test_embeddings(clip):
    names = ["dog", "potted plant", "sky"]
    text = class_embeddings(names, TEMPLATES[:6], clip)
    assert text.shape == (3, 6, 32) and text.dtype == torch.float32 and not text.requires_grad
    one = clip.encode_text(open_clip.tokenize(["a part of a potted plant."]), normalize=True)
    torch.testing.assert_close(text[1, 2], one[0])
    torch.testing.assert_close(text, class_embeddings(names, TEMPLATES[:6], clip, batch=5))
    torch.testing.assert_close(text.flip(0, 1), class_embeddings(names[::-1], TEMPLATES[5::-1], clip))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(text, class_embeddings(names, TEMPLATES[:6], clip))


@pytest.mark.parametrize(
    "names, templates, why",
    [
        ("dog", TEMPLATES, "list of non-empty strings, not 'dog'"),
        (["dog", ""], TEMPLATES, "non-empty"),
        (["dog", 3], TEMPLATES, "non-empty"),
        ([], TEMPLATES, "names is empty"),
        (["dog"], [], "templates is empty"),
        (["dog", "cat", "dog"], TEMPLATES, "3 given, 2 different"),
        (["dog"], ["a photo"], "must contain .* once.* it has 0"),
        (["dog"], ["{} and {}"], "must contain .* once.* it has 2"),
        (["very " * 80], TEMPLATES, "tokens but the text tower reads 77"),
    ],
)
def test_bad_texts(clip, names, templates, why):
    with pytest.raises(ValueError, match=why):
        class_embeddings(names, templates, clip)


def test_names_with_braces(clip):
    assert class_embeddings(["a {b}", "{"], TEMPLATES, clip).shape == (2, 8, 32)


def test_other_tokenizers(clip):
    with pytest.raises(ValueError, match="has 100 tokens but CLIP's tokenizer has 49408"):
        class_embeddings(["dog"], TEMPLATES, load_clip("test-vocab", None))


def test_cache(clip, tmp_path, monkeypatch):
    text = cached_class_embeddings(["dog", "cat"], TEMPLATES, clip, tmp_path / "a" / "b")
    assert torch.equal(text, class_embeddings(["dog", "cat"], TEMPLATES, clip))
    monkeypatch.setattr(otseg_text, "class_embeddings", lambda *a: pytest.fail("computed twice"))
    assert torch.equal(text, cached_class_embeddings(["dog", "cat"], TEMPLATES, clip, tmp_path / "a" / "b"))
    assert len(list(tmp_path.rglob("*.*"))) == 1


def test_cache_is_never_mixed_up(clip, tmp_path):
    other = copy.deepcopy(clip)
    get = lambda names, templates, clip: cached_class_embeddings(names, templates, clip, tmp_path)
    first = get(["dog", "cat"], TEMPLATES, clip)
    assert torch.equal(first, get(["dog", "cat"], TEMPLATES, other)) and len(list(tmp_path.iterdir())) == 1
    other.visual.proj.data += 1  # the image tower does not count
    assert torch.equal(first, get(["dog", "cat"], TEMPLATES, other)) and len(list(tmp_path.iterdir())) == 1
    other.text_projection.data += 0.1
    assert not torch.equal(first, get(["dog", "cat"], TEMPLATES, other))
    gelu = load_clip("test", None)
    gelu.load_state_dict(clip.state_dict())
    assert not torch.equal(first, get(["dog", "cat"], TEMPLATES, gelu))
    get(["cat", "dog"], TEMPLATES, clip), get(["dog", "cat"], TEMPLATES[:6], clip)
    assert len(list(tmp_path.iterdir())) == 5


def test_files_of_other_classes_are_rejected(clip, tmp_path):
    cached_class_embeddings(["dog", "cat"], TEMPLATES, clip, tmp_path)
    (file,) = tmp_path.iterdir()
    assert read_embeddings(file, ["dog", "cat"], TEMPLATES).shape == (2, 8, 32)
    with pytest.raises(ValueError, match="2 class names but 1 are"):
        read_embeddings(file, ["dog"])
    with pytest.raises(ValueError, match="8 templates but 6 are"):
        read_embeddings(file, ["dog", "cat"], TEMPLATES[:6])
    with pytest.raises(ValueError, match="number 1 is 'cat' in the file but 'cow' is given"):
        read_embeddings(file, ["dog", "cow"])
    save_file({"text": torch.zeros(3, 8, 32)}, file)  # another program overwrites the file
    with pytest.raises(ValueError, match="3 class names but 2 are"):
        cached_class_embeddings(["dog", "cat"], TEMPLATES, clip, tmp_path)


def test_arrays(tmp_path):
    np.save(tmp_path / "context.npy", np.zeros((59, 8, 512), np.float16))
    assert read_embeddings(tmp_path / "context.npy", [f"c{i}" for i in range(59)]).dtype == torch.float32
    with pytest.raises(ValueError, match="59 class names but 20"):
        read_embeddings(tmp_path / "context.npy", [f"c{i}" for i in range(20)])
    np.save(tmp_path / "flat.npy", np.zeros((59, 512)))
    with pytest.raises(ValueError, match=r"\(59, 512\)"):
        read_embeddings(tmp_path / "flat.npy", ["dog"])
    np.save(tmp_path / "object.npy", np.array([Bomb(tmp_path / "exploded")]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_embeddings(tmp_path / "object.npy", ["dog"])
    assert not (tmp_path / "exploded").exists()
