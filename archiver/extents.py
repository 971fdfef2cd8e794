"""How a member is cut into extents and runs (FORMAT.md, section 2.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tzip.bases import Base, Input
from tzip.coders.predictors import Predictor
from tzip.duplicates import Run
from tzip.formats.catalogue import MAX_DEPENDENCE
from tzip.formats.containers import Region, View
from tzip.formats.layout import CHUNK_ELEMENTS

INLINE_BYTES = 4096  # a file up to here is stored in its member record: two records would cost more
OWN_RUN = 65536  # tensors with fewer elements share bundles: a chunk costs 64 bytes and a table
OPAQUE_WIDTH = 8  # opaque bytes are runs of 8-byte elements, so that a zstandard frame spans 1 MiB
NO_BASES: Mapping[int, Base] = {}
Predictions = Mapping[int, tuple[Predictor, Mapping[int, Base]]]  # by places of regions: what it reads, by role
NO_PREDICTIONS: Predictions = {}


@dataclass(slots=True)
class Extent:
    """A byte range of the member: inline when `run` is None, else at `offset` of that run."""

    begin: int
    length: int
    run: Run | None = None
    offset: int = 0


@dataclass(slots=True)
class MemberLayout:
    """Extents in file order, the runs to write in the order of their first use, and the tensors."""

    extents: list[Extent]
    runs: list[Run]
    tensors: list[View]


def lay_out(
    size: int,
    regions: Sequence[Region],
    tensors: Sequence[View],
    bases: Mapping[int, Base] = NO_BASES,
    header: int = 0,
    predictions: Predictions = NO_PREDICTIONS,
) -> MemberLayout:
    """Cut a member of `size` bytes into extents: its regions, and what lies between them, the first `header` bytes inline.

    Large regions get runs of their own; small ones share bundles of one coding, in file order, those that have a base others
    than those that have none. `bases`: those of the regions that have one, by their places; `predictions`: those of
    regions with a run of their own.
    """
    layout = MemberLayout([], [], list(tensors))
    bundles: dict[tuple[int, str, bool], Run] = {}
    if header:
        layout.extents.append(Extent(0, header))
    at = header
    for i, region in enumerate(regions):
        if region.begin > at:
            lay_out_opaque(layout, at, region.begin - at)
        at = region.end
        n = region.end - region.begin
        width, coding = region.dtype.width, region.dtype.coding
        if coding == "opaque":
            lay_out_opaque(layout, region.begin, n, split=False)
            continue
        own = n >= OWN_RUN * width
        base = bases.get(i)
        kind = width, coding, base is not None
        run = None if own else bundles.get(kind)
        if run is None or run.size + n > CHUNK_ELEMENTS * width:
            run = Run(width, coding, _row(region) if own else 0)
            layout.runs.append(run)
            if not own:
                bundles[kind] = run
        layout.extents.append(Extent(region.begin, n, run, run.size))
        run.add(region.begin, n, base)
        if own and i in predictions:
            run.predictor, roles = predictions[i]
            run.inputs = sorted(
                [*run.inputs, *(Input(role, 0, min(n, one.nbytes), one) for role, one in roles.items())],
                key=lambda one: one.role,
            )
    if size > at:
        lay_out_opaque(layout, at, size - at)
    return layout


def _row(region: Region) -> int:
    """Return how many elements of its run a row has (a complex one counts twice); 0 when it does not end with one."""
    row, rest = divmod(region.row * region.dtype.bits, 8 * region.dtype.width)
    return 0 if rest else row


def lay_out_opaque(layout: MemberLayout, begin: int, n: int, *, split: bool = True) -> None:
    """Add extents for n bytes that no coding suits: inline when they are few, else a run, and the odd bytes inline.

    Without `split` they are one extent, as a tensor's bytes must be.
    """
    width = OPAQUE_WIDTH if split or n % OPAQUE_WIDTH == 0 else 1
    whole = n // width * width if n > INLINE_BYTES else 0
    if whole:
        run = Run(width, "opaque")
        run.add(begin, whole)
        layout.runs.append(run)
        layout.extents.append(Extent(begin, whole, run))
    if n > whole:
        layout.extents.append(Extent(begin + whole, n - whole))


def untangle(layout: MemberLayout) -> None:
    """Drop predictors whose runs would follow from themselves, or from too many others, when runs that are equal are shared."""
    runs = {extent.begin: extent.run.stored for extent in layout.extents if extent.run is not None}
    begins = {view.name: view.begin for view in layout.tensors}
    leans = {
        run: [runs[begins[one.base.name]] for one in run.inputs if one.base.file.inner]
        for run in layout.runs
        if any(one.base.file.inner for one in run.inputs)
    }
    for _ in range(MAX_DEPENDENCE + 1):
        for run, others in leans.items():
            run.depth = 1 + max(other.depth for other in others)
    for run in leans:
        if run.depth > MAX_DEPENDENCE:
            run.depth, run.predictor = 0, None
            run.inputs = [one for one in run.inputs if one.role == 0]
