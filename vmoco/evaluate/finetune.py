"""Fine-tuning of all weights on labelled videos, as is usual on UCF101 and HMDB51. Does not use Ray.

Each epoch shows one clip of every training video: a stored clip, a window in it, a crop and a mirroring, all drawn from
the seed. The weights after the last epoch are tested, so nothing is chosen on the test part. A test video is classified
by the mean class probabilities of some of its clips (`clips_per_video`, 10 by default), each with a centre crop.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from vmoco.clip_settings import AugmentSettings
from vmoco.data import augment
from vmoco.data.clip_cache import cache_for
from vmoco.data.manifest import Manifest
from vmoco.data.shard_reader import ClipReader
from vmoco.encoders.encoder import Encoder
from vmoco.evaluate.features import Frames, Window
from vmoco.evaluate.protocols import Measured, Split, video_right
from vmoco.job_settings import FinetuneSettings
from vmoco.progress import Progress
from vmoco.seed import hash64, mix64, permutation, uniform


class Classifier(nn.Module):
    """An encoder's backbone with a linear classifier on it.

    Args:
        encoder: its backbone is copied and not changed.
        num_classes: C.
        dropout: probability of dropping a feature before the classifier.
    """

    def __init__(self, encoder: Encoder, *, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.dropout = dropout
        self.linear = nn.Linear(encoder.feature_dim, num_classes)

    def forward(self, clips: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised float (B, 3, T, H, W) -> logits (B, C); `keep` (B, D) is 1 where a feature is not dropped."""
        features = self.encoder.backbone(clips)
        if keep is not None:
            features = features * keep / (1 - self.dropout)
        logits: torch.Tensor = self.linear(features)
        return logits


def finetune(
    encoder: Encoder,
    manifest: Manifest,
    split: Split,
    settings: FinetuneSettings,
    *,
    window: Window,
    seed: int,
    device: str = "cpu",
    show: Callable[[str], None] = print,
) -> Measured:
    """Fine-tunes on the training part of a split, then tests once on its test part.

    Args:
        encoder: initial weights; it is not changed.
        manifest: data set; `split` is over the rows of its table.
        split: the training and the test clips.
        settings: see `FinetuneSettings`.
        window: which frames of a stored clip are seen; in training its start is random.
        seed: seed of every random number.
        device: torch device to run on, such as "cpu".
        show: called with a line per epoch, and with progress lines.

    Raises:
        ValueError: the training diverged, or a clip is damaged.
    """
    torch.manual_seed(hash64("finetune", seed) % 2**63)  # only for the initial weights of the classifier
    model = Classifier(encoder, num_classes=len(split.classes), dropout=settings.dropout).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.learning_rate, momentum=0.9, weight_decay=settings.weight_decay
    )
    clips_of = _clips_of(split.video_ids, split.train)
    steps_per_epoch = max(len(clips_of) // settings.batch_size, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps_per_epoch)
    progress = Progress(
        show,
        f"fine-tuning on {split.name}  trained",
        total=settings.epochs * steps_per_epoch,
        unit="steps",
        every_seconds=10,
    )
    reader = ClipReader.of(manifest, crop=True, cache=cache_for(manifest.uri))
    for epoch in range(settings.epochs):
        model.train()
        order = permutation(len(clips_of), hash64("finetune order", seed, epoch))
        total = 0.0
        for step in range(steps_per_epoch):
            videos = order[step * settings.batch_size : (step + 1) * settings.batch_size]
            seeds = mix64(videos.astype(np.uint64), hash64("finetune clip", seed, epoch))
            rows = [_pick(clips_of[video], draw) for video, draw in zip(videos, _draws(seeds, "clip"), strict=True)]
            windows = _windows(seeds, window, num_stored=manifest.frame_shape[0])
            pixels = _augmented(model.encoder, list(reader.several(rows, windows)), seeds, settings, device)
            keep = _keep(seeds, encoder.feature_dim, settings.dropout).to(device)
            loss = F.cross_entropy(model(pixels, keep), torch.from_numpy(split.labels[rows]).to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
            progress.add()
        if not np.isfinite(total):
            raise ValueError(
                f"fine-tuning on {split.name} diverged in epoch {epoch}: lower --finetune.learning-rate "
                f"{settings.learning_rate:g}"
            )
        show(f"fine-tuning on {split.name}: epoch {epoch + 1}/{settings.epochs}, loss {total / steps_per_epoch:.3f}")
    seen = window.numbers(manifest.frame_shape[0])
    return _test(model, reader, seen, split, settings, device)


def _test(
    model: Classifier, reader: ClipReader, seen: range, split: Split, settings: FinetuneSettings, device: str
) -> Measured:
    model.eval()
    rows = []
    for members in _clips_of(split.video_ids, split.test):
        count = min(settings.clips_per_video, len(members))
        rows += list(members[np.linspace(0, len(members) - 1, count).round().astype(np.int64)])
    shares = []
    with torch.inference_mode():
        for first in range(0, len(rows), settings.batch_size):
            frames = reader.several(rows[first : first + settings.batch_size], itertools.repeat(seen))
            prepared = torch.cat([model.encoder.preprocess(torch.from_numpy(clip.copy())[None]) for clip in frames])
            shares.append(model(prepared.to(device)).softmax(dim=1).double().cpu().numpy())
    right, videos = video_right(shares, np.arange(len(split.classes)), videos=split.video_ids[rows], split=split)
    return Measured("finetune", right, videos, f"{settings.epochs} epochs, {settings.clips_per_video} clips a video")


def _windows(seeds: npt.NDArray[np.uint64], window: Window, *, num_stored: int) -> list[range]:
    """The frames of each clip that training sees; each seed determines where the window begins."""
    starts = (_draws(seeds, "window") * (num_stored - window.span + 1)).astype(np.int64)
    return [window.numbers(num_stored, start=int(start)) for start in starts]


def _augmented(
    encoder: Encoder,
    clips: list[Frames],
    seeds: npt.NDArray[np.uint64],
    settings: FinetuneSettings,
    device: str,
) -> torch.Tensor:
    """Clips (T, H, W, 3), cropped, mirrored and normalised as the encoder expects: float (B, 3, T, size, size)."""
    size = encoder.preprocessing.size
    wanted = AugmentSettings(size=size, min_area=settings.min_area, flip_probability=settings.flip_probability)
    views = []
    for index, clip in enumerate(clips):
        frames = torch.from_numpy(clip.copy())[None].to(device)
        draws = augment.draw(seeds[index : index + 1], wanted, height=clip.shape[1], width=clip.shape[2])
        views.append(augment.resized_crop(frames, torch.from_numpy(draws).to(device), size=size))
    normalised: torch.Tensor = (torch.cat(views) - encoder.mean) / encoder.std
    return normalised


def _clips_of(videos: npt.NDArray[np.object_], mask: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.int64]]:
    """The rows of each video inside the mask; videos are sorted by name."""
    rows = np.flatnonzero(mask)
    names, members = np.unique(videos[rows], return_inverse=True)
    order = np.argsort(members, kind="stable")
    return np.split(rows[order], np.searchsorted(members[order], np.arange(1, len(names))))


def _draws(seeds: npt.NDArray[np.uint64], purpose: str) -> npt.NDArray[np.float64]:
    return uniform(seeds, hash64("finetune", purpose))


def _pick(members: npt.NDArray[np.int64], draw: float) -> int:
    return int(members[int(draw * len(members))])


def _keep(seeds: npt.NDArray[np.uint64], width: int, dropout: float) -> torch.Tensor:
    """Which features are not dropped, float32 (B, D): drawn from the seeds, so that a run can be repeated."""
    places = np.arange(width, dtype=np.uint64)
    kept = np.stack([uniform(places, int(seed % 2**63)) >= dropout for seed in seeds])
    return torch.from_numpy(kept.astype(np.float32))
