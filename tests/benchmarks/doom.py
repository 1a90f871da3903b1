"""Clips of which only the motion tells the class: six ways to move through the maps of Freedoom, rendered headless.

A player walks to a random place of a map and then holds one action: forward, backward, strafe left or right, turn
left or right, at a speed of its own. What stands around says nothing of the action, nor does a single frame. Each
place gives two clips, one after the other: the two clips of one "video". Walks that end at a wall are thrown away.
Mirroring left and right would exchange classes: pretrain without flips.

With `moments` the action is held for 4 to 8 of a clip's 16 frames, at a random place, and the player stands still
before and after it. Then frames differ in what they tell: a choice of frames can matter, which it cannot where the
motion is the same from the first frame to the last.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import vizdoom
from PIL import Image
from vizdoom import Button, GameVariable

from vmoco.data.shard import Clip
from vmoco.seed import hash64

ACTIONS = ("forward", "backward", "left", "right", "turn left", "turn right")
NUM_FRAMES, HEIGHT, WIDTH = 16, 48, 64
FPS = 35.0  # one frame a tic

# Speeds that a player's keys give lie within: units of Doom's walking speed, degrees per tic.
_MOVE, _TURN = (25.0, 50.0), (3.0, 7.0)
_BUTTONS = [
    Button.MOVE_FORWARD_BACKWARD_DELTA,
    Button.MOVE_LEFT_RIGHT_DELTA,
    Button.TURN_LEFT_RIGHT_DELTA,
    Button.USE,  # opens doors
]
_SIGNS = {
    "forward": (0, 1),
    "backward": (0, -1),
    "left": (1, -1),
    "right": (1, 1),
    "turn left": (2, -1),
    "turn right": (2, 1),
}
_WARM_UP = 10  # tics until Doom's inertia has forgotten the walk
_WALK = (30, 90)  # tics between two places
_STILL = 1.0  # a mover that comes less far than this in a tic (map units) stands at a wall
_TRIES = 2000
_MOMENT = (4, 8)  # tics of the action in a clip of `moments`, both included


def render(*, maps: range, places_per_map: int, seed: int, held_out: bool = False, moments: bool = False) -> list[Clip]:
    """Two clips of uint8 (NUM_FRAMES, HEIGHT, WIDTH, 3) from each place; a pure function of the arguments.

    Args:
        maps: numbers of Freedoom's maps, within 1 to 32.
        places_per_map: rounded up to a multiple of the six actions, so that classes are balanced.
        seed: of the walks; equal seeds give equal clips.
        held_out: whether they are marked as held out.
        moments: the action takes only some of the frames of a clip.
    """
    clips: list[Clip] = []
    with _game() as game:
        for number in maps:
            random = np.random.default_rng(hash64("doom", seed, number))
            game.set_doom_map(f"map{number:02d}")
            game.set_seed(hash64("doom engine", seed, number) % 2**31)
            game.new_episode()
            for place in range(-(-places_per_map // len(ACTIONS)) * len(ACTIONS)):
                action = ACTIONS[place % len(ACTIONS)]
                frames = (_moments if moments else _held_action)(game, action, random)
                video_id = f"map{number:02d}-seed{seed}-{place:04d}"
                for part in range(2):
                    clip = frames[part * NUM_FRAMES : (part + 1) * NUM_FRAMES]
                    clip_id = f"{hash64('doom clip', video_id, part):016x}"
                    clips.append(Clip(clip_id, video_id, part * NUM_FRAMES / FPS, FPS, held_out, clip, label=action))
    return clips


def _held_action(game: vizdoom.DoomGame, action: str, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Walks on until the action can be held for two clips without a wall in the way: (2 * NUM_FRAMES, H, W, 3)."""
    button, sign = _SIGNS[action]
    for _ in range(_TRIES):
        _walk(game, random)
        held = [0.0] * len(_BUTTONS)
        held[button] = sign * random.uniform(*(_TURN if button == 2 else _MOVE))
        frames = []
        for tic in range(_WARM_UP + 2 * NUM_FRAMES):
            before = _position(game)
            _act(game, held)
            if tic < _WARM_UP:
                continue
            if button != 2 and np.linalg.norm(_position(game) - before) < _STILL:
                break
            frames.append(_picture(game))
        else:
            return np.stack(frames)
    raise RuntimeError(f"no room to hold {action!r} in {_TRIES} tries: leave this map out")


def _moments(game: vizdoom.DoomGame, action: str, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Two clips, each with one moment of the action and stillness around it: (2 * NUM_FRAMES, H, W, 3)."""
    button, sign = _SIGNS[action]
    still = [0.0] * len(_BUTTONS)
    for _ in range(_TRIES):
        _walk(game, random)
        for _ in range(2 * _WARM_UP):
            _act(game, still)
        frames = []
        for _ in range(2):
            held = list(still)
            held[button] = sign * random.uniform(*(_TURN if button == 2 else _MOVE))
            length = int(random.integers(_MOMENT[0], _MOMENT[1] + 1))
            first = int(random.integers(0, NUM_FRAMES - length + 1))
            begin = _position(game)
            for tic in range(NUM_FRAMES):
                _act(game, held if first <= tic < first + length else still)
                frames.append(_picture(game))
            if button != 2 and np.linalg.norm(_position(game) - begin) < length * _STILL:
                break
            for _ in range(_WARM_UP):  # until inertia is gone
                _act(game, still)
        else:
            return np.stack(frames)
    raise RuntimeError(f"no room for a moment of {action!r} in {_TRIES} tries: leave this map out")


def _picture(game: vizdoom.DoomGame) -> npt.NDArray[np.uint8]:
    image = Image.fromarray(game.get_state().screen_buffer)
    return np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BOX))


def _walk(game: vizdoom.DoomGame, random: np.random.Generator) -> None:
    """Forward, with a random turn now and then, for a random time."""
    for tic in range(int(random.integers(*_WALK))):
        turn = random.uniform(-60, 60) if tic % 15 == 0 else 0.0
        _act(game, [40.0, 0.0, turn, float(tic % 5 == 0)])


def _act(game: vizdoom.DoomGame, action: list[float]) -> None:
    if game.is_episode_finished():  # the exit of the map, or a pit
        game.new_episode()
    game.make_action(action, 1)
    if game.is_episode_finished():
        game.new_episode()


def _position(game: vizdoom.DoomGame) -> npt.NDArray[np.float64]:
    return np.array([game.get_game_variable(name) for name in (GameVariable.POSITION_X, GameVariable.POSITION_Y)])


@contextlib.contextmanager
def _game() -> Iterator[vizdoom.DoomGame]:
    game = vizdoom.DoomGame()
    game.set_doom_game_path(str(Path(vizdoom.__file__).parent / "freedoom2.wad"))
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    for what in ("hud", "weapon", "crosshair", "decals", "particles", "effects_sprites", "messages", "corpses"):
        getattr(game, f"set_render_{what}")(False)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.add_game_args("-nomonsters")
    game.set_available_buttons(_BUTTONS)
    game.set_available_game_variables([GameVariable.POSITION_X, GameVariable.POSITION_Y])
    game.set_episode_timeout(0)
    # The engine leaves files of its own in the working directory.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        game.set_doom_config_path(os.path.join(folder, "vizdoom.ini"))
        game.init()
        try:
            yield game
        finally:
            game.close()
