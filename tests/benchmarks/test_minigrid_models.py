"""The benchmark of the MiniGrid models counts what it says it counts."""

from functools import partial

import pytest
from scipy.stats import binomtest

import minigrid_models as bench
from longburn.models.minigrid import MemoryPolicy, PolicyConfig, memory_task, window
from longburn.models.minigrid.tasks import sees_first_object


@pytest.mark.parametrize(("won", "n"), [(0, 20), (7, 20), (499, 500), (500, 500)])
def test_intervals_are_wilsons(won: int, n: int) -> None:
    found = bench.success([(row < won, True, 10 + row, 0, 5) for row in range(n)])
    expected = binomtest(won, n).proportion_ci(0.95, method="wilson")
    assert found["interval"] == pytest.approx([expected.low, expected.high], abs=1e-4)
    assert found["success"] == pytest.approx(won / n, abs=1e-4)
    assert (found["wrong_object"], found["out_of_time"]) == (n - won, 0)


def test_first_and_last_sight_are_those_of_the_episode() -> None:
    env, plain = bench.Sight(memory_task(13)), memory_task(13)
    for seed in range(4):
        env.reset(seed=seed)
        plain.reset(seed=seed)
        seen = [0] if sees_first_object(plain) else []
        for step, action in enumerate([0, 0, 2, 2, 2, 2, 0, 0, 2, 2], 1):
            env.step(action)
            plain.step(action)
            if sees_first_object(plain):
                seen.append(step)
        assert (env.first, env.last) == ((seen[0], seen[-1]) if seen else (None, None))


def test_every_row_plays_its_share_of_whole_episodes() -> None:
    policy = MemoryPolicy(PolicyConfig(dim=16, heads=2, hidden=16), window=window(5, sinks=True)).eval()
    advanced: list[int] = []
    played = bench.play(policy, partial(memory_task, 7, max_steps=6), 8, 4, 0, lambda: advanced.append(1))
    assert len(played) == len(advanced) == 8
    assert all(p[2] == 6 or p[1] for p in played)


def test_a_long_stream_is_measured_by_the_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LONG", 20)
    policy = MemoryPolicy(PolicyConfig(dim=16, heads=2, hidden=16), window=window(5, sinks=True)).eval()
    monkeypatch.setattr(bench, "memory_task", lambda size, gate: memory_task(size, gate=gate, max_steps=1100))
    found = bench.long_stream(policy, 0, lambda: None)
    assert found["steps"] <= 1100
    if found["steps"] >= 1000:
        assert found["cache_bytes"] == [policy.init_cache(1).nbytes]
