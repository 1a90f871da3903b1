"""The contact sheet shows every frame in its place, and marks those that are dropped and no others."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from vmoco.data.contact_sheet import dropped_frames_sheet

CELL, PITCH, LEFT, TOP = 96, 102, 108, 58
NUM_CLIPS, NUM_FRAMES = 3, 5


def test_frames_stand_in_their_cells_and_dropped_ones_are_framed_and_grey() -> None:
    """Each clip and frame has a colour of its own: a kept cell shows it, a dropped one is grey inside red."""
    colours = np.random.default_rng(1).integers(0, 256, (NUM_CLIPS, NUM_FRAMES, 3), dtype=np.uint8)
    colours[..., 0], colours[..., 1] = 200, 30  # never grey
    clips = torch.from_numpy(np.broadcast_to(colours[:, :, None, None], (NUM_CLIPS, NUM_FRAMES, 24, 24, 3)).copy())
    dropped = torch.zeros(NUM_CLIPS, NUM_FRAMES, dtype=torch.bool)
    dropped[0, 1] = dropped[2, 0] = dropped[2, 4] = True
    content = dropped_frames_sheet(clips, dropped, names=["a", "b", "c"], shares=[0.5, 0, 1, 0.25, 0], title="step 1")
    sheet = np.asarray(Image.open(io.BytesIO(content)))
    assert sheet.shape[1] == LEFT + NUM_FRAMES * PITCH + 6
    for row in range(NUM_CLIPS):
        for frame in range(NUM_FRAMES):
            y, x = TOP + row * PITCH, LEFT + frame * PITCH
            cell, border = sheet[y : y + CELL, x : x + CELL], sheet[y + CELL // 2, x - 2]
            if dropped[row, frame]:
                assert (cell[..., 0] == cell[..., 1]).all()
                assert (cell[..., 1] == cell[..., 2]).all()
                assert border.tolist() == [214, 39, 40]
            else:
                assert (cell == colours[row, frame]).all()
                assert border.tolist() != [214, 39, 40]
    # Below, a bar as long as the share: none for 0, and twice the length for twice the share.
    bars = sheet[TOP + NUM_CLIPS * PITCH :, LEFT + CELL // 2 :: PITCH][:, :NUM_FRAMES]
    lengths = (bars == [214, 39, 40]).all(axis=2).sum(axis=0)
    assert lengths[2] > 60
    assert np.abs(lengths / lengths[2] - [0.5, 0, 1, 0.25, 0]).max() < 0.03


def test_equal_content_gives_equal_bytes() -> None:
    """A checkpoint that is written again after a restart writes the same sheet."""
    clips, dropped = torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8), torch.tensor([[True, False]])
    first, second = (dropped_frames_sheet(clips, dropped, names=["a"], shares=[1, 0], title="step 1") for _ in range(2))
    assert first == second
