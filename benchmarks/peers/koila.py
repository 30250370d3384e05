"""koila's `lazy` batches: it splits by what it believes to be free, in powers of two, without being asked for a size.

It asks NVML for what is free, and where no card is found it runs the batch whole; nothing can tell it of a simulated device.
"""

PACKAGES = ("koila", "pynvml<12")  # of later ones `pynvml.smi`, which it imports, is gone
SYSTEMS = ("koila",)
WHY_NOT_SIMULATED = "asks NVML what is free and never reacts to an out-of-memory"


def run(system, work):
    import warnings

    warnings.simplefilter("ignore")
    from koila import lazy

    optimizer = work.optimizer()
    work.found([work.target])
    for _ in range(work.windows):
        batch = work.batch(work.target)
        inputs, targets = lazy(batch["inputs"], batch["targets"], batch=0)
        work.model(inputs=inputs, targets=targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        work.step_was_made(work.target)
    return work.target
