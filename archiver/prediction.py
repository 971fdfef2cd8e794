"""Which tensors of a member an optimizer keeps together, and the predictor of each (FORMAT.md, section 6.6).

Nothing is told: names say which tensors are first and second moments, samples of the elements say which weights they
belong to and what the optimizer's numbers are. A predictor is chosen where a sample promises fewer bits; chunks that are
smaller without it are stored without it.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tzip import lowrank
from tzip.bases import Base
from tzip.coders import delta, factors, optimizers, predictors
from tzip.coders.arrays import I64, U8, U16, U32
from tzip.coders.planes import WORD
from tzip.coders.predictors import ADAM_WEIGHTS, FIRST_MOMENT, ROOT, SECOND_MOMENT, Predictor, pack_parameters
from tzip.formats.containers import View
from tzip.formats.layout import CHUNK_ELEMENTS
from tzip.plan import Level

Read = Callable[[int, int, int], U8]  # n bytes from a byte on of a tensor, by its place
OWN = 65536  # elements; smaller tensors share runs, and what little they are is not predicted
_RUNS, _RUN = 4, 4096  # a sample: so few runs, for a base may have to be decoded for each
_MOMENTS = (("exp_avg", "exp_avg_sq"), ("mu", "nu"), ("m", "v"), ("momentum", "variance"))
_FIRST_BETAS = (0.9, 0.95, 0.8, 0.85, 0.99, 0.5)
_SECOND_BETAS = (0.999, 0.95, 0.99, 0.98, 0.9, 0.995, 0.9999)
_EPSILONS = (1e-8, 1e-6, 1e-10, 1e-5, 1e-7)
_RANKS = (16, 32, 48)
_FEWEST = 16  # rows and columns that have levels
_MOST = 16  # weights that moments are tried with when names do not tell
_EXACT = 0.01  # bits of an element that are left when a step is found to the last bit
_SEARCHES = 3  # for corrections: a group of parameters each
_STEPS = 4000
_FEW = 2048  # elements that tell corrections apart
_WORTH = 0.97  # of the bits without a predictor
_FEW_MOVED = 8  # less than 1 / 8 of the elements of a matrix are too few for factors
_F = np.float32


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predictor, and what it reads beside a base that there is: earlier tensors, or tensors of the member by their places."""

    predictor: Predictor
    roles: Mapping[int, Base | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Sample:
    """Elements at some places of a tensor, shape (n,), as bits."""

    now: U32
    before: U32 | None


@dataclass(frozen=True, slots=True)
class _State:
    """A parameter's tensors, by their places."""

    first: int
    second: int
    weights: int | None = None


class Finder:
    """Finds the predictors of one member's tensors, by their places: `tensors`, their `earlier` ones, and those that are like
    these already, `bases`.
    """

    def __init__(
        self, tensors: Mapping[int, View], earlier: Mapping[int, Base], bases: Mapping[int, Base], read: Read, level: Level
    ) -> None:
        self.tensors = tensors
        self.earlier = earlier
        self.bases = bases
        self.read = read
        self.level = level
        self.samples: dict[int, _Sample] = {}
        self.moments: set[int] = set()
        self.searches = 0
        self.betas: list[tuple[float, float]] = []
        self.steps: list[tuple[float, ...]] = []
        self.left: dict[int, float] = {}  # bits of an element that a step leaves

    def find(self) -> dict[int, Prediction]:
        """Return the predictions of those tensors that gain by one."""
        found: dict[int, Prediction] = {}
        for state in self._states():
            self.moments |= {state.first, state.second}
            self._moments(state, found)
            if state.weights is not None and state.weights in self.earlier:
                self._weights(state, found)
        for place in self.bases:
            if place not in self.moments:
                self._low_rank(place, found)
        return found

    # ---- which tensors belong together

    def _states(self) -> list[_State]:
        large = {
            place: view
            for place, view in self.tensors.items()
            if view.dtype.name == "F32" and math.prod(view.shape) >= OWN
        }
        names = {view.name: place for place, view in large.items()}
        pairs = []
        for name, second in names.items():
            for first_word, second_word in _MOMENTS:
                other = re.sub(rf"(^|[./_]){second_word}(?=$|[./])", rf"\g<1>{first_word}", name)
                first = names.get(other)
                if other != name and first is not None and large[first].shape == large[second].shape:
                    rest = re.split(rf"(?:^|[./_]){second_word}(?:$|[./])", name, maxsplit=1)
                    pairs.append((first, second, rest[-1] or rest[0]))
                    break
        moments = {place for first, second, _ in pairs for place in (first, second)}
        weights = {place: view for place, view in large.items() if place not in moments}
        return [_State(first, second, self._weights_of(first, second, rest, weights)) for first, second, rest in pairs]

    def _weights_of(self, first: int, second: int, rest: str, weights: Mapping[int, View]) -> int | None:
        """Return the weights that moments belong to: those with the name's end, else those that they predict best."""
        shape = self.tensors[first].shape
        alike = [place for place, view in weights.items() if view.shape == shape]
        named = [place for place in alike if rest and re.search(rf"(^|[./]){re.escape(rest)}$", weights[place].name)]
        if len(named) == 1:
            return named[0]
        tried = [(self._fit(place, first, second)[0], place) for place in (named or alike)[:_MOST] if place in self.earlier]
        return min(tried)[1] if tried else None

    # ---- what predicts them

    def _sampled(self, place: int) -> list[int]:
        """Return the first elements of the runs that are looked at: those of tensors of one shape are the same."""
        base = self.earlier.get(place)
        elements = math.prod(self.tensors[place].shape)
        end = elements if base is None else min(elements, base.nbytes // 4)
        return [max(0, end - _RUN) * i // (_RUNS - 1) for i in range(_RUNS)]

    def _sample(self, place: int) -> _Sample:
        if place not in self.samples:
            base = self.earlier.get(place)
            now, before = [], []
            for at in self._sampled(place):
                now.append(self.read(place, 4 * at, 4 * _RUN))
                if base is not None:
                    old = np.empty(4 * _RUN, np.uint8)
                    base.read_into(4 * at, old)
                    before.append(old)
            earlier = np.concatenate(before).view(np.uint32) if before else None
            self.samples[place] = _Sample(np.concatenate(now).view(np.uint32), earlier)
        return self.samples[place]

    def _moments(self, state: _State, found: dict[int, Prediction]) -> None:
        m, v = self._sample(state.first), self._sample(state.second)
        if (v.now >> 31).any() or m.now.size != v.now.size:
            return
        stepped = False
        plain = _bits_alone(v.now)
        if v.before is not None:
            plain = min(plain, _bits(v.now, v.before))
        if v.before is not None and m.before is not None:
            best, betas = min((self._second_cost(m, v, b), b) for b in self._candidates(m, v))
            if best < plain * _WORTH:
                stepped = True
                b1, b2 = betas
                string = pack_parameters(SECOND_MOMENT, 1 - b1, float(_F(b2)), float(_F(1 - b2)))
                roles: dict[int, Base | int] = {1: self.earlier[state.first], 2: state.first}
                found[state.second] = self._prediction(state.second, SECOND_MOMENT, string, roles)
        if not stepped:
            self._levels(state.second, v, plain, found)
        # What the step made of the second moment says more of the first, but may itself follow from it.
        scale: Base | int = self.earlier[state.second] if stepped else state.second
        second = v.before if stepped and v.before is not None else v.now
        self._first(state, m, second, scale, found)

    def _levels(self, place: int, v: _Sample, plain: float, found: dict[int, Prediction]) -> None:
        """Predict second moments from the levels of their rows and columns, where that is better than what else there is."""
        shape = self.tensors[place].shape
        q = shape[-1] if len(shape) > 1 else 0
        count = math.prod(shape[:-1])
        if q < _FEWEST or count < _FEWEST or q > factors.MAX_COLUMNS:
            return
        rows, columns = self._fit_levels(place, q, count)
        made = np.empty_like(v.now)
        for i, at in enumerate(self._sampled(place)):
            first, n = factors.rows_of(q, at, _RUN)
            factors.levels(columns, rows[first : first + n], at, made[i * _RUN : (i + 1) * _RUN])
        if _bits_far(v.now, made) < plain * _WORTH:
            common = q.to_bytes(4, "little") + columns.tobytes()
            found[place] = Prediction(Predictor(predictors.LEVELS, common, q, rows.astype(np.int64)[None]))

    def _fit_levels(self, place: int, q: int, count: int) -> tuple[U16, U16]:
        """Return the mean levels of rows, and what columns have more, of all elements but zeros: bits are logarithms."""
        step = max(1, CHUNK_ELEMENTS // q)
        rows = np.zeros(count)
        columns, seen = np.zeros(q), np.zeros(q)
        for first in range(0, count, step):
            n = min(step, count - first)
            bits = self.read(place, 4 * q * first, 4 * q * n).view(np.uint32).reshape(n, q)
            used = bits != 0
            level = bits / 65536.0
            rows[first : first + n] = level.sum(axis=1) / np.maximum(used.sum(axis=1), 1)
            columns += np.where(used, level - rows[first : first + n, None], 0).sum(axis=0)
            seen += used.sum(axis=0)
        more = columns / np.maximum(seen, 1)
        least = min(float(more.min()), 0.0)
        return (
            np.clip(np.rint(rows + least), 0, 65535).astype(np.uint16),
            np.clip(np.rint(more - least), 0, 65535).astype(np.uint16),
        )

    def _first(self, state: _State, m: _Sample, second: U32, scale: Base | int, found: dict[int, Prediction]) -> None:
        options = [(_bits_alone(m.now) * 0.995, 0, b"")]
        k = _root_of(m.now, second)
        made = np.empty_like(m.now)
        optimizers.root(second, k, made)
        options.append((_bits_far(m.now, made), ROOT, pack_parameters(ROOT, k)))
        if m.before is not None:
            options.append((_bits(m.now, m.before), 0, b""))  # of moments that hardly moved
            context = np.empty_like(m.now)
            for beta in sorted({b for b, _ in self.betas} or {0.9}):
                optimizers.first_moment(m.before, second, _F(beta), made, context)
                string = pack_parameters(FIRST_MOMENT, float(_F(beta)))
                options.append((_bits(m.now, made, classes=_classes(context)), FIRST_MOMENT, string))
        _, kind, string = min(options)
        if kind:
            found[state.first] = self._prediction(state.first, kind, string, {1: scale})

    def _prediction(self, place: int, kind: int, string: bytes, roles: dict[int, Base | int]) -> Prediction:
        if 0 in predictors.ROLES[kind] and place not in self.bases:
            roles = {0: self.earlier[place], **roles}
        return Prediction(Predictor(kind, string), roles)

    def _candidates(self, m: _Sample, v: _Sample) -> Sequence[tuple[float, float]]:
        if not self.betas:
            grid = [(a, b) for a in _FIRST_BETAS for b in _SECOND_BETAS]
            self.betas = [min(grid, key=lambda betas: self._second_cost(m, v, betas))]
        return self.betas

    @staticmethod
    def _second_cost(m: _Sample, v: _Sample, betas: tuple[float, float]) -> float:
        assert m.before is not None
        assert v.before is not None
        made = np.empty_like(v.now)
        b1, b2 = betas
        optimizers.second_moment(v.before, m.before, m.now, 1 - b1, _F(b2), _F(1 - b2), made)
        return _bits(v.now, made)

    def _weights(self, state: _State, found: dict[int, Prediction]) -> None:
        assert state.weights is not None
        w = self._sample(state.weights)
        if w.before is None:
            return
        cost, numbers = self._fit(state.weights, state.first, state.second)
        if numbers and cost < _bits(w.now, w.before) * _WORTH:
            string = pack_parameters(ADAM_WEIGHTS, *numbers)
            self.left[state.weights] = cost / w.now.size
            roles: dict[int, Base | int] = {1: state.first, 2: state.second}
            found[state.weights] = self._prediction(state.weights, ADAM_WEIGHTS, string, roles)

    def _low_rank(self, place: int, found: dict[int, Prediction]) -> None:
        """Predict a matrix by factors of how it moved: where that is plainly of low rank, or where there is patience."""
        view, base = self.tensors[place], self.bases[place]
        width = view.dtype.width
        shape = (math.prod(view.shape[:-1]), view.shape[-1]) if len(view.shape) > 1 else (0, 0)
        before = found.get(place)
        least = self.left.get(place, math.inf)
        if view.dtype.name not in ("F32", "BF16") or base.shape != view.shape or not lowrank.suits(shape):
            return
        if math.prod(shape) < OWN or (before is not None and (not self.level.patient or least < 8)):
            return
        sharp = self._promises(place, shape)
        if sharp is None:
            return
        raw = np.empty(math.prod(shape) * width, np.uint8)
        base.read_into(0, raw)
        now, earlier = (x.view(WORD[width]).reshape(shape) for x in (self.read(place, 0, raw.size), raw))
        predictor = lowrank.fit(lowrank.Matrix(now, earlier), _RANKS, sharp=sharp, least=least)
        if predictor is not None:
            found[place] = Prediction(predictor)

    def _promises(self, place: int, shape: tuple[int, int]) -> bool | None:
        """Say whether some rows moved as an adapter would have moved them; None when a fit is not worth its time.

        Where few elements moved at all their places cost more than what factors could tell of them (steps of reinforcement
        learning: a search that took three times the rest of the packing found nothing).
        """
        rows, q = shape
        width = self.tensors[place].dtype.width
        count = min(rows, max(128, (1 << 17) // q))
        at, size = (rows - count) // 2 * q * width, count * q * width
        old = np.empty(size, np.uint8)
        self.bases[place].read_into(at, old)
        now, before = (x.view(WORD[width]).reshape(count, q)[:, :1024] for x in (self.read(place, at, size), old))
        if _FEW_MOVED * int(np.count_nonzero(now != before)) < now.size:
            return None
        if self.level.patient and width != 4:
            return False
        sharp = lowrank.is_sharp(np.ascontiguousarray(now), np.ascontiguousarray(before))
        return sharp if sharp or self.level.patient else None

    def _fit(self, weights: int, first: int, second: int) -> tuple[float, tuple[float, ...]]:
        """Return the bits of a sample of weights after a step that is fitted to it, and the step's numbers."""
        w, m, v = (self._sample(place) for place in (weights, first, second))
        if w.before is None or not w.before.size == w.now.size == m.now.size == v.now.size:
            return float("inf"), ()
        tried = [(self._weights_cost(w, m, v, numbers), numbers) for numbers in self.steps]
        known = min(tried, default=(float("inf"), ()))
        if known[0] < w.now.size:  # a bit each: no other step is nearer
            return known
        fits = [_least_squares(w.before, w.now, m.now, v.now, epsilon) for epsilon in _EPSILONS]
        best = min([known, *((self._weights_cost(w, m, v, numbers), numbers) for numbers in fits if numbers)])
        if best[1] and best[0] < 4 * w.now.size:
            best = self._refine(w, m, v, best)
            self.steps.append(best[1])
        return best

    @staticmethod
    def _weights_cost(w: _Sample, m: _Sample, v: _Sample, numbers: tuple[float, ...]) -> float:
        assert w.before is not None
        made = np.empty_like(w.now)
        form, c, s, r, e = numbers
        optimizers.adam_weights(w.before, m.now, v.now, int(form), (_F(c), _F(s), _F(r), _F(e)), made)
        return _bits(w.now, made)

    def _refine(
        self, w: _Sample, m: _Sample, v: _Sample, best: tuple[float, tuple[float, ...]]
    ) -> tuple[float, tuple[float, ...]]:
        """Search the last bits of the step size and the decay, which least squares do not tell."""
        for span, step in ((64, 4), (6, 1)):
            form, c, s, r, e = best[1]
            bits = int(np.array([s], _F).view(np.uint32)[0])
            for dc in (0, -1, 1, -2, 2, -3, 3):
                decay = float(_F(c) + _F(dc) * _F(2**-24))
                for ds in range(-span, span + 1, step):
                    size = float(np.array([bits + ds], np.uint32).view(_F)[0])
                    numbers = (form, decay, size, r, e)
                    best = min(best, (self._weights_cost(w, m, v, numbers), numbers))
        if best[0] > _EXACT * w.now.size and self.searches < _SEARCHES:
            self.searches += 1
            best = min(best, self._correct(w, m, v, best[1]))
        return best

    def _correct(self, w: _Sample, m: _Sample, v: _Sample, numbers: tuple[float, ...]) -> tuple[float, tuple[float, ...]]:
        """Search the correction of the second moment, which early steps have: it follows from their number."""
        assert w.before is not None
        n = min(w.now.size, _FEW)
        old, new, first, second = (np.ascontiguousarray(x[:n]) for x in (w.before, w.now, m.now, v.now))
        made = np.empty_like(new)
        _, c, _, _, e = numbers
        best: tuple[int, tuple[float, ...]] = (n + 1, numbers)
        for _, beta in self.betas:
            for step in range(1, _STEPS):
                root = math.sqrt(1 - beta**step)
                if _F(root) == 1:
                    break
                fitted = _least_squares(w.before, w.now, m.now, v.now, e * root)
                if not fitted:
                    break
                near = int(np.array([fitted[2] / root], _F).view(np.uint32)[0])
                for bits in (near, near - 1, near + 1):
                    size = np.array([bits], np.uint32).view(_F)[0]
                    for form, r in ((0, _F(root)), (1, _F(root)), (2, _F(1 / root)), (3, _F(1 / root))):
                        optimizers.adam_weights(old, first, second, form, (_F(c), size, r, _F(e)), made)
                        wrong = int(np.count_nonzero(made != new))
                        if wrong < best[0]:
                            best = wrong, (form, c, float(size), float(r), e)
        return self._weights_cost(w, m, v, best[1]), best[1]


def _least_squares(before: U32, now: U32, m: U32, v: U32, epsilon: float) -> tuple[float, ...]:
    """Return the numbers of the step that takes weights nearest from one to the other, or none."""
    with np.errstate(all="ignore"):
        w0, w1, m1, v1 = (x.view(_F).astype(np.float64) for x in (before, now, m, v))
        moved = -m1 / (np.sqrt(v1) + epsilon)
        columns = np.stack((moved, -w0), axis=1)
        # A few elements that are no numbers, or far from all others, would decide alone.
        finite = _near(moved) & _near(w0) & _near(w1 - w0)
        if not finite.any():
            return ()
        a, b = columns[finite], (w1 - w0)[finite]
        normal = a.T @ a
        if not np.isfinite(normal).all() or np.linalg.det(normal) == 0:
            return ()
        size, decay = np.linalg.solve(normal, a.T @ b)
        numbers = (0, float(_F(1 - decay)), float(_F(-size)), 1.0, float(_F(epsilon)))
    return numbers if all(np.isfinite(numbers)) else ()


def _near(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Say which numbers are finite and not far beyond most others."""
    size = np.abs(values)
    usual = size[np.isfinite(size)]
    return np.asarray(size <= 1024 * np.median(usual)) if usual.size else np.zeros(values.size, np.bool_)


def _root_of(m: U32, second: U32) -> int:
    """Return the number of the root predictor that suits first moments best."""
    scale = (m & 0x7FFFFFFF).astype(np.int64) - ((second & 0x7FFFFFFF) >> 1).astype(np.int64)
    return int(np.median(scale)) & 0x7FFFFFFF


def _classes(context: U32) -> I64:
    low = int(np.median(context)) - 4
    return np.clip(context.astype(np.int64) - low, 0, 7)


def _bits_far(now: U32, made: U32) -> float:
    """Return about the bits that differences from a scale take."""
    return _planes(delta.subtract(now, made, delta.TURNED), np.zeros(now.size, np.int64))


def _bits(now: U32, made: U32, classes: I64 | None = None) -> float:
    """Return about the bits that differences from a prediction take."""
    if classes is None:
        exponents = (made >> 23 & 255).astype(np.int64)
        classes = np.clip(exponents - int(np.median(exponents)) + 4, 0, 7)
    return _planes(delta.subtract(now, made, delta.ORDERED), classes)


def _planes(apart: U32, classes: I64) -> float:
    """Return the entropy of the bytes of elements in their classes; what is nearly even is stored as it is."""
    total = 0.0
    for shift in (24, 16, 8, 0):
        counts = np.bincount(classes << 8 | (apart >> shift & 255), minlength=2048).reshape(8, 256)
        even = _entropy(counts.sum(axis=0)) > 7.9 * apart.size
        total += 8 * apart.size if even else sum(map(_entropy, counts))
    return total


def _bits_alone(now: U32) -> float:
    rests = (now >> 16 & 31) | (now >> 26 & 32)
    return sum(_entropy(np.bincount(part)) for part in (now >> 21 & 1023, rests, now >> 8 & 255, now & 255))


def _entropy(counts: I64) -> float:
    used = counts[counts > 0].astype(np.float64)
    return float((used * np.log2(used.sum() / used)).sum()) if used.size else 0.0
