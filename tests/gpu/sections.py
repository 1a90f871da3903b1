"""The sections of `python -m tests.gpu`: each returns its figures, and raises AssertionError where one is wrong.

`scale` says how large, `folder` is empty. On a CPU they only show that they run.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.gpu.motion import probe_accuracy, write_motion_clips
from tests.gpu.scale import Result, Scale, Section
from vmoco.config import PretrainSettings
from vmoco.data.loader import Loader, RankBatch
from vmoco.data.manifest import Manifest
from vmoco.model.backbone import autocast_dtype, require_determinism
from vmoco.model.cost import step_cost
from vmoco.train import distributed
from vmoco.train.speed import choose_kernels
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""bf16 operations a second of a GPU without sparsity, by a part of its name (NVIDIA's data sheets)."""


def environment(scale: Scale, folder: Path) -> Result:
    """What the figures of the other sections belong to."""
    found: Result = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "compiler": shutil.which("gcc") or shutil.which("cc"),
    }
    if scale.on_gpu:
        about = torch.cuda.get_device_properties(scale.device)
        found |= {
            "gpu": about.name,
            "gpus": torch.cuda.device_count(),
            "memory_gib": round(about.total_memory / 2**30, 1),
            "capability": f"{about.major}.{about.minor}",
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    return found


class Training:
    """A state on the device of a scale, and steps on a batch that stays the same."""

    def __init__(self, scale: Scale, manifest: Manifest, settings: PretrainSettings) -> None:
        dtype, _ = autocast_dtype(settings.train.precision, scale.device)
        torch.manual_seed(0)
        self.scale = scale
        self.state = TrainState(settings, manifest_hash=manifest.hash, device=scale.device, autocast_dtype=dtype)
        choose_kernels(settings.train, scale.device)
        self.step = TrainStep(settings, self.state, scale.device)
        self.loader = Loader(manifest, settings, rank=0, world_size=1, pin_memory=scale.on_gpu)
        self.batch = self.loader.batch(0)

    def take(self, count: int) -> float:
        """Takes steps; returns the loss of the last one."""
        for _ in range(count):
            metrics = self.step(replace(self.batch, step=self.state.step))
            self.step.requested(now=False)
        return float(metrics.numbers()["loss"])

    def seconds(self) -> float:
        """Seconds of a step, after some to get warm."""
        self.take(self.scale.steps)
        times = []
        for _ in range(self.scale.steps):
            self.scale.synchronise()
            started = time.perf_counter()
            self.take(1)
            self.scale.synchronise()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def digest(self) -> str:
        """Hash of all tensors of the state."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.state.tensors().items()):
            found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()


def numerics(scale: Scale, folder: Path) -> Result:
    """Augmentation, embeddings and losses on the device are those of a CPU; in bf16 they are near them."""
    manifest = scale.data_set(folder / "data")
    settings = scale.settings(train={"precision": "fp32", "global_batch": 4, "micro_batch": 2})
    places = {"device": scale, "cpu": replace(scale, device=torch.device("cpu"))}
    pixels, embedded, losses = {}, {}, {}
    for name, place in places.items():
        training = Training(place, manifest, settings)
        clips = training.step._augmented(training.batch.query, slice(None))
        with torch.no_grad():
            embedded[name] = training.state.moco.query.eval()(clips).float().cpu()
            training.state.moco.query.train()
        pixels[name] = clips.cpu()
        losses[name] = [training.take(1) for _ in range(3)]
    similarity = torch.nn.functional.cosine_similarity(embedded["device"], embedded["cpu"]).min()
    found = {
        "augmentation_difference": float((pixels["device"] - pixels["cpu"]).abs().max()),
        "least_similarity": float(similarity),
        "loss_differences": [abs(a - b) for a, b in zip(losses["device"], losses["cpu"], strict=True)],
    }
    assert found["augmentation_difference"] < 1e-3, found
    assert found["least_similarity"] > 0.9999, found
    assert found["loss_differences"][0] < 1e-3, found
    if scale.on_gpu:
        half = Training(
            scale, manifest, scale.settings(train={"precision": "bf16", "global_batch": 4, "micro_batch": 2})
        )
        found["bf16_loss_difference"] = abs(half.take(1) - losses["cpu"][0])
        assert found["bf16_loss_difference"] < 0.1, found
    return found


def syncs(scale: Scale, folder: Path) -> Result:
    """How often a step makes the host wait for the GPU, apart from one look at the step before."""
    manifest = scale.data_set(folder / "data")
    training = Training(scale, manifest, scale.settings())
    training.take(3)
    if not scale.on_gpu:
        return {"waits_of_3_steps": None}
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            training.take(3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in noted if "synchronizing" in str(each.message)]
    # `take` reads the loss of the last step once; each step reads the flags of the step before by an event.
    found = {"waits_of_3_steps": len(waits), "messages": sorted(set(waits))}
    assert len(waits) <= 1, found
    return found


def _peak(scale: Scale) -> float | None:
    name = torch.cuda.get_device_name(scale.device) if scale.on_gpu else ""
    return next((peak for part, peak in PEAK.items() if part in name), None)


def _speed(scale: Scale, manifest: Manifest, **groups: dict[str, Any]) -> Result:
    settings = scale.settings(**groups)
    started = time.perf_counter()
    training = Training(scale, manifest, settings)
    training.take(1)
    scale.synchronise()
    first = time.perf_counter() - started
    seconds = training.seconds()
    cost, peak = step_cost(settings, bf16=scale.on_gpu), _peak(scale)
    return {
        "first_step_seconds": round(first, 2),
        "clips_per_second": round(scale.micro_batch / seconds, 2),
        "mfu": round(cost.flops_after / seconds / peak, 4) if peak else None,
    }


def step(scale: Scale, folder: Path) -> Result:
    """Clips a second and share of the peak, plainly and with each switch that needs no compiler."""
    manifest = scale.data_set(folder / "data")
    variants: dict[str, dict[str, dict[str, Any]]] = {
        "plain": {},
        "cudnn_benchmark": {"train": {"cudnn_benchmark": True}},
        "pad_channels": {"train": {"pad_channels": True}},
        "benchmark_and_padded": {"train": {"cudnn_benchmark": True, "pad_channels": True}},
        "generator_every_4": {"generator": {"every": 4}},
        "before_the_generator": {"generator": {"start_percent": 100.0}},
    }
    found = {}
    for name, groups in variants.items():
        torch.backends.cudnn.benchmark = False
        found[name] = _speed(scale, manifest, **groups)
    return found


def memory(scale: Scale, folder: Path) -> Result:
    """The peak of a rank beside what `check.py cluster` estimates."""
    manifest = scale.data_set(folder / "data")
    settings = scale.settings()
    estimate = step_cost(settings, bf16=scale.on_gpu).rank_bytes
    training = Training(scale, manifest, settings)
    if scale.on_gpu:
        torch.cuda.reset_peak_memory_stats(scale.device)
    training.take(2)
    if not scale.on_gpu:
        return {"estimate_gib": round(estimate / 2**30, 3)}
    peak = torch.cuda.max_memory_reserved(scale.device)
    found = {"estimate_gib": round(estimate / 2**30, 2), "peak_gib": round(peak / 2**30, 2), "ratio": peak / estimate}
    assert 0.5 < found["ratio"] < 1.3, found
    return found


def compiled(scale: Scale, folder: Path) -> Result:
    """The same loss, faster, and nothing compiled again after the first steps."""
    manifest = scale.data_set(folder / "data")
    plain = Training(scale, manifest, scale.settings(train={"precision": "fp32"})).take(2)
    loss = Training(scale, manifest, scale.settings(train={"precision": "fp32", "compile": True})).take(2)
    assert abs(loss - plain) < 1e-2, (loss, plain)
    found: Result = {"loss_difference": abs(loss - plain)}
    everything = {"compile": True, "compile_generator": True, "compile_generator_steps": True}
    for name, switches in {"compile": {"compile": True}, "all": everything}.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        found[name] = _speed(scale, manifest, train=switches)
        found[name]["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found


def feed(scale: Scale, folder: Path) -> Result:
    """Clips a second that one loader gives, two views each, of 16 of 32 stored frames; first and second reading."""
    found: Result = {}
    for encoding in ("raw", "jpeg") if _reads_jpeg() else ("raw",):
        manifest = scale.data_set(folder / encoding, num_frames=2 * scale.num_frames, encoding=encoding)  # type: ignore[arg-type]
        loader = Loader(manifest, scale.settings(), rank=0, world_size=1, pin_memory=scale.on_gpu)
        for name in ("first", "again"):
            started = time.perf_counter()
            for number in range(scale.steps):
                loader.batch(number)
            found[f"{encoding}_{name}"] = round(scale.steps * scale.micro_batch / (time.perf_counter() - started), 1)
    return found


def _reads_jpeg() -> bool:
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        return False
    return True


def resume(scale: Scale, folder: Path) -> Result:
    """Stopped after three of six steps and loaded again, a deterministic run has the same bits."""
    manifest = scale.data_set(folder / "data")
    settings = scale.settings(train={"deterministic": True})
    require_determinism(scale.backbone, scale.device)
    whole = Training(scale, manifest, settings)
    _through(whole, 6)
    half = Training(scale, manifest, settings)
    _through(half, 3)
    (folder / "kept").mkdir()
    half.state.save(folder / "kept")
    again = Training(scale, manifest, settings)
    again.state.load(folder / "kept")
    _through(again, 6)
    assert again.digest() == whole.digest(), "the resumed run has other bits"
    return {"equal": True}


def _through(training: Training, until: int) -> None:
    for batch in _batches(training, until):
        training.step(batch)


def _batches(training: Training, until: int) -> Iterator[RankBatch]:
    while training.state.step < until:
        yield training.loader.batch(training.state.step)


def ranks(scale: Scale, folder: Path) -> Result:
    """One rank whose collectives go through NCCL trains as one without them."""
    manifest = scale.data_set(folder / "data")
    settings = scale.settings(train={"precision": "fp32", "deterministic": True})
    require_determinism(scale.backbone, scale.device)
    alone = Training(scale, manifest, settings)
    alone.take(2)
    backend = "cpu:gloo,cuda:nccl" if scale.on_gpu else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        joined = Training(scale, manifest, settings)
        joined.take(2)
        assert distributed.gather_text("a text") == ["a text"]
    finally:
        torch.distributed.destroy_process_group()
    differences = {
        name: float((tensor.float() - joined.state.tensors()[name].float()).abs().max())
        for name, tensor in alone.state.tensors().items()
        if tensor.is_floating_point() and tensor.numel()
    }
    assert max(differences.values()) < 1e-5, max(differences.items(), key=lambda item: item[1])
    return {"largest_difference": max(differences.values())}


def ablation(scale: Scale, folder: Path) -> Result:
    """Linear probe of the direction of motion, for each arm and seed: what learns on this device, and in what time."""
    manifest, clips, labels = write_motion_clips(folder / "data", scale)
    arms: dict[str, dict[str, Any]] = {
        "moco": {"drop_ratio": 0.0},
        "random": {"drop_ratio": 0.25, "start_percent": 100.0, "before_start": "random"},
        "adversarial": {"drop_ratio": 0.25, "start_percent": 30.0, "before_start": "random", "relative": True},
    }
    found: Result = {"chance": 1 / len(set(labels)), "seconds_a_run": []}
    for arm in scale.arms:
        scores = []
        for seed in range(scale.seeds):
            settings = scale.settings(
                run={"seed": seed},
                model={"backbone": "r3d_nano"},
                augment={"size": 32, "flip_probability": 0.0},
                data={"num_frames": 8},
                generator={**arms[arm], "learning_rate": 0.002},
                moco={"queue_size": 1024 if scale.on_gpu else 64, "momentum": 0.99},
                train={
                    **{"steps": scale.arm_steps, "optimizer": "adamw", "learning_rate": 2e-3},
                    **{"global_batch": 16 if scale.on_gpu else 4, "micro_batch": 8 if scale.on_gpu else 4},
                },
            )
            started = time.perf_counter()
            training = Training(scale, manifest, settings)
            _through(training, scale.arm_steps)
            scale.synchronise()
            found["seconds_a_run"].append(round(time.perf_counter() - started, 1))
            scores.append(probe_accuracy(training.state.moco.query.backbone, clips, labels, scale.device))
        found[arm] = [round(score, 4) for score in scores]
    return found


SECTIONS: dict[str, tuple[Section, int]] = {
    "environment": (environment, 30),
    "numerics": (numerics, 60),
    "syncs": (syncs, 30),
    "step": (step, 110),
    "memory": (memory, 30),
    "compiled": (compiled, 150),
    "feed": (feed, 45),
    "resume": (resume, 60),
    "ranks": (ranks, 40),
    "ablation": (ablation, 150),
}
"""Function and limit in seconds of each."""
