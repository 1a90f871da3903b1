"""Are bf16 weight gradients of 3-D convolutions right on this CPU? `python -m tests.benchmarks.bf16_gradient`.

The same gradient is computed many times, on memory that is filled with a large number in between; a result that changes
was computed from memory that nobody wrote. Ends with one JSON line: per shape, the share of results that differ.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F

# channels, kernel, (T, H, W), clips
SHAPES = [
    (128, (3, 3, 3), (4, 8, 8), 8),
    (128, (3, 3, 3), (2, 4, 4), 8),
    (512, (3, 3, 3), (2, 7, 7), 2),
    (512, (3, 3, 3), (2, 7, 7), 8),
]


def share_that_differs(
    channels: int, kernel: tuple[int, int, int], shape: tuple[int, int, int], clips: int, *, dtype: torch.dtype
) -> float:
    """Share of 10 repetitions whose weight gradient is not that of the first."""
    torch.manual_seed(0)
    inputs = torch.randn(clips, channels, *shape)
    found = []
    for _ in range(11):
        poison = [torch.full((2_000_000,), 1e30) for _ in range(4)]
        del poison
        weight = torch.full((channels, channels, *kernel), 0.01, requires_grad=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = F.conv3d(inputs, weight, padding=tuple(size // 2 for size in kernel))
        output.float().square().sum().backward()
        assert weight.grad is not None
        found.append(weight.grad)
    return sum(not torch.equal(found[0], gradient) for gradient in found[1:]) / 10


def main() -> None:
    torch.set_num_threads(1)
    shares = {}
    for channels, kernel, shape, clips in SHAPES:
        name = f"{channels}ch {'x'.join(map(str, kernel))} at {'x'.join(map(str, shape))}, {clips} clips"
        shares[name] = {
            str(dtype).removeprefix("torch."): share_that_differs(channels, kernel, shape, clips, dtype=dtype)
            for dtype in (torch.bfloat16, torch.float32)
        }
        print(name, shares[name], flush=True)
    print(json.dumps({"torch": torch.__version__, "share_that_differs": shares}))


if __name__ == "__main__":
    main()
