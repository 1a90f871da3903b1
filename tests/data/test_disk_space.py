"""What ingest will write is said before the first shard; what cannot fit is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data import videos
from tests.data.test_ingest_tasks import probed, settings
from tests.store import Store
from vmoco.data.decoder import Decoder
from vmoco.data.disk_space import bytes_of, check_space, num_clips_to_write
from vmoco.data.found import Found
from vmoco.data.ingest_plan import Probed, plan_shards
from vmoco.data.ingest_tasks import make_shard

HUGE = [Probed(Found("a.mp4", 1), "hash", 10**12)]


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


@pytest.mark.parametrize("size", [(24, 32), (96, 128)])
def test_the_size_of_raw_shards_is_known_before(tmp_path: Path, decoder: Decoder, size: tuple[int, int]) -> None:
    """What the probe pass says is within 3 % of the files; what is written already counts no more."""
    for number in range(4):
        videos.write_video(tmp_path / f"in/{number}.mp4", videos.images(30 + number))
    chosen = settings(tmp_path, num_frames=8, height=size[0], width=size[1], videos_per_shard=2)
    found = probed(chosen, decoder)
    num_clips = num_clips_to_write(found, output=chosen.output, settings=chosen)
    assert num_clips == 12
    sizes = []
    for plan in plan_shards(found, chosen):
        made = make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder)
        sizes.append(made.file.num_bytes)
        assert num_clips_to_write(found, output=chosen.output, settings=chosen) == num_clips - 6 * len(sizes)
    assert bytes_of(num_clips, chosen, "raw") == pytest.approx(sum(sizes), rel=0.03)


def test_jpeg_shards_are_estimated(tmp_path: Path, decoder: Decoder) -> None:
    """Between a third of the size of real shards and three times as much, for a picture with detail."""
    noise = np.random.default_rng(0).integers(-12, 12, (96, 128, 3))
    frames = [(image + noise).clip(0, 255).astype(np.uint8) for image in videos.images(24, height=96, width=128)]
    videos.write_video(tmp_path / "in/a.mp4", frames)
    chosen = settings(tmp_path, num_frames=8, height=96, width=128, encoding="jpeg")
    (plan,) = plan_shards(found := probed(chosen, decoder), chosen)
    made = make_shard(plan, root=chosen.videos, output=chosen.output, settings=chosen, decoder=decoder)
    assert 1 / 3 < bytes_of(found[0].num_clips, chosen, "jpeg") / made.file.num_bytes < 3


def test_what_fits_is_said(tmp_path: Path, store: Store) -> None:
    """The number of clips, their size, and what is free; nothing is free or full in a store."""
    few = [Probed(Found("a.mp4", 1), "hash", 3)]
    chosen = settings(tmp_path)
    line = check_space(few, output=chosen.output, settings=chosen, continues=False)
    assert re.fullmatch(
        rf"writes 3 clips in raw encoding, 0\.0 MB, to {chosen.output}, which has [\d.]+ [GM]B free", line
    )
    far = settings(tmp_path, output="s3://bucket/out", encoding="jpeg")
    line = check_space([], output=far.output, settings=far, continues=False)
    assert line == "writes 0 clips in jpeg encoding, about 0.0 MB, to s3://bucket/out"


def test_what_cannot_fit_is_refused(tmp_path: Path) -> None:
    """The message has both sizes and what to do: JPEG with its size, or fewer clips where it is JPEG already."""
    chosen = settings(tmp_path)
    raw = rf"^--output {chosen.output} has [\d.]+ [GM]B free, and ingest would write {10**12} clips in raw encoding, "
    jpeg = r"[\d.]+ GB: free space, give another --output, or give --encoding jpeg, which needs about [\d.]+ GB$"
    with pytest.raises(ValueError, match=raw + jpeg):
        check_space(HUGE, output=chosen.output, settings=chosen, continues=False)
    with pytest.raises(ValueError, match=r"or give --encoding jpeg and a new --output, which needs about"):
        check_space(HUGE, output=chosen.output, settings=chosen, continues=True)
    with pytest.raises(ValueError, match=r"in jpeg encoding, about .* or lower --max-clips-per-video 3$"):
        check_space(HUGE, output=chosen.output, settings=settings(tmp_path, encoding="jpeg"), continues=False)
