"""Sessions against the plain transformer, whose caches are rolled; what a ring keeps; streams without end."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mg2_cases import build, distance, drawn, heard, peer_of, tiny, tiny_model, tiny_weights
from torch import Tensor

from longburn.models.matrix_game_2 import Caches, FrameWindow, MatrixGame2Config, Rollout, RolloutSettings, place_of
from longburn.models.matrix_game_2.sampler import BlockNoise, noise_levels

H, W = 4, 6
GRID = (H // 2, W // 2)
STEPS = (1000, 500)


@pytest.fixture(autouse=True)
def _no_grad() -> object:
    with torch.no_grad():
        yield


def image(batch: int = 1, frames: int = 2, name: str = "a") -> tuple[Tensor, Tensor]:
    clip = torch.from_numpy(drawn(f"{name} clip", (batch, 5, 1280)))
    return clip, torch.from_numpy(drawn(f"{name} start", (batch, 16, frames, H, W)))


def session(config: MatrixGame2Config, batch: int = 1, **changes: object) -> Rollout:
    chosen = RolloutSettings(latent_size=(H, W), **{"steps": STEPS, **changes})  # type: ignore[arg-type]
    return Rollout(tiny_model(config), *image(batch), seeds=range(batch), settings=chosen)


def action(config: MatrixGame2Config, block: int) -> tuple[list[float], list[float] | None]:
    keys = config.action_config.keyboard_dim_in
    pressed = [float(i == block % keys) for i in range(keys)]
    if not config.action_config.enable_mouse:
        return pressed, None
    return pressed, [0.1 * (block % 3 - 1), 0.1 * (block % 2)]


class PlainSession:
    """The released loop around the plain transformer, by its own bookkeeping."""

    def __init__(self, config: MatrixGame2Config, window: FrameWindow, batch: int = 1) -> None:
        self.config, self.peer, self.batch = config, peer_of(config, window), batch
        self.clip, self.start = image(batch)
        self.levels = noise_levels(STEPS)
        shape = (batch, 16, 3, H, W)
        self.noise = BlockNoise(shape, len(STEPS), range(batch), torch.device("cpu"))
        self.first, self.fresh = torch.zeros(shape), torch.zeros(len(STEPS), *shape)
        self.tracks: list[list[list[float]]] = [[], []]
        self.frames = 0

    def step(self, block: int) -> Tensor:
        for track, signal in zip(self.tracks, action(self.config, block), strict=True):
            track.extend([signal] * (12 if self.frames else 9) if signal is not None else [])
        tracks = [torch.tensor([track] * self.batch) for track in self.tracks]
        windows = [heard(track, self.frames, 3) if track.numel() else None for track in tracks]
        mask = torch.zeros(self.batch, 4, 3, H, W)
        mask[:, :, 0] = float(self.frames == 0)
        frames = [self.start[:, :, min(self.frames + i, 1)] for i in range(3)]
        cond = torch.cat([mask, torch.stack(frames, 2)], 1)

        def velocity(x: Tensor, level: float) -> Tensor:
            t = torch.full((self.batch, 3), 1000 * level)
            keyboard, mouse = windows
            return self.peer.forward(x, t, self.clip, cond, mouse, keyboard, self.frames)

        self.noise.send(self.first, self.fresh)
        x = self.first.clone()
        for i, level in enumerate(self.levels[:-1]):
            clean = x - level * velocity(x, level)
            x = clean if i + 1 == len(STEPS) else (1 - self.levels[i + 1]) * clean + self.levels[i + 1] * self.fresh[i]
        velocity(x, 0.0)
        self.frames += 3
        return x


@settings(max_examples=5)
@given(
    st.sampled_from(("universal", "gta_drive", "templerun")), st.integers(0, 3), st.integers(0, 4), st.integers(1, 2)
)
def test_a_ring_is_the_window_computed_anew(mode: str, sinks: int, more: int, batch: int) -> None:
    config, window = tiny(mode), FrameWindow(3 + sinks + more, sinks)
    ours = session(config, batch, window=window.frames, sink_frames=sinks)
    plain = PlainSession(config, window, batch)
    for block in range(window.frames // 3 + 2):
        assert distance(ours.step(*action(config, block)), plain.step(block)) < 3e-5, block


def test_bf16_stays_near() -> None:
    config = tiny("universal")
    low = build(config, tiny_weights(config), torch.bfloat16)
    ours = Rollout(low, *image(), settings=RolloutSettings(latent_size=(H, W), steps=STEPS))
    plain = PlainSession(config, FrameWindow(6))
    for block in range(4):
        made = ours.step(*action(config, block))
        assert made.dtype == torch.float32
        assert distance(made, plain.step(block)) < 4e-2


def test_time_may_start_anywhere_without_kept_frames() -> None:
    config = tiny("universal")
    model, window, ropes = tiny_model(config), FrameWindow(6), config.ropes(GRID)
    clip, start = image(frames=3)
    look, modulation = model.look(clip), model.modulation(torch.tensor([[700.0]]))
    flows = []
    for shift in (0, 3 * 341, 3_000_000):
        caches = Caches(config, window, 1, GRID[0] * GRID[1], dtype=torch.float32, device="cpu")
        for block in range(4):
            first = torch.tensor([shift + 3 * block])
            place = place_of(ropes, window, first, 3, full=block >= 1, dtype=torch.float32)
            signals = [torch.from_numpy(drawn(f"{block} {n}", (1, 3, 12, n))) for n in (2, 4)]
            condition = torch.from_numpy(drawn(f"cond {block}", (1, 20, 3, H, W)))
            prepared = model.prepare(place, caches, condition, *signals, look)
            flows.append(model.velocity(start + block, modulation, prepared, caches))
    for block in range(4):
        assert distance(flows[4 + block], flows[block]) < 1e-5
        assert distance(flows[8 + block], flows[block]) < 1e-5


def test_kept_frames_are_never_overwritten() -> None:
    config, n = tiny("universal"), GRID[0] * GRID[1]
    rollout = session(config, window=7, sink_frames=2)
    rollout.step(*action(config, 0))
    ring = rollout.caches.video[1]
    k, v = (x[:, :, : 2 * n].clone() for x in ring.memory[:2])
    for block in range(1, 12):
        rollout.step(*action(config, block))
        assert torch.equal(ring.memory[0][:, :, : 2 * n], k)
        assert torch.equal(ring.memory[1][:, :, : 2 * n], v)
        newest = range(3 * block + 3 - 5, 3 * block + 3)
        held = [n * frame + i for frame in (0, 1, *newest) for i in range(n) if frame >= 0]
        assert sorted(set(ring.positions[0].tolist()) - {-1}) == sorted(set(held)), block
        assert sorted(p for p in rollout.caches.keyboard[0].positions[0].tolist() if p >= 0) == list(
            range(max(0, 3 * block + 3 - 7), 3 * block + 3)
        )


@pytest.mark.parametrize(("frames", "sinks"), [(4, 2), (2, 0), (6, 4), (5, -1)])
def test_a_window_holds_kept_frames_and_a_block(frames: int, sinks: int) -> None:
    with pytest.raises(ValueError, match=r"sinks \+ block <= window"):
        session(tiny("universal"), window=frames, sink_frames=sinks)


def test_passes_leave_only_the_clean_block() -> None:
    """Whatever noisy passes wrote, the caches are those of the clean pass alone."""
    config = tiny("universal")
    model, window, ropes = tiny_model(config), FrameWindow(6), config.ropes(GRID)
    clip, x = image(frames=3)
    look, clean = model.look(clip), model.modulation(torch.tensor([[0.0]]))
    kept = []
    for passes in (0, 3):
        caches = Caches(config, window, 1, GRID[0] * GRID[1], dtype=torch.float32, device="cpu")
        for block in range(3):
            place = place_of(ropes, window, torch.tensor([3 * block]), 3, full=False, dtype=torch.float32)
            prepared = model.prepare(
                place, caches, torch.ones(1, 20, 3, H, W), torch.zeros(1, 3, 12, 2), torch.ones(1, 3, 12, 4), look
            )
            for i in range(passes):
                model.velocity(x * i, model.modulation(torch.tensor([[100.0 * i]])), prepared, caches)
            model.remember(x + block, clean, prepared, caches)
        kept.append([tensor.clone() for ring in caches.every for tensor in (*ring.memory[:2], ring.positions)])
    for a, b in zip(*kept, strict=True):
        n = a.shape[-2] - 1 if a.dim() == 4 else a.shape[-1]  # the last slot takes what is written nowhere
        assert torch.equal(a[..., :n, :] if a.dim() == 4 else a, b[..., :n, :] if b.dim() == 4 else b)


def test_beyond_the_originals_end() -> None:
    """Upstream stops after 341 blocks. Nothing grows here, and nothing that is computed does."""
    config = tiny("universal", num_layers=1, ffn_dim=16, listening=(0,))
    model = tiny_model(config)
    start = torch.zeros(1, 16, 1, 2, 2)
    rollout = Rollout(model, image()[0], start, settings=RolloutSettings(latent_size=(2, 2), steps=(1000,)))
    sizes, addresses, largest = [], [], []
    for block in range(400):
        latents = rollout.step(*action(config, block))
        if block in (20, 399):
            gc.collect()
            sizes.append(sum(x.nbytes for x in gc.get_objects() if type(x) is Tensor))
            addresses.append([x.data_ptr() for ring in rollout.caches.every for x in ring.memory])
        largest.append(float(latents.abs().max()))
    assert rollout.frames == 1200
    assert sizes[0] == sizes[1]
    assert addresses[0] == addresses[1]
    assert max(largest[200:]) < 2 * max(largest[:200]) < 100
    assert len({round(value, 4) for value in largest[-20:]}) > 10  # and it has not stopped


def test_noise_that_was_half_drawn_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generators are then somewhere between two blocks."""
    rollout = session(tiny("universal"))
    drawing = BlockNoise.draw

    def interrupted(noise: BlockNoise) -> None:
        drawing(noise)
        if rollout.frames:
            raise KeyboardInterrupt

    monkeypatch.setattr(BlockNoise, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rollout.step([1, 0, 0, 0])
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"interrupted halfway; reset\(\) begins again"):
        rollout.step([1, 0, 0, 0])
    rollout.reset([0])
    assert torch.equal(rollout.step([1, 0, 0, 0]), session(tiny("universal")).step([1, 0, 0, 0]))


def test_the_callers_images_are_not_held() -> None:
    config = tiny("universal")
    given_start = [image()[1] for _ in range(2)]
    rollout, other = (
        Rollout(tiny_model(config), image()[0], start, settings=RolloutSettings(latent_size=(H, W), steps=STEPS))
        for start in given_start
    )
    given_start[0].zero_()
    assert torch.equal(rollout.step([1, 0, 0, 0]), other.step([1, 0, 0, 0]))
    for one in (rollout, other):
        clip, start = image(name="b")
        one.reanchor(clip, start)
        if one is rollout:
            start.zero_()
    assert torch.equal(rollout.step([1, 0, 0, 0]), other.step([1, 0, 0, 0]))
    for one in (rollout, other):
        clip, start = image(name="c")
        one.reset([0], clip, start)
        if one is rollout:
            start.zero_()
    assert torch.equal(rollout.step([1, 0, 0, 0]), other.step([1, 0, 0, 0]))


def test_sessions_of_nobody_and_images_of_nothing_are_refused() -> None:
    model, (clip, start) = tiny_model(tiny("universal")), image()
    chosen = RolloutSettings(latent_size=(H, W), steps=STEPS)
    with pytest.raises(ValueError, match="Rollout: no seeds, wanted one a stream"):
        Rollout(model, clip[:0], start[:0], seeds=(), settings=chosen)
    with pytest.raises(ValueError, match=r"Rollout: clip is \(1, 0, 1280\), wanted \[1, 257, 1280\]"):
        Rollout(model, clip[:, :0], start, settings=chosen)
