"""What happens to a run: killed, stopped, out of disk, given broken files; and what remains."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
import trees
from helpers import close

from otseg import checkpoints, training
from otseg.checkpoints import Log, newest_state, read_tensors, write_state, write_tensors
from otseg.clip import read_checkpoint
from otseg.folders import Files
from otseg.images import Unreadable
from otseg.recipes import resolve
from otseg.training import fit, fit_distributed, step, train_loop

fork = multiprocessing.get_context("fork")  # children begin with everything imported
RECIPE = resolve(
    "folder",
    clip="digits_clip",
    image_size=32,
    stride=32,
    train_short_side=32,
    train_long_side=64,
    test_short_side=32,
    max_iters=14,
    batch_size=2,
    warmup_iters=2,
    val_interval=4,
    val_images=2,
    visual_prompts=2,
    num_templates=2,
    depth=2,
)
CHECKED = ("name", "recipe", "metrics", "skipped_images")  # of a record: what does not depend on the clock


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    trees.write_folder(root, n=5)
    return root


def run(data, out, recipe=RECIPE, **options):
    return fit(recipe, out, root=data, workers=options.pop("workers", 0), progress=False, **options)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "A run that nothing happens to."
    out = tmp_path_factory.mktemp("whole")
    run(data, out)
    return out


def content(out):
    "All that a finished run leaves, without times."
    weights = {name: read_checkpoint(out / f"{name}.safetensors")[0] for name in ("half", "best", "last")}
    record = json.loads((out / "record.json").read_text())
    return weights, (out / "log.jsonl").read_text(), {name: record[name] for name in CHECKED}


def assert_same(out, whole):
    (weights, log, record), (weights_whole, log_whole, record_whole) = content(out), content(whole)
    assert log == log_whole and record == record_whole
    for name in weights:
        assert weights[name].keys() == weights_whole[name].keys()
        assert all(torch.equal(weights[name][key], weights_whole[name][key]) for key in weights[name]), name


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_child(job, kill_after=None):
    "The exit code of a forked process that does a job; killed after some seconds if asked for."
    child = fork.Process(target=job)
    child.start()
    child.join(kill_after)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return child.exitcode


def counted(original, n, act):
    "A function that acts before its n-th call."
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            act()
        return original(*args, **kwargs)

    return call


# killed


def test_killed_in_steps_and_in_the_middle_of_saving(data, whole, tmp_path):
    "Seven times in one run: before the n-th step, or with a file half way to the disk; then it goes on to the same end."

    def job(module, name, n):
        def child():
            setattr(module, name, counted(getattr(module, name), n, die))
            run(data, tmp_path)

        return child

    deaths = [
        (training, "step", 1),
        (training, "step", 3),
        (os, "fsync", 2),
        (training, "step", 6),
        (checkpoints, "save_file", 2),
        (os, "fsync", 5),
        (training, "finish_run", 1),
    ]
    assert [in_a_child(job(*death)) for death in deaths] == [-signal.SIGKILL] * 7
    run(data, tmp_path)
    assert_same(tmp_path, whole)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_killed_at_any_time(data, whole, tmp_path):
    "Until it is done, after random times."
    rng, kills = random.Random(0), 0
    for _ in range(40):
        code = in_a_child(lambda: run(data, tmp_path), kill_after=rng.uniform(0.2, 1.5) if kills < 8 else None)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    run(data, tmp_path)
    assert_same(tmp_path, whole)


# stopped


@pytest.mark.parametrize("number, exception", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("at", [1, 5, 9])
def test_stopped(data, whole, tmp_path, monkeypatch, number, exception, at):
    "The step is finished and the state saved; the same call ends as if nothing had happened."
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as m:
        m.setattr(training, "step", counted(step, at, lambda: os.kill(os.getpid(), number)))
        with pytest.raises(exception, match=f"stopped after iteration {at} of 14; the same command goes on"):
            run(data, tmp_path)
    assert newest_state(tmp_path / "states")[1]["iteration"] == at
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    run(data, tmp_path)
    assert_same(tmp_path, whole)


def test_two_ctrl_c_stop_at_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        training, "step", counted(step, 3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    )
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path)


def test_a_finished_run_is_not_trained_again(data, whole, monkeypatch):
    before = content(whole)
    monkeypatch.setattr(training, "step", None)
    run(data, whole)
    assert str(content(whole)) == str(before)


def test_anew(data, whole, tmp_path):
    "resume = False overwrites."
    run(data, tmp_path, max_iters=3)
    with pytest.raises(ValueError, match="holds a run with another max_iters: give another folder, or resume = False"):
        run(data, tmp_path)
    run(data, tmp_path, resume=False)
    assert_same(tmp_path, whole)


# damaged states


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:-3] + bytes([b[-3] ^ 4]) + b[-2:],
        lambda b: b"",
        lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:],
    ],
    ids=["half-written", "one bit", "empty", "one bit of the header"],
)
def test_a_damaged_state_is_named_and_passed_over(data, whole, tmp_path, monkeypatch, spoil):
    with monkeypatch.context() as m:
        m.setattr(training, "step", counted(step, 11, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit):
            run(data, tmp_path)
    assert [p.name for p in sorted((tmp_path / "states").iterdir())] == ["00000008.safetensors", "00000011.safetensors"]
    newest = tmp_path / "states/00000011.safetensors"
    newest.write_bytes(spoil(newest.read_bytes()))
    with pytest.warns(UserWarning, match="00000011.safetensors is .* going on from the state before it"):
        run(data, tmp_path)
    assert_same(tmp_path, whole)


def test_only_the_last_states_stay(tmp_path):
    for t in (5, 10, 100, 1000):
        write_state(tmp_path, t, {"w": torch.ones(2)}, {"iteration": t}, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00000010.safetensors",
        "00000100.safetensors",
        "00001000.safetensors",
    ]


@pytest.mark.parametrize("bit", random.Random(0).sample(range(8 * 300), 40))
def test_any_bit_is_noticed(tmp_path, bit):
    path = tmp_path / "a.safetensors"
    write_tensors(
        path, {"w": torch.arange(12.0), "b": torch.ones(3, dtype=torch.uint8)}, {"classes": ["cat"], "iteration": 7}
    )
    content = bytearray(path.read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.safetensors is"):
        read_tensors(path)


# faults


def test_a_loss_that_is_not_finite(data, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite"):
        run(data, tmp_path, lr=1e20, warmup_iters=0)
    for path in tmp_path.rglob("*.safetensors"):
        assert all(v.isfinite().all() for v in read_tensors(path)[0].values())


def test_a_corrupt_image_is_skipped_and_counted(data, tmp_path, monkeypatch):
    original = Files.__getitem__

    def broken(self, i):
        if i == 3 and "train" in str(self.files[i][0]):
            raise Unreadable("photo 3.png cannot be read as an image")
        return original(self, i)

    with monkeypatch.context() as m, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m.setattr(Files, "__getitem__", broken)
        record = run(data, tmp_path)
    assert record["skipped_images"] > 0 and record["metrics"]["ensemble"]["pacc"] is not None


def test_a_worker_that_dies(data, tmp_path, monkeypatch):
    "An error, and the states are still there."
    with monkeypatch.context() as m:
        m.setattr(training, "step", counted(step, 6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit):
            run(data, tmp_path)
    monkeypatch.setattr(Files, "__getitem__", lambda self, i: die())
    with pytest.raises(RuntimeError, match="worker"):
        run(data, tmp_path, workers=1)
    assert newest_state(tmp_path / "states")[1]["iteration"] == 6


def limited_files():
    "In this process, no file may grow over 100 kB."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_disk_that_takes_no_more(data, whole, tmp_path):
    "The run stops, what was saved before is untouched, and with room it goes on."
    with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit):
        m.setattr(training, "step", counted(step, 6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        run(data, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")}

    def child():
        training.loop = lambda *args: [limited_files(), train_loop(*args)]
        try:
            run(data, tmp_path)
        except OSError as e:
            os._exit(7 if "could not be written" in str(e) and "make room" in str(e) else 8)

    assert in_a_child(child) == 7
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")} == before and not list(
        tmp_path.rglob("*.partial")
    )
    run(data, tmp_path)
    assert_same(tmp_path, whole)


def test_a_full_disk(data, tmp_path):
    "A real one, of half a megabyte."
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        with pytest.raises(OSError, match="could not be written .*No space left|could not be written.*make room"):
            run(data, disk)
        assert not list(disk.rglob("*.partial"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_made(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match="nothing can be written to .*file/run .Not a directory.: choose another folder as out"
    ):
        run(data, tmp_path / "file" / "run")


def test_a_folder_that_cannot_be_written(data, tmp_path, monkeypatch):
    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    with pytest.raises(OSError, match="nothing can be written to .* .Permission denied.: choose another folder as out"):
        run(data, tmp_path / "run")


# the log


def test_log_is_flushed_and_never_repeats(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for t in (10, 20, 30):
        log.write(iteration=t, loss=t / 7)
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == t // 10
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"iteration": 40, "lo')
    log = Log(tmp_path / "log.jsonl", upto=20)
    log.write(iteration=30, loss=1.0)
    assert [json.loads(line)["iteration"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [10, 20, 30]


# several processes


def assert_close(ours, theirs):
    "All weights (or gradients) together to 1e-6 of their norm, and each tensor to 1e-5 of its largest value."
    norm = lambda tensors: torch.cat([t.flatten().double() for t in tensors]).norm()
    assert ours.keys() == theirs.keys()
    assert norm([ours[name] - theirs[name] for name in ours]) <= 1e-6 * norm(ours.values())
    for name in ours:
        close(theirs[name], ours[name], 1e-5)


def keep_gradients(out):
    "A step that writes the gradients of the last iteration, of the first process, to a file."

    def call(run, batch, t):
        original = run.opt.step

        def load_or_make_record(*args, **kwargs):
            if run.main:
                write_tensors(
                    out / "gradients.safetensors",
                    {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None},
                    {},
                )
            return original(*args, **kwargs)

        run.opt.step = kept
        try:
            return step(run, batch, t)
        finally:
            run.opt.step = original

    return call


def test_two_processes_are_one(data, tmp_path, monkeypatch):
    "Half of the batch each: the weights of one process up to rounding; metrics reduced exactly, five images on two ranks included."
    still = replace(RECIPE, dropout=0.0, max_iters=6, batch_size=4)
    one, two = (tmp_path / name for name in ("one", "two"))
    monkeypatch.setattr(training, "step", keep_gradients(one))
    alone = run(data, one, still)
    monkeypatch.setattr(training, "step", keep_gradients(two))
    together = fit_distributed(2, still, two, root=data, workers=0, progress=False)
    assert (alone["processes"], together["processes"]) == (1, 2)
    ours, theirs = (read_checkpoint(folder / "last.safetensors")[0] for folder in (one, two))
    assert_close(ours, theirs)
    assert_close(*(read_tensors(folder / "gradients.safetensors")[0] for folder in (one, two)))
    for path, scores in alone["metrics"].items():
        assert together["metrics"][path]["pacc"] == pytest.approx(scores["pacc"], abs=2e-3)


def test_metrics_of_two_processes_are_exact(data, tmp_path):
    "With steps of no length the model is the same: five images on two ranks, each counted once."
    still = replace(RECIPE, lr=1e-30, min_lr=1e-30, weight_decay=0.0, max_iters=2)
    alone, together = (
        fit_distributed(n, still, tmp_path / str(n), root=data, workers=0, progress=False) for n in (1, 2)
    )
    assert together["processes"] == 2 and together["metrics"] == alone["metrics"]


@pytest.mark.parametrize("setting", ["inductive", "fully_supervised"])
def test_parts_are_the_whole(data, tmp_path, setting):
    still = replace(RECIPE, setting=setting, dropout=0.0, max_iters=4, batch_size=4)
    for name, n in (("whole", None), ("parts", 3)):
        run(data, tmp_path / name, still, per_device=n)
    ours, theirs = (read_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("whole", "parts"))
    assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, launcher",
    [
        (
            1,
            [
                "accelerate.commands.launch",
                "--cpu",
                "--num_processes=1",
                "--num_machines=1",
                "--mixed_precision=no",
                "--dynamo_backend=no",
                "-m",
            ],
        ),
        (
            2,
            ["torch.distributed.run", "--nproc-per-node=2", "-m"],
        ),  # accelerate launch starts several processes on GPUs, but on CPUs only through MPI
    ],
    ids=["accelerate", "torchrun"],
)
def test_launched_from_the_shell(data, tmp_path, processes, launcher):
    args = [
        f"--{name}={value}"
        for name, value in vars(replace(RECIPE, max_iters=4)).items()
        if name not in ("dataset", "setting", "unseen") and not isinstance(value, bool)
    ]
    command = [
        sys.executable,
        "-m",
        *launcher,
        "otseg.cli",
        "train",
        "--dataset=folder",
        f"--root={data}",
        f"--out={tmp_path / 'run'}",
        "--workers=0",
        *args,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        json.loads((tmp_path / "run/record.json").read_text())["processes"] == processes
        and done.stdout.count("| ensemble |") == 1
    )


@pytest.mark.slow
def test_a_killed_rank_ends_the_run(data, tmp_path):
    "With an error, not with a wait for ever."

    def child():
        def step_or_die(run, batch, t):
            if t == 2 and run.accelerator.process_index == 1:
                die()
            return step(run, batch, t)

        training.step = step_or_die
        try:
            fit_distributed(2, replace(RECIPE, batch_size=4), tmp_path / "run", root=data, workers=0, progress=False)
        except Exception:
            os._exit(9)

    began = time.time()
    assert in_a_child(child, kill_after=90) == 9 and time.time() - began < 90
