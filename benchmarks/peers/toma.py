"""toma's `toma.range`: the window in slices, halved on an out-of-memory and remembered."""

PACKAGES = ("toma",)
SYSTEMS = ("toma",)


def run(system, work):
    from toma import toma
    from work import in_pieces

    optimizer, last = work.optimizer(), 0

    @toma.range(initial_step=work.target)
    def slices(start, end):
        nonlocal last
        step = end - start
        if step != last and (end < work.target or start == 0):
            last = step
            work.found(in_pieces(work.target, step), goes_on=True)
        (work.model(**work.batch(step)) * (step / work.target)).backward()

    for _ in range(work.windows):
        slices(0, work.target)
        optimizer.step()
        optimizer.zero_grad()
        work.step_was_made(work.target)
    return last
