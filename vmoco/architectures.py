"""The backbones by name: which clips each takes, how it normalises, and which of its branches drop path can leave out.

These facts are needed before any network is built, to check settings and to draw random numbers, so torch is not
imported here. `vmoco/model/backbone.py` builds the networks, and a test compares them with this table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What is known of a backbone without building it."""

    min_frames: int = 1
    """Fewest frames of a clip."""
    min_size: int = 16
    """Smallest height and width of a clip, in pixels."""
    batch_norm: bool = True
    """Whether the clips of a micro-batch are normalised together. Others have layer normalisation: each clip is encoded
    by itself, so a micro-batch decides memory only, and there are no running statistics and nothing to shuffle."""
    num_blocks: int = 0
    """Number of transformer blocks with two residual branches each that drop path can leave out; 0 where it cannot."""
    learns_positions: bool = False
    """Whether its weights have a shape for one number of frames and one size, those of its training clips."""

    def drop_rates(self, rate: float) -> list[float]:
        """Probability with which drop path leaves out each residual branch, in the order of the network.

        It rises linearly from 0 in the first block to `rate` in the last one (Huang et al., 2016, section 3).

        Args:
            rate: from 0 to below 1.

        Returns:
            One number for each branch; none if nothing is ever left out.
        """
        if rate == 0:
            return []
        return [rate * block / (self.num_blocks - 1) for block in range(self.num_blocks) for _ in range(2)]


ARCHITECTURES = {
    "r3d_18": Architecture(),
    "r2plus1d_18": Architecture(),
    "mc3_18": Architecture(),
    # Halves time three times and space five times, without padding at the last.
    "s3d": Architecture(min_frames=5, min_size=17),
    # Clips of any size: frames are padded to whole patches (2x4x4), and patches to whole windows (8x7x7).
    "swin3d_t": Architecture(batch_norm=False, num_blocks=12),
    "swin3d_s": Architecture(batch_norm=False, num_blocks=24),
    "mvit_v2_s": Architecture(batch_norm=False, num_blocks=16, learns_positions=True),
    "r3d_nano": Architecture(),
    "r2plus1d_nano": Architecture(),
    "swin3d_nano": Architecture(batch_norm=False, num_blocks=5),
}
"""By the name that `--model.backbone` takes."""

TRANSFORMERS = tuple(name for name, architecture in ARCHITECTURES.items() if architecture.num_blocks)
"""Those with residual branches that drop path can leave out."""
