"""The generator chooses frames, and the gradient it follows predicts what dropping a frame does."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from tests.dataset import real_clips
from tests.dropping import estimates, true_effects
from vmoco.config import GeneratorSettings
from vmoco.data.augment import normalise
from vmoco.model.generator import SCORE_BOUND, Generator, drop_frames, frame_fill, keep_mask, sampling_scores
from vmoco.model.moco import MocoEncoder


@pytest.mark.parametrize("shape", [(2, 3, 5, 20, 28), (1, 3, 16, 64, 64)])
def test_importance_is_a_distribution_over_frames(shape: tuple[int, ...]) -> None:
    """Any number of frames and any size: positive, and each row adds up to 1."""
    importance = Generator(GeneratorSettings())(torch.randn(shape))
    assert importance.shape == (shape[0], shape[2])
    assert (importance > 0).all()
    torch.testing.assert_close(importance.sum(dim=1), torch.ones(shape[0]))


def test_generator_has_a_memory_of_earlier_frames() -> None:
    """The score of the last frame changes when only the first frame does: recurrence over time, and causal."""
    generator = Generator(GeneratorSettings(frame_size=16))
    clips = torch.randn(1, 3, 6, 16, 16)
    changed = clips.clone()
    changed[:, :, 0] += 1
    before, after = (torch.log(generator(c))[0] for c in (clips, changed))
    # Scores up to the constant that softmax leaves open: differences of neighbours.
    assert not torch.isclose(before[5] - before[4], after[5] - after[4], atol=1e-7)
    changed = clips.clone()
    changed[:, :, 5] += 1
    after = torch.log(generator(changed))[0]
    torch.testing.assert_close(after[1:5] - after[:4], before[1:5] - before[:4])
    assert not torch.isclose(before[5] - before[4], after[5] - after[4], atol=1e-7)


def test_relative_importance_knows_no_places() -> None:
    """Over the clips of a micro-batch no place is more important than another; without, all clips lose the same ones.

    The clips are noise: nothing but the growing state of an untrained generator tells places apart.
    """
    clips = torch.randn(64, 3, 16, 16, 16, generator=torch.manual_seed(2))
    shares = {}
    for relative in (False, True):
        torch.manual_seed(0)
        importance = Generator(GeneratorSettings(frame_size=16, relative=relative))(clips)
        torch.testing.assert_close(importance.sum(dim=1), torch.ones(64))
        shares[relative] = (keep_mask(importance, 4) == 0).float().mean(dim=0)
    scores = importance.log() - importance.log().mean(dim=1, keepdim=True)
    torch.testing.assert_close(scores.mean(dim=0), torch.zeros(16), rtol=0, atol=1e-6)
    assert shares[False].max() > 0.9  # of 64 clips; 0.25 would be even
    assert shares[True].max() < 0.6


def test_most_important_frames_are_dropped() -> None:
    """Exactly the k largest go; at a tie the earlier one."""
    importance = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert keep_mask(importance, 2).tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    assert keep_mask(importance, 0).tolist() == [[1, 1, 1, 1]] * 2


def test_frames_are_sampled_one_after_the_other_in_proportion_to_their_importance() -> None:
    """How often each pair of 4 frames is dropped, against the probability of drawing it without replacement.

    20,000 draws: 4 standard deviations of a share are at most 0.015.
    """
    importance = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(4))
    mask = keep_mask(sampling_scores(importance.expand_as(noise), noise), 2)
    for pair in itertools.combinations(range(4), 2):
        orders = itertools.permutations(importance[list(pair)].tolist())
        expected = sum(first * second / (1 - first) for first, second in orders)
        found = (mask[:, list(pair)] == 0).all(dim=1).double().mean()
        assert float(found) == pytest.approx(expected, abs=0.015), pair


def test_a_sample_is_a_function_of_importance_and_noise() -> None:
    """Scores are log p - log(-log u), clip by clip and frame by frame; noise of 0 and 1 gives finite ones.

    Of equally important frames those with the most noise go, as when frames are dropped at random.
    """
    random = torch.Generator().manual_seed(5)
    importance, noise = (torch.rand(3, 6, generator=random) for _ in range(2))
    scores = sampling_scores(importance, noise)
    for clip, frame in itertools.product(range(3), range(6)):
        p, u = float(importance[clip, frame]), float(noise[clip, frame])
        assert float(scores[clip, frame]) == pytest.approx(math.log(p) - math.log(-math.log(u)))
    assert torch.isfinite(sampling_scores(importance[:, :2], torch.tensor([[0.0, 1.0]] * 3))).all()
    even = torch.full((3, 6), 1 / 6)
    assert torch.equal(keep_mask(sampling_scores(even, noise), 2), keep_mask(noise, 2).double())


@pytest.mark.parametrize("relative", [False, True])
def test_sampled_importance_stays_away_from_a_certain_choice(relative: bool) -> None:
    """However large the scores, importance is softmax(2 tanh(score / 2)), so frames differ by a factor e^4 at most."""
    torch.manual_seed(0)
    generator = Generator(GeneratorSettings(frame_size=16, select="sample", relative=relative))
    scores: list[torch.Tensor] = []
    generator.score.register_forward_hook(lambda module, inputs, output: scores.append(output.squeeze(1)))
    with torch.no_grad():
        generator.score.weight *= 10_000
        importance = generator(torch.randn(4, 3, 8, 16, 16))
    for clip in range(4):
        own = [float(each[clip]) - relative * float(each.mean()) for each in scores]
        weights = [math.exp(2 * math.tanh(score / 2)) for score in own]
        assert importance[clip].tolist() == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-4)
        assert max(own) - min(own) > 4
        assert float(importance[clip].max() / importance[clip].min()) <= 1.001 * math.exp(2 * SCORE_BOUND)


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_dropped_frames_are_filled(fill: str) -> None:
    """A dropped frame holds its own mean colour, or zero; a kept one is untouched."""
    clips = torch.randn(1, 3, 2, 4, 4)
    dropped = drop_frames(clips, torch.tensor([[1.0, 0.0]]), frame_fill(clips, fill))
    assert torch.equal(dropped[:, :, 0], clips[:, :, 0])
    expected = clips[:, :, 1].mean(dim=(2, 3)) if fill == "mean" else torch.zeros(1, 3)
    torch.testing.assert_close(dropped[:, :, 1], expected[..., None, None].expand(1, 3, 4, 4))


def test_gradient_agrees_with_the_true_effect_of_dropping(footage: Path) -> None:
    """On real footage, on most frames the gradient has the sign of what dropping the frame really does to G's loss.

    Both are taken relative to the mean over the clip's frames, because that is all a softmax lets through. The pixel
    sum of the released code is no better than a coin.
    """
    clips = torch.from_numpy(real_clips(footage, num_clips=8, num_frames=16))
    clips = normalise(clips.permute(0, 4, 1, 2, 3).float() / 255)
    agreements: dict[str, list[torch.Tensor]] = {"mask": [], "pixel_sum": []}
    for seed in range(2):
        torch.manual_seed(seed)
        encoder = MocoEncoder("r3d_nano", embedding_dim=128, head="linear").train()
        mask = keep_mask(torch.rand(8, 16), 4)
        effects = true_effects(encoder, clips, mask)
        effects = effects - effects.nanmean(dim=1, keepdim=True)
        kept = mask > 0
        for estimator, gradient in estimates(encoder, clips, mask).items():
            gradient = gradient - gradient.where(kept, torch.nan).nanmean(dim=1, keepdim=True)
            agreements[estimator].append(gradient[kept].sign() == effects[kept].sign())
    share = {estimator: torch.cat(found).float().mean().item() for estimator, found in agreements.items()}
    # 96 frames: a coin stays below 0.65 in all but 1 of 700 trials.
    assert share["mask"] > 0.65, share
    assert share["pixel_sum"] < 0.6, share
