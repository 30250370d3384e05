from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.data import batches
from autoaccum.errors import PlanError

Pair = namedtuple("Pair", "inputs labels")


@dataclass
class Record:
    image: torch.Tensor
    caption: list
    scale: float = 2.0


class Encoding(UserDict):
    """As HF's BatchEncoding: a mapping that is not a dict."""


def rows(samples):
    return torch.arange(samples * 3.0).view(samples, 3)


NESTED = {
    "a tensor": lambda n: rows(n),
    "a tuple": lambda n: (rows(n), torch.arange(n)),
    "what default collation gives": lambda n: [rows(n), torch.arange(n)],
    "a dict": lambda n: {"input_ids": rows(n), "labels": torch.arange(n)},
    "a mapping that is no dict": lambda n: Encoding(input_ids=rows(n), mask=rows(n)),
    "a named tuple": lambda n: Pair(rows(n), torch.arange(n)),
    "a dataclass": lambda n: Record(rows(n), [f"caption {i}" for i in range(n)]),
    "strings": lambda n: (rows(n), [f"text {i}" for i in range(n)]),
    "ragged token lists": lambda n: {"tokens": [[1] * (i + 1) for i in range(n)], "labels": torch.arange(n)},
    "targets of a detector": lambda n: (rows(n), [{"boxes": torch.ones(i + 1, 4)} for i in range(n)]),
    "an array": lambda n: {"x": rows(n).numpy()},
    "things of the whole batch": lambda n: {"x": rows(n), "temperature": 0.5, "name": "train", "none": None, "scalar": torch.tensor(3.0)},
}


@pytest.mark.parametrize("kind", NESTED)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_batch_is_cut_into_what_it_was_made_of(kind, sizes):
    samples = sum(sizes) if sum(sizes) > 2 else 3
    sizes = sizes if sum(sizes) > 2 else [3]
    batch = NESTED[kind](samples)
    assert batches.count(batch) == samples
    pieces = batches.split(batch, sizes)
    assert [batches.count(piece) for piece in pieces] == sizes
    assert all(type(piece) is type(batch) for piece in pieces)
    flat = [leaf for piece in pieces for path, leaf in batches._leaves(piece) if path == first_path(batch)]
    assert [tuple(map(str, item)) if hasattr(item, "__iter__") else str(item) for leaf in flat for item in leaf] == [
        tuple(map(str, item)) if hasattr(item, "__iter__") else str(item) for item in dict(batches._leaves(batch))[first_path(batch)]
    ]


def test_images_of_unlike_sizes_are_samples():
    batch = ([torch.ones(i + 2, 4) for i in range(5)], torch.arange(5))
    assert batches.count(batch) == 5
    (first, _), (second, labels) = batches.split(batch, [3, 2])
    assert [len(image) for image in first + second] == [2, 3, 4, 5, 6] and labels.tolist() == [3, 4]


def first_path(batch):
    return next(path for path, leaf in batches._leaves(batch) if batches._length(leaf) is not None)


def test_what_belongs_to_the_whole_batch_goes_along_unchanged():
    batch = NESTED["things of the whole batch"](4)
    for piece in batches.split(batch, [3, 1]):
        assert (piece["temperature"], piece["name"], piece["none"]) == (0.5, "train", None)
        assert piece["scalar"] is batch["scalar"]


def test_pieces_of_tensors_are_views():
    batch = rows(10)
    assert all(piece.untyped_storage().data_ptr() == batch.untyped_storage().data_ptr() for piece in batches.split(batch, [6, 4]))


@given(samples=st.integers(1, 40))
def test_a_batch_is_shortened_or_repeated(samples):
    resized = batches.resize({"x": rows(7), "y": [str(i) for i in range(7)]}, samples)
    assert batches.count(resized) == samples
    assert resized["y"] == [str(i % 7) for i in range(samples)]
    assert torch.equal(resized["x"], rows(7)[torch.arange(samples) % 7])


def test_fields_that_disagree_are_named():
    with pytest.raises(PlanError, match=r"labels has 3"):
        batches.count({"input_ids": rows(4), "labels": torch.arange(3)})


def test_what_cannot_be_cut_is_named_with_the_remedy():
    class Graph:
        pass

    with pytest.raises(PlanError, match=r"Graph.*split="):
        batches.count((Graph(), rows(3)))
    with pytest.raises(PlanError, match="nothing that can be cut"):
        batches.count({"lr": 0.1})
    with pytest.raises(PlanError, match="empty"):
        batches.resize(rows(0), 3)


def test_sizes_must_sum_to_the_batch():
    with pytest.raises(PlanError, match="5 samples"):
        batches.split(rows(5), [3, 3])


def test_a_batch_that_is_there_already_is_not_copied():
    batch = {"x": rows(3), "text": ["a", "b", "c"]}
    assert batches.move(batch, torch.device("cpu")) is batch
    assert batches.move(batch, torch.device("meta"))["x"].device.type == "meta"
    assert batches.move(batch, torch.device("meta"))["text"] == ["a", "b", "c"]


def test_tensors_in_lists_of_samples_are_moved_too():
    ragged = [torch.ones(2, 4), torch.ones(3, 4)]
    moved = batches.move((ragged, [{"boxes": torch.ones(1, 4)}] * 2), torch.device("meta"))
    assert {tensor.device.type for tensor in (*moved[0], moved[1][0]["boxes"])} == {"meta"}


def test_a_loader_is_told_from_a_batch():
    with pytest.raises(PlanError, match=r"a DataLoader is not a batch: give one batch of it, next\(iter\(loader\)\)"):
        batches.count(torch.utils.data.DataLoader(rows(4)))


def test_shapes_and_bytes_describe_the_batch():
    assert batches.shapes({"input_ids": torch.zeros(40, 512)}) == {"input_ids": (40, 512)}
    assert batches.shapes([rows(3), torch.arange(3)]) == {"batch[0]": (3, 3), "batch[1]": (3,)}
    assert batches.shapes(rows(2)) == {"batch": (2, 3)}
    assert batches.nbytes({"x": torch.zeros(4, 4), "y": torch.zeros(2, dtype=torch.int64)}) == 80


def test_uncollated_samples_are_counted_as_samples():
    rows = [(torch.zeros(10), torch.tensor(1.0)) for _ in range(7)]
    assert batches.count(rows) == 7 and [len(piece) for piece in batches.split(rows, (4, 3))] == [4, 3]
    assert batches.count([(torch.zeros(7, 2), torch.zeros(7)), ["text"] * 7]) == 7  # fields, one of them a pair


@pytest.mark.parametrize("samples", [2, 3, 4])
@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_images_beside_their_boxes_are_samples_also_where_there_are_as_many_as_channels(samples, kind):
    images, boxes = [torch.full((3, 8, 9), float(index)) for index in range(samples)], [{"box": index} for index in range(samples)]
    batch = {"images": images, "boxes": boxes} if kind is dict else kind((images, boxes))
    assert batches.count(batch) == samples
    pieces = batches.split(batch, (1, samples - 1))
    fields = [list(piece.values()) if kind is dict else list(piece) for piece in pieces]
    assert [len(field[0]) for field in fields] == [1, samples - 1] and fields[1][0][0].shape == (3, 8, 9)
    joined = batches.join([batch, batch])
    both = list(joined.values()) if kind is dict else list(joined)
    assert len(both[0]) == len(both[1]) == 2 * samples and both[0][-1].shape == (3, 8, 9)
    assert batches.count(batches.resize(batch, 5)) == 5


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_tensors_are_cut_joined_repeated_and_described(layout):
    rows = [torch.arange(3.0 * n).view(n, 3) for n in (2, 5, 1, 4)]
    batch = {"x": torch.nested.nested_tensor(rows, layout=layout), "y": torch.arange(4)}
    assert batches.count(batch) == 4
    first, second = batches.split(batch, [3, 1])
    assert [len(row) for row in first["x"].unbind()] == [2, 5, 1] and torch.equal(second["x"].unbind()[0], rows[3])
    joined = batches.join([second, first])
    assert [len(row) for row in joined["x"].unbind()] == [4, 2, 5, 1] and joined["y"].tolist() == [3, 0, 1, 2]
    assert [len(row) for row in batches.resize(batch, 6)["x"].unbind()] == [2, 5, 1, 4, 2, 5]
    assert batches.shapes(batch)["x"] == (4, 5, 3) and batches.nbytes(batch["x"]) == sum(row.nbytes for row in rows)
    assert batches.join([batch, {"x": torch.zeros(1, 2, 3), "y": torch.arange(1)}]) is None
