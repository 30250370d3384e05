"""Samples that differ in what a loss may count."""

import torch

from autoaccum.data import variety


def test_the_samples_with_most_and_least_labels_come_first_and_last():
    labels = torch.full((12, 6), -100)
    for index, count in enumerate([3, 1, 6, 2, 5, 3, 3, 4, 2, 3, 3, 3]):
        labels[index, :count] = 7
    chosen = variety.most_unlike({"x": torch.arange(12), "labels": labels}, 12, 4)
    assert (chosen["labels"] != -100).sum(1).tolist() == [6, 5, 2, 1]
    assert chosen["x"].tolist()[:2] == [2, 4] and chosen["x"].tolist()[3] == 1


def test_masks_of_zeros_and_ones_count_and_other_numbers_do_not():
    assert variety.is_countable((torch.randn(4, 3), torch.ones(4, 3)))
    assert not variety.is_countable((torch.randn(4, 3), -torch.rand(4)))


def test_uniform_batches_are_known():
    assert variety.is_uniform({"ids": torch.ones(4, 5, dtype=torch.long)})
    assert not variety.is_uniform({"ids": torch.tensor([[1, 2, 0], [1, 0, 0]])})


def test_where_nothing_can_be_counted_the_first_samples_are_taken():
    batch = (torch.randn(20, 3), torch.randn(20))
    assert torch.equal(variety.most_unlike(batch, 20, 5)[0], batch[0][:5])


def test_samples_that_are_not_padded_count_by_their_lengths():
    rows = [torch.ones(length, 2) for length in (3, 5, 3, 9, 3, 3)]
    for batch in (rows, torch.nested.nested_tensor(rows, layout=torch.jagged)):
        assert variety.is_countable(batch) and not variety.is_uniform(batch)
        chosen = variety.most_unlike(batch, 6, 2)
        assert sorted(len(row) for row in chosen) == [3, 9]
    alike = [torch.ones(3, 2), torch.ones(3, 2)]
    assert variety.is_uniform(torch.nested.nested_tensor(alike, layout=torch.jagged))
