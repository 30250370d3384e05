"""token_mean: exact over windows of unlike lengths, padding and all."""

import pytest
import torch

import autoaccum
from autoaccum.data.windows import Window
from autoaccum.window import accumulation, losses
from tests.probe.test_equivalence import Speaker, ragged
from tests.window.test_accumulation import Recorder

CPU = torch.device("cpu")


def stepped(model, batch, sizes, **given):
    model = model.double()
    optimizer = Recorder(model.parameters(), lr=0.0)
    job = autoaccum.Job(model, optimizer, autoaccum.token_mean, batch, **given)
    accumulation.run(job, job.loss, Window.of([batch]).cut(sizes), samples=sum(sizes), device=CPU)
    return optimizer.stepped


@pytest.mark.parametrize("sizes", [(20,), (8, 8, 4), (7, 7, 6), (1,) * 20, (13, 7)])
def test_the_gradient_of_every_split_is_that_of_the_mean_over_all_labels(sizes):
    batch = ragged(20)
    batch["labels"][0] = -100  # a sample, alone in its micro-batch in one of the splits, in which nothing counts
    whole = Speaker().double()
    whole(**batch).loss.backward()
    for parameter, ours in zip(whole.parameters(), stepped(Speaker(), batch, sizes)):
        torch.testing.assert_close(parameter.grad, ours, rtol=1e-12, atol=1e-15)


def test_a_count_given_beforehand_changes_nothing():
    batch = ragged(20)
    before = stepped(Speaker(), batch, (8, 8, 4), count=lambda piece: (piece["labels"] != -100).sum())
    for one, other in zip(before, stepped(Speaker(), batch, (8, 8, 4))):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


class TinyForCausalLM(Speaker):
    """Named as Transformers names those that predict the next token."""


class TinyForMaskedLM(Speaker):
    pass


class Wrapped(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_models_that_predict_the_next_token_are_known_by_their_class_also_wrapped():
    assert losses.predicts_next(Wrapped(TinyForCausalLM())) and not losses.predicts_next(TinyForMaskedLM())
    translator = TinyForCausalLM()
    translator.config = type("Config", (), {"is_encoder_decoder": True})
    assert not losses.predicts_next(translator)
    total, count = autoaccum.token_mean(TinyForCausalLM(shifted=True), ragged())
    assert count == (ragged()["labels"][:, 1:] != -100).sum() and total > 0


def test_what_it_needs_is_told():
    with pytest.raises(autoaccum.JobError, match=r"under 'labels', and this one has \['input_ids'\]"):
        autoaccum.token_mean(Speaker(), {"input_ids": torch.zeros(2, 3)})
    with pytest.raises(autoaccum.JobError, match="returned no "):
        autoaccum.token_mean(lambda **batch: torch.zeros(1), ragged())
