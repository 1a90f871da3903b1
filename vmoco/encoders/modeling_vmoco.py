"""An exported encoder as a model of Hugging Face's transformers.

`jobs/export.py --to huggingface` copies this file and `video_network.py` beside the weights; vmoco itself never imports
it. `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` runs both. It needs torch, torchvision, transformers and
safetensors, but not vmoco. There is no processor: the model takes raw frames, and prepares them as in its training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .video_network import VideoNetwork


class VmocoConfig(PretrainedConfig):
    """The network and its preprocessing.

    Args:
        network: name of the network, as `VideoNetwork` takes it.
        hidden_size: width of a feature.
        num_frames: frames of a clip in its training; other lengths are accepted.
        fps: frames per second of its training clips.
        image_size: height and width in pixels to which frames are scaled.
        image_mean: of red, green and blue in [0, 1].
        image_std: their deviation.
        standardise: scale each clip to zero mean and unit deviation instead of using the two.
        kwargs: what every configuration of transformers has.
    """

    model_type = "vmoco"

    def __init__(
        self,
        network: str = "r3d_18",
        hidden_size: int = 512,
        num_frames: int = 16,
        fps: float = 15.0,
        image_size: int = 112,
        image_mean: tuple[float, ...] = (0.43216, 0.394666, 0.37645),
        image_std: tuple[float, ...] = (0.22803, 0.22145, 0.216989),
        standardise: bool = False,
        **kwargs: Any,
    ) -> None:
        self.network = network
        self.hidden_size = hidden_size
        self.num_frames = num_frames
        self.fps = fps
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.standardise = standardise
        super().__init__(**kwargs)


class VmocoModel(PreTrainedModel):
    """A pretrained video encoder."""

    config_class = VmocoConfig
    base_model_prefix = "vmoco"
    main_input_name = "pixel_values"

    def __init__(self, config: VmocoConfig) -> None:
        super().__init__(config)
        self.encoder = VideoNetwork(
            config.network,
            size=config.image_size,
            mean=config.image_mean,
            std=config.image_std,
            standardise=config.standardise,
        )
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, torch.Tensor]:
        """Features of clips: `pooler_output` (B, D), the mean of `last_hidden_state` (B, D, T', H', W').

        Args:
            pixel_values: raw frames, uint8 (B, T, H, W, 3), RGB, of any size; or what `encoder.preprocess` makes of
                them, float (B, 3, T, S, S), to train with augmentation of your own.
            return_dict: False gives the two as a tuple.

        Raises:
            ValueError: clips of another shape or type.
        """
        maps, features = self.encoder(pixel_values)
        if return_dict is False:
            return maps, features
        return BaseModelOutputWithPooling(last_hidden_state=maps, pooler_output=features)

    @torch.inference_mode()
    def embed(self, frames: torch.Tensor) -> torch.Tensor:
        """Features to compare by cosine: raw frames, uint8 (B, T, H, W, 3), RGB -> float32 (B, D) of unit length."""
        return F.normalize(self.encoder(frames)[1].float(), dim=1)
