"""Who divides in the Trainer: the gradient is that of the whole batch, whatever the loss does with what it is given."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PretrainedConfig, Trainer, TrainerCallback, TrainingArguments

import autoaccum
from autoaccum.integrations import huggingface

IGNORED = -100


class Tagger(nn.Module):
    """Scores for every token; a loss of its own where labels are given, divided by what the Trainer says it counts, if it says it."""

    def __init__(self, balance=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.balance = nn.Embedding(30, 6), nn.Linear(6, 4), balance
        self.double()

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.head(torch.tanh(self.embedding(input_ids)))
        if labels is None:
            return {"logits": logits}
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count + self.balance * logits.pow(2).mean(), "logits": logits}


class Texts(torch.utils.data.Dataset):
    """Unlike lengths; the texts in `unlabelled` have no label at all."""

    def __init__(self, samples=22, unlabelled=()):
        generator = torch.Generator().manual_seed(1)
        self.ids = [torch.randint(1, 30, (int(n),), generator=generator) for n in torch.randint(2, 9, (samples,), generator=generator)]
        self.labels = [torch.where(torch.rand(len(ids), generator=generator) < 0.3, IGNORED, ids % 4) for ids in self.ids]
        for index in unlabelled:
            self.labels[index][:] = IGNORED

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def padded(samples):
    def pad(name, value):
        return nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)

    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", IGNORED)}


class FirstGradient(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.seen.append(torch.cat([torch.zeros(p.numel(), dtype=p.dtype) if p.grad is None else p.grad.flatten().clone() for p in model.parameters()]))


def trainer(folder, model, data, collator=padded, kind=Trainer, functions=None, **given):
    settings = {"max_grad_norm": 0.0, "learning_rate": 0.0, "per_device_train_batch_size": 4, "remove_unused_columns": False, "max_steps": 1}
    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, **given}
    return kind(model, TrainingArguments(str(folder), **settings), train_dataset=data, data_collator=collator, **(functions or {}))


def first_gradient(made, *, target, most, **given):
    plan = huggingface.tune(made, target_batch=target, max_micro_batch=most, **given)
    plan.apply(made)
    steps = FirstGradient()
    made.add_callback(steps)
    made.train()
    return steps.seen[0]


def whole_gradient(model, data, loss):
    model.zero_grad()
    loss(model, padded([data[index] for index in range(len(data))])).backward()
    gradient = torch.cat([torch.zeros(p.numel(), dtype=p.dtype) if p.grad is None else p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return gradient


def by_items(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum") / num_items_in_batch


def own_mean(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


class Overrides(Trainer):
    """As older code does: a loss of its own, which knows nothing of items."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = own_mean(outputs, labels)
        return (loss, outputs) if return_outputs else loss


class Divides(Overrides):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return by_items(model(**inputs), labels, num_items_in_batch)


class Adds(Trainer):
    """Calls the Trainer's and adds to it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)


def mean(model, batch):
    return model(**batch)["loss"]


def twice(model, batch):
    return 2 * mean(model, batch)


@pytest.mark.parametrize("most", [2, 5])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(
    ("kind", "functions", "right"),
    [
        (Trainer, {}, mean),
        (Trainer, {"compute_loss_func": by_items}, mean),
        (Trainer, {"compute_loss_func": own_mean}, mean),
        (Overrides, {}, mean),
        (Divides, {}, mean),
        (Adds, {}, twice),
    ],
)
def test_whoever_divides_the_gradient_is_that_of_the_whole_batch(tmp_path, kind, functions, right, equal, most):
    model, data = Tagger(), Texts()
    made = trainer(tmp_path, model, data, kind=kind, functions=functions)
    gradient = first_gradient(made, target=22, most=most, equal=equal)
    expected = whole_gradient(model, data, right)
    assert (gradient - expected).norm() / expected.norm() < 1e-12


@pytest.mark.parametrize("unlabelled", [range(6), range(10, 22), [3]])
def test_micro_batches_without_a_label_contribute_nothing(tmp_path, unlabelled):
    model, data = Tagger(), Texts(unlabelled=unlabelled)
    made = trainer(tmp_path, model, data)
    gradient = first_gradient(made, target=22, most=2)
    expected = whole_gradient(model, data, mean)
    assert torch.isfinite(gradient).all() and (gradient - expected).norm() / expected.norm() < 1e-12


def test_label_smoothing_is_exact(tmp_path):
    model, data = Tagger(), Texts()
    model.config = PretrainedConfig()
    made = trainer(tmp_path, model, data, label_smoothing_factor=0.2)
    gradient = first_gradient(made, target=22, most=4)
    expected = whole_gradient(model, data, lambda model, batch: made.label_smoother(model(batch["input_ids"]), batch["labels"]))
    assert (gradient - expected).norm() / expected.norm() < 1e-7  # the smoother sums in single precision


def test_class_weights_are_exact_with_a_count_and_told_without(tmp_path):
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)

    def weighted(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), weight=weights, ignore_index=IGNORED)

    def sum_of_weights(batch):
        labels = batch["labels"]
        return float(weights[labels.clamp(min=0)][labels != IGNORED].sum())

    model, data = Tagger(), Texts()
    functions = {"compute_loss_func": weighted}
    gradient = first_gradient(trainer(tmp_path, model, data, functions=functions), target=22, most=4, count=sum_of_weights)
    expected = whole_gradient(model, data, lambda model, batch: weighted(model(batch["input_ids"]), batch["labels"]))
    assert (gradient - expected).norm() / expected.norm() < 1e-12
    with pytest.warns(UserWarning, match="the gradient of"):
        huggingface.tune(trainer(tmp_path, model, data, functions=functions), target_batch=22, max_micro_batch=4)


def test_a_balance_loss_enters_a_step_once(tmp_path):
    """It is no mean over labels, so it is not exact, and that is told; but it is not multiplied by the micro-batches either."""
    data = Texts()
    with pytest.warns(UserWarning, match="the gradient of"):
        gradient = first_gradient(trainer(tmp_path, Tagger(balance=1.0), data), target=22, most=4)
    without = first_gradient(trainer(tmp_path, Tagger(), data), target=22, most=4)
    expected = whole_gradient(Tagger(balance=1.0), data, mean) - whole_gradient(Tagger(), data, mean)
    assert float((gradient - without) @ expected / (expected @ expected)) == pytest.approx(1.0, abs=0.2)


class Patches(torch.utils.data.Dataset):
    """Pictures of unlike sizes as patches, with one label each."""

    def __init__(self, samples=22):
        generator = torch.Generator().manual_seed(2)
        self.patches = [torch.randn(int(n), 4, dtype=torch.float64, generator=generator) for n in torch.randint(1, 6, (samples,), generator=generator)]

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, index):
        return {"patches": self.patches[index], "labels": torch.tensor(index % 3)}


def flattened(samples):
    return {
        "patches": torch.cat([sample["patches"] for sample in samples]),
        "sizes": torch.tensor([len(sample["patches"]) for sample in samples]),
        "labels": torch.stack([sample["labels"] for sample in samples]),
    }


class Sees(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 3).double()

    def forward(self, patches, sizes, labels):
        pictures = torch.stack([part.mean(0) for part in self.inner(patches).split(sizes.tolist())])
        return {"loss": nn.functional.cross_entropy(pictures, labels)}


def test_batches_of_patches_are_tuned_and_exact(tmp_path):
    model, data = Sees(), Patches()
    made = trainer(tmp_path, model, data, flattened)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient = first_gradient(made, target=22, most=4)
    model.zero_grad()
    model(**flattened([data[index] for index in range(22)]))["loss"].backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - expected).norm() / expected.norm() < 1e-12


def test_what_cannot_be_counted_is_refused_and_the_remedy_works(tmp_path):
    class Nameless(Sees):
        def forward(self, patches, sizes, targets):
            return super().forward(patches, sizes, targets)

    def other_names(samples):
        batch = flattened(samples)
        return {"patches": batch["patches"], "sizes": batch["sizes"], "targets": batch["labels"]}

    with pytest.raises(autoaccum.PlanError, match="give count=, a function of a batch"):
        huggingface.tune(trainer(tmp_path, Nameless(), Patches(), other_names), target_batch=22, max_micro_batch=4)
    model = Nameless()
    gradient = first_gradient(trainer(tmp_path, model, Patches(), other_names), target=22, most=4, count=lambda batch: len(batch["targets"]))
    model.zero_grad()
    model(**other_names([Patches()[index] for index in range(22)]))["loss"].backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - expected).norm() / expected.norm() < 1e-12


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, index):
        return {"x": torch.tensor([float(index)], dtype=torch.float64), "y": torch.tensor(0.5 * index, dtype=torch.float64)}


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.seen = nn.Linear(1, 1).double(), []

    def forward(self, x, y):
        if self.training:
            self.seen += [int(value) for value in x[:, 0]]
        return {"loss": nn.functional.mse_loss(self.inner(x)[:, 0], y)}


class Curriculum(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class Oversampled(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=self._train_batch_size, sampler=[0, 1, 2] * 20, collate_fn=self.data_collator)


class Further(Oversampled):
    """Changes something else, two classes up."""


class Sliced(Trainer):
    """torch gives a loader with a batch sampler another sampler, in the dataset's order."""

    def get_train_dataloader(self):
        slices = torch.utils.data.BatchSampler(list(range(49, -1, -1)), self._train_batch_size, False)
        return DataLoader(self.train_dataset, batch_sampler=slices, collate_fn=self.data_collator)


class OwnBatches(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_sampler=[[0, 1], [2, 3, 4], [5]] * 10, collate_fn=self.data_collator)


def order_of(folder, kind, change=None):
    model = Remembers()
    made = trainer(folder, model, Numbers(), torch.utils.data.default_collate, kind=kind, max_steps=-1, num_train_epochs=1)
    if change is not None:
        change(made)
    plan = huggingface.tune(made, target_batch=25, max_micro_batch=7)
    plan.apply(made)
    model.seen.clear()
    made.train()
    return model.seen


@pytest.mark.parametrize(
    ("kind", "order"), [(Curriculum, list(range(50))), (Oversampled, [0, 1, 2] * 20), (Further, [0, 1, 2] * 20), (Sliced, list(range(49, -1, -1)))]
)
def test_the_users_own_order_of_samples_is_kept(tmp_path, kind, order):
    assert order_of(tmp_path, kind) == order


def test_a_loader_that_was_set_on_the_instance_is_kept_too(tmp_path):
    def change(made):
        made.get_train_dataloader = lambda: DataLoader(made.train_dataset, batch_size=4, sampler=list(range(49, -1, -1)), collate_fn=made.data_collator)

    assert order_of(tmp_path, Trainer, change) == list(range(49, -1, -1))


def test_batches_that_the_user_puts_together_are_refused_and_the_remedy_works(tmp_path):
    with pytest.raises(autoaccum.PlanError, match="equal=True"):
        order_of(tmp_path, OwnBatches)
    made = trainer(tmp_path, Remembers(), Numbers(), torch.utils.data.default_collate, kind=OwnBatches)
    huggingface.tune(made, target_batch=24, max_micro_batch=7, equal=True).apply(made)
    made.train()


def test_a_plan_that_was_made_elsewhere_is_looked_at_when_training_begins(tmp_path):
    """A mean over samples of texts that are padded to the longest of their batch, padding included."""

    class Padding(Tagger):
        def forward(self, input_ids, labels):
            return {"loss": self.head(torch.tanh(self.embedding(input_ids))).pow(2).sum((1, 2)).mean() + 0 * labels.sum()}

    model, elsewhere = Padding(), nn.Linear(1, 1)
    made = trainer(tmp_path, model, Texts())
    plan = autoaccum.tune(
        elsewhere, torch.optim.SGD(elsewhere.parameters(), 0.1), lambda model, batch: model(batch).mean(), torch.ones(4, 1), target_batch=22, max_micro_batch=4
    )
    plan.apply(made)
    with pytest.warns(UserWarning, match="do not add up"):
        made.train()


class Graphs(torch.utils.data.Dataset):
    """Graphs of three to seven nodes; the first dimension of a batch counts nodes."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        drawn = torch.Generator().manual_seed(index)
        return {name: torch.randn(3 + index % 5, generator=drawn, dtype=torch.float64) for name in ("x", "y")}


def put_together(samples):
    return {"x": torch.cat([sample["x"] for sample in samples])[:, None], "y": torch.cat([sample["y"] for sample in samples])}


@pytest.mark.parametrize("equal", [True, False])
def test_a_mean_over_the_nodes_of_graphs_is_exact_and_not_warned_of(tmp_path, equal):
    model = Remembers()
    made = trainer(tmp_path, model, Graphs(), put_together, kind=Curriculum, max_steps=4)
    gradients = []
    made.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    made.optimizer.register_step_pre_hook(lambda *_: gradients.append(model.inner.weight.grad.clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plan = huggingface.tune(made, target_batch=10, max_micro_batch=5 if equal else 4, equal=equal)
        plan.apply(made)
        gradients.clear()
        made.train()
    for step, gradient in enumerate(gradients):
        model.zero_grad()
        model(**put_together([Graphs()[index] for index in range(10 * step, 10 * step + 10)]))["loss"].backward()
        assert float((gradient - model.inner.weight.grad).abs().max()) < 1e-14
    assert len(gradients) == 4


class TooLarge(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_sampler=[list(range(8)), list(range(8, 12))] * 4, collate_fn=self.data_collator)


def test_batches_larger_than_the_micro_batch_are_told(tmp_path):
    made = trainer(tmp_path, Remembers(), Numbers(), torch.utils.data.default_collate, kind=TooLarge)
    huggingface.tune(made, target_batch=12, max_micro_batch=4, equal=True).apply(made)
    with pytest.raises(autoaccum.PlanError, match="gives a batch of 8 samples, and the plan's micro-batches have 4"):
        made.train()
