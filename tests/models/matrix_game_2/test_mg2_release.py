"""A release's directory, from its files to a world that gymnasium knows."""

from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from PIL import Image
from tiny_release import write_release

from longburn.interact import PlayableWorld, WorldModelEnv
from longburn.models.matrix_game_2 import RolloutSettings
from longburn.models.matrix_game_2.release import find_parts, load_world
from longburn.models.matrix_game_2.vae import WanVae
from longburn.weights import CheckpointError

SMALL = RolloutSettings(latent_size=(4, 6), steps=(1000, 500))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"), "universal", "templerun")


@pytest.mark.parametrize("mode", ["universal", "templerun"])
def test_it_is_an_environment(release: Path, mode: str) -> None:
    parts: list[str] = []
    world = load_world(
        release,
        mode=mode,
        image=release / "start.png",
        settings=SMALL,
        progress=lambda part, done, total: parts.append(part),
    )
    assert set(parts) == {"image tower", "VAE", "transformer"}
    assert isinstance(world, PlayableWorld)
    env = WorldModelEnv(world, horizon=9)
    env.spec = gymnasium.envs.registration.EnvSpec("Matrix-v0", entry_point=lambda **_: env, disable_env_checker=True)
    check_env(env, skip_render_check=True)
    observation, info = env.reset(seed=1)
    assert observation.shape == (32, 48, 3)
    assert [frame.shape for frame in info["frames"]] == [(32, 48, 3)]
    shown = [env.step(world.action_of(["w"]))[4]["frames"] for _ in range(3)]
    assert [len(frames) for frames in shown] == [9, 12, 12]


def test_seeds_and_keys_decide(release: Path) -> None:
    world = load_world(release, image=release / "start.png", settings=SMALL)

    def play(seed: int, *keys: str) -> np.ndarray:
        world.reset(seed=seed)
        return np.concatenate([world.step(world.action_of([key])).frames for key in keys])

    first = play(0, "w", "left")
    np.testing.assert_array_equal(play(0, "w", "left"), first)
    assert (play(1, "w", "left") != first).any()
    assert (play(0, "s", "left")[:9] != first[:9]).any()


def test_pictures_never_lag_behind_their_blocks(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = load_world(release, image=release / "start.png", settings=SMALL)
    world.reset(seed=0)
    first = world.step(world.action_of(["w"])).frames
    with monkeypatch.context() as patch:
        patch.setattr(world, "_decoded", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            world.step(world.action_of(["w"]))
    with pytest.raises(RuntimeError, match="the call before was interrupted before its pictures; call reset"):
        world.step(world.action_of(["w"]))
    world.reset(seed=0)
    np.testing.assert_array_equal(world.step(world.action_of(["w"])).frames, first)


def test_what_is_missing_is_named_all_at_once(release: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    with pytest.raises(CheckpointError, match=r"no gta_distilled_model; no models_clip.*pth or .* or image_encoder"):
        find_parts(tmp_path, mode="gta_drive")
    with pytest.raises(CheckpointError, match=r"no taew2_1\.pth or taew2_1\.safetensors"):
        find_parts(release, tiny=True)
    with pytest.raises(CheckpointError, match="no such directory"):
        find_parts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="mode is 'chess', wanted one of universal"):
        find_parts(release, mode="chess")
    (tmp_path / "start.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"start\.txt cannot be read as a picture"):
        load_world(release, image=tmp_path / "start.txt", settings=SMALL)


def test_a_folder_with_another_model_is_refused(release: Path, tmp_path: Path) -> None:
    for name in ("vae", "image_encoder"):
        (tmp_path / name).symlink_to(release / name)
    (tmp_path / "base_distilled_model").symlink_to(release / "templerun_distilled_model")
    with pytest.raises(CheckpointError, match="holds templerun weights, wanted universal"):
        load_world(tmp_path, settings=SMALL)


def test_what_is_cheap_to_see_is_seen_first(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vae", "image_encoder"):
        (tmp_path / name).symlink_to(release / name)
    (tmp_path / "base_distilled_model").symlink_to(release / "templerun_distilled_model")
    monkeypatch.setattr(WanVae, "encode_start", lambda *given: pytest.fail("the image was encoded"))
    image = release / "start.png"
    with pytest.raises(CheckpointError, match="holds templerun weights"):
        load_world(tmp_path, image=image, settings=SMALL)
    for changes, message in (
        ({"window": 4, "sink_frames": 2}, "do not fit a window of 4"),
        ({"steps": (5, 9)}, "wanted falling numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            load_world(release, image=image, settings=replace(SMALL, **changes))


def test_a_start_image_is_looked_at_again_when_its_pixels_change(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.new("RGB", (48, 32), "white")
    world = load_world(release, image=picture, settings=SMALL)
    encoded = []
    encode = WanVae.encode_start
    monkeypatch.setattr(WanVae, "encode_start", lambda vae, image: (encoded.append(image), encode(vae, image))[1])
    white = world.reset(seed=0).frames
    world.reset(seed=0, options={"image": picture.copy()})
    assert not encoded, "the same pixels"
    picture.paste("black", (0, 0, 48, 32))
    assert (world.reset(seed=0).frames != white).all()
    assert len(encoded) == 1


def test_an_action_is_whatever_its_space_holds(release: Path) -> None:
    world = load_world(release, mode="templerun", image=release / "start.png", settings=SMALL)
    for action in (3, np.int64(3), np.array(3)):
        assert world.action_space.contains(action)
        world.reset(seed=0)
        world.step(action)
    with pytest.raises(ValueError, match=r"MatrixGameWorld\.step: action .*wanted a number within 0 \.\. 6"):
        world.step(np.array([3]))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"keyboard": None, "mouse": [0, 0]}, "keyboard is no array of numbers"),
        ({"keyboard": "wasd", "mouse": [0, 0]}, "keyboard is no array of numbers"),
        ({"keyboard": [[1, 0], [0]], "mouse": [0, 0]}, "keyboard is no array of numbers"),
        ({"keyboard": [1, 0, 0, 0], "mouse": None}, "mouse is no array of numbers"),
        (
            {"keyboard": [1, 0, 0, 0], 5: [0, 0]},
            r"action \['5', 'keyboard'\], wanted a dictionary of keyboard and mouse",
        ),
    ],
    ids=str,
)
def test_an_action_of_another_type_changes_nothing(release: Path, action: object, message: str) -> None:
    world = load_world(release, image=release / "start.png", settings=SMALL)
    world.reset(seed=0)
    wanted = world.step(world.action_of(["w"])).frames
    world.reset(seed=0)
    with pytest.raises(ValueError, match=rf"^MatrixGameWorld\.step: {message}") as raised:
        world.step(action)
    assert "\n" not in str(raised.value)
    np.testing.assert_array_equal(world.step(world.action_of(["w"])).frames, wanted)
