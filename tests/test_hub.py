"""Publish a checkpoint on a hub and load it from there. The hub is a small server on the loopback address."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import ModelCard, constants

from otseg import cli, load
from otseg.clip import load_clip, local_file
from otseg.evaluation import evaluate_checkpoint
from otseg.models import DEFAULT_CHECKPOINT, read_checkpoint
from otseg.publish import model_card, prepare, upload
from otseg.recipes import recipe_dict

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    "Repositories in memory: name -> {file: content}. `full` names objects that it refuses."

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.objects, self.requests, self.writers = {}, {}, [], {"Bearer good"}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status=200, body=b"", **headers):
        self.send_response(status)
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        repo, _, place = unquote(self.path).removeprefix("/").partition("/resolve/")
        revision, _, file = place.partition("/")
        self.server.requests.append(file)
        if repo not in self.server.repos:
            return self.reply(401, X_Error_Code="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.reply(404, X_Error_Code="RevisionNotFound")
        content = self.server.repos[repo].get(file)
        if content is None:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        self.reply(body=content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_PUT(self):
        self.server.objects[self.path.split("/")[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply()

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.reply(body={"errors": [], "warnings": []})
        if self.headers.get("Authorization") not in hub.writers:
            return self.reply(403, {"error": "no write access"})
        if self.path == "/api/repos/create":
            name = "{organization}/{name}".format(**json.loads(body))
            hub.repos.setdefault(name, {})
            return self.reply(body={"url": f"{hub.url}/{name}", "id": name})
        if "/preupload/" in self.path:
            paths = [f["path"] for f in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            files = [{"path": p, "uploadMode": mode[p.endswith(".safetensors")], "shouldIgnore": False} for p in paths]
            return self.reply(body={"files": files})
        if self.path.endswith("/lfs/objects/batch"):
            found = json.loads(body)["objects"]
            objects = [o | {"actions": {"upload": {"href": f"{hub.url}/objects/{o['oid']}"}}} for o in found]
            return self.reply(body={"transfer": "basic", "objects": objects})
        repo = self.path.removeprefix("/api/models/").split("/commit/")[0]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.repos[repo][value["path"]] = hub.objects[value["oid"]]
        self.reply(body={"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    yield server
    server.shutdown()


ADDRESS = "hf://me/digits/otseg.safetensors"


def close(server):
    server.shutdown()
    server.server_close()


def test_what_is_pushed_can_be_loaded_and_is_the_same_model(hub, capsys, few_scenes):
    assert cli.main(["push", str(DEFAULT_CHECKPOINT), "me/digits", "--license", "apache-2.0"]) == 0
    assert ADDRESS in capsys.readouterr().out
    assert sorted(hub.repos["me/digits"]) == ["README.md", "otseg.safetensors"]
    assert hub.repos["me/digits"]["otseg.safetensors"] == DEFAULT_CHECKPOINT.read_bytes()
    seg, own = load(ADDRESS), load()
    assert seg.classes == own.classes
    assert all(torch.equal(a, b) for a, b in zip(seg.model.state_dict().values(), own.model.state_dict().values()))
    metrics = [
        evaluate_checkpoint(c, images=2, progress=False).record["metrics"] for c in (ADDRESS, DEFAULT_CHECKPOINT)
    ]
    assert metrics[0] == metrics[1]


def test_the_model_card_says_what_the_hub_and_a_stranger_ask(hub):
    upload(prepare(DEFAULT_CHECKPOINT, "me/digits", "cc-by-4.0"), "me/digits")
    card = ModelCard(hub.repos["me/digits"]["README.md"].decode())
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "cc-by-4.0",
        "otseg",
        "image-segmentation",
    )
    for part in (f'otseg.load("{ADDRESS}")', "`seven`, `eight`, `nine`, `gravel`", "Not evaluated", "| max_iters |"):
        assert part in card.text


def test_metrics_are_those_of_these_weights(tmp_path):
    _, header = read_checkpoint(DEFAULT_CHECKPOINT)
    header |= {"iteration": header["recipe"].max_iters}
    scores = {"pacc": 0.9, "miou_seen": 0.6, "miou_unseen": 0.5, "hiou": 0.54545, "iou": {"one": 0.6}}
    about = dict(
        dataset="digits", split=0, setting="inductive", method="mpsa", seed=0, commit="a", device="CPU", images=200
    )
    record = about | {"recipe": recipe_dict(header["recipe"]), "metrics": {"ensemble": scores}}
    card = ModelCard(model_card(header, record, ADDRESS, "apache-2.0"))
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("hIoU", 54.55), ("mIoU", 60.0)]
    assert "| 54.5 |" in card.text and "200 validation images" in card.text
    other = tmp_path / "record.json"  # of another seed
    other.write_text(json.dumps(record | {"recipe": record["recipe"] | {"seed": 77}}))
    with pytest.raises(ValueError, match="does not belong to"):
        prepare(DEFAULT_CHECKPOINT, "me/digits", "apache-2.0", record=other)


def test_dry_run_uploads_nothing(hub, capsys):
    command = ["push", str(DEFAULT_CHECKPOINT), "me/digits", "--license", "apache-2.0", "--dry-run"]
    assert cli.main(command) == 0
    assert "# digits" in capsys.readouterr().out and not hub.repos


def test_offline_a_cached_file_is_used_and_an_absent_one_says_what_to_do(hub):
    hub.repos["me/digits"] = {"otseg.safetensors": DEFAULT_CHECKPOINT.read_bytes()}
    first = local_file(ADDRESS)
    close(hub)
    assert local_file(ADDRESS) == first and load(ADDRESS).classes
    with pytest.raises(ConnectionError, match="no copy of other.safetensors: download it on a machine"):
        load("hf://me/digits/other.safetensors")
    with pytest.raises(ConnectionError, match="nothing was uploaded"):
        upload(prepare(DEFAULT_CHECKPOINT, "me/digits", "apache-2.0"), "me/digits")


def test_a_file_is_downloaded_once(hub):
    hub.repos["me/digits"] = {"otseg.safetensors": DEFAULT_CHECKPOINT.read_bytes()}
    sizes = [local_file(ADDRESS).stat().st_size, local_file(ADDRESS).stat().st_size]
    assert sizes[0] == sizes[1] and hub.requests.count("otseg.safetensors") == 3  # head, get, head


@pytest.mark.parametrize(
    "address, error, message",
    [
        ("hf://me/nothing/otseg.safetensors", FileNotFoundError, "no repository .*me/nothing"),
        ("hf://me/digits/last.safetensors", FileNotFoundError, "has no file last.safetensors"),
        ("hf://me/digits@v9/otseg.safetensors", FileNotFoundError, "has no revision v9"),
        ("hf://me/digits/otseg.pth", ValueError, "expected hf://OWNER/REPO/FILE.safetensors"),
        ("hf://me/otseg.safetensors", ValueError, "expected hf://OWNER/REPO/FILE.safetensors"),
        ("hf://me/digits/../x.safetensors", ValueError, "expected hf://OWNER/REPO/FILE.safetensors"),
    ],
)
def test_what_cannot_be_loaded_is_named(hub, address, error, message):
    hub.repos["me/digits"] = {"otseg.safetensors": DEFAULT_CHECKPOINT.read_bytes(), "otseg.pth": b"pickle"}
    with pytest.raises(error, match=message):
        load(address)
    assert "otseg.pth" not in hub.requests


def test_a_pickle_under_another_name_is_refused(hub, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    hub.repos["me/digits"] = {"otseg.safetensors": (tmp_path / "x.pt").read_bytes()}
    with pytest.raises(ValueError):
        load(ADDRESS)


def test_without_write_access_nothing_is_published(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert cli.main(["push", str(DEFAULT_CHECKPOINT), "me/digits", "--license", "apache-2.0"]) == 2
    assert "hf auth login" in capsys.readouterr().err and not hub.repos


def test_weights_of_a_clip_come_from_the_hub_too(hub):
    from otseg.models import ASSETS

    hub.repos["me/clip"] = {"clip.safetensors": (ASSETS / "digits_clip.safetensors").read_bytes()}
    seg = load(clip_weights="hf://me/clip/clip.safetensors")
    assert seg.classes == load().classes and seg.clip is not None
    with pytest.raises(ValueError, match="does not contain the weights of ViT-B-32-quickgelu"):
        load_clip("ViT-B-32-quickgelu", "hf://me/clip/clip.safetensors")
