"""Text from token bytes: however the bytes are cut, the same text and the same stop as one look at the whole."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longburn.generation.stop import TextStream


def run(pieces: list[bytes], stops: list[str]) -> tuple[list[str], str | None]:
    stream = TextStream(stops)
    printed = [stream.feed(piece) for piece in pieces]
    return [*printed, stream.flush()], stream.stop


def one_piece(data: bytes, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the first byte at which a stop string is complete; the longest of those that end there."""
    for end in range(len(data) + 1):
        here = [stop for stop in stops if data[:end].endswith(stop.encode())]
        if here:
            longest = max(here, key=lambda stop: len(stop.encode()))
            return data[: end - len(longest.encode())].decode("utf-8", "replace"), longest
    return data.decode("utf-8", "replace"), None


# Letters that overlap, characters of 2, 3 and 4 bytes that share their first bytes, and pieces of broken UTF-8.
alphabet = ["a", "b", "\n", "é", "è", "日", "明", "本", "🙂", "🙃"]
fragments = [*(c.encode() for c in alphabet), b"\xe6", b"\x97", b"\xf0\x9f", b"\xc3", b"\xff", b"\xed\xa0", b"\xe0\x80"]
byte_strings = st.lists(st.sampled_from(fragments), max_size=14).map(b"".join)
stop_lists = st.lists(st.text(st.sampled_from(alphabet), min_size=1, max_size=4), max_size=4)


@given(st.lists(byte_strings | st.binary(max_size=3), max_size=8), stop_lists)
@example([b"a", b"aab", b"b"], ["aab"])
@example([b"ab", b"c", b"d"], ["abcd", "bc"])
def test_any_cut_gives_the_text_and_stop_of_one_piece(pieces, stops):
    printed, stop = run(pieces, stops)
    assert ("".join(printed), stop) == one_piece(b"".join(pieces), stops)


@given(byte_strings, stop_lists)
def test_byte_by_byte_equals_one_token(data, stops):
    by_byte, stop = run([bytes([b]) for b in data], stops)
    at_once, same_stop = run([data], stops)
    assert ("".join(by_byte), stop) == ("".join(at_once), same_stop)


@given(byte_strings, stop_lists)
def test_nothing_is_held_back_without_need(data, stops):
    """At every byte: what is printed is all that is certain, and what is pending could still change."""
    stream, printed = TextStream(stops), ""
    for n in range(1, len(data) + 1):
        printed += stream.feed(data[n - 1 : n])
        if stream.stop is not None:
            break
        pending = stream.pending
        assert printed == data[: n - len(pending)].decode("utf-8", "replace")
        if pending:
            begins_a_stop = any(stop.encode().startswith(pending) for stop in stops)
            completable = any(
                _decodes(pending + bytes([second]) + rest)
                for second in range(0x80, 0xC0)
                for rest in (b"", b"\x80", b"\x80\x80")
            )
            surrogate = pending[:1] == b"\xed" and pending[1:2] >= b"\xa0"  # Python's decoder waits for its third byte
            assert begins_a_stop or completable or surrogate


def _decodes(data: bytes) -> bool:
    try:
        return len(data.decode("utf-8")) == 1
    except UnicodeDecodeError:
        return False


@given(byte_strings, byte_strings, stop_lists)
def test_a_new_stream_continues_from_the_pending_bytes(before, after, stops):
    first = TextStream(stops)
    printed = first.feed(before)
    if first.stop is not None:
        return
    resumed = TextStream(stops)
    assert resumed.feed(first.pending) == ""
    printed += resumed.feed(after) + resumed.flush()
    assert (printed, resumed.stop) == one_piece(before + after, stops)


def test_text_comes_as_early_as_it_can():
    assert run([b"Hel", b"lo"], ["\n\n"])[0] == ["Hel", "lo", ""]
    assert run([b"one\n", b"two\n", b"\nthree"], ["\n\n"]) == (["one", "\ntwo", "", ""], "\n\n")
    assert run([b"a", b"a", b"a", b"b", b"c"], ["aab"]) == (["", "", "a", "", "", ""], "aab")


def test_characters_split_over_tokens():
    day = "日".encode()
    assert run([day[:1], day[1:2], day[2:]], [])[0] == ["", "", "日", ""]
    smile = "🙂".encode()
    assert run([b"x" + smile[:3], smile[3:] + b"y"], [])[0] == ["x", "🙂y", ""]


def test_a_stop_string_split_inside_its_characters():
    stop = "日本🙂".encode()
    for cut in range(1, len(stop)):
        printed, found = run([b"ok" + stop[:cut], stop[cut:] + b"never"], ["日本🙂"])
        assert printed == ["ok", "", ""]
        assert found == "日本🙂"
    # The first byte of the stop string, but another character.
    assert run([b"\xe6", "明".encode()[1:]], ["日"]) == (["", "明", ""], None)


def test_the_stop_that_is_complete_first_wins():
    assert run([b"xabcd"], ["abcd", "bc"]) == (["xa", ""], "bc")
    assert run([b"xabc"], ["bc", "abc", "c"]) == (["x", ""], "abc")


def test_invalid_bytes_become_replacements_as_soon_as_they_are_lost():
    assert run([b"\xff"], [])[0] == ["\ufffd", ""]
    assert run([b"\xe6", b"a"], [])[0] == ["", "\ufffda", ""]
    assert run([b"\xe6\x97"], [])[0] == ["", "\ufffd"]  # only the end settles it
    assert run([b"\xe6", b"S", b"T"], ["STOP"])[0] == ["", "\ufffd", "", "ST"]
    assert run([b"\xe6", b"STOP"], ["STOP"]) == (["", "\ufffd", ""], "STOP")


def test_nothing_comes_after_the_stop():
    stream = TextStream(["."])
    assert stream.feed(b"Yes. No") == "Yes"
    assert stream.stop == "."
    assert stream.feed(b" more") == ""
    assert stream.flush() == ""


def test_a_held_back_prefix_is_printed_at_the_end():
    assert run([b"to be ST", b"O"], ["STOP"])[0] == ["to be ", "", "STO"]


def test_wrong_stop_strings_are_refused():
    with pytest.raises(ValueError, match="empty"):
        TextStream(["ok", ""])
    with pytest.raises(TypeError, match="several strings"):
        TextStream("STOP")
    with pytest.raises(ValueError, match="surrogates not allowed"):
        TextStream(["\ud800"])
