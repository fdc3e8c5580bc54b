import os
import tempfile

import matplotlib
import pytest
import torch

os.environ.setdefault("OTSEG_CACHE", tempfile.mkdtemp(prefix="otseg-cache-"))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; Triton reads it when it is imported

matplotlib.use("Agg")
torch.set_num_threads(1)  # the models of the tests are small: more threads only get in each other's way


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes over ten seconds; leave out with -m 'not slow'")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # PyTorch begins with another seed in each process


@pytest.fixture
def open_operators(monkeypatch):
    "The operators of the transport become plain functions: a dispatch mode sees what they do."
    from otseg import ot

    monkeypatch.setattr(ot, "transport_plan", ot.compute_plan)
    monkeypatch.setattr(ot, "transport_gradient", ot.compute_gradient)


@pytest.fixture(scope="session")
def forest(tmp_path_factory):
    "A miniature of every layout, which no test changes; the folder of one's own is `mine`."
    import trees

    root = tmp_path_factory.mktemp("data")
    for name, write in trees.WRITERS.items():
        write(root / "mine" if name == "folder" else root)
    return root


@pytest.fixture(scope="session")
def openai_vit_b_16(tmp_path_factory):
    "Path of a ViT-B/16 with random weights in OpenAI's file format, in half precision. Tests only read it."
    from clips import save_openai

    from otseg.clip import load_clip

    path = tmp_path_factory.mktemp("openai") / "ViT-B-16.pt"
    torch.manual_seed(0)
    save_openai(load_clip("ViT-B-16-quickgelu", None, precision="fp16"), path)
    return path


@pytest.fixture(scope="module")
def few_scenes():
    "The embedded benchmark with at most 4 scenes of each kind, so that a validation takes a moment."
    import otseg.digits

    draw = otseg.digits.draw_scenes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(otseg.digits, "draw_scenes", lambda split, size, start=0: draw(split, min(size, 4), start))
        yield
