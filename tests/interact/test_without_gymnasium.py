"""Without the extra: protocols are there, and what needs gymnasium names the extra."""

import subprocess
import sys

BLOCKED = """
import sys
sys.modules["gymnasium"] = None
import longburn.interact as interact
import longburn.interact.world

class Room:
    fps, frame_size, observation_space, action_space = 4.0, (2, 2), None, None
    def reset(self, *, seed, options=None): ...
    def step(self, action): ...

assert isinstance(Room(), interact.WorldModel)
assert not isinstance(Room(), interact.PlayableWorld)
for needs in (
    lambda: interact.WorldModelEnv,
    lambda: interact.action_codec(None),
    lambda: interact.LinearEncoder(None, 4),
    lambda: interact.rollout(None, None),
):
    try:
        needs()
    except ImportError as error:
        print(error)
"""


def test_the_extra_is_named() -> None:
    result = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert all(line.endswith("needs gymnasium: pip install 'longburn[env]'") for line in lines)
