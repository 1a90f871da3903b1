"""What does `--data.shuffle-window` save, and what does it cost? `python -m tests.benchmarks.shuffle_window`.

A million synthetic videos of ten clips of 150 kB, of which each epoch draws all ten, in shards of 1,700 clips. A node
reads them through a cache that holds a tenth. For several windows, over the second of two epochs:

- `requests_a_clip`, `bytes_a_clip`: requests to the store and fetched bytes, for each clip that is trained on. Without
  a window each clip is a request; with one, a request fetches the clips of 8 MiB of a shard. `of_8_nodes`: the same
  where eight nodes share the work. Each has a cache, and fetches the pieces that its part of the queries and of the
  keys, which are shuffled, lies in.
- `same_video_keys`: how many of the 65,536 keys in the queue are of the query's own video. They never count, so they
  are places that hold no negative.
- `videos_a_batch`: different videos in a batch of 256.
- `shards_a_batch`: different shards in a batch of 256: neighbours in a data set are often alike (one channel, one
  folder), and batch normalisation sees them together.

Nothing is read: the order is that of the loader (`plan.Stream`), the cache removes what was used longest ago. Ends with
one JSON line.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections import OrderedDict

import numpy as np

from tests.data.test_plan import Clips
from vmoco.data.plan import Stream
from vmoco.data.shard_reader import _TOGETHER
from vmoco.seed import mix64, permutation

CLIPS_PER_VIDEO, CLIP_BYTES, CLIPS_PER_SHARD, QUEUE, BATCH = 10, 150_000, 1700, 65_536, 256
CACHE_SHARE, NODES = 0.1, 8


def synthetic(num_videos: int) -> Clips:
    """Videos of CLIPS_PER_VIDEO clips."""
    numbers = np.arange(num_videos * CLIPS_PER_VIDEO)
    ids = mix64(numbers.astype(np.uint64), 0)
    place = numbers % CLIPS_PER_VIDEO
    return Clips(np.arange(num_videos + 1) * CLIPS_PER_VIDEO, ids, place, np.full(len(numbers), CLIPS_PER_VIDEO))


def reads(clips: np.ndarray, *, counted: int, together: bool, num_clips: int) -> tuple[float, float]:
    """Requests and bytes for each of the last `counted` clips.

    Args:
        clips: in the order in which they are read.
        counted: how many of them count; the others fill the cache.
        together: whether a request fetches a piece of a shard.
        num_clips: of the data set.
    """
    offset = clips % CLIPS_PER_SHARD * CLIP_BYTES
    pieces = clips // CLIPS_PER_SHARD * 10**4 + offset // _TOGETHER if together else clips
    per_request = _TOGETHER / CLIP_BYTES if together else 1.0
    room = CACHE_SHARE * num_clips / per_request
    cache: OrderedDict[int, None] = OrderedDict()
    requests = 0
    for number, piece in enumerate(pieces.tolist()):
        if piece in cache:
            cache.move_to_end(piece)
            continue
        cache[piece] = None
        if len(cache) > room:
            cache.popitem(last=False)
        requests += number >= len(clips) - counted
    return requests / counted, requests * per_request * CLIP_BYTES / counted


def of_node(clips: np.ndarray) -> np.ndarray:
    """What the first of NODES nodes reads: its part of the queries and of the keys of each batch."""
    batches = clips.reshape(-1, BATCH)
    keys = np.stack([batch[permutation(BATCH, step)] for step, batch in enumerate(batches)])
    share = BATCH // NODES
    found: np.ndarray = np.concatenate([batches[:, :share], keys[:, :share]], axis=1).reshape(-1)
    return found


def same_video_keys(videos: np.ndarray, *, counted: int) -> float:
    """Mean number of keys of the query's own video in the queue, over the last `counted` queries."""
    order = np.lexsort((np.arange(len(videos)), videos))
    place, video, found = order, videos[order], 0
    for step in range(1, 2 * CLIPS_PER_VIDEO):
        same = (video[step:] == video[:-step]) & (place[step:] - place[:-step] <= QUEUE)
        found += int((same & (place[step:] >= len(videos) - counted)).sum())
    return found / counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--videos", type=float, default=1e6)
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 200_000, 50_000, 10_000, 2_000])
    wanted = parser.parse_args()
    num_videos, found = int(wanted.videos), {}
    clips = synthetic(num_videos)
    for window in wanted.windows:
        began = time.perf_counter()
        stream = Stream(clips, seed=1, draws_per_video=CLIPS_PER_VIDEO, window=window)
        length = stream.epoch_length // BATCH * BATCH
        draws = [stream.draws(np.arange(at, at + BATCH)) for at in range(0, 2 * length, BATCH)]
        drawn, videos = (np.concatenate([getattr(each, name) for each in draws]) for name in ("clip", "video"))
        read = functools.partial(reads, together=window > 0, num_clips=stream.num_clips)
        requests, num_bytes = read(drawn, counted=length)
        part = of_node(drawn)
        of_part = [each * 2 for each in read(part, counted=len(part) // 2)]  # a clip is read as query and as key
        shards = np.sort((drawn[-length:] // CLIPS_PER_SHARD).reshape(-1, BATCH), axis=1)
        different = np.sort(videos[-length:].reshape(-1, BATCH), axis=1)
        found[window] = {
            "requests_a_clip": round(requests, 4),
            "bytes_a_clip": round(num_bytes),
            "of_8_nodes": [round(of_part[0], 4), round(of_part[1])],
            "same_video_keys": round(same_video_keys(videos, counted=length), 3),
            "videos_a_batch": round(1 + float((np.diff(different, axis=1) != 0).sum(axis=1).mean()), 1),
            "shards_a_batch": round(1 + float((np.diff(shards, axis=1) != 0).sum(axis=1).mean()), 1),
        }
        print(f"window {window or 'all'}: {found[window]}, {time.perf_counter() - began:.0f} s", flush=True)
    print(json.dumps({"videos": num_videos, "windows": found}))


if __name__ == "__main__":
    main()
