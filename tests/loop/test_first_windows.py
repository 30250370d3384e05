"""The first windows of training: a loss that is weighted wrong is told once, and one that is right never is."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import autoaccum
from tests.plans import by_hand


def texts(samples=60):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 50, (int(length),), generator=generator) for length in torch.randint(3, 20, (samples,), generator=generator)]


def padded(samples):
    ids = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    return {"ids": ids, "labels": ids.masked_fill(ids == 0, -100)}


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.double()

    def forward(self, ids):
        return self.head(torch.tanh(self.embedding(ids)))


def over_labels(model, batch):
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def over_samples(model, batch):
    """Each text's own mean, and the mean of these."""
    losses = F.cross_entropy(model(batch["ids"]).transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none")
    return (losses.sum(1) / (batch["labels"] != -100).sum(1)).mean()


def sum_and_count(model, batch):
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum"), (batch["labels"] != -100).sum()


def with_noise(model, batch):
    return over_samples(model, batch) + 0.1 * torch.rand(())


def train(loss, **given):
    """The warnings of two epochs with a plan that no comparison went into."""
    model = Reader()
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), loss, padded(texts()[:4]), **given)
    plan = by_hand(job, 20, 6)
    loop = autoaccum.Accumulator(job, plan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for window in plan.windows(DataLoader(texts(), batch_size=10, collate_fn=padded)):
                loop.step(window)
    return [str(warning.message) for warning in caught]


def test_a_mean_over_labels_is_told_once_with_the_cure():
    (message,) = train(over_labels)
    assert "mean over what counts in 'labels'" in message and "autoaccum.token_mean" in message


def with_dropout(model, batch):
    logits = F.dropout(model(batch["ids"]), 0.3)
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum"), (batch["labels"] != -100).sum()


def with_masks_by_chance(model, batch):
    labels = batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.5, -100)
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"), (labels != -100).sum()


def pops(model, batch):
    labels = batch.pop("labels")
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"), (labels != -100).sum()


@pytest.mark.parametrize("loss", [over_samples, sum_and_count, with_noise, with_dropout, with_masks_by_chance, pops])
def test_what_is_right_or_cannot_be_told_is_not_alarmed_about(loss):
    assert train(loss) == []


def test_a_count_settles_it():
    assert train(over_labels, count=lambda batch: (batch["labels"] != -100).sum()) == []


def test_a_metric_beside_the_loss_is_told():
    def loss_and_accuracy(model, batch):
        return over_samples(model, batch), torch.tensor(0.5)

    (message,) = train(loss_and_accuracy)
    assert "no count" in message and "Return the loss alone" in message


def test_looking_changes_nothing_that_training_depends_on():
    def run(looks):
        torch.manual_seed(5)
        model = nn.Sequential(Reader(), nn.Dropout(0.5), nn.BatchNorm1d(50, dtype=torch.float64))

        def loss(model, batch):
            inner, drop, norm = model
            return F.cross_entropy(norm(drop(inner(batch["ids"])).transpose(1, 2)), batch["labels"], ignore_index=-100)

        job = autoaccum.Job(model, torch.optim.Adam(model.parameters()), loss, padded(texts()[:4]))
        plan = by_hand(job, 20, 6)
        loop = autoaccum.Accumulator(job, plan)
        if not looks:
            loop._first = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for window in plan.windows(DataLoader(texts(), batch_size=10, collate_fn=padded)):
                loop.step(window)
        return [tensor.clone() for tensor in model.state_dict().values()] + [torch.get_rng_state()]

    assert all(torch.equal(one, other) for one, other in zip(run(True), run(False)))


def test_windows_that_end_several_epochs_in_turn_are_no_short_batches():
    model = nn.Linear(4, 2).double()
    job = autoaccum.Job(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: F.mse_loss(model(batch), torch.zeros(len(batch), 2).double()), ()
    )
    plan = by_hand(job, 20, 7)
    loop = autoaccum.Accumulator(job, plan)
    one, other = torch.randn(50, 4, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    samples = [loop.step(window).samples for pair in zip(plan.windows(DataLoader(one, 8)), plan.windows(DataLoader(other, 8))) for window in pair]
    assert samples == [20, 20, 20, 10]
    with pytest.raises(autoaccum.PlanError, match="the loader gives 8 samples a step"):  # raw batches are still looked at
        for batch in DataLoader(one, 8):
            loop.step(batch)


@pytest.mark.parametrize("kind", ["classes", "samples"])
def test_weights_of_classes_and_of_samples_are_told(kind):
    generator = torch.Generator().manual_seed(3)
    x, y, weights = torch.randn(48, 4, generator=generator).double(), torch.arange(48) % 3, torch.rand(48, generator=generator).double() + 0.1

    def loss(model, batch):
        if kind == "classes":
            return F.cross_entropy(model(batch[0]), batch[1], weight=torch.tensor([0.2, 1.0, 4.0]).double())
        return (F.cross_entropy(model(batch[0]), batch[1], reduction="none") * batch[2]).sum() / batch[2].sum()

    model = nn.Linear(4, 3).double()
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), loss, ())
    with pytest.warns(UserWarning, match="not over samples|no mean over samples"):
        autoaccum.Accumulator(job, by_hand(job, 48, 10)).step((x, y, weights))


def warned(loss, loader, plan_of=20, most=6, **given):
    """What is said in two epochs with a plan from elsewhere."""
    model = Reader()
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), loss, padded(texts()[:4]), **given)
    plan = by_hand(job, plan_of, most)
    loop = autoaccum.Accumulator(job, plan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for window in plan.windows(loader):
                loop.step(window)
    return [str(warning.message) for warning in caught]


BY_LENGTH = [text for length in (5, 9, 14) for text in [torch.full((length,), 1 + at) for at in range(20)]]


def sorted_by_length(batch_size):
    return DataLoader(BY_LENGTH, batch_size=batch_size, collate_fn=padded)


@pytest.mark.parametrize("batch_size", [20, 10, 1])
def test_a_loader_that_sorts_by_length_is_told_although_every_batch_is_uniform(batch_size):
    assert any("not over samples" in message for message in warned(over_labels, sorted_by_length(batch_size)))
    assert not warned(over_samples, sorted_by_length(batch_size)) and not warned(sum_and_count, sorted_by_length(batch_size))


def test_a_micro_batch_of_one_sample_is_looked_at_too():
    loader = DataLoader(texts(), batch_size=10, collate_fn=padded)
    assert any("not over samples" in message for message in warned(over_labels, loader, most=1))
    assert not warned(over_samples, loader, most=1)


def test_a_count_that_counts_something_else_is_told():
    loader = DataLoader(texts(), batch_size=10, collate_fn=padded)
    assert any("is no mean over what count= counts" in message for message in warned(over_samples, loader, count=labels_in))
    assert any("is no mean over what count= counts" in message for message in warned(over_labels, loader, count=lambda batch: (batch["ids"] != 0)[:, 1:].sum()))
    assert not warned(over_labels, loader, count=labels_in)  # the remedy


def labels_in(batch):
    return (batch["labels"] != -100).sum()


def with_functional_dropout(model, batch):
    logits = F.dropout(model(batch["ids"]), 0.3, model.training)
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def test_dropout_that_is_a_function_and_half_precision_do_not_hide_it():
    loader = DataLoader(texts(), batch_size=10, collate_fn=padded)
    assert any("not over samples" in message for message in warned(with_functional_dropout, loader))
    model = Reader().float()
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), over_labels, padded(texts()[:4]), autocast=torch.bfloat16)
    plan = by_hand(job, 20, 6)
    loop = autoaccum.Accumulator(job, plan)
    with pytest.warns(UserWarning, match="not over samples"):
        for window in plan.windows(loader):
            loop.step(window)


def test_texts_of_one_length_say_nothing_and_cost_no_warning():
    loader = DataLoader([torch.full((7,), 1 + at) for at in range(40)], batch_size=10, collate_fn=padded)
    assert not warned(over_labels, loader)


def time_major(samples):
    """Texts along the second dimension, as recurrent networks take them."""
    return {name: field.T.contiguous() for name, field in padded(samples).items()}


def cut_time_major(batch, sizes):
    cut = {name: field.split(list(sizes), dim=1) for name, field in batch.items()}
    return [{name: pieces[index] for name, pieces in cut.items()} for index in range(len(sizes))]


def texts_in(batch):
    return batch["ids"].shape[1]


def over_samples_of_time_major(model, batch):
    return over_samples(model, {name: field.T for name, field in batch.items()})


@pytest.mark.parametrize(("loss", "is_told"), [(over_labels, True), (over_samples_of_time_major, False), (sum_and_count, False)])
def test_batches_that_only_split_cuts_are_looked_at(loss, is_told):
    model = Reader()
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), loss, (), split=cut_time_major, samples=texts_in)
    plan = by_hand(job, 20, 6)
    loop = autoaccum.Accumulator(job, plan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for window in plan.windows(DataLoader(texts(), batch_size=10, collate_fn=time_major), samples=texts_in, split=cut_time_major):
            loop.step(window)
    assert any("over samples" in str(warning.message) for warning in caught) is is_told


@pytest.mark.parametrize("kind", ["list", "jagged"])
def test_texts_of_unlike_lengths_that_are_not_padded_are_told(kind):
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randn(int(length), 4, generator=generator).double() for length in torch.randint(2, 12, (40,), generator=generator)]

    def collate(samples):
        return list(samples) if kind == "list" else torch.nested.nested_tensor(list(samples), layout=torch.jagged)

    def over_rows(model, batch):
        return torch.cat([model(sample).square().flatten() for sample in (batch if kind == "list" else batch.unbind())]).mean()

    model = nn.Linear(4, 1).double()
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), over_rows, ())
    plan = by_hand(job, 20, 6)
    loop = autoaccum.Accumulator(job, plan)
    with pytest.warns(UserWarning, match="no mean over samples|not over samples"):
        for window in plan.windows(DataLoader(rows, batch_size=10, collate_fn=collate)):
            loop.step(window)


def test_weights_of_pixels_are_told():
    generator = torch.Generator().manual_seed(5)
    x, weights = torch.randn(48, 6, generator=generator).double(), torch.rand(48, 6, generator=generator).double()

    def weighted(model, batch):
        return (model(batch[0]).square() * batch[1]).sum() / batch[1].sum()

    model = nn.Linear(6, 6).double()
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), weighted, ())
    with pytest.warns(UserWarning, match="not over samples|no mean over samples"):
        autoaccum.Accumulator(job, by_hand(job, 48, 10)).step((x, weights))
