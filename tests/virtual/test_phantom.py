"""Each test traces in a process of its own."""

import pytest

from tests.simulated import in_a_process

MIB = 2**20
HEAD = "fake.enable(); fake.self_test()\ncard = kernels.Card(80, 0)\n"


def test_what_is_asked_for_at_once_equals_torchs_own_count():
    """torch's MemTracker follows the same storages with code of its own; it rounds each up to 512 bytes."""
    code = """
from torch.distributed._tools.mem_tracker import MemTracker
from autoaccum.data import batches
from autoaccum.simulate.attention import chosen_for
found = {}
for name, make, n in (("mlp", mlp, 64), ("conv", conv, 8), ("decoder", decoder, 16)):
    job = make()
    made = phantom.Phantom([job])
    def loop(begin):
        for _ in range(2):
            begin()
            x = batches.move(made.batch(n), torch.device("cuda"))
            out = job.loss(job.model, x)
            out.backward()
            job.optimizer.step()
            job.optimizer.zero_grad()
            del out, x
    ours = made.recorded(lambda tracer: loop(lambda: None), card)
    seen = [max(-(-size // 512) * 512, 512) if kind != "workspace" else 0 for size, kind in zip(ours.sizes, ours.kinds)]
    ours.sizes[:] = seen
    tracker = MemTracker()
    tracker.track_external(job.model, job.optimizer)
    with chosen_for(80), made._mode, tracker:
        loop(tracker.reset_mod_stats)
    (theirs,) = [each["Total"] for device, each in tracker.get_tracker_snapshot("peak").items() if device.type == "cuda"]
    found[name] = [ours.requested_peak(), theirs]
tell(found)
"""
    for name, (ours, theirs) in in_a_process(HEAD + code).items():
        assert abs(ours - theirs) <= 1e-4 * theirs, (name, ours, theirs)


def test_every_way_of_training_is_traced_and_costs_what_it_must():
    code = """
def peak(job, windows=([16], [16, 16]), capability=80):
    made = phantom.Phantom([job]).tape(windows, kernels.Card(capability, 0))
    ran = tape.replay(made, Allocator())
    return ran.peak_allocated_bytes, tape.held_at(made, ran.peak_event), made.assumed
scaler = torch.amp.GradScaler("cpu")
tell({
    "plain": peak(decoder()),
    "bf16": peak(decoder(autocast=torch.bfloat16)),
    "fp16": peak(decoder(autocast=torch.float16, scaler=scaler, max_grad_norm=1.0)),
    "again": peak(decoder(again=True)),
    "sgd": peak(decoder(optimizer=torch.optim.SGD)),
    "loop": peak(decoder(optimizer_options={"foreach": False})),
    "fused": peak(decoder(optimizer_options={"fused": True})),
    "old": peak(decoder(autocast=torch.bfloat16), capability=75),
    "conv": peak(conv()),
    "asking": peak(asking()),
    "closure": peak(closure_on_a_device()),
    "helped": peak(helped()),
    "elsewhere": peak(elsewhere()),
    "adagrad": peak(decoder(optimizer=torch.optim.Adagrad)),
    "lbfgs": peak(decoder(optimizer=torch.optim.LBFGS, optimizer_options={"history_size": 5})),
})
"""
    found = in_a_process(HEAD + code)
    weights = found["plain"][1]["parameters"]
    assert found["plain"][1]["optimizer"] >= 2 * weights  # Adam's two moments
    assert found["plain"][1]["gradients"] > 0
    assert found["bf16"][0] < found["plain"][0]
    assert found["again"][1]["activations"] < 0.7 * found["plain"][1]["activations"]
    assert found["sgd"][1]["optimizer"] == 0
    assert found["fp16"][1]["optimizer"] >= 2 * weights  # no step was skipped
    assert found["old"][0] > found["bf16"][0]  # attention in its plain form holds what is quadratic in the length
    assert found["conv"][1]["activations"] > 0
    assert any("was taken to be 1" in said for said in found["asking"][2])
    assert found["closure"][0] > 0 and found["helped"][0] > 0 and found["elsewhere"][0] > 0
    assert found["adagrad"][1]["parameters"] == weights and found["adagrad"][1]["optimizer"] >= weights
    assert found["lbfgs"][1]["optimizer"] >= 10 * weights  # five pairs of vectors


def test_gradients_are_accumulated_in_place_and_the_third_micro_batch_peaks_no_higher():
    code = """
made = phantom.Phantom([decoder()])
tell([tape.replay(made.tape([[8], [8] * pieces], card), Allocator()).peak_requested_bytes for pieces in (1, 2, 3, 5)])
"""
    one, two, three, five = in_a_process(HEAD + code)
    assert one < two <= three == pytest.approx(five, rel=1e-3)


def test_only_autograds_own_sums_are_in_place():
    code = """
found = []
for plus in (True, False):
    adds_its_own.plus = plus
    found.append(phantom.Phantom([adds_its_own()]).tape([[512], [512]], card).requested_peak())
tell(found)
"""
    plus, minus = in_a_process(HEAD + code)
    assert plus == minus


def test_the_second_of_two_jobs_books_its_batch_as_its_own():
    code = """
made = phantom.Phantom([mlp(), mlp()])
ran = made.tape([[256], [256]], card)
tell([size for size, kind in zip(ran.sizes, ran.kinds) if kind == "optimizer" and size >= 256 * 256 * 4])
"""
    weights = {256 * 1024 * 4}
    assert set(in_a_process(HEAD + code)) <= weights


def test_a_line_through_two_sizes_tells_a_third():
    code = """
found = {}
for name, job in (("mlp", mlp()), ("conv", conv()), ("decoder", decoder(autocast=torch.bfloat16))):
    made = phantom.Phantom([job])
    low, high, true = (made.tape([[n], [n] * 3], card) for n in (8, 12, 37))
    found[name] = tape.same_tape(tape.Growth(low, high, 8, 12).at(37), true)
tell(found)
"""
    assert in_a_process(HEAD + code) == {"mlp": True, "conv": True, "decoder": True}


@pytest.mark.parametrize(
    ("job", "says"),
    [("ragged", "bincount"), ("hooked", "has a hook on its gradient"), ("sparse", "use dense ones (sparse=False)")],
)
def test_what_cannot_be_traced_says_what_and_what_to_do(job, says):
    code = f"""
from autoaccum.errors import JobError
try:
    phantom.Phantom([{job}()]).tape([[4], [4]], card)
    tell("traced")
except JobError as error:
    tell(str(error))
"""
    told = in_a_process(HEAD + code)
    assert says in told
    assert "\n" not in told


def test_the_approximation_on_cpu_tensors_needs_nothing_of_cuda():
    code = """
made = phantom.Phantom([decoder()], "cpu").tape([[8], [8, 8]], card)
phantom.Phantom([closure_on_a_device()], "cpu").tape([[8], [8, 8]], card)
ran = tape.replay(made, Allocator())
tell([ran.peak_allocated_bytes, tape.held_at(made, ran.peak_event)])
"""
    peak, held = in_a_process(code.replace("card", "kernels.Card(80, 0)"))
    assert held["parameters"] > 0
    assert peak > held["parameters"] * 4


def test_data_keep_their_values_while_a_job_is_built():
    code = """
with without_memory():
    labels = torch.arange(2_000_000, dtype=torch.int32).remainder(7)
    kinds = int(labels.long().clone().max()) + 1
    table = torch.empty(1500, 1000).copy_(torch.ones(1500, 1000) * 3)
    weight = torch.nn.Linear(2000, 2000).to(torch.bfloat16).weight
    parts, out = torch.empty(2_000_000), torch.empty(2_000_000)
    for start in range(0, 2_000_000, 500_000):
        parts[start : start + 500_000] = 5
    torch.add(parts, parts, out=out)
tell([kinds, table.mean().item(), parts.clone().min().item(), out.clone().min().item(), str(weight.dtype), list(weight.shape)])
"""
    assert in_a_process(code) == [7, 3.0, 5.0, 10.0, "torch.bfloat16", [2000, 2000]]


def test_what_a_loss_refers_to_is_on_the_card_once_it_is_used():
    code = """
class Trainer:
    def __init__(self):
        self.weights, self.device, self.data = torch.ones(10), "cpu", torch.zeros(30_000_000)
    def loss(self, model, batch):
        return F.cross_entropy(model(batch[0].to(self.device)), batch[1], weight=self.weights) + len(self.data)
job, shared = mlp(), (torch.ones(10),)
def one(x, held=shared): return x * held[0].sum()
def other(x, held=shared): return x + held[0].sum()
def loss(model, batch): return other(one(F.cross_entropy(model(batch[0]), batch[1])))
found = []
for each in (job.loss, Trainer().loss, loss):
    again = mlp()
    made = phantom.Phantom([autoaccum.Job(again.model, again.optimizer, each, again.batch)]).tape([[8], [8, 8]], card)
    found.append(sum(size for size, kind in zip(made.sizes, made.kinds) if kind == "parameters"))
tell(found)
"""
    plain, held, shared = in_a_process(HEAD + code)
    assert held == shared == plain + 40  # ten numbers; what is only counted stays on the host


def test_an_optimizer_that_was_resumed_in_part_is_traced():
    code = """
job = mlp()
job.model(torch.ones(2, 256)).sum().backward()
for parameter in list(job.model.parameters())[2:]:
    parameter.grad = None
job.optimizer.step()
job.optimizer.zero_grad()
resumed = phantom.Phantom([job]).tape([[8], [8, 8]], card)
tell([tape.replay(each, Allocator()).peak_allocated_bytes for each in (resumed, phantom.Phantom([mlp()]).tape([[8], [8, 8]], card))] + list(resumed.assumed))
"""
    resumed, fresh = in_a_process(HEAD + code)
    assert resumed == pytest.approx(fresh, rel=0.01)


def test_large_weights_are_never_written():
    code = """
import resource
with without_memory():
    job = huge()
    torch.nn.Linear(16384, 16384).to(torch.bfloat16)
fake.enable()
made = phantom.Phantom([job]).tape([[2], [2, 2]], kernels.Card(80, 0))
tell([made.requested_peak(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024])
"""
    peak, resident = in_a_process(code)
    assert peak > 100 * 2**30
    assert resident < 2 * 2**30


def test_tensors_of_classes_of_their_own_are_kept_or_refused_and_never_flattened():
    told = in_a_process(
        """
class Labelled(torch.nn.Parameter):
    "A plain parameter with an attribute."
class Packed(torch.nn.Parameter):
    def cuda(self, device=None): return self
def job(kind):
    model = nn.Linear(8, 8)
    model.weight = kind(torch.randn(8, 8))
    model.weight.lr_scale = 3
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b).mean() * m.weight.lr_scale, torch.randn(4, 8))
fake.enable()
from autoaccum.simulate import Card
told = [len(phantom.Phantom([job(Labelled)]).tape([(2,)], Card(80)).events) > 5]
layer = type("WQLinear", (nn.Module,), {"__module__": "awq.modules.linear", "forward": lambda self, x: x})
try: phantom.Phantom([job(Packed)])
except autoaccum.JobError as error: told.append(str(error))
made = job(torch.nn.Parameter)
made.model.extra = layer()
try: phantom.Phantom([made])
except autoaccum.JobError as error: told.append(str(error))
tell(told)
"""
    )
    assert told[0] is True and told[1].startswith("a Packed holds its values in a form of its own") and told[2].startswith("WQLinear keeps its weights packed")
