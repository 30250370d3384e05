"""autoaccum in place: `tune`, then its `Accumulator`. The second line searches the exact largest micro-batch, with nothing
kept aside, for the plain loop to train with."""

from contextlib import contextmanager

PACKAGES = ()  # this checkout, in its own environment
SYSTEMS = ("autoaccum", "autoaccum, learning", "autoaccum, largest=True, headroom=0")  # and "autoaccum, from the host" on a card


def run(system, work):
    import warnings

    from work import in_pieces

    import autoaccum
    from autoaccum.plan.arithmetic import micro_batches

    warnings.simplefilter("ignore")
    if work.device is not None:
        from autoaccum.devices import table

        Simulated.device = work.device
        table._TABLE["cpu"] = (__name__, "Simulated", lambda: True)
    optimizer = work.optimizer()

    def loss(model, batch):
        return model(**batch)

    if "learning" in system:
        return learn(work, optimizer, loss)
    more = {"largest": True, "headroom": 0} if "largest" in system else {}
    plan = autoaccum.tune(work.model, optimizer, loss, work.batch, target_batch=work.target, memory_limit=work.limit_bytes, **more)
    work.trials = len(plan.trials) + 1  # and the comparison of a few samples split and whole
    if more:
        work.train(in_pieces(work.target, plan.largest_fit), optimizer)
        return plan.largest_fit
    work.found(plan.micro_batches)
    loop, sizes = autoaccum.Accumulator(work.model, optimizer, plan), plan.micro_batches
    for _ in range(work.windows):
        result = loop.step(work.as_loaded(work.target), loss)
        if result.rescued:
            sizes = micro_batches(work.target, result.micro_batches)
            work.found(sizes, goes_on=True)
        work.step_was_made(result.samples)
    return sizes[0]


def learn(work, optimizer, loss):
    """No search: the plan is learned in the windows of training."""
    import autoaccum

    loop = autoaccum.Accumulator(work.model, optimizer, target_batch=work.target, memory_limit=work.limit_bytes)
    work.found(loop.plan.micro_batches)
    for _ in range(work.windows):
        result = loop.step(work.as_loaded(work.target), loss)
        work.found(loop.plan.micro_batches, goes_on=True)
        work.step_was_made(result.samples, result.micro_batches)
    return loop.plan.micro_batch


class Simulated:
    """A simulated device as a backend: what it says of its memory is what a card's allocator would."""

    device = None
    allocator, exact_peak, enforces, shared_with_host = "", True, True, False

    def __init__(self):
        from autoaccum.devices.memory import Facts

        self.facts = Facts("cpu", None, "simulated", None)
        self._most = self._lap = 0

    def memory(self, *, who=True):
        from simulated import BUDGET

        from autoaccum.devices.memory import Memory

        return Memory(BUDGET, BUDGET - self.held_bytes(), self.held_bytes(), 0, (), "physical")

    def held_bytes(self):
        return int(self.device.held())

    live_bytes = held_bytes

    @contextmanager
    def watch(self):
        self._most = self._lap = self.held_bytes()
        self.device.when_taken = self._taken
        yield self

    def _taken(self):
        now = int(self.device.held() + self.device.held_by_activations)
        self._most, self._lap = max(self._most, now), max(self._lap, now)

    def peak_bytes(self):
        return max(self._most, self.held_bytes())

    def lap_bytes(self):
        lap, self._lap = max(self._lap, self.held_bytes()), 0
        return lap

    def restart(self):
        self._most = self._lap = 0

    def retries(self):
        return 0

    @contextmanager
    def capped(self, budget_bytes):
        before, self.device.limit = self.device.limit, float(budget_bytes)
        try:
            yield
        finally:
            self.device.limit = before

    def prepare(self):
        pass

    synchronize = release = prepare
