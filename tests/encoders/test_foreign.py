"""Weights that vmoco did not train come with the preprocessing that they were trained with."""

from __future__ import annotations

import pytest
from torchvision.models import get_model_weights

from vmoco.encoders import foreign
from vmoco.model.weights import TORCHVISION


@pytest.mark.parametrize("name", TORCHVISION)
def test_pixels_are_prepared_as_torchvision_says(name: str) -> None:
    """Size, mean and deviation are those of the transforms that torchvision publishes with its weights."""
    expected = get_model_weights(name)["KINETICS400_V1"]
    transforms = expected.transforms()
    found = foreign.torchvision_preprocessing(name)
    assert [found.size] * 2 == list(transforms.crop_size)
    assert found.mean == pytest.approx(tuple(transforms.mean))
    assert found.std == pytest.approx(tuple(transforms.std))
    assert found.num_frames >= expected.meta.get("min_temporal_size", 1)  # not stated for the ResNets
