"""Eight processes, pretended by a process group whose collectives do nothing: shares and denominators."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import small_model

from otseg.data import Benchmark, EndlessBatches
from otseg.evaluation import validate
from otseg.recipes import resolve

STEP = """
import sys
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", rank=int(sys.argv[1]), world_size=8, store=FakeStore())
from helpers import small_model
from test_devices import small_trainer
from otseg.steps import training_step
for per_device in (4, 2):  # at once, and with gradient accumulation
    torch.manual_seed(0)
    trainer, batch = small_trainer("cpu", "fully_supervised", attention="softmax", per_device=per_device)
    assert trainer.accelerator.num_processes == 8 and trainer.accelerator.process_index == int(sys.argv[1])
    trainer.model.eval(), setattr(trainer.net, "train", lambda *_: None)  # no dropout
    print(*training_step(trainer, batch, 0).tolist())
"""


def run_steps(rank=None):
    "Losses of a training step as one of eight processes, or as the only one (None), for two values of per_device."
    tests = Path(__file__).parent
    code, environment = STEP, {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    if rank is None:
        code = code.replace(
            'dist.init_process_group("fake", rank=int(sys.argv[1]), world_size=8, store=FakeStore())', ""
        )
        code = code.replace("num_processes == 8", "num_processes == 1")
        rank = 0
    else:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "8", "ACCELERATE_USE_CPU": "1"}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}
    done = subprocess.run([sys.executable, "-c", code, str(rank)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor([[float(v) for v in line.split()] for line in done.stdout.strip().splitlines()])


def test_a_batch_is_shared_out_completely():
    alone = list(EndlessBatches(50, 16, seed=3, stop=5))
    shares = [list(EndlessBatches(50, 16, seed=3, stop=5, rank=rank, world=8)) for rank in range(8)]
    for t, batch in enumerate(alone):
        together = [key for share in shares for key in share[t]]
        assert sorted(together) == sorted(batch) and all(len(share[t]) == 2 for share in shares)
    with pytest.raises(ValueError, match="12 images .* 8 processes"):
        EndlessBatches(50, 12, seed=3, stop=5, world=8)


def test_every_validation_image_counts_once():
    g = torch.Generator().manual_seed(0)
    data = [
        {"image": torch.randn(3, 32, 32, generator=g), "label": torch.randint(5, (32, 32), generator=g)}
        for _ in range(11)
    ]
    model, bench = small_model(), Benchmark("test", tuple("abcde"), (1, 4), None, None)
    recipe, sums = resolve("digits", image_size=32, stride=24), []
    for rank in range(8):  # reduce only records what this process would add
        seen = []
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=8, reduce=lambda c, seen=seen: seen.append(c) or c
        )
        validate(model, bench, recipe, data, paths=("mps",), accelerator=accelerator)
        sums += seen
    total = sum(sums)
    assert total.sum() == 11 * 32 * 32
    alone = validate(model, bench, recipe, data, paths=("mps",))["mps"]
    assert abs(total.diagonal().sum() / total.sum() - alone["pacc"]) < 1e-6


@pytest.mark.slow
def test_the_losses_are_divided_by_the_mean_number_of_masks():
    """The pretended sums leave each process its own masks; divided by eight, the losses are eight times larger."""
    alone = run_steps()
    torch.testing.assert_close(alone[0], alone[1], rtol=1e-5, atol=0)
    for rank in (0, 7):
        torch.testing.assert_close(run_steps(rank), 8 * alone, rtol=1e-5, atol=0)
