"""Ludwig's `BatchSizeEvaluator`, driven as its trainer does: weights and optimizer saved to a file before, put back after.

Its trainer doubles from 1, five steps each, while samples per second grow, at most 20 % of the data and at most the effective
batch; on a CPU at most 512. `effective_batch_size` and `batch_size: auto` make `effective // size` accumulation steps.
"""

PACKAGES = ()
ALONE = ("ludwig",)
SYSTEMS = ("Ludwig",)


def run(system, work):
    import tempfile
    import types

    import torch
    from ludwig.utils import batch_size_tuner
    from work import accumulated

    if work.device is not None:
        batch_size_tuner.time = types.SimpleNamespace(time=work.clock)
    optimizer = work.optimizer()

    class Evaluator(batch_size_tuner.BatchSizeEvaluator):
        def reset(self):
            optimizer.zero_grad()

        def step(self, batch_size, global_max_sequence_length=None):
            work.model(**work.batch(batch_size)).backward()
            optimizer.step()
            optimizer.zero_grad()

    with tempfile.NamedTemporaryFile(suffix=".ckpt") as snapshot:
        torch.save((work.model.state_dict(), optimizer.state_dict()), snapshot.name)
        most = work.target if work.device is not None else min(work.target, 512)
        found = Evaluator().select_best_batch_size(len(work.samples), most)
        weights, state = torch.load(snapshot.name)
        work.model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    work.train(accumulated(work.target, found), optimizer)
    return found
