"""Faults in a run: kills, stop signals, full disks, damaged files, failing processes; and how the run survives them."""

import json
import multiprocessing
import os
import random
import resource
import shutil
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
from otseg.folders import Files
from otseg.images import Unreadable
from otseg.models import read_checkpoint
from otseg.recipes import differences, resolve
from otseg.steps import training_step
from otseg.training import fit, fit_distributed, train_loop

fork = multiprocessing.get_context("fork")  # children start with everything imported
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
COMPARED = ("name", "recipe", "metrics", "skipped_images")  # entries of a record that do not depend on time


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    trees.write_folder(root, n=5)
    return root


def run(data, out, recipe=RECIPE, workers=0, **options):
    return fit(recipe, out, root=data, workers=workers, progress=False, **options)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    "Folder of a run without any fault."
    out = tmp_path_factory.mktemp("undisturbed")
    run(data, out)
    return out


def results(out):
    "Weights, log and record of a finished run, without times."
    weights = {name: read_checkpoint(out / f"{name}.safetensors")[0] for name in ("half", "best", "last")}
    record = json.loads((out / "record.json").read_text())
    return weights, (out / "log.jsonl").read_text(), {name: record[name] for name in COMPARED}


def assert_same_results(out, undisturbed):
    (weights, log, record), (other_weights, other_log, other_record) = results(out), results(undisturbed)
    assert log == other_log and record == other_record
    for name in weights:
        assert weights[name].keys() == other_weights[name].keys()
        assert all(torch.equal(weights[name][key], other_weights[name][key]) for key in weights[name]), name


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def run_in_child(job, kill_after=None):
    "Exit code of a forked process that runs a function; it is killed after `kill_after` seconds, if given."
    child = fork.Process(target=job)
    child.start()
    child.join(kill_after)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return child.exitcode


def before_call(n, function, act):
    "A function that calls `act` before its n-th call."
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            act()
        return function(*args, **kwargs)

    return wrapper


def signal_in_step(monkeypatch, n, number=signal.SIGTERM, times=1):
    "Make this process send itself a signal in its n-th training step."

    def send():
        for _ in range(times):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(training, "training_step", before_call(n, training_step, send))


def stop_after(n, data, out):
    "Start a run that stops on SIGTERM after n steps."
    with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit):
        signal_in_step(m, n)
        run(data, out)


# kills


def test_killed_in_steps_and_in_the_middle_of_saving(data, undisturbed, tmp_path):
    "Seven kills in one run, before a step or while a file is written. The run still ends bit for bit the same."

    def job(module, name, n):
        def child():
            setattr(module, name, before_call(n, getattr(module, name), kill_self))
            run(data, tmp_path)

        return child

    kills = [
        (training, "training_step", 1),
        (training, "training_step", 3),
        (os, "fsync", 2),
        (training, "training_step", 6),
        (checkpoints, "save_file", 2),
        (os, "fsync", 5),
        (training, "finish_run", 1),
    ]
    assert [run_in_child(job(*kill)) for kill in kills] == [-signal.SIGKILL] * 7
    run(data, tmp_path)
    assert_same_results(tmp_path, undisturbed)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_killed_at_random_times(data, undisturbed, tmp_path):
    "Each process lives about 1.3 times as long as the one before, until one reaches the end."
    rng, kills = random.Random(0), 0
    while run_in_child(lambda: run(data, tmp_path), kill_after=0.1 * 1.3**kills * rng.uniform(0.8, 1.2)):
        kills += 1
    assert kills
    run(data, tmp_path)
    assert_same_results(tmp_path, undisturbed)


# stop signals


@pytest.mark.parametrize("number, exception", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("t", [1, 5, 9])
def test_stopped_by_a_signal(data, undisturbed, tmp_path, monkeypatch, number, exception, t):
    "The step is finished and the state saved. The same call resumes and ends bit for bit the same."
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as m:
        signal_in_step(m, t, number)
        with pytest.raises(exception, match=f"stopped after iteration {t} of 14; the same command continues"):
            run(data, tmp_path)
    assert newest_state(tmp_path / "states")[1]["iteration"] == t
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    run(data, tmp_path)
    assert_same_results(tmp_path, undisturbed)


def test_a_second_ctrl_c_stops_at_once(data, tmp_path, monkeypatch):
    signal_in_step(monkeypatch, 3, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path)
    assert not (tmp_path / "states").exists()  # it did not wait for the end of the step


def test_a_finished_run_is_not_trained_again(data, undisturbed, monkeypatch):
    before = results(undisturbed)
    monkeypatch.setattr(training, "training_step", None)
    run(data, undisturbed)
    assert str(results(undisturbed)) == str(before)


def test_without_resume_a_run_starts_anew(data, undisturbed, tmp_path):
    run(data, tmp_path, max_iters=3)
    with pytest.raises(ValueError, match="holds a run with another max_iters: give another folder, or overwrite it"):
        run(data, tmp_path)
    run(data, tmp_path, resume=False)
    assert_same_results(tmp_path, undisturbed)


# damaged files


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    "Folder of a run that stopped after iteration 11. Tests copy it."
    out = tmp_path_factory.mktemp("stopped")
    stop_after(11, data, out)
    return out


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:-3] + bytes([b[-3] ^ 4]) + b[-2:],
        lambda b: b"",
        lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:],
    ],
    ids=["half-written", "one bit", "empty", "one bit of the header"],
)
def test_a_damaged_state_is_named_and_skipped(data, undisturbed, stopped, tmp_path, damage):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    assert [p.name for p in sorted((out / "states").iterdir())] == ["00000008.safetensors", "00000011.safetensors"]
    newest = out / "states/00000011.safetensors"
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match="00000011.safetensors is .* trying the state before it"):
        run(data, out)
    assert_same_results(out, undisturbed)


def test_only_the_last_states_are_kept(tmp_path):
    for t in (5, 10, 100, 1000):
        write_state(tmp_path, t, {"w": torch.ones(2)}, {"iteration": t}, keep=3)
    kept = ["00000010.safetensors", "00000100.safetensors", "00001000.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


@pytest.mark.parametrize("bit", random.Random(0).sample(range(8 * 300), 40))
def test_any_flipped_bit_is_detected(tmp_path, bit):
    path, tensors = tmp_path / "a.safetensors", {"w": torch.arange(12.0), "b": torch.ones(3, dtype=torch.uint8)}
    write_tensors(path, tensors, {"classes": ["cat"], "iteration": 7})
    content = bytearray(path.read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.safetensors is"):
        read_tensors(path)


# other faults


def test_a_loss_that_is_not_finite(data, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite"):
        run(data, tmp_path, lr=1e20, warmup_iters=0)
    for path in tmp_path.rglob("*.safetensors"):
        assert all(v.isfinite().all() for v in read_tensors(path)[0].values())


def test_a_corrupt_image_is_skipped_and_counted(data, tmp_path, monkeypatch):
    read = Files.__getitem__

    def read_or_fail(self, i):
        if i == 3 and "train" in str(self.files[i][0]):
            raise Unreadable("photo 3.png cannot be read as an image")
        return read(self, i)

    with monkeypatch.context() as m, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m.setattr(Files, "__getitem__", read_or_fail)
        record = run(data, tmp_path)
    assert record["skipped_images"] > 0 and record["metrics"]["ensemble"]["pacc"] is not None


def test_a_worker_that_dies(data, tmp_path, monkeypatch):
    "It is an error, and the states are still there."
    stop_after(6, data, tmp_path)
    monkeypatch.setattr(Files, "__getitem__", lambda self, i: kill_self())
    with pytest.raises(RuntimeError, match="worker"):
        run(data, tmp_path, workers=1)
    assert newest_state(tmp_path / "states")[1]["iteration"] == 6


def limit_file_size():
    "No file of this process may grow beyond 100 kB."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_disk_that_is_full_for_a_while(data, undisturbed, tmp_path):
    "The run stops, earlier files are unchanged, and once there is room it resumes."
    stop_after(6, data, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")}

    def limited_loop(*args):
        limit_file_size()
        train_loop(*args)

    def child():
        training.train_loop = limited_loop
        try:
            run(data, tmp_path)
        except OSError as e:
            os._exit(7 if "could not be written" in str(e) and "make room" in str(e) else 8)

    assert run_in_child(child) == 7
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")} == before
    assert not list(tmp_path.rglob("*.partial"))
    run(data, tmp_path)
    assert_same_results(tmp_path, undisturbed)


def test_a_full_disk(data, tmp_path):
    "A real file system of half a megabyte."
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
    expected = "nothing can be written to .*file/run .Not a directory.: choose another folder as out"
    with pytest.raises(OSError, match=expected):
        run(data, tmp_path / "file" / "run")


def test_a_folder_that_is_not_writable(data, tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match="nothing can be written to .* .Permission denied.: choose another folder as out"):
        run(data, tmp_path / "run")


# the log


def test_the_log_is_flushed_and_repeats_no_iteration(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    for t in (10, 20, 30):
        log.write(iteration=t, loss=t / 7)
        assert len(path.read_text().splitlines()) == t // 10
    with open(path, "a") as f:
        f.write('{"iteration": 40, "lo')  # the process died here
    log = Log(path, last_iteration=20)
    log.write(iteration=30, loss=1.0)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [10, 20, 30]


# several processes


def assert_close(ours, theirs):
    "All tensors together agree to 1e-6 of their norm, and each one to 1e-5 of its largest value."

    def norm(tensors):
        return torch.cat([t.flatten().double() for t in tensors]).norm()

    assert ours.keys() == theirs.keys()
    assert norm([ours[name] - theirs[name] for name in ours]) <= 1e-6 * norm(ours.values())
    for name in ours:
        close(theirs[name], ours[name], 1e-5)


def step_that_keeps_gradients(out):
    "A training step whose main process writes the gradients of the last iteration to a file."

    def step(trainer, batch, t):
        update = trainer.opt.step

        def write_and_update():
            if trainer.accelerator.is_main_process:
                named = trainer.model.named_parameters()
                gradients = {name: p.grad for name, p in named if p.grad is not None}
                write_tensors(out / "gradients.safetensors", gradients, {})
            return update()

        with pytest.MonkeyPatch.context() as m:
            m.setattr(trainer.opt, "step", write_and_update)
            return training_step(trainer, batch, t)

    return step


def test_two_processes_equal_one(data, tmp_path, monkeypatch):
    """Half of the batch each: weights and gradients of one process up to rounding.

    Five validation images on two processes are counted once each."""
    recipe = replace(RECIPE, dropout=0.0, max_iters=6, batch_size=4)
    one, two = (tmp_path / name for name in ("one", "two"))
    monkeypatch.setattr(training, "training_step", step_that_keeps_gradients(one))
    alone = run(data, one, recipe)
    monkeypatch.setattr(training, "training_step", step_that_keeps_gradients(two))
    together = fit_distributed(2, recipe, two, root=data, workers=0, progress=False)
    assert (alone["processes"], together["processes"]) == (1, 2)
    assert_close(*(read_checkpoint(folder / "last.safetensors")[0] for folder in (one, two)))
    assert_close(*(read_tensors(folder / "gradients.safetensors")[0] for folder in (one, two)))
    for path, scores in alone["metrics"].items():
        assert together["metrics"][path]["pacc"] == pytest.approx(scores["pacc"], abs=2e-3)


def test_metrics_of_two_processes_are_exact(data, tmp_path):
    "With a vanishing learning rate the model is the same: five images on two processes, each counted once."
    recipe = replace(RECIPE, lr=1e-30, min_lr=1e-30, weight_decay=0.0, max_iters=2)
    alone, together = (
        fit_distributed(n, recipe, tmp_path / str(n), root=data, workers=0, progress=False) for n in (1, 2)
    )
    assert together["processes"] == 2 and together["metrics"] == alone["metrics"]


@pytest.mark.parametrize("setting", ["inductive", "fully_supervised"])
def test_parts_of_a_batch_equal_the_whole(data, tmp_path, setting):
    recipe = replace(RECIPE, setting=setting, dropout=0.0, max_iters=4, batch_size=4)
    for name, per_device in (("whole", None), ("parts", 3)):
        run(data, tmp_path / name, recipe, per_device=per_device)
    assert_close(*(read_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("whole", "parts")))


ACCELERATE = [
    "accelerate.commands.launch",
    "--cpu",
    "--num_processes=1",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
]
TORCHRUN = ["torch.distributed.run", "--nproc-per-node=2"]  # on CPUs, accelerate launches several processes only by MPI


@pytest.mark.slow
@pytest.mark.parametrize("processes, launcher", [(1, ACCELERATE), (2, TORCHRUN)], ids=["accelerate", "torchrun"])
def test_launched_from_the_shell(data, tmp_path, processes, launcher):
    options = differences(replace(RECIPE, max_iters=4)) | dict(root=data, out=tmp_path / "run", workers=0)
    arguments = ["--dataset=folder", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "otseg.cli", "train", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run/record.json").read_text())["processes"] == processes
    assert done.stdout.count("| ensemble |") == 1  # only the main process prints the table


def test_processes_that_do_not_see_each_other(data, tmp_path, monkeypatch):
    "torchrun on a CPU without ACCELERATE_USE_CPU: each would train alone into the same folder."
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but accelerate sees 1.*ACCELERATE_USE_CPU=true"):
        run(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_accelerate_launch_on_a_cpu_does_not_train_alone(data, tmp_path):
    "accelerate launch --cpu --num_processes 2 runs one process, which looks like two."
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "otseg.cli"]
    words = [
        "train",
        "--dataset=folder",
        f"--root={data}",
        f"--out={tmp_path}/run",
        "--workers=0",
        "--clip=digits_clip",
    ]
    done = subprocess.run([*command, *words], capture_output=True, text=True, env={**os.environ})
    assert done.returncode != 0 and "torchrun --nproc_per_node N" in done.stderr
    assert not (tmp_path / "run").exists()


def test_another_dataset_in_the_same_folder(data, undisturbed, tmp_path):
    "A finished run is not evaluated on another dataset as if it were its own."
    other = tmp_path / "other"
    trees.write_folder(other, n=5)
    with pytest.raises(ValueError, match="holds a run with another dataset_name"):
        run(other, undisturbed)


@pytest.mark.slow
def test_a_killed_process_ends_the_run(data, tmp_path):
    "The other process raises an error instead of waiting for ever."

    def child():
        def step_or_die(trainer, batch, t):
            if t == 2 and trainer.accelerator.process_index == 1:
                kill_self()
            return training_step(trainer, batch, t)

        training.training_step = step_or_die
        try:
            fit_distributed(2, replace(RECIPE, batch_size=4), tmp_path / "run", root=data, workers=0, progress=False)
        except Exception:
            os._exit(9)

    started = time.time()
    assert run_in_child(child, kill_after=90) == 9 and time.time() - started < 90
