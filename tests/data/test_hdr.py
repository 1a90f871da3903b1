"""HDR pictures are converted as FFmpeg's filters convert them."""

from __future__ import annotations

import numpy as np
import pytest

from vmoco.data.hdr import Primaries, Transfer, to_sdr

COLOURS = [(grey, grey, grey) for grey in range(0, 65536, 4096)]
COLOURS += [(38000, 0, 0), (0, 38000, 0), (0, 0, 38000), (38000, 38000, 12000), (52000, 30000, 9000)]
COLOURS += [(20000, 42000, 60000), (9000, 5000, 3000), (65535, 65535, 65535)]

GREYS_PQ = "0000000e0e0e1e1e1e3232324a4a4a6868688e8e8eb7b7b7d4d4d4e7e7e7f3f3f3fbfbfbffffffffffffffffffffffff"
GREYS_HLG = "000000181818303030484848606060787878909090a7a7a7b9b9b9c8c8c8d6d6d6e2e2e2ebebebf3f3f3f8f8f8fcfcfc"
# What the ffmpeg program 9.0.2 makes of COLOURS, tagged with the transfer function and the primaries (smpte2084 or
# arib-std-b67; bt2020, smpte432 or bt709), from gbrp16le to gbrp:
#     zscale=t=linear:npl=100:agamma=false,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:desat=0,zscale=t=bt709
FFMPEG: dict[tuple[Transfer, Primaries], str] = {
    ("pq", "bt2020"): GREYS_PQ + "f5000000ee000000eeede700ff00000057ff280e08ffffff",
    ("pq", "p3"): GREYS_PQ + "ef000000ec000000edebeb00ff0b000059ff241008ffffff",
    ("pq", "bt709"): GREYS_PQ + "eb000000eb000000ebebeb21ff440b155aff22120bffffff",
    ("hlg", "bt2020"): GREYS_HLG + "d6000000ce000000b6ceca00f553000089f93a1b11ffffff",
    ("hlg", "p3"): GREYS_HLG + "c8000000cb000000b9cbcb19f06d001b88f9341d11ffffff",
    ("hlg", "bt709"): GREYS_HLG + "be000000c9000000b3cccc4ded7c2d478af8311e14ffffff",
}


@pytest.mark.parametrize(("transfer", "primaries"), FFMPEG)
def test_colours_are_those_of_ffmpeg(transfer: Transfer, primaries: Primaries) -> None:
    """Greys from black to the brightest, pure and mixed colours, also out of the screen's range: within 1 of 255."""
    found = to_sdr(np.array([COLOURS], np.uint16), transfer, primaries)
    expected = np.frombuffer(bytes.fromhex(FFMPEG[transfer, primaries]), np.uint8).reshape(1, -1, 3)
    assert found.shape == expected.shape
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_more_light_is_never_darker(transfer: Transfer) -> None:
    """Over all codes of grey, the picture goes from black to white without a step back."""
    ramp = np.repeat(np.arange(65536, dtype=np.uint16)[None, :, None], 3, axis=2)
    shown = to_sdr(ramp, transfer, "bt2020")[0].astype(int)
    assert (np.diff(shown, axis=0) >= 0).all()
    assert (shown[0] == 0).all()
    assert (shown[-1] == 255).all()
