"""Jobs whose course depends on values, on chance, or on the card: a simulated one has none of these, and says what it took instead."""

import pytest

from tests.simulated import in_a_process

HEAD = """
from torch import nn
from torch.nn import functional as F
from autoaccum.simulate import Card, CardFacts, replay
import random, warnings
warnings.simplefilter("ignore")
fake.enable()

def traced(model, loss, batch, card=Card(80), sizes=(4, 4), uneven=False):
    job = autoaccum.Job(model, torch.optim.Adam(model.parameters()), loss, batch)
    made = phantom.Phantom([job])
    tape = made.tape([sizes[:1], sizes], card, uneven=uneven)
    return tape, made
"""

LOSSES = {
    "distributions": "lambda m, b: -torch.distributions.Normal(m(b), m(b).exp()).log_prob(b).mean() + torch.distributions.Gamma(b.exp(), m(b).exp()).rsample().mean()",
    "asserts": "lambda m, b: (m(b) * (1 if (b == b).all() and not torch.isnan(b).any() and b.isnan().sum() == 0 else 1 / 0)).mean()",
    "lists": "lambda m, b: m(b).mean() * len(b.sum(-1).tolist())",
    "cond": "lambda m, b: torch.cond(b.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (m(b),)).mean()",
    "flex": "lambda m, b: torch.nn.attention.flex_attention.flex_attention(*[m(b).view(-1, 1, 1, 16).expand(-1, 2, 128, 16)] * 3).mean()",
    "questions": "lambda m, b: (m(b) + torch.ones(16, device='cuda' if torch.cuda.is_available() else 'cpu')).mean() * torch.cuda.get_device_properties(0).multi_processor_count",
    "device_literal": "lambda m, b: (m(b.cuda()) + torch.tensor(1.0, device='cuda')).mean()",
    "margin": "lambda m, b: F.multi_margin_loss(m(b), torch.zeros(len(b), dtype=torch.long, device=b.device))",
    "ctc_host_lengths": "lambda m, b: F.ctc_loss(m(b).view(len(b), 4, 4).log_softmax(-1).transpose(0, 1), torch.ones(len(b), 2, dtype=torch.long, device=b.device), torch.full((len(b),), 4), torch.full((len(b),), 2))",
    "least_squares": "lambda m, b: torch.linalg.lstsq(m(b).view(-1, 4, 4), b.view(-1, 4, 4)).solution.mean()",
    "equal": "lambda m, b: m(b).mean() if not torch.equal(b, b + 1) else 1 / 0",
}


@pytest.fixture(scope="module")
def courses():
    code = HEAD + "import torch.nn.attention.flex_attention\ntold = {}\n"
    for name, loss in LOSSES.items():
        code += f"""
try: told["{name}"] = len(traced(nn.Linear(16, 16), {loss}, torch.rand(4, 16))[0].events)
except Exception as error: told["{name}"] = f"{{type(error).__name__}}: {{error}}"
"""
    return in_a_process(code + "tell(told)")


@pytest.mark.parametrize("name", LOSSES)
def test_a_course_that_depends_on_values_is_traced(courses, name):
    assert isinstance(courses[name], int) and courses[name] > 10, courses[name]


REFUSED = {
    "lambda m, b: m(torch.repeat_interleave(b, torch.ones(len(b), dtype=torch.long, device=b.device), dim=0)).mean()": "give it output_size=",
    "lambda m, b: m(b).mean() + torch.nested.nested_tensor(list(b.unbind()), layout=torch.jagged).sum(1).mean()": "nested tensors cannot be simulated",
    "lambda m, b: m(b).to_sparse().sum()": "layout torch.sparse_coo, which cannot be simulated",
}


def test_what_has_no_answer_is_refused_in_a_sentence():
    code = HEAD + "from autoaccum.errors import JobError\ntold = []\n"
    for loss in REFUSED:
        code += f"""
try: traced(nn.Linear(16, 16), {loss}, torch.rand(4, 16)); told.append("traced")
except JobError as error: told.append(str(error))
"""
    for says, said in zip(REFUSED.values(), in_a_process(code + "tell(told)")):
        assert says in said and "INTERNAL ASSERT" not in said


def test_recurrent_layers_of_every_kind_and_packed_sequences():
    told = in_a_process(
        HEAD
        + """
class Packed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.r, self.o = getattr(nn, kind)(8, 16, batch_first=True, num_layers=2, bidirectional=True), nn.Linear(32, 1)
    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, sizes = nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.o(out)
def plain(model, batch): return model.o(model.r(batch[0])[0]).mean()
def packed(model, batch): return model(*batch).mean()
told = {}
for kind in ("LSTM", "GRU", "RNN"):
    batch = (torch.randn(4, 5, 8), torch.tensor([5, 4, 3, 2]))
    told[kind] = [traced(Packed(kind), loss, batch)[0].requested_peak() for loss in (plain, packed)]
cells = nn.ModuleList([nn.GRUCell(8, 8), nn.LSTMCell(8, 8, bias=False), nn.RNNCell(8, 8)])
told["cells"] = len(traced(cells, lambda m, b: m[0](b).mean() + m[1](b)[0].mean() + m[2](b).mean(), torch.randn(4, 8))[0].events)
tape, made = traced(Packed("GRU"), packed, (torch.randn(4, 5, 8), torch.tensor([5, 4, 3, 2])))
told["said"] = list(tape.assumed)
tell(told)
"""
    )
    assert told["cells"] > 10
    for kind in ("LSTM", "GRU", "RNN"):
        plain, packed = told[kind]
        assert plain <= packed < 1.6 * plain  # the packed copy and the padded one are added
    assert told["said"] and all("full length" in line and "an upper bound" in line for line in told["said"])


MIXTURE = """
class Mixture(nn.Module):
    def __init__(self, experts=8):
        super().__init__()
        self.gate, self.experts = nn.Linear(32, experts), nn.ModuleList(nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32)) for _ in range(experts))
    def forward(self, x):
        flat = x.reshape(-1, 32)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            PICKED
        return out
"""
WAYS = {
    "where": "token, place = torch.where(chosen == number); out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])",
    "mask": "mask = (chosen == number).any(-1)\n            if mask.any(): out[mask] = out[mask] + expert(flat[mask])",
    "one_hot": "token = F.one_hot(chosen, 8).permute(2, 1, 0)[number].nonzero()[:, 1]; out.index_add_(0, token, expert(flat[token]))",
    "numpy": "parts = flat.repeat(2, 1).split([int(each) for each in torch.bincount(chosen.flatten(), minlength=8).cpu().numpy()]); out = out + expert(parts[number]).sum()",
    "counts": "parts = flat.repeat(2, 1).split(torch.bincount(chosen.flatten(), minlength=8).tolist()); out = out + expert(parts[number]).sum()",
}


@pytest.fixture(scope="module")
def mixtures():
    """By way: peaks of the even split, of the worst, and of a dense layer that sees each token twice; the experts, and what was assumed."""
    code = (
        HEAD
        + """
told, loss = {}, lambda m, b: m(b).square().mean()
dense = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32))
twice, _ = traced(dense, lambda m, b: m(b.reshape(-1, 32).repeat(2, 1)).square().mean(), torch.randn(4, 256, 32))
"""
    )
    for way, picked in WAYS.items():
        code += (
            MIXTURE.replace("PICKED", picked)
            + f"""
even, made = traced(Mixture(), loss, torch.randn(4, 256, 32))
worst, _ = traced(Mixture(), loss, torch.randn(4, 256, 32), uneven=True)
told["{way}"] = [even.requested_peak(), worst.requested_peak(), twice.requested_peak(), made.experts, list(even.assumed)]
"""
        )
    return in_a_process(code + "tell(told)")


def test_classes_that_are_compared_with_labels_are_no_experts():
    told = in_a_process(
        HEAD
        + """
def loss(m, b):
    scores = m(b)
    labels = torch.zeros(len(b), dtype=torch.long, device=b.device)
    return F.cross_entropy(scores, labels) + scores[scores.argmax(1) != labels].mean()
tape, made = traced(nn.Linear(16, 8), loss, torch.rand(4, 16))
tell([made.experts, list(tape.assumed)])
"""
    )
    assert told[0] == 0 and "an upper bound" in told[1][0]


@pytest.mark.parametrize("way", WAYS)
def test_an_experts_tokens_are_an_even_part_and_the_worst_split_is_told(mixtures, way):
    even, worst, twice, experts, assumed = mixtures[way]
    assert experts == 8 and not [line for line in assumed if "every element" in line]
    assert 0.9 * even <= worst < 2.5 * even  # all tokens through two of the experts hold as many activations
    assert 0.5 * twice < even < 3 * twice  # two experts for each token, not eight


def test_sizes_drawn_at_random_are_the_largest_of_several_and_every_trace_draws_alike():
    told = in_a_process(
        HEAD
        + """
from autoaccum.virtual.simulation import Simulation
from autoaccum.simulate import profiles
from autoaccum.probe import Limits
def loss(m, b): return m(b.repeat(1, random.choice([1, 2, 4, 8, 16])).view(-1, 64)).square().mean()
def plan(loss):
    model = nn.Linear(64, 512)
    job = autoaccum.Job(model, torch.optim.Adam(model.parameters()), loss, torch.randn(4, 64))
    return Simulation([job], profiles.load("24GiB"), Limits()).estimate(65536)
state = random.getstate()
drawn = plan(loss)
largest = plan(lambda m, b: m(b.repeat(1, 16).view(-1, 64)).square().mean())
tell([drawn.micro_batch, largest.micro_batch, list(drawn.warnings), drawn.largest_micro_batch, drawn.fits, random.getstate() == state])
"""
    )
    drawn, largest, warnings, most, fits, untouched = told
    assert untouched and fits and most > 0
    assert largest <= drawn <= 2 * largest  # six draws of five sizes, of which one window holds several
    assert any("draws sizes at random" in line for line in warnings)


def test_a_job_is_told_the_facts_of_its_card_and_cards_with_other_facts_have_tapes_of_their_own():
    told = in_a_process(
        HEAD
        + """
from autoaccum.virtual.simulation import Simulation
from autoaccum.simulate import profiles
from autoaccum.probe import Limits
names = []
def loss(m, b):
    names.append(torch.cuda.get_device_name())
    assert torch.cuda.get_device_properties(0).total_memory == torch.cuda.mem_get_info()[1]
    more = 2 if torch.cuda.get_device_capability() >= (8, 0) else 1
    return m(b.repeat(more, 1)).square().mean()
model = nn.Linear(64, 4096)
simulation = Simulation([autoaccum.Job(model, torch.optim.Adam(model.parameters()), loss, torch.randn(4, 64))], profiles.load("t4"), Limits())
peaks = [simulation.estimate(4096, both=False).peak_bytes]
simulation.use(profiles.load("a100-40gb"))
peaks.append(simulation.estimate(4096, both=False).peak_bytes)
tell([peaks, sorted(set(names)), torch.cuda.is_available()])
"""
    )
    (old, new), names, available = told
    assert new > 1.5 * old and len(names) == 2 and any("T4" in name for name in names) and not available


def test_softmax_in_float32_of_halves_takes_its_backwards_product_in_float32():
    told = in_a_process(
        """
from autoaccum.simulate import Card
halves, singles = torch.empty(4, 8, dtype=torch.float16), torch.empty(4, 8)
tell([[piece.nbytes for piece in kernels.taken("_softmax_backward_data", (gradient, output), [halves], Card(75))]
      for gradient, output in ((singles, singles), (halves, halves))])
"""
    )
    assert told == [[4 * 8 * 4], [4 * 8 * 2]]
