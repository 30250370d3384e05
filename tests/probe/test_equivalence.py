"""Whether splitting changes the gradient: what breaks it is found and named."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import autoaccum
from tests import jobs
from tests.digest import digest


def compared(model, loss, batch, **given):
    return autoaccum.equivalence(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, batch, **given)


def dense(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), *between, nn.ReLU(), nn.Linear(12, 1))


def contrastive(model, batch):
    one, other = model(batch[0]), model(batch[0] + 0.1 * batch[1])
    return nn.functional.cross_entropy(one @ other.T, torch.arange(len(one)))


class Centred(nn.Module):
    def forward(self, inputs):
        return inputs - inputs.mean(dim=0, keepdim=True)


class Speaker(nn.Module):
    """A language model of its own kind: `.loss` is the mean over labels other than -100."""

    def __init__(self, shifted=False):
        super().__init__()
        torch.manual_seed(0)
        self.shifted = shifted
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, input_ids, labels):
        logits = self.out(self.embed(input_ids))
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return type("Output", (), {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())})


def ragged(samples=8, length=12):
    torch.manual_seed(4)
    ids = torch.randint(0, 20, (samples, length))
    labels = ids.clone()
    for row, kept in enumerate(torch.randint(2, length, (samples,)).tolist()):
        labels[row, kept:] = -100
    return {"input_ids": ids, "labels": labels}


def test_a_mean_over_samples_is_exact_also_with_dropout():
    found = compared(dense(nn.Dropout(0.5)), jobs.mse, jobs.pairs(12))
    assert found.exact is True and found.relative_error < 1e-5 and found.sizes == (5, 3) and found.samples == 8
    assert "exact: the gradient of 5 + 3 samples is that of 8 at once" in str(found)


def test_a_sum_over_samples_is_told():
    found = compared(dense(), lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1], reduction="sum"), jobs.pairs(12))
    assert (found.exact, found.cause) == (False, "sum") and "reduction='mean'" in str(found)


def test_batch_norm_is_named_and_the_rest_compared_without_it():
    found = compared(dense(nn.BatchNorm1d(12)), jobs.mse, jobs.pairs(12))
    assert (found.exact, found.cause, found.layers) == (False, "batch-norm", ("1",))
    assert found.batch_norm_error > 0.01 and found.relative_error < 1e-4
    also_a_sum = compared(dense(nn.BatchNorm1d(12)), lambda model, batch: jobs.mse(model, batch) * len(batch[0]), jobs.pairs(12))
    assert also_a_sum.cause == "sum"


def test_a_loss_over_pairs_of_samples_is_told_from_a_layer_that_mixes_them():
    loss = compared(dense(), contrastive, jobs.pairs(12))
    assert (loss.exact, loss.cause, loss.layers) == (False, "mixed", ()) and "in-batch negatives" in str(loss)
    layer = compared(dense(nn.Identity(), Centred()), jobs.mse, jobs.pairs(12))
    assert (layer.exact, layer.cause, layer.layers) == (False, "mixed", ("2",)) and "layer '2'" in str(layer)


def test_a_token_mean_is_recognised_and_token_mean_cures_it():
    found = compared(Speaker(), lambda model, batch: model(**batch).loss, ragged())
    assert (found.exact, found.cause) == (False, "token-mean") and "'labels'" in str(found) and "autoaccum.token_mean" in str(found)
    assert compared(Speaker(), autoaccum.token_mean, ragged()).exact is True


def test_a_shift_of_the_labels_matters_and_is_noticed():
    assert compared(Speaker(shifted=True), partial(autoaccum.token_mean, shifted=True), ragged()).exact is True
    assert compared(Speaker(shifted=True), autoaccum.token_mean, ragged()).exact is False


def test_unequal_weights_are_told_with_their_figures():
    weights = {"inputs": torch.randn(8, 8), "targets": torch.randn(8, 1)}
    slope = torch.linspace(1, 3, 8)

    def loss(model, batch):
        owed = slope[: len(batch["inputs"])].square().sum()  # not in the batch
        return nn.functional.mse_loss(model(batch["inputs"]), batch["targets"]) * owed / 30

    assert compared(dense(), loss, weights).cause == "weights"


def test_a_random_loss_cannot_be_compared_and_says_so():
    found = compared(dense(), lambda model, batch: jobs.mse(model, (batch[0] + torch.randn_like(batch[0]), batch[1])), jobs.pairs(12))
    assert (found.exact, found.cause) == (None, "random")


def test_one_sample_cannot_be_split():
    assert compared(dense(), jobs.mse, jobs.pairs(1)).exact is None
    with pytest.raises(autoaccum.UsageError, match="one sample cannot be split"):
        compared(dense(), jobs.mse, jobs.pairs(8), samples=1)


def test_a_gradient_of_nothing_says_nothing():
    assert compared(dense(), lambda model, batch: jobs.mse(model, batch) * 0, jobs.pairs(8)).exact is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_rounding_is_not_taken_for_a_difference(dtype):
    assert compared(dense(), jobs.mse, jobs.pairs(12), autocast=dtype).exact is True


def test_everything_comes_back_as_it_was():
    model = dense(nn.BatchNorm1d(12), nn.Dropout(0.3))
    optimizer = torch.optim.Adam(model.parameters())
    batch = jobs.pairs(12)
    before = digest(model, optimizer)
    assert autoaccum.equivalence(model, optimizer, jobs.mse, batch).exact is False
    assert digest(model, optimizer) == before


def test_tune_warns_of_a_loss_that_is_not_a_mean_and_of_nothing_else():
    model = dense()

    def warnings(loss):
        return autoaccum.tune(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, jobs.pairs(12), target_batch=12, max_micro_batch=5).warnings

    assert warnings(jobs.mse) == ()
    (told,) = warnings(lambda model, batch: jobs.mse(model, batch) * len(batch[0]))
    assert "sum over the samples" in told


def test_of_several_jobs_the_one_that_is_not_exact_is_told():
    good, bad = jobs.small(), jobs.small(lambda model, batch: jobs.mse(model, batch) * len(batch[0]))
    assert autoaccum.equivalence([good, copy.copy(good)]).exact is True
    assert autoaccum.equivalence([good, bad]).cause == "sum"


def plan_of(model, loss, batch, **given):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return autoaccum.tune(model, optimizer, loss, batch, **{"target_batch": 12, "max_micro_batch": 5, **given})


def test_what_tune_finds_is_warned_of_where_it_is_called():
    with pytest.warns(UserWarning, match="sum over the samples") as told:
        plan_of(dense(), lambda model, batch: jobs.mse(model, batch) * len(batch[0]), jobs.pairs(12))
    assert told[0].filename == __file__


class SaysOtherwiseInEval(nn.Module):
    """Functional dropout, and a result of another kind in eval mode, as detection models have."""

    def __init__(self):
        super().__init__()
        self.inner = dense()

    def forward(self, inputs):
        out = self.inner(nn.functional.dropout(inputs, 0.5, training=self.training))
        return out if self.training else {"boxes": out}


def test_a_comparison_that_fails_is_told_and_is_not_taken_for_exact():
    with pytest.warns(UserWarning, match=r"whether splitting changes the gradient could not be seen: \w+Error"):
        plan_of(SaysOtherwiseInEval(), jobs.mse, jobs.pairs(12))


def test_a_plan_of_single_samples_is_compared_too_where_the_limit_is_enforced():
    with pytest.warns(UserWarning, match="sum over the samples"):
        plan_of(dense(), lambda model, batch: jobs.mse(model, batch) * len(batch[0]), jobs.pairs(12), max_micro_batch=1, memory_limit="8GiB")


def test_eval_mode_is_mentioned_where_the_comparison_needed_it():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = dense()

        def forward(self, inputs):
            return self.inner(nn.functional.dropout(inputs, 0.5, training=self.training))

    found = compared(Noisy(), jobs.mse, jobs.pairs(12))
    assert found.exact is True and "in eval mode, because the loss draws random numbers" in str(found)


def test_a_gradient_of_rounding_alone_is_not_judged():
    model = nn.Linear(4, 1)
    inputs = torch.randn(8, 4)
    assert compared(model, jobs.mse, (inputs, model(inputs).detach() + 1e-8)).exact is None


def test_token_mean_that_counts_the_wrong_labels_is_not_told_to_use_token_mean():
    found = compared(Speaker(shifted=True), autoaccum.token_mean, ragged())
    assert "shifted=True" in str(found) and "use loss=autoaccum.token_mean" not in str(found)


def test_the_job_that_is_not_exact_is_numbered():
    good, bad = jobs.small(), jobs.small(lambda model, batch: jobs.mse(model, batch) * len(batch[0]))
    assert str(autoaccum.equivalence([good, bad])).startswith("job 2 of 2: the loss is a sum")


class Codebook(nn.Module):
    """A vector quantiser whose codes are a moving average of what they were nearest to."""

    def __init__(self, decay):
        super().__init__()
        self.encoder, self.decay = nn.Linear(5, 3).double(), decay
        self.register_buffer("code", torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        z = self.encoder(x)
        nearest = torch.cdist(z.detach(), self.code).argmin(1)
        loss = ((z - self.code[nearest]) ** 2).mean()
        if self.training:
            for index in range(4):
                if bool((nearest == index).any()):
                    self.code[index].lerp_(z.detach()[nearest == index].mean(0), 1 - self.decay)
        return loss


class Carries(nn.Module):
    """A recurrent layer that keeps its hidden state from one batch to the next."""

    def __init__(self):
        super().__init__()
        self.cell, self.hidden = nn.GRUCell(5, 4).double(), None

    def forward(self, x):
        last = torch.zeros(1, 4, dtype=torch.float64) if self.hidden is None else self.hidden
        out = self.cell(x, last.expand(len(x), 4))
        self.hidden = out.detach().mean(0, keepdim=True)
        return (out**2).mean()


class Lazy(nn.Module):
    """Fills a table in its first forward, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 1).double()
        self.register_buffer("table", torch.zeros(5, dtype=torch.float64))

    def forward(self, x):
        self.table.copy_(torch.arange(5).double())
        return (self.inner(x + self.table) ** 2).mean()


def of_module(module):
    torch.manual_seed(0)
    model = module()
    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return autoaccum.equivalence(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: model(batch), x)


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_a_buffer_that_forward_moves_is_named(decay):
    found = of_module(lambda: Codebook(decay))
    assert (found.exact, found.cause) == (False, "state") and "buffer 'code'" in found.message and "once per optimizer step" in found.message


def test_what_is_kept_from_the_forward_before_is_named():
    found = of_module(Carries)
    assert (found.exact, found.cause) == (False, "state") and found.layers == ("cell",)


def test_a_table_that_is_filled_once_is_no_state_that_moves():
    found = of_module(Lazy)
    assert found.exact


def test_a_pair_that_does_not_add_up_is_refused_by_tune_and_the_loss_alone_is_taken():
    def with_accuracy(model, batch):
        out = model(batch[0])
        return torch.nn.functional.mse_loss(out, batch[1]), (out > 0).double().mean()

    batch = jobs.pairs(16)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(autoaccum.JobError, match=r"its second part is no count: it is .* for 4 samples"):
        autoaccum.tune(model, optimizer, with_accuracy, batch, target_batch=16, max_micro_batch=4)
    plan = autoaccum.tune(model, optimizer, lambda model, batch: with_accuracy(model, batch)[0], batch, target_batch=16, max_micro_batch=4)
    assert plan.micro_batches == (4,) * 4


def test_a_sum_of_weights_is_a_count():
    def weighted(model, batch):
        weights = 0.1 + batch[0][:, 0].abs()
        return (weights * (model(batch[0])[:, 0] - batch[1][:, 0]) ** 2).sum(), weights.sum()

    model = nn.Linear(8, 1)
    assert autoaccum.equivalence(model, torch.optim.SGD(model.parameters(), lr=0.1), weighted, jobs.pairs(16)).exact


def test_samples_that_are_all_alike_prove_nothing():
    ids = torch.randint(1, 20, (8, 12), generator=torch.Generator().manual_seed(0))
    model = Speaker()
    found = autoaccum.equivalence(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: model(**batch).loss, {"input_ids": ids, "labels": ids}
    )
    assert found.exact is None and found.message.startswith("could not tell") and "worst_case" in found.message


def test_masks_drawn_by_chance_are_no_reason_to_refuse():
    """As masked language modelling draws them in the loss: the count of a batch is another every time."""

    def loss(model, batch):
        mask = (torch.rand(batch[0].shape) < 0.5).float()
        return ((model(batch[0]) - batch[1]) ** 2 * mask[:, :1]).sum(), mask[:, :1].sum()

    model = nn.Linear(8, 1)
    plan = autoaccum.tune(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, jobs.pairs(16), target_batch=16, max_micro_batch=4)
    assert plan.micro_batches == (4,) * 4


@pytest.mark.parametrize("kept", [False, True])
def test_a_generator_of_the_losss_own_is_no_state_of_a_layer(kept):
    own = torch.Generator().manual_seed(0)

    def loss(model, batch):
        return ((model(batch[0]) - batch[1] + torch.randn(1, generator=own)) ** 2).mean()

    model = nn.Linear(8, 1)
    found = autoaccum.equivalence(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, jobs.pairs(16), keep=[own] if kept else [])
    assert found.exact is None and found.cause == "random"


def test_a_part_in_which_nothing_counts_is_not_exact():
    def loss(model, batch):
        return ((model(batch[0]) - batch[1]) ** 2 * batch[2]).sum() / batch[2].sum()

    counts = torch.ones(8, 1)
    counts[5:] = 0
    model = nn.Linear(8, 1)
    found = autoaccum.equivalence(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, (*jobs.pairs(8), counts))
    assert found.exact is False and "nothing counts in it" in found.message


def test_a_field_that_counts_the_same_in_every_sample_is_not_the_reason():
    """Pixels marked 255 are left out by the loss, and no rule here knows that mark: the image, which has a value everywhere, does not explain it."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(1, 3, 3, padding=1).double()
    batch = {"image": torch.randn(4, 1, 20, 20, dtype=torch.float64), "mask": torch.randint(1, 3, (4, 20, 20))}
    batch["mask"][0, 0, :12] = 255  # 0.496 and 0.504 of what counts

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch["image"]), batch["mask"], ignore_index=255)

    told = autoaccum.equivalence(autoaccum.Job(model, torch.optim.SGD(model.parameters()), loss, batch))
    assert told.cause == "weights" and "image" not in str(told), told
