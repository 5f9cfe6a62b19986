"""What is not upstream's: relative kept frames, weights of past frames, fp8, other images on the way; bad input."""

import math

import numpy as np
import pytest
import torch
from mg2_cases import distance, drawn, given, heard, peer_of, tiny, tiny_model
from torch import Tensor

from longburn.models.matrix_game_2 import Caches, FrameWindow, Rollout, RolloutSettings, place_of
from longburn.models.matrix_game_2.layer import Rings
from longburn.models.matrix_game_2.sampler import BlockNoise, jump, noise_levels
from longburn.models.matrix_game_2.signals import Signals

H, W = 4, 6
GRID, N = (2, 3), 6


@pytest.fixture(autouse=True)
def _no_grad() -> object:
    with torch.no_grad():
        yield


def image(batch: int = 1, name: str = "a") -> tuple[Tensor, Tensor]:
    clip = torch.from_numpy(drawn(f"{name} clip", (batch, 5, 1280)))
    return clip, torch.from_numpy(drawn(f"{name} start", (batch, 16, 2, H, W)))


def session(mode: str = "universal", batch: int = 1, seeds: list[int] | None = None, **changes: object) -> Rollout:
    chosen = RolloutSettings(latent_size=(H, W), **{"steps": (1000, 500), **changes})  # type: ignore[arg-type]
    return Rollout(tiny_model(tiny(mode)), *image(batch), seeds=seeds or list(range(batch)), settings=chosen)


def turned(x: Tensor, times: list[int]) -> Tensor:
    """x `[heads, frames * N, size]` in fp64, turned pair by pair; frames stand at these times."""
    size, out = x.shape[-1], torch.empty_like(x, dtype=torch.float64)
    counts = (size // 2 - 2 * (size // 6), size // 6, size // 6)
    for token in range(x.shape[1]):
        place = (times[token // N], token % N // GRID[1], token % GRID[1])
        angles = [p * 10000.0 ** (-j / count) for p, count in zip(place, counts, strict=True) for j in range(count)]
        for j, angle in enumerate(angles):
            a, b = x[:, token, 2 * j].double(), x[:, token, 2 * j + 1].double()
            out[:, token, 2 * j] = a * math.cos(angle) - b * math.sin(angle)
            out[:, token, 2 * j + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


@pytest.mark.parametrize("option", ["relative", "weights", "both", "packed"])
def test_attention_to_a_window_by_its_formula(option: str) -> None:
    """Keys are kept as they are projected, and turned anew for every block: kept frames stand right before the rest."""
    config = tiny("universal")
    attention = tiny_model(config).layers[0].attention
    weights = (-0.7, -1.5) if option in ("weights", "both") else ()
    window = FrameWindow(7, 2, relative_sinks=option in ("relative", "both"), past_log_weights=weights)
    kind = {"dtype": torch.float32, "device": "cpu"}
    caches = Caches(config, window, 1, N, packed=option == "packed", **kind)  # type: ignore[arg-type]
    rings, ropes = Rings(window, caches.video[0], None), config.ropes(GRID)
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    for block in range(6):
        x = torch.from_numpy(drawn(f"block {block}", (1, 3 * N, config.dim)))
        first = torch.tensor([3 * block])
        place = place_of(ropes, window, first, 3, full=3 * block + 3 >= 7, dtype=torch.float32)
        out = attention.forward(x, place, rings)
        q, k, v = attention.qkv(x).chunk(3, 2)
        q, k, v = (attention._cut(y)[0] for y in (attention.q_norm(q), attention.k_norm(k), v))
        for i in range(3):
            keys[3 * block + i], values[3 * block + i] = k[:, i * N : (i + 1) * N], v[:, i * N : (i + 1) * N]
        held = sorted(f for f in keys if f < 2 or f >= 3 * block + 3 - 5)
        if window.relative_sinks:
            times, now = list(range(len(held))), list(range(len(held) - 3, len(held)))
        else:
            times, now = held, [3 * block, 3 * block + 1, 3 * block + 2]
        scores = turned(q, now) @ turned(torch.cat([keys[f] for f in held], 1), times).mT * config.head_dim**-0.5
        for at, frame in enumerate(held):
            age = 3 * block - frame
            if weights and age > 0 and frame >= 2:
                scores[:, :, at * N : (at + 1) * N] += weights[min(age, 2) - 1]
        wanted = scores.softmax(-1) @ torch.cat([values[f] for f in held], 1).double()
        wanted = attention._joined(wanted.float()[None])
        assert distance(out, wanted) < (0.05 if option == "packed" else 1e-5), block


def test_packed_caches_are_smaller() -> None:
    plain, packed = session(sink_frames=1), session(sink_frames=1, packed=True)
    assert sum(c.nbytes for c in packed.caches.video) < 0.6 * sum(c.nbytes for c in plain.caches.video)
    for _ in range(3):
        one, other = plain.step([1, 0, 0, 0]), packed.step([1, 0, 0, 0])
        assert 0 < distance(other, one) < 0.2


def test_another_image_on_the_way() -> None:
    """The plain model, begun anew with the frames that are still seen, under the other image."""
    config = tiny("universal")
    rollout = session()
    made, actions = [], [([1.0, 0, 0, 1], [0.1, 0.0]), ([0.0, 1, 0, 0], [0.0, -0.1]), ([0.0, 0, 1, 0], [0.1, 0.1])]
    for keys, mouse in actions:
        made.append(rollout.step(keys, mouse))
    clip, start = image(name="b")
    rollout.reanchor(clip, start)
    after = rollout.step([1.0, 0, 0, 0], [0.0, 0.1])

    peer = peer_of(config, FrameWindow(6))
    tracks = []
    for i in range(2):
        signals = [[*a[i]] for a in (*actions, ([1.0, 0, 0, 0], [0.0, 0.1]))]
        tracks.append(torch.tensor([[signal for b, signal in enumerate(signals) for _ in range(12 if b else 9)]]))
    keyboard, mouse = ([heard(track, first, 3) for first in (6, 9)] for track in tracks)
    old = image()[1]
    seen = torch.cat([torch.zeros(1, 4, 3, H, W), old[:, :, 1:].expand(-1, -1, 3, -1, -1)], 1)
    peer.forward(made[2], torch.zeros(1, 3), clip, seen, mouse[0], keyboard[0], 0)
    mask = torch.zeros(1, 4, 3, H, W)
    mask[:, :, 0] = 1
    cond = torch.cat([mask, start[:, :, [0, 1, 1]]], 1)
    noise = BlockNoise(tuple(after.shape), 2, [0], torch.device("cpu"))
    x, fresh, levels = torch.zeros_like(after), torch.zeros(2, *after.shape), noise_levels((1000, 500))
    for _ in range(4):
        noise.send(x, fresh)
    for i in range(2):
        t = torch.full((1, 3), 1000 * levels[i])
        clean = x - levels[i] * peer.forward(x, t, clip, cond, mouse[1], keyboard[1], 3)
        x = clean if i else (1 - levels[1]) * clean + levels[1] * fresh[0]
    assert distance(after, x) < 3e-5


@pytest.mark.parametrize(("window", "sinks"), [(6, 0), (8, 2), (4, 0), (9, 4)])
def test_reading_again_fills_the_rings_as_they_were(window: int, sinks: int) -> None:
    """After a change of image the rings hold the frames that the next block sees, and later blocks come as ever."""
    rollout = session(window=window, sink_frames=sinks)
    for _ in range(5):
        rollout.step([1, 0, 0, 0])
    rollout.reanchor(image(name="b")[0])
    recent = range(15 - window + 3, 15)
    frames = {p // N for p in rollout.caches.video[0].positions[0].tolist() if p >= 0}
    assert frames == {*range(sinks), *(f for f in recent if f >= 15 - window + 3)} - {
        f for f in recent if f < 15 - (window - sinks)
    }
    held = rollout.caches.mouse[0].positions[0].tolist()
    assert {p for p in held if p >= 0} == set(recent)
    assert all(torch.isfinite(rollout.step([0, 1, 0, 0])).all() for _ in range(4))
    assert len(rollout._made) <= window + sinks


def test_noise_levels_are_those_of_the_released_steps() -> None:
    wanted = {1000: 1000, 750: 937.5, 666: 908.8427, 500: 833.3333, 333: 713.9794, 250: 625.0}
    for step, t in wanted.items():
        assert 1000 * noise_levels([step])[0] == pytest.approx(t, abs=1e-4)
    assert noise_levels((1000, 666, 333))[-1] == 0
    for bad in ((), (1001,), (500, 500), (300, 600), (10, 0)):
        with pytest.raises(ValueError, match="falling numbers"):
            noise_levels(bad)


def test_a_jump_removes_all_noise_and_adds_the_next_levels() -> None:
    x0, noise, fresh = (given(name, (2, 16, 3, H, W)) for name in "abc")
    level, after = torch.tensor([0.9]), torch.tensor([0.4])
    x = 0.9 * noise + 0.1 * x0
    torch.testing.assert_close(jump(x, noise - x0, fresh, level, after), 0.4 * fresh + 0.6 * x0)
    torch.testing.assert_close(jump(x, noise - x0, fresh, level, torch.tensor([0.0])), x0)


def test_every_stream_has_noise_of_its_own() -> None:
    together = session(batch=2, seeds=[5, 9])
    first = [together.step([1, 0, 0, 0]) for _ in range(3)]
    alone = Rollout(together.model, image(2)[0][1:], image(2)[1][1:], seeds=[9], settings=together.settings)
    for block in range(3):
        torch.testing.assert_close(alone.step([1, 0, 0, 0])[0], first[block][1], rtol=1e-4, atol=1e-4)
    together.reset([5, 9])
    assert torch.equal(together.step([1, 0, 0, 0]), first[0])
    together.reset([5, 10])
    assert not torch.equal(together.step([1, 0, 0, 0])[1], first[0][1])
    noise = BlockNoise((1, 4), 3, [3], torch.device("cpu"))
    x, fresh = torch.zeros(1, 4), torch.ones(3, 1, 4)
    noise.send(x, fresh)
    assert len({float(v) for v in (*x.flatten(), *fresh[:2].flatten())}) == 12  # every step's is new
    assert not fresh[2].any()


def test_actions_are_heard_in_windows_of_pictures() -> None:
    config, n = tiny("gta_drive"), 9 + 12 * 5
    signals = Signals(config, 2)
    track = (given("keys", (2, n, 2)) > 0).float()
    moves = given("mouse", (2, n, 2)).clamp(-1, 1)
    at = 0
    for block in range(6):
        count = signals.pictures(3 * block)
        keys, mouse = signals.checked(track[:, at : at + count], moves[:, at : at + count], 3 * block)
        at += count
        for windows, whole in zip(signals.hear(keys, mouse), (track, moves), strict=True):
            assert torch.equal(windows, heard(whole[:, :at], 3 * block, 3))


BAD_ACTIONS = [
    ("universal", [1, 0, 0], None, r"keyboard is \(3,\), wanted \[4\]"),
    ("universal", [1, 0, 0, 2], None, "keyboard holds 2.0, wanted 0 or 1"),
    ("universal", [1, 0, 0, float("nan")], None, "keyboard holds nan"),
    ("universal", [1, 0, 0, 0], [0.1], r"mouse is \(1,\), wanted \[2\]"),
    ("universal", [1, 0, 0, 0], [0.1, -3.0], "mouse holds -3.0, wanted numbers within"),
    ("universal", [1, 0, 0, 0], [0.1, float("nan")], "mouse holds nan"),
    ("templerun", [0, 1, 0, 0, 0, 0, 0], [0, 0], "the templerun model has none"),
    ("templerun", [0, 1, 0, 0, 0, 0, 1], None, "2 actions at once; templerun wants exactly one"),
    ("gta_drive", [[1, 0], [0, 1]], None, r"keyboard is \(2, 2\)"),
    ("universal", "w", None, r"keyboard is no array of numbers .*wanted \[4\]"),
    ("universal", None, None, "keyboard is no array of numbers"),
    ("universal", [[1, 0], [0]], None, "keyboard is no array of numbers"),
    ("universal", [1, 0, 0, 1j], None, "complex numbers"),
]


@pytest.mark.parametrize(("mode", "keyboard", "mouse", "message"), BAD_ACTIONS)
def test_a_bad_action_changes_nothing(mode: str, keyboard: object, mouse: object, message: str) -> None:
    rollout, other = session(mode), session(mode)
    good = [float(i == 0) for i in range(rollout.model.config.action_config.keyboard_dim_in)]
    for one in (rollout, other):
        one.step(good)
    with pytest.raises(ValueError, match=message) as raised:
        rollout.step(keyboard, mouse)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("Rollout.step: ")
    assert torch.equal(rollout.step(good), other.step(good))


def test_bad_images_change_nothing() -> None:
    rollout, other = session(), session()
    clip, start = image()
    for one in (rollout, other):
        one.step([1, 0, 0, 0])
    for bad in ((clip[:, :, :5], None), (clip[:, :3], None), (clip, start[..., :4]), (clip, start[:, :8])):
        with pytest.raises(ValueError, match=r"Rollout: (clip|start) is"):
            rollout.reanchor(*bad)
        with pytest.raises(ValueError, match=r"Rollout: (clip|start) is"):
            rollout.reset([1], *bad)
    with pytest.raises(ValueError, match="one for each of 1 streams"):
        rollout.reset([1, 2])
    assert torch.equal(rollout.step([1, 0, 0, 0]), other.step([1, 0, 0, 0]))
    model = rollout.model
    with pytest.raises(ValueError, match="latents of 352 x 640 pictures"):
        Rollout(model, clip, start)
    with pytest.raises(ValueError, match="even numbers"):
        RolloutSettings(latent_size=(5, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative_sinks": True}, "relative_sinks without kept frames"),
        ({"window": 4, "sink_frames": 2}, "do not fit a window of 4"),
        ({"past_log_weights": (0.0, float("nan"))}, "past_log_weights are .*nan.*wanted numbers"),
        ({"shift": 0.0}, "shift is 0.0, wanted a number above 0"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"steps": ()}, r"steps are \[\], wanted falling numbers"),
        ({"steps": (500, 900)}, "wanted falling numbers"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sink_frames": 0.5}, "sink_frames is 0.5, wanted a whole number of latent frames"),
        ({"sink_frames": True}, "sink_frames is True"),
        ({"window": 7.5}, "window is 7.5, wanted a whole number of latent frames"),
        ({"steps": 1000}, "steps is 1000, wanted falling whole numbers"),
        ({"steps": (1000, 0.5)}, r"steps is \(1000, 0.5\)"),
        ({"latent_size": (4,)}, r"latent_size is \(4,\), wanted two even numbers"),
        ({"latent_size": (4, 6.0)}, r"latent_size is \(4, 6.0\)"),
        ({"past_log_weights": -0.5}, "past_log_weights is -0.5, wanted numbers or -inf"),
        ({"shift": "5"}, "shift is '5', wanted a number above 0"),
    ],
)
def test_settings_of_another_type_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^RolloutSettings: {message}"):
        RolloutSettings(**changes)  # type: ignore[arg-type]


def test_a_window_is_of_whole_frames() -> None:
    for bad in ((7.5,), ("7",), (7, 0.5), (7, True)):
        with pytest.raises(ValueError, match=r"^FrameWindow: (sink_)?frames is .*, wanted a whole number"):
            FrameWindow(*bad)  # type: ignore[arg-type]


def test_settings_may_be_numbers_of_numpy() -> None:
    two = np.int64(2)
    given_by = {"past_log_weights": np.array([-0.5]), "steps": np.array([1000, 500]), "latent_size": [two, 4]}
    chosen = RolloutSettings(two + 5, two, shift=5, **given_by)
    assert chosen == RolloutSettings(7, 2, False, (-0.5,), (1000, 500), 5.0, latent_size=(2, 4))
    assert FrameWindow(two + 5, two) == FrameWindow(7, 2)


def test_what_is_done_to_latents_does_not_reach_the_session() -> None:
    rollout, other = session(), session()
    clip, start = image(name="b")
    for one in (rollout, other):
        for _ in range(2):
            latents = one.step([1, 0, 0, 0])
        if one is rollout:
            latents.zero_()
        one.reanchor(clip, start)
    assert torch.equal(rollout.step([1, 0, 0, 0]), other.step([1, 0, 0, 0]))


def test_an_interrupted_step_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout, other = session(), session()
    wanted = [other.step([1, 0, 0, 0]) for _ in range(2)]
    rollout.step([1, 0, 0, 0])
    with monkeypatch.context() as patch:
        patch.setattr(type(rollout.model), "velocity", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rollout.step([1, 0, 0, 0])
    for go_on in (lambda: rollout.step([1, 0, 0, 0]), lambda: rollout.reanchor(image()[0])):
        with pytest.raises(RuntimeError, match=r"interrupted halfway; reset\(\) begins again"):
            go_on()
    rollout.reset([0])
    assert all(torch.equal(rollout.step([1, 0, 0, 0]), block) for block in wanted)
