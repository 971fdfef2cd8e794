"""Who is a fine-tune of whom: sketches, distances, the forest."""

import numpy as np
import pytest
from hubs import weights, write_model
from hypothesis import given
from hypothesis import strategies as st

from tzip.hub.families import _BUDGET, apart, distances, forest, sketch


def sketches(tmp_path, *models):
    found = []
    for i, model in enumerate(models):
        tensors, options = model if isinstance(model, tuple) else (model, {})
        write_model(tmp_path / f"m{i}", tensors, **options)
        found.append(sketch(str(tmp_path / f"m{i}"), None))
    return found


def parents_of(found, depth=4, fixed=None):
    return forest([s.alone for s in found], distances(found), depth, fixed)


def test_the_model_that_all_are_near_to_is_the_base(tmp_path):
    """Of a star of fine-tunes, the plain one is no first and no last by name, and is found."""
    moved = [3e-5, 1e-4, 0.0, 2e-4]
    found = sketches(tmp_path, *[weights(1, m, i) for i, m in enumerate(moved)])
    assert parents_of(found) == [2, 2, None, 2]


def test_a_model_that_went_on_from_a_fine_tune_leans_on_it(tmp_path):
    first = weights(1, 1e-3, 1)
    rng = np.random.default_rng(5)
    second = {n: w + np.float32(1e-6) * rng.standard_normal(w.shape).astype(np.float32) for n, w in first.items()}
    found = sketches(tmp_path, weights(1), weights(1, 1e-5, 2), weights(1, 1e-5, 3), first, second)
    assert parents_of(found)[:3] == [None, 0, 0]
    assert parents_of(found)[3:] in ([0, 3], [4, 0])
    assert parents_of(found, depth=1)[3:] == [0, 0]
    assert parents_of(found, depth=0) == [None] * 5


def test_shards_and_their_names_do_not_matter(tmp_path):
    found = sketches(tmp_path, weights(1), (weights(1, 1e-5, 1), {"shards": 3}))
    assert found[0].specs == found[1].specs
    assert parents_of(found) == [None, 0]


def test_other_names_of_all_tensors_do_not_matter(tmp_path):
    found = sketches(tmp_path, weights(1), {f"model.{n}": w for n, w in weights(1, 1e-5, 1).items()})
    assert parents_of(found) == [None, 0]


def test_one_tensor_more_or_resized_does_not_matter(tmp_path):
    tensors = weights(1, 1e-5, 1)
    tensors["head"] = weights(9)["emb.weight"]
    tensors["emb.weight"] = np.concatenate([tensors["emb.weight"], tensors["emb.weight"][:7]])
    found = sketches(tmp_path, weights(1), tensors)
    assert parents_of(found) == [None, 0]


def test_the_same_shapes_alone_make_no_family(tmp_path):
    assert parents_of(sketches(tmp_path, weights(1), weights(2), weights(3))) == [None] * 3


def test_other_types_make_no_family(tmp_path):
    halves = {n: w.astype(np.float16) for n, w in weights(1).items()}
    assert parents_of(sketches(tmp_path, weights(1), halves)) == [None] * 2


def test_copies_lean_on_the_first(tmp_path):
    assert parents_of(sketches(tmp_path, weights(1), weights(1), weights(1))) == [None, 0, 0]


def test_what_has_no_tensors_is_packed_by_itself(tmp_path):
    (tmp_path / "text").write_bytes(b"words")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    found = [sketch(str(tmp_path / name), None) for name in ("text", "broken.safetensors")]
    assert parents_of(found) == [None, None]
    assert [s.specs for s in found] == [(), ()]


def test_comparing_all_at_once_is_comparing_one_by_one(tmp_path):
    found = sketches(tmp_path, weights(1), weights(1, 1e-5, 1), weights(1, 1e-4, 2))
    for (child, parent), bits in distances(found).items():
        assert bits == pytest.approx(apart(found[child], found[parent]), rel=1e-6)
    assert len(distances(found)) == 6


def test_a_sketch_stays_small(tmp_path):
    many = {f"t{i:03}": np.ones((64, 40), np.float32) for i in range(400)}
    (found,) = sketches(tmp_path, many)
    assert len(found.specs) == 400
    assert sum(s.size for s in found.samples) <= _BUDGET


@given(st.data())
def test_a_forest_is_one_whatever_the_distances(data):
    n = data.draw(st.integers(0, 9))
    places = st.integers(0, max(0, n - 1))
    alone = data.draw(st.lists(st.floats(1, 100), min_size=n, max_size=n))
    bits = data.draw(st.dictionaries(st.tuples(places, places), st.floats(0, 100))) if n else {}
    bits = {pair: cost for pair, cost in bits.items() if pair[0] != pair[1]}
    depth = data.draw(st.integers(0, 4))
    fixed = data.draw(st.dictionaries(places, st.integers(0, 5), max_size=3)) if n else {}
    parents = forest(alone, bits, depth, fixed)
    assert len(parents) == n
    for i, parent in enumerate(parents):
        if i in fixed:
            assert parent is None
        steps, at = 0, i
        while at not in fixed and (above := parents[at]) is not None:
            assert (at, above) in bits
            at, steps = above, steps + 1
            assert steps <= n
        if parent is not None:
            assert steps + fixed.get(at, 0) <= depth
