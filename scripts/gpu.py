"""Verify and measure a GPU with one command: `make gpu`, or `python scripts/gpu.py` where the package is not installed.

Each part runs in a process of its own with a time limit, the most valuable ones first, and its results are written as
soon as it ends: results/benchmarks/NAME.json, .csv and .md, where NAME comes from the GPU. Parts that fail or run out
of time leave a note, and the others still run. `--device cpu` runs every part with tiny sizes, to find mistakes before
a GPU is at hand; it writes to runs/gpu unless `--out` says otherwise. `--wheels FOLDER` installs missing packages from
wheels in a folder, for machines without a network.
"""

import argparse
import csv
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {  # module -> distribution, of what the package needs at run time
    "torch": "torch",
    "torchvision": "torchvision",
    "open_clip": "open_clip_torch",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "torchmetrics": "torchmetrics",
    "pydantic": "pydantic",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "seaborn": "seaborn",
    "scipy": "scipy",
    "tqdm": "tqdm",
    "typer": "typer",
    "mlxtend": "mlxtend",
    "skimage": "scikit-image",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
}
OPTIONAL = {"ot": "POT", "geomloss": "geomloss", "flash_sinkhorn": "flash-sinkhorn"}


# measuring


class Report:
    """Rows of one part, appended to a JSON-lines file as they are measured."""

    def __init__(self, path, part):
        self.path, self.part = Path(path), part

    def row(self, what, **values):
        row = {"part": self.part, "what": what} | values
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        print("  ", what, {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}, flush=True)


@contextmanager
def noted(report, what, **values):
    """Turn an exception (out of memory, say) into a row with a note, so that the next row is still measured."""
    try:
        yield
    except Exception as e:
        report.row(what, **values, note=f"failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:300])


def measure(run, device, repeats):
    """Milliseconds (median, lowest, highest) of `run` after two warm-ups, and peak memory above the start in MB."""
    import torch

    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    run(), run(), synchronize()
    values = {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(1000 * (time.perf_counter() - start))
    if device == "cuda":
        values["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"ms": statistics.median(times), "ms_low": min(times), "ms_high": max(times)} | values


def costs(p, m, n, device="cpu", seed=0):
    """Costs (p, m, n) like those of cosines: a part that all prompts share and one of each prompt."""
    import torch

    g = torch.Generator().manual_seed(seed)
    shared, own = torch.randn(p, m, 1, generator=g), torch.randn(p, m, n, generator=g)
    return (1 - torch.tanh(0.3 * shared + 0.6 * own)).to(device)


# parts


def facts(report, device, sizes):
    """Device, driver and library versions."""
    import torch

    values = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        values |= {
            "name": p.name,
            "memory_gb": p.total_memory / 2**30,
            "multiprocessors": p.multi_processor_count,
            "capability": f"{p.major}.{p.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "bf16": torch.cuda.is_bf16_supported(),
        }
    if importlib.util.find_spec("triton"):
        import triton

        values["triton"] = triton.__version__
    report.row("device", **values)


def kernels(report, device, sizes):
    """The Triton kernels, forward and backward, against the float64 tensor code."""
    import torch

    from otseg import kernel, loss_kernel, newton, ot

    def compare(what, C, mu=None, nu=None, eps=0.05):
        p, n, m = C.shape
        mu = torch.full((p, m), 1 / m) if mu is None else mu
        nu = torch.full((p, n), 1 / n) if nu is None else nu
        C, mu, nu = C.to(device), mu.to(device), nu.to(device)
        T, failed = kernel.solve_fused(C, mu, nu, eps, 100, 1e-6, **ot.KERNEL_CONSTANTS)
        want, failed_tensor_code = newton.solve_plan(C.double(), mu.double(), nu.double(), eps, tol=1e-9)
        grad = torch.randn(C.shape, generator=torch.Generator().manual_seed(1)).to(device)
        ours = kernel.gradient_fused(T, grad, eps, newton.RIDGE)
        # the gradient of the same plan, so that its error is that of the kernel alone
        theirs = newton.plan_gradient(T.double(), grad.double(), eps)
        # relative to the terms whose difference the gradient is: at a sharp eps they cancel almost completely
        scales = ((T * grad).abs().amax() / eps, grad.abs().amax(), grad.abs().amax())
        errors = {
            f"error_grad_{name}": float((a - b).abs().amax() / scale)
            for name, a, b, scale in zip(("cost", "mu", "nu"), ours, theirs, scales)
        }
        report.row(
            what,
            eps=eps,
            problems=p,
            pixels=m,
            prompts=n,
            converged=int((failed == 0).sum()),
            converged_tensor_code=int((failed_tensor_code == 0).sum()),
            error_plan=float((T - want).abs().amax() / want.abs().amax().clamp_min(1e-30)),
            error_marginal=float((T.sum(-1) - nu).abs().amax()),
            **errors,
        )

    big, odd = sizes["kernel_problems"], sizes["kernel_sizes"]
    with noted(report, "paper's size"):
        compare("paper's size", costs(*big).mT.contiguous())
    for m, n in odd:
        with noted(report, f"{m} x {n}"):
            compare(f"{m} x {n}", costs(3, m, n).mT.contiguous())
    m, n = odd[0]
    for eps in (0.005, 0.001):
        with noted(report, f"eps {eps}"):
            compare("sharp eps", costs(3, m, n).mT.contiguous(), eps=eps)
    with noted(report, "skewed marginals"):
        g = torch.Generator().manual_seed(2)
        mu, nu = (torch.rand(3, s, generator=g) ** 8 + 1e-9 for s in (m, n))
        nu[:, 0] = 0  # a prompt without mass
        compare("skewed marginals", costs(3, m, n).mT.contiguous(), mu / mu.sum(-1, True), nu / nu.sum(-1, True))
    with noted(report, "NaN stays in its problem"):
        C = costs(3, m, n)
        C[1, 0, 0] = float("nan")
        with ot.defer_convergence_checks() as checks:
            T = ot.sinkhorn(C.to(device))
            checks.found.clear()
        report.row("NaN stays in its problem", ok=bool(T[[0, 2]].isfinite().all()))
    with noted(report, "empty"):
        shapes = [list(ot.sinkhorn(torch.empty(s, device=device)).shape) for s in ((0, 8, 3), (2, 0, 3))]
        report.row("empty", ok=shapes == [[0, 8, 3], [2, 0, 3]])
    with noted(report, "losses"):
        compare_losses(report, device, sizes)
    if device == "cuda":
        jit_functions = {"plan": kernel.plan_kernel, "gradient": kernel.gradient_kernel}
        for name, function in (jit_functions | {"mask loss": loss_kernel.mask_loss_kernel}).items():
            with noted(report, f"registers of the {name} kernel"):
                for compiled in compiled_kernels(function):
                    report.row(f"registers of the {name} kernel", registers=compiled.n_regs, spills=compiled.n_spills)


def compare_losses(report, device, sizes):
    """Losses of the kernel and their gradients against float64 tensor code."""
    import torch

    from otseg import loss_kernel, losses

    b, k, side, patch = sizes["loss_images"], sizes["loss_classes"], sizes["loss_side"], 16
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(b, k, side // patch, side // patch, generator=g)
    label = torch.randint(0, min(k, 12), (b, side, side), generator=g)
    label[:, : side // 8] = losses.IGNORE
    fits, found = losses.kernel_fits, []
    try:
        losses.kernel_fits = loss_kernel.fits  # in the interpreter too
        for dtype in (torch.float32, torch.float64):
            x = logits.to(device, dtype).requires_grad_()
            loss = losses.mask_loss(x, label.to(device))
            found.append({n: (v.detach(), torch.autograd.grad(v, x, retain_graph=True)[0]) for n, v in loss.items()})
    finally:
        losses.kernel_fits = fits
    errors = {}
    for name, (value, grad) in found[1].items():
        ours, our_grad = found[0][name]
        errors |= {f"error_{name}": float((ours - value).abs() / value.abs())}
        errors |= {f"error_grad_{name}": float((our_grad - grad).abs().amax() / grad.abs().amax())}
    report.row("losses", masks=b * k, pixels=side**2, **errors)


def compiled_kernels(jit_function):
    """Compiled variants of a Triton kernel, read from its caches: Triton has no public way to list them."""
    caches = getattr(jit_function, "device_caches", None) or getattr(jit_function, "cache", {})
    found = []
    for cache in caches.values():
        variants = cache[0] if isinstance(cache, tuple) else cache
        found += [k for k in variants.values() if hasattr(k, "n_regs")]
    return found


@contextmanager
def precision(name, device):
    """float32, tf32 (matrix products in TensorFloat-32) or bf16 (autocast)."""
    import torch

    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        with torch.autocast(device, torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def parity(report, device, sizes):
    """Masks of the official code's golden checkpoint, in each precision."""
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file

    from otseg.official import load_official
    from otseg.ot import sinkhorn

    golden = ROOT / "tests/golden"
    want = load_file(golden / "converged_model.safetensors")
    config = json.loads((golden / "meta.json").read_text())["config"]
    text = load_file(golden / "model.safetensors")["text"]
    model = load_official(golden / "official_checkpoint.pth", text, config["img"], config["heads"]).to(device)
    for name in ("float32", "tf32", "bf16"):
        with noted(report, name), precision(name, device), torch.no_grad():
            masks = model(want["image"].to(device))
            values = {}
            for path in ("mps", "mpsa"):
                truth = want[f"all.{path}_masks"]
                ours = F.interpolate(getattr(masks, path).float().cpu(), size=truth.shape[-2:], mode="bilinear")
                values[f"error_{path}"] = float((ours - truth).abs().max() / truth.abs().max())
                values[f"same_label_{path}"] = float((ours.argmax(1) == truth.argmax(1)).float().mean())
            report.row(name, **values)
    plans = load_file(golden / "sinkhorn.safetensors")
    cases = sorted({name.split(".")[0] for name in plans})
    eps = json.loads((golden / "meta.json").read_text())
    for case in cases:
        with noted(report, f"plan {case}"):
            T = sinkhorn(plans[f"{case}.cost"].to(device), eps=eps[f"sinkhorn.{case}"]["eps"]).cpu()
            truth = plans[f"{case}.plan64"]
            report.row(f"plan {case}", error=float((T - truth).abs().max() / truth.abs().max()))


def tests(report, device, sizes):
    """The tests that use a GPU."""
    files = [
        f"tests/{name}.py" for name in ("test_devices", "test_kernel", "test_loss_kernel", "test_precision", "test_ot")
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x" if device == "cpu" else "--maxfail=20",
        "-p",
        "no:cacheprovider",
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(sizes["test_processes"])]
    chosen = ["-k", sizes["tests"]] if sizes["tests"] else []
    files = [f for f in files if (ROOT / f).exists()]
    done = subprocess.run([*command, *chosen, *files], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    report.row("pytest", status=done.returncode, summary=lines[-1] if lines else done.stderr[-300:])
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            report.row("failed test", summary=line[:300])


def transport(report, device, sizes):
    """Time, memory and marginal error of the transport, beside other solvers and the bandwidth limit."""
    import torch

    from otseg import newton, ot

    p, m, n = sizes["transport"]
    C = costs(p, m, n, device)
    weight = torch.randn(p, m, n, generator=torch.Generator().manual_seed(1)).to(device)

    def tensor_code(C):
        mu, nu = C.new_full((len(C), m), 1 / m), C.new_full((len(C), n), 1 / n)
        return newton.solve_plan(C.mT.contiguous(), mu, nu, 0.05)[0].mT

    def pot(C):
        from ot import solve_batch

        mu, nu = C.new_full((p, m), 1 / m), C.new_full((p, n), 1 / n)
        return solve_batch(C, a=mu, b=nu, reg=0.05, method="log_sinkhorn", grad="autodiff", tol=1e-6).plan

    def geomloss(C):
        from geomloss.ot import solve_batch

        return solve_batch(C, reg=0.05, max_iter=100).plan

    methods = {
        "ours": ot.sinkhorn,
        "plain": newton.sinkhorn_loop,
        "POT": pot,
        "GeomLoss": geomloss,
        "copy": torch.clone,
    }
    moved = 2 * C.numel() * C.element_size()
    for name, solve in methods.items():
        for backward in (False, True):
            what = f"{name}, {'forward and backward' if backward else 'forward'}"

            def run(solve=solve, backward=backward):
                cost = C.clone().requires_grad_(backward)
                T = solve(cost)
                if backward:
                    (T * weight).sum().backward()
                return T.detach()

            with noted(report, what):
                if package := {"POT": "ot", "GeomLoss": "geomloss"}.get(name):
                    if not importlib.util.find_spec(package):
                        report.row(what, note="not run: not installed")
                        continue
                with ot.defer_convergence_checks():
                    T = run()
                    values = measure(run, device, sizes["repeats"])
                error = max(float((T.sum(-1) - 1 / m).abs().max()), float((T.sum(-2) - 1 / n).abs().max()))
                extra = {} if name == "copy" else {"error_marginal": error}
                report.row(
                    what, problems=p, pixels=m, prompts=n, **values, **extra, gb_per_s=moved / values["ms"] / 1e6
                )
    with noted(report, "tensor code, forward"):
        report.row("tensor code, forward", **measure(lambda: tensor_code(C), device, sizes["repeats"]))
    with noted(report, "flash-sinkhorn"):
        flash_sinkhorn(report, device, sizes)


def flash_sinkhorn(report, device, sizes):
    """flash-sinkhorn's loss on unit vectors, whose half squared distance is 1 - cosine: one problem at a time."""
    if device == "cpu" or not importlib.util.find_spec("flash_sinkhorn"):
        report.row("flash-sinkhorn", note="not run: not installed" if device != "cpu" else "not run: needs a GPU")
        return
    import torch
    import torch.nn.functional as F
    from flash_sinkhorn import SamplesLoss

    _, m, n = sizes["transport"]
    x, y = (F.normalize(torch.randn(s, 512, device=device), dim=-1) for s in (m, n))
    loss = SamplesLoss(loss="sinkhorn", blur=0.05**0.5, debias=False, half_cost=True)
    report.row("flash-sinkhorn, one problem", **measure(lambda: loss(x, y), device, sizes["repeats"]))


def trainer_and_batch(device, k, n, visual_prompts, side, batch, tower, mixed="no", compiled=False, parts=None):
    """A training step at the size of a dataset: a model with random weights and one batch."""
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from otseg.clip import visual_tower
    from otseg.data import Benchmark
    from otseg.model import OTSeg
    from otseg.recipes import resolve
    from otseg.steps import Trainer, make_optimizer

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    text = F.normalize(torch.randn(k, n, tower["dim"]), dim=-1)
    model = OTSeg(
        visual=visual_tower(**tower),
        text=text,
        image_size=side,
        visual_prompts=visual_prompts,
        init_from_clip=True,
        **(parts or {}),
    ).to(device)
    recipe = resolve("coco", "fully_supervised", image_size=side, stride=side, batch_size=batch, precision=mixed)
    trainer = Trainer(
        recipe=recipe,
        bench=Benchmark("random", tuple(map(str, range(k))), (), None, None),
        accelerator=Accelerator(mixed_precision=mixed, cpu=device == "cpu"),
        model=model,
        net=torch.compile(model, dynamic=False) if compiled else model,
        opt=make_optimizer(model, recipe),
        text=model.text,
        unseen=torch.empty(0, dtype=torch.long, device=device),
        per_device=batch,
    )
    stripes = torch.linspace(0, min(8, k) - 1e-3, side).long() * max(k // 8, 1)
    label = stripes.clamp_max(k - 1).expand(batch, side, side).contiguous()
    present = torch.stack([one.flatten().bincount(minlength=256) > 0 for one in label])
    batch = {"image": torch.randn(batch, 3, side, side), "label": label}
    return trainer, {name: t.to(device) for name, t in batch.items()} | {"present_labels": present}


def step(report, device, sizes):
    """The training step as training runs it: images per second, memory, synchronisations, share of each part."""
    import torch

    from otseg.ot import defer_convergence_checks
    from otseg.steps import training_step

    def one(dataset, batch, name, compiled=False):
        what = f"{dataset}, batch {batch}, {name}" + ", compiled" * compiled
        with noted(report, what):
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            mixed = "bf16" if name == "bf16" else "no"
            trainer, data = trainer_and_batch(
                device, batch=batch, mixed=mixed, compiled=compiled, tower=sizes["tower"], **sizes["step"][dataset]
            )

            def run():
                with defer_convergence_checks() as checks:
                    total = training_step(trainer, data, 1)
                    checks.found.clear()  # their warnings would synchronise
                return total

            values = measure(run, device, sizes["step_repeats"])
            values["images_per_s"] = 1000 * batch / values["ms"]
            if device == "cuda":
                values["synchronisations"] = count_synchronisations(run)
                if not compiled:
                    values |= kernel_shares(run)
            loss = measure_losses(trainer, data, device, sizes["step_repeats"], mixed)
            values["losses_ms"] = loss
            report.row(what, dataset=dataset, batch=batch, precision=name, compiled=compiled, **values)
            if device == "cuda" and name == "bf16" and not compiled and batch == sizes["batches"][-1]:
                report.row(f"slowest kernels of {what}", **slowest_kernels(run))
        if device == "cuda":
            torch.cuda.empty_cache()

    first, *others = sizes["step"]
    one(first, sizes["batches"][-1], "bf16")
    for batch in reversed(sizes["batches"]):
        for name in ("bf16", "tf32", "float32"):
            if (batch, name) != (sizes["batches"][-1], "bf16"):
                one(first, batch, name)
    for dataset in others:
        for batch in sizes["batches"]:
            one(dataset, batch, "bf16")
    torch.set_float32_matmul_precision("highest")
    for batch in sizes["batches"]:
        plain_step(report, device, batch, sizes, first)
    if sizes["compile"]:
        one(first, sizes["batches"][-1], "bf16", compiled=True)


def plain_step(report, device, batch, sizes, dataset):
    """The same step in plain PyTorch: unrolled Sinkhorn, a loss at full size, unfused blocks."""
    import torch

    from otseg.losses import naive_mask_loss, training_loss
    from otseg.tasks import PLAIN_PARTS

    what = f"{dataset}, batch {batch}, bf16, plain"
    with noted(report, what, batch=batch):
        trainer, data = trainer_and_batch(
            device, batch=batch, mixed="bf16", tower=sizes["tower"], parts=PLAIN_PARTS, **sizes["step"][dataset]
        )

        def run():
            with trainer.accelerator.autocast():
                masks = trainer.net(data["image"], trainer.text)
            trainer.accelerator.backward(sum(training_loss(masks, data["label"], loss=naive_mask_loss).values()))
            trainer.opt.step()
            trainer.opt.zero_grad()

        values = measure(run, device, sizes["step_repeats"])
        values["images_per_s"] = 1000 * batch / values["ms"]
        report.row(what, dataset=dataset, batch=batch, precision="bf16", compiled=False, **values)
    if device == "cuda":
        torch.cuda.empty_cache()


def measure_losses(trainer, data, device, repeats, mixed):
    """Milliseconds of the losses of a step alone, forward and backward."""
    import torch

    from otseg.losses import training_loss
    from otseg.model import Masks

    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=mixed == "bf16"):
        masks = trainer.model(data["image"], trainer.text)
    masks = Masks(*(t.detach().requires_grad_() for t in masks))
    bound = int(data["present_labels"].sum())

    def run():
        sum(training_loss(masks, data["label"], max_present=bound).values()).backward()

    return measure(run, device, repeats)["ms"]


def count_synchronisations(run):
    """Host synchronisations in a run, from PyTorch's warnings about them."""
    import warnings

    import torch

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def kernel_times(run):
    """Milliseconds of each CUDA kernel in a run, by name."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / 1000 for e in prof.key_averages() if e.self_device_time_total}


def kernel_shares(run):
    """Milliseconds that the GPU works in a run, and the share of each kind of kernel in percent."""
    kinds = {
        "transport": r"plan_kernel|gradient_kernel",
        "losses": r"mask_loss_kernel",
        "attention": r"flash|fmha|attention|softmax",
        "matrix_products": r"gemm|cutlass|sm\d\d_xmma|cublas|nvjet|bmm",
        "memory": r"[Mm]emcpy|[Mm]emset",
    }
    total = dict.fromkeys([*kinds, "other"], 0.0)
    for name, ms in kernel_times(run).items():
        total[next((k for k, pattern in kinds.items() if re.search(pattern, name)), "other")] += ms
    busy = sum(total.values())
    return {"kernels_ms": busy} | {f"share_{kind}": 100 * ms / (busy or 1) for kind, ms in total.items()}


def slowest_kernels(run, count=12):
    """Milliseconds of the slowest kernels of a run, in one sentence."""
    times = sorted(kernel_times(run).items(), key=lambda item: -item[1])[:count]
    return {"kernels": "; ".join(f"{name[:90]} {ms:.2f} ms" for name, ms in times)}


def inference(report, device, sizes):
    """Sliding-window inference: windows per second."""
    import torch
    import torch.nn.functional as F

    from otseg.clip import visual_tower
    from otseg.inference import predict_paths, window_starts
    from otseg.model import OTSeg

    for dataset, s in sizes["inference"].items():
        torch.manual_seed(0)
        text = F.normalize(torch.randn(s["k"], s["n"], sizes["tower"]["dim"]), dim=-1)
        model = OTSeg(
            visual=visual_tower(**sizes["tower"]), text=text, image_size=s["side"], visual_prompts=s["visual_prompts"]
        )
        model = model.to(device).eval()
        image = torch.randn(1, 3, *s["image"], device=device)
        stride = round(s["side"] * 5 / 6)
        windows = len(window_starts(s["image"][0], s["side"], stride)) * len(
            window_starts(s["image"][1], s["side"], stride)
        )
        for name in ("bf16", "tf32", "float32"):
            with noted(report, f"{dataset}, {name}"), precision(name, device):
                run = lambda: predict_paths(model, image, ("ensemble",), stride=stride)  # noqa: B023
                values = measure(run, device, sizes["repeats"])
                report.row(f"{dataset}, {name}", windows=windows, **values, windows_per_s=1000 * windows / values["ms"])


def digits(report, device, sizes):
    """The embedded benchmark, all settings and several seeds: metrics beside those of the CPU's records."""
    from otseg.evaluation import best_device
    from otseg.recipes import SETTINGS, resolve, run_name
    from otseg.training import fit

    assert device == "cpu" or best_device().type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(sizes["seeds"]):
            for setting in SETTINGS:
                with noted(report, f"{setting}, seed {seed}"):
                    recipe = resolve("digits", setting, seed=seed, **sizes["digits"])
                    record = fit(recipe, Path(folder) / run_name(recipe), progress=False)
                    cpu = ROOT / f"results/runs/{run_name(resolve('digits', setting, seed=seed))}.json"
                    cpu = json.loads(cpu.read_text())["metrics"]["ensemble"]["hiou"] if cpu.is_file() else None
                    ours = record["metrics"]["ensemble"]["hiou"]
                    report.row(
                        f"{setting}, seed {seed}",
                        setting=setting,
                        seed=seed,
                        seconds=record["seconds"],
                        hiou=100 * ours if ours is not None else None,
                        hiou_cpu_record=100 * cpu if cpu is not None else None,
                    )


def loading(report, device, sizes):
    """Training crops of COCO's size per second: can the cores feed the GPU?"""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader
    from torchvision.io import write_jpeg, write_png

    from otseg.data import EndlessBatches, TrainCrops
    from otseg.descriptions import described
    from otseg.folders import Files
    from otseg.recipes import resolve

    (h, w), side, count = sizes["loading_size"], sizes["loading_side"], sizes["loading_images"]
    with tempfile.TemporaryDirectory() as folder:
        g, files = torch.Generator().manual_seed(0), []
        for i in range(count):
            image = F.interpolate(torch.rand(1, 3, 15, 20, generator=g), size=(h, w), mode="bicubic")[0].clamp(0, 1)
            label = F.interpolate(torch.randint(171, (1, 1, 15, 20), generator=g).float(), size=(h, w))[0]
            files.append((Path(folder, f"{i}.jpg"), Path(folder, f"{i}.png")))
            write_jpeg((255 * image).byte(), str(files[-1][0]), quality=90)
            write_png(label.byte(), str(files[-1][1]))
        recipe = resolve("coco", image_size=side, stride=side, train_short_side=h)
        crops = TrainCrops(Files(files, described("coco")), recipe, torch.arange(256))
        for workers in sizes["workers"]:
            if workers > (os.cpu_count() or 1):
                continue
            with noted(report, f"{workers} processes"):
                steps = sizes["loading_steps"]
                batches = EndlessBatches(count, sizes["loading_batch"], 0, steps + 1)
                loader = iter(DataLoader(crops, batch_sampler=batches, num_workers=workers))
                next(loader)  # the processes start
                start = time.perf_counter()
                images = sum(len(batch["image"]) for batch in loader)
                report.row(f"{workers} processes", workers=workers, crops_per_s=images / (time.perf_counter() - start))


PARTS = {  # name -> (function, seconds on a GPU, seconds on a CPU)
    "facts": (facts, 30, 60),
    "kernels": (kernels, 60, 240),
    "parity": (parity, 40, 120),
    "transport": (transport, 50, 120),
    "step": (step, 120, 240),
    "tests": (tests, 90, 240),
    "inference": (inference, 40, 120),
    "loading": (loading, 40, 120),
    "digits": (digits, 140, 300),
}
VIT = dict(width=768, layers=12, heads=12, patch=16, image_size=224, dim=512)
SMALL = dict(width=32, layers=2, heads=2, patch=16, image_size=64, dim=16)
SIZES = {
    "cuda": dict(
        kernel_problems=(2496, 1024, 8),
        kernel_sizes=((1024, 8), (900, 7), (1, 1), (3, 2), (577, 6), (2048, 8), (1025, 16)),
        loss_images=4,
        loss_classes=156,
        loss_side=512,
        transport=(2496, 1024, 8),
        repeats=10,
        step_repeats=5,
        batches=(4, 16),
        compile=True,
        tower=VIT,
        tests="",
        test_processes=8,
        step={
            "COCO-Stuff": dict(k=156, n=8, visual_prompts=100, side=512),
            "Context": dict(k=49, n=8, visual_prompts=10, side=480),
            "VOC": dict(k=15, n=6, visual_prompts=10, side=512),
        },
        inference={
            "COCO-Stuff": dict(k=171, n=8, visual_prompts=100, side=512, image=(512, 683)),
            "VOC": dict(k=20, n=6, visual_prompts=10, side=512, image=(512, 683)),
        },
        seeds=3,
        digits={},
        workers=(1, 4, 8, 16),
        loading_size=(480, 640),
        loading_side=512,
        loading_images=128,
        loading_steps=24,
        loading_batch=16,
    ),
    "cpu": dict(
        kernel_problems=(4, 64, 4),
        kernel_sizes=((16, 3), (1, 1), (17, 5)),
        loss_images=1,
        loss_classes=3,
        loss_side=48,
        transport=(6, 64, 4),
        repeats=2,
        step_repeats=2,
        batches=(1, 2),
        compile=False,
        tower=SMALL,
        tests="not kernel",
        test_processes=2,
        step={
            "COCO-Stuff": dict(k=6, n=3, visual_prompts=4, side=64),
            "VOC": dict(k=4, n=2, visual_prompts=2, side=64),
        },
        inference={"COCO-Stuff": dict(k=6, n=3, visual_prompts=4, side=64, image=(64, 96))},
        seeds=1,
        digits=dict(max_iters=4, warmup_iters=2, val_interval=4, val_images=2),
        workers=(1, 2),
        loading_size=(48, 64),
        loading_side=32,
        loading_images=8,
        loading_steps=4,
        loading_batch=4,
    ),
}


# the command


def install(wheels):
    """Install what is missing from a folder of wheels, without a network."""
    missing = [name for module, name in (PACKAGES | OPTIONAL).items() if not importlib.util.find_spec(module)]
    for name in missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", wheels, name]
        done = subprocess.run(command, capture_output=True, text=True)
        print(f"{name}: {'installed' if done.returncode == 0 else 'no wheel'}", flush=True)
    importlib.invalidate_caches()


def read_rows(path):
    """Rows of a JSON-lines file; the last line may be cut by a time limit."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def cell(value):
    """A value in a Markdown table."""
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "/")


def write_results(out, name, about, rows):
    """Write NAME.json, NAME.csv and NAME.md with what has been measured so far."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)
    text = [f"# {about['name']}", "", f"`{about['command']}`, commit {about['commit'][:12]}, {about['date']}.", ""]
    for part, (function, *_) in PARTS.items():
        own = [row for row in rows if row["part"] == part]
        if not own:
            continue
        columns = [c for c in dict.fromkeys(key for row in own for key in row) if c != "part"]
        text += [
            f"## {part}",
            "",
            function.__doc__,
            "",
            "| " + " | ".join(columns) + " |",
            "|" + " --- |" * len(columns),
        ]
        text += ["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in own] + [""]
    (out / f"{name}.md").write_text("\n".join(text), encoding="utf-8")


def run_part(part, device, budget, path):
    """Run a part in a process of its own; its rows, and a note if it failed or ran out of time."""
    limit = min(PARTS[part][1 if device == "cuda" else 2], budget)
    if limit < 5:
        return [{"part": part, "what": part, "note": "not run: no time left"}]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    if device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--part", part, "--device", device, "--rows", str(path)]
    start, note = time.time(), None
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            note = f"failed: {(done.stderr.strip().splitlines() or [''])[-1]}"[:300]
    except subprocess.TimeoutExpired:
        note = f"stopped after {limit:.0f} s"
    rows = [row for row in read_rows(path) if row["part"] == part]
    print(f"   {part}: {time.time() - start:.0f} s{', ' + note if note else ''}", flush=True)
    return rows + ([{"part": part, "what": part, "note": note}] if note else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if PyTorch sees a GPU")
    parser.add_argument("--parts", help=f"comma-separated, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, help="folder (default: results/benchmarks, or runs/gpu for a CPU)")
    parser.add_argument("--name", help="of the files (default: from the device)")
    parser.add_argument("--commit", help="of the code, if this folder is a copy without its history")
    parser.add_argument("--seconds", type=float, help="time limit of all parts together (default: 360 on a GPU)")
    parser.add_argument("--wheels", default=os.environ.get("WHEELS"), help="folder of wheels to install from")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        PARTS[options.part][0](Report(options.rows, options.part), options.device, SIZES[options.device])
        return 0
    if options.wheels:
        install(options.wheels)
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: PyTorch sees no GPU; --device cpu runs everything with tiny sizes", file=sys.stderr)
        return 2
    parts = options.parts.split(",") if options.parts else list(PARTS)
    if wrong := set(parts) - set(PARTS):
        print(f"gpu.py: no part {', '.join(sorted(wrong))}; there is {', '.join(PARTS)}", file=sys.stderr)
        return 2
    title = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, tiny sizes"
    name = options.name or (re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") if device == "cuda" else "cpu_tiny")
    out = options.out or ROOT / ("results/benchmarks" if device == "cuda" else "runs/gpu")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {
        "name": title,
        "device": device,
        "command": f"python scripts/gpu.py --device {device}",
        "commit": options.commit or git or "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    rows, end = [], time.time() + (options.seconds or (360 if device == "cuda" else 1500))
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            print(f"{part}: {PARTS[part][0].__doc__.splitlines()[0]}", flush=True)
            rows += run_part(part, device, end - time.time(), Path(folder) / "rows.jsonl")
            write_results(out, name, about, rows)
    print(f"wrote {name}.json, .csv and .md; {sum('note' in row for row in rows)} rows have a note")
    return 0


if __name__ == "__main__":
    sys.exit(main())
