"""How much do ranks send each other? `python -m tests.benchmarks.communication`.

Real steps at 2 and 4 gloo ranks, 16 frames of 112 x 112, the generator on, 32 clips a rank and the small network, so
that it fits a CPU; what is sent is counted by torch's profiler. Gradients, which every data-parallel training sends,
stand apart. Beside it: what a rank would send to gather the pixels of the keys in float32 (shuffle-BN as released).
Then a table for r3d_18 with the paper's batch, by the formula that the counts have just confirmed.
Ends with one JSON line: bytes per rank and step at 2 ranks.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from tests.collectives import collectives_of, without_gradients
from tests.dataset import make_data_set
from tests.ranks import run_on_ranks
from tests.train.test_step import changed
from vmoco.config import PretrainSettings
from vmoco.data.loader import Loader
from vmoco.data.manifest import Manifest
from vmoco.model.moco import VideoMoco
from vmoco.presets import PRESETS
from vmoco.train import distributed
from vmoco.train.state import TrainState
from vmoco.train.step import TrainStep

CPU = torch.device("cpu")
CLIPS = 32
FRAMES, SIZE, CHANNELS = 16, 112, 3
FLOAT = 4


def settings_for(ranks: int) -> PretrainSettings:
    return changed(
        PRESETS["tiny"][1],
        data={"num_frames": FRAMES},
        augment={"size": SIZE},
        model={"embedding_dim": 128},
        generator={"start_percent": 0.0},
        moco={"queue_size": 1024},
        train={"global_batch": CLIPS * ranks, "micro_batch": 8},
    )


def count(folder: str) -> tuple[float, int, int]:
    """Bytes sent by this rank in the second step: besides gradients, of gradients, and of running statistics."""
    torch.set_num_threads(1)
    settings, manifest = settings_for(distributed.world_size()), Manifest.load(folder)
    state = TrainState(settings, manifest_hash=manifest.hash, device=CPU)
    step = TrainStep(settings, state, CPU)
    loader = Loader(manifest, settings, rank=distributed.rank(), world_size=distributed.world_size())
    step(loader.batch(0))
    batch = loader.batch(1)
    rest, gradients = without_gradients(collectives_of(lambda: step(batch)), state.moco.query, state.moco.generator)
    sent = sum(one.sent_bytes(distributed.world_size()) for one in rest)
    return sent, gradients, FLOAT * sum(tensor.numel() for tensor in state.moco.running_statistics())


def pixel_bytes(ranks: int, clips: int) -> int:
    """Sent by each rank to gather all pixels on all ranks."""
    return (ranks - 1) * clips * FRAMES * SIZE * SIZE * CHANNELS * FLOAT


def formula(ranks: int, *, clips: int, statistics: int, dim: int = 128) -> float:
    """Keys gathered, running statistics added up; the few hundred bytes of other sums are left out."""
    return (ranks - 1) * clips * dim * FLOAT + 2 * (ranks - 1) / ranks * statistics


def main() -> None:
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        make_data_set(Path(folder), num_videos=40, num_frames=FRAMES, height=SIZE, width=SIZE)
        for ranks in (2, 4):
            (sent, gradients, statistics), *_ = run_on_ranks(ranks, count, folder)
            expected, pixels = formula(ranks, clips=CLIPS, statistics=statistics), pixel_bytes(ranks, CLIPS)
            print(
                f"{ranks} ranks: {sent:,.0f} bytes sent ({expected:,.0f} by the formula), pixels {pixels:,}, "
                f"{pixels / sent:,.0f} x less; gradients {2 * (ranks - 1) / ranks * gradients:,.0f}",
                flush=True,
            )
            assert abs(sent - expected) < 0.05 * expected
            result[ranks] = {"sent_bytes": round(sent), "pixel_gather_bytes": pixels}
    paper = PRESETS["paper"][1]
    model = VideoMoco(changed(paper, model={"backbone": "r3d_18"}), device=CPU)
    statistics = FLOAT * sum(tensor.numel() for tensor in model.running_statistics())
    print(f"computed for r3d_18, {CLIPS} clips of {FRAMES}x{SIZE}x{SIZE} a rank, MB sent per rank and step:")
    print(f"{'GPUs':>6} {'keys and sums':>14} {'gradients':>10} {'pixels':>10} {'less':>7}")
    weights = FLOAT * sum(parameter.numel() for parameter in model.query.parameters())
    for ranks in (8, 16, 32, 64, 128, 256, 512, 1024):
        ours, pixels = formula(ranks, clips=CLIPS, statistics=statistics), pixel_bytes(ranks, CLIPS)
        gradients = 2 * (ranks - 1) / ranks * weights
        print(f"{ranks:>6} {ours / 1e6:>14.2f} {gradients / 1e6:>10.1f} {pixels / 1e6:>10.0f} {pixels / ours:>6,.0f}x")
    print(json.dumps(result[2] | {"ranks_4": result[4]}))


if __name__ == "__main__":
    main()
