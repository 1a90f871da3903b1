"""Converts the picture of an HDR frame to the range and colours of other videos (tone mapping).

The steps and constants are those of FFmpeg's usual filters, so a clip looks as those who convert with them know it:

    zscale=t=linear:npl=100:agamma=false, zscale=p=bt709, tonemap=mobius:desat=0, zscale=t=bt709

Light up to 30 nits stays as it is, brighter light is compressed, and from 1,000 nits on all is white. Metadata about
the brightest light of a file is not used: it is often missing or wrong, and so equal light looks equal in every video.

It works on scaled pictures. Scaling mixes codes, not light, as it does in videos without HDR.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vmoco.data.frames import Frames

Transfer = Literal["pq", "hlg"]
Primaries = Literal["bt2020", "p3", "bt709"]
Floats = npt.NDArray[Any]

_WHITE = 100.0
"""Nits of the brightest light of an SDR screen."""
_PEAK = 1000 / _WHITE
"""Brightest light that is told apart, as a multiple of that."""
_KNEE = 0.3
"""Light up to here stays as it is: the default of FFmpeg's `tonemap=mobius`."""
# Weights of red, green and blue in luminance.
_LUMINANCE: dict[Primaries, tuple[float, float, float]] = {
    "bt2020": (0.2627, 0.6780, 0.0593),
    "p3": (0.228975, 0.691739, 0.079287),
    "bt709": (0.2126, 0.7152, 0.0722),
}
# Linear light to that of BT.709: of BT.2020 (BT.2087), and of Display P3 (SMPTE EG 432-1).
_TO_709: dict[Primaries, tuple[tuple[float, float, float], ...]] = {
    "bt2020": (
        (1.660491, -0.587641, -0.072850),
        (-0.124550, 1.132900, -0.008349),
        (-0.018151, -0.100579, 1.118730),
    ),
    "p3": (
        (1.224940, -0.224940, 0.0),
        (-0.042057, 1.042057, 0.0),
        (-0.019638, -0.078636, 1.098274),
    ),
    "bt709": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
}


def to_sdr(codes: npt.NDArray[np.uint16], transfer: Transfer, primaries: Primaries) -> Frames:
    """The picture for an SDR screen: uint8 (H, W, 3), BT.709.

    Args:
        codes: uint16 (H, W, 3), RGB, 0 to 65535, as the transfer function encodes light.
        transfer: PQ is SMPTE ST 2084, HLG is ARIB STD-B67.
        primaries: What the codes mean by red, green and blue.
    """
    light = _light(transfer)[codes]
    red, green, blue = (light[..., number] for number in range(3))
    if transfer == "hlg":
        # The scene's light as a screen of 1,000 nits shows it: BT.2100, table 5, gamma 1.2.
        luminance = _weighted(_LUMINANCE[primaries], red, green, blue)
        # In float64 and then rounded, because powers differ in the last bit from CPU to CPU.
        gain = (_PEAK * luminance.astype(np.float64) ** 0.2).astype(np.float32)
        red, green, blue = gain * red, gain * green, gain * blue
    red, green, blue = (_weighted(row, red, green, blue) for row in _TO_709[primaries])
    brightest = np.maximum(np.maximum(red, green), np.maximum(blue, np.float32(1e-6)))
    scale = _compressed(brightest) / brightest
    shown = np.stack([np.clip(scale * each, 0, 1) for each in (red, green, blue)], axis=-1)
    return _encoded()[np.rint(np.sqrt(shown) * np.float32(65535)).astype(np.uint16)]


def _weighted(weights: tuple[float, ...], *colours: Floats) -> Floats:
    # Sums and products one by one: a matrix product rounds differently from CPU to CPU.
    first, second, third = (np.float32(weight) * each for weight, each in zip(weights, colours, strict=True))
    return first + second + third


def _compressed(light: Floats) -> Floats:
    """The curve `mobius` of FFmpeg's filter tonemap: linear up to the knee, and 1 at the peak."""
    knee, peak = _KNEE, _PEAK
    a = -knee * knee * (peak - 1) / (knee * knee - 2 * knee + peak)
    b = (knee * knee - 2 * knee * peak + peak) / (peak - 1)
    scale = np.float32((b * b + 2 * b * knee + knee * knee) / (b - a))
    return np.where(light <= knee, light, scale * (light + np.float32(a)) / (light + np.float32(b)))


@functools.cache
def _light(transfer: Transfer) -> Floats:
    """Light of each code: for PQ on the screen, where 1 is `_WHITE`; for HLG in the scene, from 0 to 1."""
    code = np.arange(65536) / 65535
    if transfer == "pq":  # BT.2100, table 4
        power = code ** (1 / 78.84375)
        ratio = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
        return (10_000 / _WHITE * ratio ** (1 / 0.1593017578125)).astype(np.float32)
    # BT.2100, table 5
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)


@functools.cache
def _encoded() -> Frames:
    """The 8-bit code of light, by the square root of that light in 65535 steps: the gamma 2.4 of BT.1886."""
    light = (np.arange(65536) / 65535) ** 2
    return np.rint(255 * light ** (1 / 2.4)).astype(np.uint8)
