"""What a pickle describes, without doing what it says: its opcodes are followed, nothing is imported and nothing called.

Plain values come out as themselves. A global is its name and stays one; a call gives what the reader of the container
makes of that name, or an object of which only the attributes are known. Values may be shared, nested a
million deep and even contain themselves: whoever walks them must not recurse, compare, hash or print them.
"""

import pickletools
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import IO, TypeVar, cast

from tzip.formats.containers import ContainerError, Read

MAX_BYTES = 100_000_000
MAX_STEPS = 4_000_000  # of some 40 for a tensor; the worst ones take about 150 bytes of memory each
MAX_WAY = 4096  # characters of the way to a value
_PIECE = 1 << 16


@dataclass(slots=True, eq=False, repr=False)
class Global:
    """Something that the pickle would import: module and name, joined by a dot."""

    name: str


@dataclass(slots=True, eq=False, repr=False)
class Map:
    """A dictionary: keys and values in turn. Of equal keys the last one counts."""

    pairs: list[object] = field(default_factory=list)


@dataclass(slots=True, eq=False, repr=False)
class Opaque:
    """An object that is not known: its attributes as the pickle sets them, and what it holds as a dictionary."""

    state: object = None
    pairs: list[object] = field(default_factory=list)


Call = Callable[[str, tuple[object, ...]], object]
"""Returns what a call of that name makes of its arguments, None when the reader does not know it."""


class Stream:
    """The bytes of a file from `at` on, read in pieces; it ends at `end`, and after MAX_BYTES."""

    def __init__(self, read: Read, at: int, end: int) -> None:
        self._read, self._end = read, min(end, at + MAX_BYTES)
        self._base, self._piece, self._next = at, b"", 0

    @property
    def at(self) -> int:
        """The offset in the file of the next byte."""
        return self._base + self._next

    def read(self, n: int) -> bytes:
        """Return the next n bytes, fewer at the end."""
        if n > len(self._piece) - self._next:
            at = self.at
            self._piece = self._read(at, min(max(n, _PIECE), self._end - at))
            self._base, self._next = at, 0
        out = self._piece[self._next : self._next + n]
        self._next += len(out)
        return out

    def readline(self) -> bytes:
        """Return the bytes up to and with the next line feed."""
        parts = [b""]
        while not parts[-1].endswith(b"\n"):
            found = self._piece.find(b"\n", self._next) + 1 or len(self._piece)
            parts.append(self.read(max(found - self._next, 1)))
            if not parts[-1]:
                break
        return b"".join(parts)


def load(stream: Stream, call: Call, persistent: Callable[[object], object]) -> object:
    """Return the value of the pickle at the stream's place, which is its end afterwards.

    `persistent` makes something of each persistent id. Raises ContainerError when the bytes are no pickle.
    """
    machine = _Machine(call, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(cast("IO[bytes]", stream)):
            machine.step(opcode.name, argument)
        return machine.pop()
    except ContainerError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, Warning) as e:
        raise ContainerError(f"its pickle is invalid: {type(e).__name__}: {str(e)[:200]}") from None


_VALUES = {  # opcodes that stand for the value of their argument
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MAPS = {
    "builtins.dict",
    "__builtin__.dict",
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.Counter",
}
_SAME = {"torch.Size"} | {f"{m}.{t}" for m in ("builtins", "__builtin__") for t in ("list", "tuple", "set", "frozenset")}


class _Machine:
    """The stack, the marks (heights of the stack) and the memo of a pickle under way."""

    def __init__(self, call: Call, persistent: Callable[[object], object]) -> None:
        self._call, self._persistent = call, persistent
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}
        self._steps = 0

    def pop(self) -> object:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ContainerError("its pickle takes a value from an empty stack")
        return self._stack.pop()

    def _top(self) -> object:
        value = self.pop()
        self._stack.append(value)
        return value

    def _from_mark(self) -> list[object]:
        height = self._marks.pop()
        items = self._stack[height:]
        del self._stack[height:]
        return items

    def step(self, name: str, argument: object) -> None:
        """Follow one opcode."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise ContainerError(f"its pickle has more than {MAX_STEPS} steps")
        if name in _VALUES:
            self._stack.append(argument)
            return
        match name:  # the frequent ones first
            case "BINPUT" | "LONG_BINPUT" | "PUT" | "MEMOIZE":
                self._memo[len(self._memo) if name == "MEMOIZE" else cast("int", argument)] = self._top()
            case "BINGET" | "LONG_BINGET" | "GET":
                self._stack.append(self._memo[cast("int", argument)])
            case "MARK":
                self._marks.append(len(self._stack))
            case "TUPLE":
                self._stack.append(tuple(self._from_mark()))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(_TUPLES[name])]
                self._stack.append(tuple(reversed(items)))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                self._stack.append(self._called(function, arguments))
            case "PERSID" | "BINPERSID":
                self._stack.append(self._persistent(argument if name == "PERSID" else self.pop()))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._stack.append(_CONSTANTS[name])
            case "EMPTY_LIST" | "EMPTY_SET":
                self._stack.append([])
            case "LIST" | "FROZENSET":
                self._stack.append(self._from_mark())
            case "EMPTY_DICT":
                self._stack.append(Map())
            case "DICT":
                made = Map()
                self._put(made, self._from_mark())
                self._stack.append(made)
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [self.pop()] if name == "APPEND" else self._from_mark()
                holder = self._top()
                if isinstance(holder, list):
                    holder.extend(items)
            case "SETITEM" | "SETITEMS":
                items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self._from_mark()
                self._put(self._top(), items)
            case "GLOBAL":
                self._stack.append(Global(cast("str", argument).replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                if not isinstance(attribute, str) or not isinstance(module, str):
                    raise ContainerError("its pickle imports what is no name")
                self._stack.append(Global(f"{module}.{attribute}"))
            case "NEWOBJ_EX":
                _, arguments, function = self.pop(), self.pop(), self.pop()
                self._stack.append(self._called(function, arguments))
            case "INST":
                function = Global(cast("str", argument).replace(" ", ".", 1))
                self._stack.append(self._called(function, tuple(self._from_mark())))
            case "OBJ":
                items = self._from_mark()
                self._stack.append(self._called(items[0], tuple(items[1:])))
            case "BUILD":
                state, built = self.pop(), self._top()
                if isinstance(built, Opaque):
                    built.state = state
            case "POP":
                # pickle takes a mark away when nothing stands on it
                if self._marks and self._marks[-1] == len(self._stack):
                    self._marks.pop()
                else:
                    self.pop()
            case "POP_MARK":
                self._from_mark()
            case "DUP":
                self._stack.append(self._top())
            case "NEXT_BUFFER" | "EXT1" | "EXT2" | "EXT4":
                self._stack.append(Opaque())
            case "PROTO" | "FRAME" | "STOP" | "READONLY_BUFFER":
                pass
            case _:
                raise ContainerError(f"its pickle has the unknown opcode {name}")

    def _put(self, holder: object, items: list[object]) -> None:
        if len(items) % 2:
            raise ContainerError("its pickle has a key without a value")
        if isinstance(holder, Map | Opaque):
            holder.pairs.extend(items)

    def _called(self, function: object, arguments: object) -> object:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            return Opaque()
        if function.name in _MAPS:
            return self._map(arguments)
        if function.name in _SAME and len(arguments) <= 1:
            return arguments[0] if arguments else []
        made = self._call(function.name, arguments)
        return Opaque() if made is None else made

    def _map(self, arguments: tuple[object, ...]) -> Map:
        """A dictionary that is called with its items, as Python 2 pickled the ordered one; others get theirs later."""
        made = Map()
        for item in arguments[0] if arguments and isinstance(arguments[0], list) else ():
            self._steps += 1  # one list may be the argument of many calls
            if isinstance(item, list | tuple) and len(item) == 2:
                made.pairs.extend(item)
        return made


T = TypeVar("T")
_Holder = Map | Opaque | list[object] | tuple[object, ...]


def reached(root: object, kind: type[T], top: str | None, transparent: Set[str]) -> Iterator[tuple[str | None, T]]:
    """Yield what is of a kind and reached from the root, each as often as it is, with the way to it: keys, indices and
    attributes joined by dots, below `top`; None for the root itself. A holder is entered once, by the first way to it.
    Attributes of the transparent names are dictionaries whose names are left out of the way.
    """
    entered: set[int] = set()
    todo: list[Iterator[tuple[str | None, object]]] = [iter([(top, root)])]
    while todo:
        for path, value in todo[-1]:
            if isinstance(value, kind):
                yield path, value
            elif isinstance(value, Map | Opaque | list | tuple) and id(value) not in entered:
                entered.add(id(value))
                todo.append(_members(path, value, kind, transparent, entered))
                break
        else:
            todo.pop()


def _members(
    path: str | None, holder: _Holder, kind: type[object], transparent: Set[str], entered: set[int]
) -> Iterator[tuple[str | None, object]]:
    """Yield what may be or hold what is sought, each with the way to it. A way too long for a name ends."""
    members: Iterable[tuple[str, object]]
    if isinstance(holder, Opaque):
        states = holder.state if isinstance(holder.state, tuple) and len(holder.state) == 2 else (holder.state,)
        maps = [s for s in states if isinstance(s, Map) and id(s) not in entered]
        entered.update(map(id, maps))
        members = [item for pairs in (*(s.pairs for s in maps), holder.pairs) for item in _items(pairs)]
    elif isinstance(holder, Map):
        members = _items(holder.pairs)
    else:
        members = ((str(i), value) for i, value in enumerate(holder))
    for label, value in members:
        if isinstance(holder, Opaque) and label in transparent and isinstance(value, Map):
            yield path, value
        elif isinstance(value, kind | Map | Opaque | list | tuple) and len(label) + len(path or "") < MAX_WAY:
            yield label if path is None else f"{path}.{label}", value


def _items(pairs: list[object]) -> Iterable[tuple[str, object]]:
    """Return the items of a dictionary, their keys as text; of equal keys the last one's value counts."""
    items: dict[tuple[bool, str], object] = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        parts = key if isinstance(key, tuple) and len(key) <= 4 else (key,)
        if isinstance(key, str) or all(map(_is_short, parts)):
            items[isinstance(key, str), str(key)] = value
    return [(text, value) for (_, text), value in items.items()]


def _is_short(key: object) -> bool:
    """Whether it has a text that is short: what the file repeats without cost must not grow here."""
    if isinstance(key, int):
        return key.bit_length() <= 64
    return key is None or isinstance(key, float) or (isinstance(key, str) and len(key) <= 32 and key.isascii())
