"""What a window is, and the policies that give every layer its own."""

import dataclasses

import pytest

from longburn import AttnWindow, WindowPolicy


def test_a_window_is_a_frozen_value() -> None:
    assert AttnWindow(8, sink_tokens=2) == AttnWindow(8, sink_tokens=2)
    assert AttnWindow() == AttnWindow(None, sink_tokens=0, relative_sinks=False, lookahead=0, block=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        AttnWindow(8).size = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size 0: a window counts the query itself, so it is at least 1"),
        ({"size": -3}, "size -3"),
        ({"size": 4, "sink_tokens": -1}, "sink_tokens -1: a count of first positions"),
        ({"lookahead": -1}, "lookahead -1: a count of later keys"),
        ({"block": 0}, "block 0: a count of positions"),
        ({"relative_sinks": True, "sink_tokens": 4}, "relative_sinks with size None and sink_tokens 4"),
        ({"relative_sinks": True, "size": 4}, "relative_sinks with size 4 and sink_tokens 0"),
    ],
)
def test_a_bad_window_says_which_number_is_wrong(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"AttnWindow: {message}"):
        AttnWindow(**settings)


def test_two_sided_windows_count_neighbours() -> None:
    """(left, right) neighbours without the query: its own count is one more on the left."""
    assert AttnWindow.two_sided(3, 5) == AttnWindow(4, lookahead=5)
    assert AttnWindow.two_sided(0, 0) == AttnWindow(1, lookahead=0)
    assert AttnWindow.two_sided() == AttnWindow(None, lookahead=None)
    assert not AttnWindow.two_sided(3, 5).streams
    assert not AttnWindow.two_sided().streams
    assert AttnWindow.two_sided(7, 0).streams
    assert AttnWindow(7, block=4).streams


def sizes(policy: WindowPolicy, layers: int) -> list[int | None]:
    return [window.size for window in policy.windows(layers)]


def test_policies() -> None:
    assert sizes(WindowPolicy.full(), 3) == [None, None, None]
    assert sizes(WindowPolicy.fixed(128), 2) == [128, 128]
    assert sizes(WindowPolicy.uniform(AttnWindow(7)), 2) == [7, 7]
    assert sizes(WindowPolicy.every_other(128, full_on_even=False), 5) == [128, None, 128, None, 128]
    assert sizes(WindowPolicy.every_other(128, full_on_even=True), 4) == [None, 128, None, 128]
    assert sizes(WindowPolicy.explicit([None, 4, AttnWindow(9)]), 3) == [None, 4, 9]
    assert sizes(WindowPolicy(lambda layer: AttnWindow(2**layer)), 4) == [1, 2, 4, 8]
    assert WindowPolicy.full().windows(0) == ()


def test_policies_pass_on_sink_tokens() -> None:
    wanted = AttnWindow(8, sink_tokens=4, relative_sinks=True)
    assert WindowPolicy.fixed(8, sink_tokens=4, relative_sinks=True).of_layer(1) == wanted
    full, windowed = WindowPolicy.every_other(8, full_on_even=True, sink_tokens=4).windows(2)
    assert (full, windowed) == (AttnWindow(), AttnWindow(8, sink_tokens=4))
    assert WindowPolicy.explicit([wanted]).of_layer(0) == wanted


def test_a_list_that_is_too_short_says_so() -> None:
    with pytest.raises(ValueError, match=r"explicit: layer 2 has no window; 2 were given"):
        WindowPolicy.explicit([4, 5]).windows(3)
    with pytest.raises(ValueError, match="size 0"):
        WindowPolicy.explicit([4, 0])
