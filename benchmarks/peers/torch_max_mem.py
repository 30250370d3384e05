"""torch-max-mem's decorator: the window again in slices of half the size, rounded to multiples of 32."""

PACKAGES = ("torch-max-mem",)
SYSTEMS = ("torch-max-mem",)


def run(system, work):
    from torch_max_mem import MemoryUtilizationMaximizer
    from work import in_pieces

    optimizer, last = work.optimizer(), 0

    @MemoryUtilizationMaximizer()
    def window(batch_size):
        nonlocal last
        optimizer.zero_grad()
        pieces = in_pieces(work.target, batch_size)
        if batch_size != last:
            last = batch_size
            work.found(pieces, goes_on=True)
        for size in pieces:
            (work.model(**work.batch(size)) * (size / work.target)).backward()

    for _ in range(work.windows):
        window(batch_size=work.target)
        optimizer.step()
        work.step_was_made(work.target)
    return last
