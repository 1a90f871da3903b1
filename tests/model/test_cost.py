"""Costs by shapes agree with what plain counting gives, and grow as they must."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.train.test_step import changed
from vmoco.model.backbone import build_backbone
from vmoco.model.cost import SCORE_SECONDS, scoring_seconds, step_cost
from vmoco.presets import PRESETS


def test_arithmetic_is_that_of_the_layers() -> None:
    """Two operations for each product of each convolution and of the head, counted layer by layer on a real forward."""
    settings = PRESETS["tiny"][1]
    flops = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal flops
        if isinstance(module, nn.Conv3d):
            flops += 2 * output[0].numel() * module.in_channels * torch.tensor(module.kernel_size).prod().item()

    backbone = build_backbone(settings.model.backbone)
    for module in backbone.modules():
        module.register_forward_hook(count)
    backbone(torch.zeros(2, 3, settings.data.num_frames, settings.augment.size, settings.augment.size))
    head = 2 * backbone.feature_dim * settings.model.embedding_dim
    cost = step_cost(settings, bf16=False)
    assert cost.forward_flops == flops + head
    assert cost.flops_before == 4 * 8 * cost.forward_flops
    assert cost.run_flops(settings) == (10 * 4 + 10 * 6) * 8 * cost.forward_flops
    # A G that trains in every second of the last 10 steps.
    every = changed(settings, generator={"every": 2})
    assert step_cost(every, bf16=False).run_flops(every) == (10 * 4 + 5 * 6 + 5 * 4) * 8 * cost.forward_flops
    # A G that learns from 1 of 4 clips of a micro-batch encodes it twice more and computes the gradient of its pixels.
    few = changed(settings, generator={"clips_percent": 25.0})
    assert step_cost(few, bf16=False).run_flops(few) == (10 * 4 + 10 * 4.75) * 8 * cost.forward_flops


def test_a_reversed_negative_costs_one_forward() -> None:
    """With 2 of each 4 keys a step has half a forward more for each clip, and ranks receive half as many keys more."""
    settings = changed(PRESETS["tiny"][1], scaling={"num_workers": 2})
    without = step_cost(settings, bf16=False)
    cost = step_cost(changed(settings, moco={"reversed_negatives_percent": 50.0}), bf16=False)
    more = 8 // 2 * cost.forward_flops
    assert (cost.flops_before - without.flops_before, cost.flops_after - without.flops_after) == (more, more)
    assert cost.key_bytes == 1.5 * without.key_bytes == 8 // 2 * 1.5 * 4 * 32


@pytest.mark.parametrize("backbone", ["r3d_nano", "r2plus1d_nano", "swin3d_nano"])
def test_contrast_costs_the_gradient_of_the_stems_input_on_top(backbone: str) -> None:
    """What torch counts for forward and backward of a clip that needs a gradient, less that of one that does not."""
    settings = changed(PRESETS["tiny"][1], model={"backbone": backbone}, generator={"objective": "contrast"})
    shape = (2, 3, settings.data.num_frames, settings.augment.size, settings.augment.size)
    counts = []
    for needs_gradient in (False, True):
        network = build_backbone(backbone)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(shape, requires_grad=needs_gradient)).sum().backward()
        counts.append(counter.get_total_flops() / 2)
    cost = step_cost(settings, bf16=False)
    assert cost.flops_after - cost.flops_before == pytest.approx((counts[1] - counts[0]) * 8)
    assert cost.flops_before == 4 * 8 * cost.forward_flops


def test_memory_is_that_of_what_autograd_keeps() -> None:
    """Activations are the bytes that a real forward keeps, each storage once; bf16 halves them."""
    settings = PRESETS["tiny"][1]
    kept: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    backbone = build_backbone(settings.model.backbone)
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    shape = (2, 3, settings.data.num_frames, settings.augment.size, settings.augment.size)
    with torch.autograd.graph.saved_tensors_hooks(note, note):
        backbone(torch.zeros(shape))
    expected = sum(size for place, size in kept.items() if place not in weights) / 2
    cost = step_cost(settings, bf16=False)
    assert cost.activation_bytes == pytest.approx(expected, rel=0.05)
    assert step_cost(settings, bf16=True).activation_bytes == cost.activation_bytes // 2


@pytest.mark.parametrize("name", ["swin3d_nano", "mvit_v2_s"])
def test_memory_of_a_transformer_is_that_of_its_graph(name: str) -> None:
    """What the nodes of a real graph keep. In bf16 half of it, apart from normalisation and softmax, as autocast does.

    Tables of positions are the same for all clips, and do not count.
    """
    settings = changed(PRESETS["tiny"][1], model={"backbone": name})
    shape = (2, 3, settings.data.num_frames, settings.augment.size, settings.augment.size)
    backbone = build_backbone(name, num_frames=shape[2], size=shape[3])
    own = {each.untyped_storage().data_ptr() for each in (*backbone.parameters(), *backbone.buffers())}
    kept: dict[bool, dict[int, int]] = {True: {}, False: {}}
    alive, seen, nodes = [], set(), [backbone(torch.zeros(shape)).grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        in_float32 = node.name() in ("NativeLayerNormBackward0", "SoftmaxBackward0")
        for field in dir(node):
            value = getattr(node, field) if field.startswith("_saved_") else None
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in own:
                    alive.append(tensor)
                    kept[in_float32][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    in_float32, others = (sum(kept[each].values()) for each in (True, False))
    assert in_float32 > 0.1 * others, "it matters"
    cost = step_cost(settings, bf16=False)
    assert cost.activation_bytes == pytest.approx(sum((kept[True] | kept[False]).values()) / 2, rel=0.02)
    assert step_cost(settings, bf16=True).activation_bytes == pytest.approx((in_float32 + others / 2) / 2, rel=0.02)


@pytest.mark.parametrize(("name", "gigaflops"), [("swin3d_t", 43.882), ("swin3d_s", 82.841), ("mvit_v2_s", 64.224)])
def test_arithmetic_is_what_torchvision_states(name: str, gigaflops: float) -> None:
    """Products of a forward by torchvision's own count: MViT at 16x224x224, Swin at 16 frames of that size too.

    Its list counts some products that are no matrix products, and leaves out others: within 2 %.
    """
    settings = changed(PRESETS["paper"][1], model={"backbone": name}, data={"num_frames": 16}, augment={"size": 224})
    assert step_cost(settings, bf16=False).forward_flops / 2e9 == pytest.approx(gigaflops, rel=0.02)


def test_the_network_carries_twice_the_gradients() -> None:
    """One rank sends nothing; of many each sends nearly twice the gradients in an all-reduce, as a ring does."""
    settings = PRESETS["demo"][1]
    alone = step_cost(changed(settings, scaling={"num_workers": 1}), bf16=False)
    assert (alone.gradient_bytes, alone.key_bytes) == (0, 0)
    pair = step_cost(settings, bf16=False)
    assert pair.gradient_bytes == 4 * pair.num_parameters
    assert pair.key_bytes == 32 // 2 * 4 * 128


@pytest.mark.parametrize("preset", ["paper", "recommended"])
def test_scoring_fits_the_preset(preset: str) -> None:
    """On the CPU cores of the preset the score of a checkpoint takes less than half of the time that it may take.

    With 500 videos on one core, the defaults, it takes hours.
    """
    settings = PRESETS[preset][1]
    assert scoring_seconds(settings, num_videos=12_000) < SCORE_SECONDS / 2
    defaults = changed(settings, evaluation={"num_cpus": 1, "max_videos": 500})
    assert scoring_seconds(defaults, num_videos=12_000) > 2 * 3600
    assert scoring_seconds(changed(defaults, evaluation={"use_gpu": True}), num_videos=12_000) < SCORE_SECONDS


def test_scoring_time_is_that_of_its_forwards() -> None:
    """20 clips of each video that takes part; twice the cores take half the time; sharing counts as one core."""
    settings = changed(PRESETS["demo"][1], evaluation={"num_cpus": 1, "max_videos": 50})
    one = step_cost(settings, bf16=False).forward_flops / 5e10
    assert scoring_seconds(settings, num_videos=10) == pytest.approx(200 * one)
    assert scoring_seconds(settings, num_videos=1000) == pytest.approx(1000 * one)
    double = changed(settings, evaluation={"num_cpus": 2})
    assert scoring_seconds(double, num_videos=10) == pytest.approx(100 * one)
    shared = changed(settings, evaluation={"num_cpus": 0})
    assert scoring_seconds(shared, num_videos=10) == pytest.approx(200 * one)
