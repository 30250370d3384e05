"""The textbook's search: double until it runs out of memory, then bisect; one forward, backward and step each."""

PACKAGES = ()
SYSTEMS = ("textbook",)


def run(system, work):
    from work import accumulated

    optimizer = work.optimizer()

    def fits(size):
        try:
            work.model(**work.batch(size)).backward()
            optimizer.step()
            return True
        except (RuntimeError, MemoryError):
            return False
        finally:
            optimizer.zero_grad()

    largest = work.target
    low, high = 0, 1
    while high <= largest and fits(high):
        low, high = high, 2 * high
    high = min(high, largest + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not low:
        raise RuntimeError("not one sample fits")
    work.train(accumulated(work.target, low), optimizer)
    return low
