"""Pickles: the opcodes are those that pickletools finds, whole or damaged, and plain values those that pickle loads."""

import math
import pickle
import pickletools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tzip.formats import opcodes as module
from tzip.formats.containers import ContainerError
from tzip.formats.opcodes import STOP, Stream, opcodes
from tzip.formats.pickles import Map, load

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-300, 70000)
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4)
        | st.lists(inner, max_size=2).map(lambda items: [items, items])
    ),
    max_leaves=12,
)


def stream_of(raw, at=0):
    return Stream(lambda offset, n: raw[offset : offset + n], at, len(raw))


def ours(raw):
    """Every opcode and its argument, None when there is an error."""
    found = []
    try:
        found += ((bytes([code]), tell_apart(argument)) for code, argument in opcodes(stream_of(raw)))
    except ContainerError:
        return None
    return found


def theirs(raw):
    """The same from Python's own parser. Where it follows other rules than pickle's own reader, so do we: a text of protocol
    0 has two quotes, and a name has no escapes.
    """
    found = []
    try:
        for opcode, argument, at in pickletools.genops(raw):
            code = opcode.code.encode("latin-1")
            if code == b"S" and raw[at + 2 : at + 3] == b"\n":
                return None
            if code in (b"c", b"i", b"P"):
                lines = raw[at + 1 :].split(b"\n")[: 1 if code == b"P" else 2]
                argument = ".".join(line.decode("ascii") for line in lines)
            found.append((code, tell_apart(argument)))
    except (ValueError, OverflowError, Warning):
        return None
    return found


def tell_apart(argument):
    """NaNs equal to themselves, True not to 1."""
    return type(argument), struct.pack("<d", argument) if isinstance(argument, float) else argument


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
@given(value=PLAIN, protocol=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_opcodes_of_whole_pickles(piece, value, protocol):
    raw = pickle.dumps(value, protocol)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        stream = stream_of(b"before" + raw + b"after", 6)
        found = list(opcodes(stream))
        assert (found[-1], stream.at) == ((STOP, None), 6 + len(raw))
        assert ours(raw) == theirs(raw)
        assert len(found) == len(ours(raw))


LINES = st.sampled_from([b"00", b"01", b"7", b"-5", b"12L", b"'a'", b"'", b"'\\x41'", b"os", b"1.5", b"\xe4", b""])


@st.composite
def opcode(draw):
    """Any opcode with an argument that may suit it."""
    which = draw(st.sampled_from(pickletools.opcodes))
    code, argument = which.code.encode("latin-1"), which.arg
    if argument is None:
        return code
    if argument.n >= 0:
        return code + draw(st.binary(min_size=argument.n, max_size=argument.n))
    if argument.n == pickletools.UP_TO_NEWLINE:
        return code + draw(LINES) + b"\n" + (draw(LINES) + b"\n" if which.name in ("GLOBAL", "INST") else b"")
    width = {"1": 1, "4": 4, "8": 8}[argument.name[-1]]
    data = draw(st.binary(max_size=12) | st.text(max_size=5).map(str.encode))
    n = draw(st.sampled_from([len(data)] * 6 + [0, 255, (1 << (8 * width - 1)), len(data) + 1]))
    return code + (n & ((1 << (8 * width)) - 1)).to_bytes(width, "little") + data


@pytest.mark.filterwarnings("ignore")
@given(st.lists(opcode(), max_size=12), st.booleans())
@settings(max_examples=600, deadline=None)
def test_opcodes_in_any_order(parts, stops):
    raw = b"".join(parts) + (b"." if stops else b"")
    assert ours(raw) == theirs(raw)
    survives(raw)


@pytest.mark.filterwarnings("ignore")
@given(PLAIN, st.integers(0, 5), st.data())
@settings(max_examples=100, deadline=None)
def test_damage(value, protocol, data):
    raw = bytearray(pickle.dumps(value, protocol))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    assert ours(bytes(raw)) == theirs(bytes(raw))
    survives(bytes(raw))


@pytest.mark.parametrize("protocol", range(6))
def test_truncation_at_every_byte(protocol):
    raw = pickle.dumps([1, -1, 1 << 70, 1.5, "a" * 300, "b", b"c" * 300, b"d", {"e": (True, None)}, 70000, {1, 2}], protocol)
    assert ours(raw)
    for n in range(len(raw)):
        assert ours(raw[:n]) is None
        assert survives(raw[:n]) is None


def survives(raw):
    """Whatever it says, the machine has a value or knows why not."""
    try:
        return load(stream_of(raw), lambda name, arguments: None, lambda key: key), None
    except ContainerError as e:
        reason = str(e)
    assert 0 < len(reason) < 1000
    return None


def same(found, value):
    if isinstance(found, Map):
        keys, values = found.pairs[::2], found.pairs[1::2]
        return keys == list(value) and all(map(same, values, value.values()))
    if isinstance(value, list | tuple):
        return type(found) is type(value) and len(found) == len(value) and all(map(same, found, value))
    if isinstance(value, float) and math.isnan(value):
        return math.isnan(found)
    return type(found) is type(value) and found == value


@given(PLAIN, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_plain_values_are_those_that_pickle_loads(value, protocol):
    raw = pickle.dumps(value, protocol)
    if not any(code == b"c" for code, _ in ours(raw)):  # old protocols know no bytes, and call for them
        assert same(load(stream_of(raw), lambda name, arguments: None, lambda key: key), pickle.loads(raw))


def test_values_that_are_not_there_are_not_read():
    asked = []

    def read(offset, n):
        asked.append(n)
        return (b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + bytes(n))[offset : offset + n]

    with pytest.raises(ContainerError, match="do not follow"):
        list(opcodes(Stream(read, 0, 1 << 30)))
    assert sum(asked) == 1 << 16
