import gc

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.simulate.allocator_settings import Settings

MIB = 2**20


def trained(samples, width=256):
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        inputs = torch.randn(samples, width)
        (model(inputs) - inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_loop_that_halves_when_memory_runs_out_ends_at_what_fits():
    """The usual recipe, unchanged, on a card that is not here."""
    samples, refused = 16384, 0
    with autoaccum.VirtualGpu("48MiB") as gpu:
        while True:
            try:
                trained(samples)
                break
            except torch.OutOfMemoryError as error:
                assert "CUDA out of memory. Tried to allocate" in str(error)
                refused += 1
                samples //= 2
                gc.collect()
                gpu.empty_cache()
        assert gpu.max_memory_reserved() <= 48 * MIB
    assert refused >= 2
    with autoaccum.VirtualGpu("48MiB"), pytest.raises(torch.OutOfMemoryError):
        trained(2 * samples)


def test_it_runs_out_in_backward_too():
    with autoaccum.VirtualGpu("74MiB"):
        hidden = weight = torch.ones(10 * MIB // 4, requires_grad=True)
        for _ in range(6):
            hidden = hidden.exp()  # each keeps 10 MiB for backward
        loss = hidden.sum()
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
    assert weight.grad is None


def test_every_storage_is_charged_once_and_given_back():
    with autoaccum.VirtualGpu("1GiB") as gpu:
        whole = torch.ones(4 * MIB // 4)
        view = whole[10:].reshape(-1).detach()
        assert gpu.memory_allocated() == 4 * MIB
        whole = whole * 2
        assert gpu.memory_allocated() == 8 * MIB
        del view, whole
        assert gpu.memory_allocated() == 0
        assert gpu.memory_reserved() == 20 * MIB  # cached
        assert gpu.memory_stats()["allocated_bytes.all.peak"] == 8 * MIB


def test_what_was_made_outside_is_charged_when_it_is_used():
    weight = torch.ones(4 * MIB // 4)
    with autoaccum.VirtualGpu("1GiB") as gpu:
        assert gpu.memory_allocated() == 0
        weight.add_(1)
        assert gpu.memory_allocated() == 4 * MIB
    assert gpu.memory_allocated() == 0
    assert weight[0] == 2  # and lives on


def test_what_is_resized_is_charged_anew():
    with autoaccum.VirtualGpu("64MiB") as gpu:
        grown = torch.empty(1)
        grown.resize_(4 * MIB // 4)
        assert gpu.memory_allocated() == 4 * MIB
        with pytest.raises(torch.OutOfMemoryError):
            grown.resize_(100 * MIB)


def test_garbage_that_dies_while_the_allocator_works_does_no_harm():
    class Cycle:
        def __init__(self, tensor):
            self.tensor, self.me = tensor, self

    kept = gc.get_threshold()
    gc.set_threshold(3, 1, 1)
    try:
        with autoaccum.VirtualGpu("1GiB") as gpu:
            for number in range(400):
                Cycle(torch.empty(1000 * (number % 97 + 1)))
            gc.collect()
            assert gpu.memory_allocated() == 0
            assert sum(block.size for block in gpu.allocator.blocks()) == gpu.memory_reserved()
    finally:
        gc.set_threshold(*kept)


def test_the_hosts_own_work_is_not_charged():
    with autoaccum.VirtualGpu("64MiB") as gpu:
        with gpu.paused():
            data = torch.zeros(100 * MIB // 4)
        gpu.on_host([data])
        piece = data[:10].clone()
        assert gpu.memory_allocated() == 512
        del piece


def test_results_are_those_without_it():
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    inputs = torch.randn(4, 8)
    plain = model(inputs)
    with autoaccum.VirtualGpu("t4"):
        assert torch.equal(model(inputs), plain)


def test_the_allocators_settings_count():
    how = Settings(expandable_segments=True)
    with autoaccum.VirtualGpu("1GiB", settings=how) as gpu:
        kept = torch.empty(25 * MIB, dtype=torch.uint8)
        assert gpu.memory_reserved() == 40 * MIB
        del kept


def test_a_named_card_has_its_context_taken_off():
    gpu = autoaccum.VirtualGpu("t4")
    assert gpu.allocator.available_bytes == gpu.profile.total_bytes - gpu.profile.context_bytes
    assert repr(gpu) == "<VirtualGpu Tesla T4: 0 B of 14.4 GiB reserved>"


def test_bad_ones_are_told():
    with pytest.raises(autoaccum.UsageError, match="no GPU data file for 'tt4'"):
        autoaccum.VirtualGpu("tt4")
    for wrong in (-5, 8.0, True, 0):
        with pytest.raises(autoaccum.UsageError):
            autoaccum.VirtualGpu(wrong)
    with autoaccum.VirtualGpu("1GiB") as gpu, pytest.raises(autoaccum.UsageError, match="in use already"), gpu:
        pass


def test_the_accumulating_loop_is_rescued_on_it():
    from tests.plans import by_hand

    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 1))
    job = autoaccum.Job(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]),
        (torch.randn(2048, 64), torch.randn(2048, 1)),
    )
    with autoaccum.VirtualGpu("10MiB"):
        loop = autoaccum.Accumulator(job, by_hand([job], 2048, 2048))
        result = loop.step(job.batch)
    assert result.rescued is not None
    assert result.samples == 2048
    assert loop.micro_batch < 2048
