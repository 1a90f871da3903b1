"""What moves in a clip, as numbers by which a copy of the clip is known however it was encoded.

An encoder puts two scenes near each other if they look alike, as two moments before one fixed camera do. Such clips are
no copies. So embeddings only propose pairs, and this file decides: what stands still is removed, and the phases of what
moves are compared. Phases tell where something is and when, and not how bright it is; a logo does not move.

A clip that begins some frames later has nearly the same amplitudes and other phases, all turned by the shift. So every
shift is tried, at almost no cost. So many clips that share half of their frames or more are known too.

Phase correlation is due to Kuglin and Hines, "The phase correlation image alignment method" (1975). Here amplitudes
count by their square root and not at all as there, because small amplitudes of a strongly compressed copy are noise.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from PIL import Image

from vmoco.data.frames import Frames

Fingerprints = npt.NDArray[np.float16]

_HEIGHT, _WIDTH, _FRAMES = 48, 64, 16
"""Size to which clips are scaled, and most frames that are compared, spread evenly."""
_SPACE, _TIME = 0.35, 0.3
"""Highest frequencies that are compared, in cycles per pixel and per frame: compression changes what lies above."""
_LEAST = 0.01
"""Largest change, in grey levels, of a clip in which nothing moves: rounding leaves this much."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def fingerprint(frames: Frames) -> Fingerprints:
    """The fingerprint of a clip.

    Args:
        frames: uint8 (T, H, W, 3), T at least 2.

    Returns:
        float16 (2, F): real and imaginary parts of a vector of length 1; zeros if nothing moves. F depends on T alone.
    """
    chosen = np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int)
    small = np.stack([_scaled(frames[number]) for number in chosen])
    # The mean over time, and what grows evenly: light that fades would make all clips of a scene alike.
    constant = _still_basis(len(small))
    moving = small - np.einsum("td,sd,shw->thw", constant, constant, small)
    found = np.fft.fftn(moving)[_band(len(small))]
    if np.abs(moving).max() < _LEAST:
        return np.zeros((2, len(found)), np.float16)
    found /= np.sqrt(np.maximum(np.abs(found), 1e-6))
    found /= np.sqrt((np.abs(found) ** 2).sum())
    return np.stack([found.real, found.imag]).astype(np.float16)


def agreement(one: Fingerprints, other: Fingerprints, *, num_frames: int) -> npt.NDArray[np.float32]:
    """How well fingerprints agree, at the shift in time at which they agree best.

    It is 1 for equal clips, 0.2 to 0.6 for most that share half of their frames, and about 0 for clips that have
    nothing in common.

    Args:
        one: float16 (N, 2, F).
        other: the same shape; row i of both is compared.
        num_frames: T, frames of the clips.

    Returns:
        float32 (N,), at most 1.
    """
    compared = min(_FRAMES, num_frames)
    times, each = np.unique(_band(compared)[0], return_counts=True)  # K frequencies in time, each with as many in space
    shape = (len(one), 2, len(times), each[0])
    first, second = (prints.astype(np.float32).reshape(shape) for prints in (one, other))
    # At each frequency in time, the sum over space of conj(one) * other: complex (N, K) as two real ones.
    real = np.einsum("nckp,nckp->nk", first, second)
    imaginary = np.einsum("nkp,nkp->nk", first[:, 0], second[:, 1])
    imaginary -= np.einsum("nkp,nkp->nk", first[:, 1], second[:, 0])
    # A shift by s frames turns frequency k by 2 pi k s / T; past the end a clip begins again, so T shifts are all.
    turn = (2 * np.pi * np.outer(times, np.arange(compared)) / compared).astype(np.float32)
    best: npt.NDArray[np.float32] = (real @ np.cos(turn) - imaginary @ np.sin(turn)).max(axis=1)
    return best


def size_of(num_frames: int) -> int:
    """F, for clips of that many frames."""
    return len(_band(min(_FRAMES, num_frames))[0])


def _scaled(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    grey = Image.fromarray(frame @ _LUMA)
    return np.asarray(grey.resize((_WIDTH, _HEIGHT), Image.Resampling.BOX))


@functools.lru_cache(4)
def _still_basis(num_frames: int) -> npt.NDArray[np.float32]:
    """Orthonormal (T, 2): what is constant over time, and what grows evenly; of two frames only the first."""
    times = np.linspace(-1, 1, num_frames)
    basis = np.stack([np.ones(num_frames), times][: 1 + (num_frames > 2)], axis=1)
    orthonormal: npt.NDArray[np.float32] = np.linalg.qr(basis)[0].astype(np.float32)
    return orthonormal


@functools.lru_cache(4)
def _band(num_frames: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Places of the frequencies that are compared, in the spectrum of a clip (T, H, W).

    Of real numbers, the negative frequencies in time repeat the positive ones. The mean of a frame is left out: lamps
    flicker.
    """
    times = [k for k in range(1, (num_frames - 1) // 2 + 1) if k / num_frames <= _TIME] or [1]
    y, x = np.fft.fftfreq(_HEIGHT)[:, None], np.fft.fftfreq(_WIDTH)[None]
    squared = x**2 + y**2
    kept = np.zeros((num_frames, _HEIGHT, _WIDTH), bool)
    kept[times] = (squared <= _SPACE**2) & (squared > 0)
    return np.nonzero(kept)
