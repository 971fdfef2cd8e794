"""What a pickle describes, without doing what it says: its opcodes are followed, nothing is imported and nothing called.

Plain values come out as themselves. A global is its name and stays one; a call gives what the reader of the container
makes of that name, or an object of which only the attributes are known. Values may be shared, nested a
million deep and even contain themselves: whoever walks them must not recurse, compare, hash or print them.
"""

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from tzip.formats.containers import ContainerError
from tzip.formats.opcodes import STOP, Stream, opcodes

MAX_STEPS = 4_000_000  # of some 40 for a tensor; the worst ones take about 150 bytes of memory each
MAX_WAY = 4096  # characters of the way to a value


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


def load(stream: Stream, call: Call, persistent: Callable[[object], object]) -> object:
    """Return the value of the pickle at the stream's place, which is its end afterwards.

    `persistent` makes something of each persistent id. Raises ContainerError when the bytes are no pickle.
    """
    machine = _Machine(call, persistent)
    try:
        return machine.run(stream)
    except ContainerError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as e:
        raise ContainerError(f"its pickle is invalid: {type(e).__name__}: {str(e)[:200]}") from None


_MAPS = {
    "builtins.dict",
    "__builtin__.dict",
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.Counter",
}
_SAME = {"torch.Size"} | {f"{m}.{t}" for m in ("builtins", "__builtin__") for t in ("list", "tuple", "set", "frozenset")}


class _Machine:
    """The stack, the marks (heights of the stack) and the memo of a pickle under way.

    Its steps are methods that take the argument of an opcode; `_STEPS` says which.
    """

    __slots__ = ("_call", "_floor", "_items", "_marks", "_memo", "_persistent", "_stack")

    def __init__(self, call: Call, persistent: Callable[[object], object]) -> None:
        self._call, self._persistent = call, persistent
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._floor = 0  # the last mark, below which nothing is taken
        self._memo: dict[int, object] = {}
        self._items = 0

    def run(self, stream: Stream) -> object:
        """Return what is on top of the stack when the pickle stops."""
        steps, stack, memo = _STEPS, self._stack, self._memo
        for code, argument in islice(opcodes(stream), MAX_STEPS):
            step = steps[code]
            # Two opcodes of three are of the first three kinds: without calls for them all takes a quarter less time.
            if step is _PUT:
                if len(stack) <= self._floor:
                    raise ContainerError("its pickle keeps what an empty stack has")
                memo[argument] = stack[-1]
            elif step is _PUSH:
                stack.append(argument)
            elif step is _GET:
                stack.append(memo[argument])
            else:
                step(self, argument)
        if code != STOP:  # which is the last one that there is
            raise ContainerError(f"its pickle has more than {MAX_STEPS} steps")
        return self._pop()

    def _pop(self) -> object:
        if len(self._stack) <= self._floor:
            raise ContainerError("its pickle takes a value from an empty stack")
        return self._stack.pop()

    def _pop_two(self) -> tuple[object, object]:
        """Return the last value but one, and the last."""
        stack = self._stack
        if len(stack) < self._floor + 2:
            raise ContainerError("its pickle takes a value from an empty stack")
        last = stack.pop()
        return stack.pop(), last

    def _top(self) -> object:
        if len(self._stack) <= self._floor:
            raise ContainerError("its pickle looks at an empty stack")
        return self._stack[-1]

    def _from_mark(self) -> list[object]:
        marks, stack = self._marks, self._stack
        height = marks.pop()
        self._floor = marks[-1] if marks else 0
        items = stack[height:]
        del stack[height:]
        return items

    def pass_by(self, _: object) -> None:
        """Do nothing: of protocols, frames, what a buffer may be used for, and the end."""

    def mark(self, _: object) -> None:
        self._floor = height = len(self._stack)
        self._marks.append(height)

    def pop_mark(self, _: object) -> None:
        self._from_mark()

    def pop(self, _: object) -> None:
        # pickle takes a mark away when nothing stands on it
        if self._marks and self._floor == len(self._stack):
            self._from_mark()
        else:
            self._pop()

    def duplicate(self, _: object) -> None:
        self._stack.append(self._top())

    def memoize(self, _: object) -> None:
        self._memo[len(self._memo)] = self._top()

    def push(self, value: object) -> None:
        """Push what the argument is."""
        self._stack.append(value)

    def put(self, key: int) -> None:
        self._memo[key] = self._top()

    def get(self, key: int) -> None:
        self._stack.append(self._memo[key])

    def true(self, _: object) -> None:
        self._stack.append(True)

    def false(self, _: object) -> None:
        self._stack.append(False)

    def unknown(self, _: object) -> None:
        """Push what only other parts of a program know: an extension, a buffer that is kept elsewhere."""
        self._stack.append(Opaque())

    def empty_tuple(self, _: object) -> None:
        self._stack.append(())

    def tuple1(self, _: object) -> None:
        self._stack.append((self._pop(),))

    def tuple2(self, _: object) -> None:
        self._stack.append(self._pop_two())

    def tuple3(self, _: object) -> None:
        third, second, first = self._pop(), self._pop(), self._pop()
        self._stack.append((first, second, third))

    def tuple_(self, _: object) -> None:
        self._stack.append(tuple(self._from_mark()))

    def empty_list(self, _: object) -> None:
        self._stack.append([])

    def list_(self, _: object) -> None:
        self._stack.append(self._from_mark())

    def append(self, _: object) -> None:
        self._extend([self._pop()])

    def extend(self, _: object) -> None:
        self._extend(self._from_mark())

    def _extend(self, items: list[object]) -> None:
        holder = self._top()
        if isinstance(holder, list):
            holder.extend(items)

    def empty_map(self, _: object) -> None:
        self._stack.append(Map())

    def map_(self, _: object) -> None:
        made = Map()
        self._put(made, self._from_mark())
        self._stack.append(made)

    def set_item(self, _: object) -> None:
        items = [*self._pop_two()]
        self._put(self._top(), items)

    def set_items(self, _: object) -> None:
        items = self._from_mark()
        self._put(self._top(), items)

    def _put(self, holder: object, items: list[object]) -> None:
        if len(items) % 2:
            raise ContainerError("its pickle has a key without a value")
        if isinstance(holder, Map | Opaque):
            holder.pairs.extend(items)

    def name(self, name: str) -> None:
        self._stack.append(Global(name))

    def stack_name(self, _: object) -> None:
        module, attribute = self._pop_two()
        if not isinstance(attribute, str) or not isinstance(module, str):
            raise ContainerError("its pickle imports what is no name")
        self._stack.append(Global(f"{module}.{attribute}"))

    def persistent(self, key: object) -> None:
        self._stack.append(self._persistent(key))

    def persistent_top(self, _: object) -> None:
        self._stack.append(self._persistent(self._pop()))

    def reduce(self, _: object) -> None:
        function, arguments = self._pop_two()
        self._stack.append(self._called(function, arguments))

    def reduce_named(self, _: object) -> None:
        self._pop()  # arguments by name
        self.reduce(_)

    def instance(self, name: str) -> None:
        self._stack.append(self._called(Global(name), tuple(self._from_mark())))

    def object_(self, _: object) -> None:
        items = self._from_mark()
        self._stack.append(self._called(items[0], tuple(items[1:])))

    def build(self, _: object) -> None:
        state, built = self._pop(), self._top()
        if isinstance(built, Opaque):
            built.state = state

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
            self._items += 1  # one list may be the argument of many calls
            if self._items > MAX_STEPS:
                raise ContainerError(f"its pickle copies more than {MAX_STEPS} items")
            if isinstance(item, list | tuple) and len(item) == 2:
                made.pairs.extend(item)
        return made


_PUSH, _GET, _PUT = _Machine.push, _Machine.get, _Machine.put
_STEPS: dict[int, Callable[[_Machine, Any], None]] = {
    ord(code): step
    for codes, step in (
        ("IJKML\x8a\x8bFGSTUBC\x8e\x96VX\x8c\x8dN", _PUSH),  # None is what an opcode without argument has
        ("\x80\x95\x98.", _Machine.pass_by),
        ("(", _Machine.mark),
        ("1", _Machine.pop_mark),
        ("0", _Machine.pop),
        ("2", _Machine.duplicate),
        ("pqr", _PUT),
        ("\x94", _Machine.memoize),
        ("ghj", _GET),
        ("\x88", _Machine.true),
        ("\x89", _Machine.false),
        ("\x82\x83\x84\x97", _Machine.unknown),
        (")", _Machine.empty_tuple),
        ("\x85", _Machine.tuple1),
        ("\x86", _Machine.tuple2),
        ("\x87", _Machine.tuple3),
        ("t", _Machine.tuple_),
        ("]\x8f", _Machine.empty_list),  # and the empty set
        ("l\x91", _Machine.list_),  # and the frozen set
        ("a", _Machine.append),
        ("e\x90", _Machine.extend),  # a list by APPENDS, a set by ADDITEMS
        ("}", _Machine.empty_map),
        ("d", _Machine.map_),
        ("s", _Machine.set_item),
        ("u", _Machine.set_items),
        ("c", _Machine.name),
        ("\x93", _Machine.stack_name),
        ("P", _Machine.persistent),
        ("Q", _Machine.persistent_top),
        ("R\x81", _Machine.reduce),  # NEWOBJ, too
        ("\x92", _Machine.reduce_named),
        ("i", _Machine.instance),
        ("o", _Machine.object_),
        ("b", _Machine.build),
    )
    for code in codes
}


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
