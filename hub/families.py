"""Which model is a fine-tune of which: by names, types and shapes of tensors, and by samples of their elements.

A sketch holds a few elements of each tensor, at places that its shape decides, so that sketches of two models can be
compared wherever their tensors have the same shape, whatever files they lie in. From sketches comes a forest: the model
that the others of a family are nearest to is packed by itself, the others as differences from it or from each other.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tzip.bases import ALONE_BITS, TENSOR_SUFFIXES
from tzip.coders.arrays import U8, Words
from tzip.coders.planes import WORD
from tzip.formats.catalogue import FILE
from tzip.formats.containers import ContainerError, span_bytes, whole_tensors
from tzip.formats.dtypes import BY_NAME
from tzip.formats.neighbours import Neighbours
from tzip.tree import collect

_BUDGET = 1 << 15  # elements of a sketch
_LEAST, _MOST = 32, 2048  # elements of a tensor, half of them at each of two places
_SMALL = 1024  # elements of a tensor that is not sampled
_WORTH = 0.9  # of its size alone: what a model must come to, about, to be made to lean on another
_DEEPER = 0.02  # what a step deeper must gain
_PARENTS = 128  # models of a family that the others of a large one are compared with
_WORK = 1 << 31  # comparisons of elements that a family may take
_OTHERS = 16  # other families of like shapes that one is compared with


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor: name, dtype by name, shape, elements as they are coded (`Dtype.width`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int


@dataclass(frozen=True, slots=True)
class Sketch:
    """Samples of a model's tensors, one array of elements for each; the bits that all of it takes by itself, about."""

    specs: tuple[Spec, ...]
    samples: tuple[Words, ...]
    alone: float


def sketch(path: str, dereference: bool | None) -> Sketch:
    """Sample the model at a path. Raises UsageError and OSError; a file that cannot be read as tensors has none."""
    specs: list[Spec] = []
    reads = []
    neighbours = Neighbours()
    alone = 0.0
    for item in collect([path], dereference):
        if item.kind != FILE or item.open is None:
            continue
        alone += 8 * item.size
        if not item.name.endswith(TENSOR_SUFFIXES):
            continue
        with item.open() as source:
            try:
                found = neighbours.look(source, item.original)
            except ContainerError:
                continue
        for view in whole_tensors(found.regions, found.tensors).values():
            width = view.dtype.width
            elements = span_bytes(view.dtype, view.shape, None) // width
            alone += elements * (_alone(view.dtype.coding, width) - 8 * width)
            if elements >= _SMALL:
                specs.append(Spec(view.name, view.dtype.name, view.shape, elements))
                reads.append((item.open, view.begin))
    order = sorted(range(len(specs)), key=lambda i: (specs[i].name, specs[i].dtype, specs[i].shape))
    each = min(_MOST, max(_LEAST, _BUDGET // max(1, len(specs)))) // 2
    samples: list[Words] = [np.empty(0, np.uint8)] * len(specs)
    by_file: dict[object, list[int]] = defaultdict(list)
    for i, (opened, _) in enumerate(reads):
        by_file[opened].append(i)
    for mine in by_file.values():
        with reads[mine[0]][0]() as source:
            for i in mine:
                samples[i] = _sample(source.read_at, reads[i][1], specs[i], each)
    return Sketch(tuple(specs[i] for i in order), tuple(samples[i] for i in order), alone)


def _alone(coding: str, width: int) -> float:
    return min(ALONE_BITS.get(coding, 7.0 * width), 8.0 * width)


def _sample(read: Callable[[int, int], bytes], begin: int, spec: Spec, each: int) -> Words:
    """Return `each` elements from a third of the tensor on and as many from two thirds on: the first rows may be padding."""
    width = BY_NAME[spec.dtype].width
    each = min(each, spec.elements // 3)
    parts = [read(begin + spec.elements * k // 3 * width, each * width) for k in (1, 2)]
    raw: U8 = np.frombuffer(b"".join(p.ljust(each * width, b"\0") for p in parts), np.uint8)
    words: Words = raw.view(WORD[width]).reshape(2, each)
    return words


# ---- how far two models are apart


def _bits(a: Words, b: Words) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """Return the bits an element that samples are apart, about: the mean over the last two axes."""
    apart = np.minimum(a - b, b - a)
    moved = np.log2(apart.astype(np.float32) + 1).mean((-2, -1), dtype=np.float64)
    return np.where(moved > 0, moved + 1, 0.0)


def apart(model: Sketch, base: Sketch) -> float:
    """Return the bits that a model takes as a difference from another, about; no more than by itself."""
    total = model.alone
    for i, j in _pairs(model.specs, base.specs):
        spec, a, b = model.specs[i], model.samples[i], base.samples[j]
        n = min(a.shape[1], b.shape[1])
        dtype = BY_NAME[spec.dtype]
        alone = _alone(dtype.coding, dtype.width)
        total -= spec.elements * max(0.0, alone - float(_bits(a[:, :n], b[:, :n])))
    return total


def _pairs(model: Sequence[Spec], base: Sequence[Spec]) -> Iterator[tuple[int, int]]:
    """Yield the places of tensors that belong together: of one name, else the nth without one of a type and shape."""
    by_name = {(s.name, s.dtype, s.shape): j for j, s in enumerate(base)}
    named = {i: j for i, s in enumerate(model) if (j := by_name.get((s.name, s.dtype, s.shape))) is not None}
    yield from named.items()
    spare: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    taken = set(named.values())
    for j in reversed(range(len(base))):
        if j not in taken:
            spare[base[j].dtype, base[j].shape].append(j)
    for i, s in enumerate(model):
        if i not in named and spare[s.dtype, s.shape]:
            yield i, spare[s.dtype, s.shape].pop()


def _within(members: Sequence[int], sketches: Sequence[Sketch], found: dict[tuple[int, int], float]) -> None:
    """Compare models whose tensors are the same by name, type and shape, all at once."""
    parents = list(members)
    if len(members) > 2 * _PARENTS:
        parents = [members[i * len(members) // _PARENTS] for i in range(_PARENTS)]
    first = sketches[members[0]]
    each = sum(s.size for s in first.samples) or 1
    share = _WORK / (len(members) * len(parents) * each)  # of the samples, where all of them would take too long
    saved = np.zeros((len(parents), len(members)))
    for t, spec in enumerate(first.specs):
        n = max(8, int(first.samples[t].shape[1] * min(1.0, share)))
        samples = np.stack([sketches[m].samples[t][:, :n] for m in members])
        dtype = BY_NAME[spec.dtype]
        alone = _alone(dtype.coding, dtype.width)
        for row, parent in enumerate(parents):
            bits = _bits(samples, sketches[parent].samples[t][:, :n])
            saved[row] += spec.elements * np.maximum(0.0, alone - bits)
    for row, parent in enumerate(parents):
        for column, child in enumerate(members):
            if child != parent:
                found[child, parent] = sketches[child].alone - float(saved[row, column])


def distances(sketches: Sequence[Sketch]) -> dict[tuple[int, int], float]:
    """Return, by the places of (model, base), the bits of those differences that are worth it (`apart`).

    Models of the same tensors are all compared with each other, or with 128 of them where they are more than 256; of models
    that only have the shapes of their largest tensors in common, the one of each kind that the others are nearest to.
    """
    kinds: dict[tuple[Spec, ...], list[int]] = defaultdict(list)
    for i, one in enumerate(sketches):
        if one.specs:
            kinds[one.specs].append(i)
    found: dict[tuple[int, int], float] = {}
    heads: dict[int, int] = {}
    for members in kinds.values():
        within: dict[tuple[int, int], float] = {}
        _within(members, sketches, within)
        found |= within
        heads[_middle(members, [s.alone for s in sketches], within)] = len(members)
    like: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for head in sorted(heads, key=lambda h: (-heads[h], h)):
        for shape in _large_shapes(sketches[head].specs):
            like[shape].append(head)
    for others in like.values():
        for i, a in enumerate(others):
            for b in others[max(0, i - _OTHERS) : i]:
                if (a, b) not in found:
                    found[a, b], found[b, a] = apart(sketches[a], sketches[b]), apart(sketches[b], sketches[a])
    return {(i, j): bits for (i, j), bits in found.items() if bits < _WORTH * sketches[i].alone}


def _large_shapes(specs: Iterable[Spec]) -> list[tuple[str, tuple[int, ...]]]:
    """Return the three types and shapes that most of a model's elements have."""
    elements: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    for s in specs:
        elements[s.dtype, s.shape] += s.elements
    return sorted(elements, key=lambda e: (-elements[e], e))[:3]


# ---- the forest


def _middle(members: Sequence[int], alone: Sequence[float], bits: Mapping[tuple[int, int], float]) -> int:
    """Return the model from which, as the base of all others, the family is smallest; the first of equals."""
    gain = dict.fromkeys(members, 0.0)
    for (child, parent), cost in bits.items():
        if child in gain and parent in gain:
            gain[parent] += max(0.0, alone[child] - cost)
    return max(members, key=lambda m: (gain[m] - alone[m], -m))


def forest(
    alone: Sequence[float], bits: Mapping[tuple[int, int], float], depth: int, fixed: Mapping[int, int] | None = None
) -> list[int | None]:
    """Return the base of each model, None for those that are packed by themselves.

    `bits`: what model i costs as a difference from j, by (i, j), where it is worth it; `depth`: how many archives one may
    be read through at most; `fixed`: depths of models that are packed already, which may be bases and get None. Each family
    (what `bits` connects) grows from its middle, or from what is packed, by the nearest model next.
    """
    fixed = fixed or {}
    parents: list[int | None] = [None] * len(alone)
    by_parent: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for (child, parent), cost in bits.items():
        by_parent[parent].append((cost, child))
    for family in _families(len(alone), bits):
        depths = {m: fixed[m] for m in family if m in fixed}
        left = {m for m in family if m not in fixed}
        if left and not depths:
            root = _middle(sorted(left), alone, bits)
            depths[root] = 0
            left.discard(root)
        new = list(depths)
        near: list[tuple[float, int, int]] = []
        while left:
            for parent in new:
                if depths[parent] < depth:
                    for cost, child in by_parent[parent]:
                        if child in left:
                            heapq.heappush(near, (cost * (1 + _DEEPER * depths[parent]), child, parent))
            if not near:
                root = _middle(sorted(left), alone, bits)
                depths[root], new = 0, [root]
                left.discard(root)
                continue
            _, child, parent = heapq.heappop(near)
            new = []
            if child in left:
                parents[child], depths[child], new = parent, depths[parent] + 1, [child]
                left.discard(child)
    return parents


def _families(count: int, bits: Mapping[tuple[int, int], float]) -> list[list[int]]:
    """Return the models that `bits` connects, by families."""
    head = list(range(count))

    def find(i: int) -> int:
        while head[i] != i:
            head[i] = head[head[i]]
            i = head[i]
        return i

    for i, j in bits:
        head[find(i)] = find(j)
    families: dict[int, list[int]] = defaultdict(list)
    for i in range(count):
        families[find(i)].append(i)
    return list(families.values())
