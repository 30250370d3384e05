"""Accelerate's `find_executable_batch_size`, as in its example "automatic gradient accumulation": all is built inside, after a seed."""

PACKAGES = ("accelerate",)
SYSTEMS = ("Accelerate",)


def run(system, work):
    from accelerate import Accelerator
    from accelerate.utils import find_executable_batch_size
    from work import accumulated

    accelerator = Accelerator(cpu=work.place == "cpu")
    answer = 0

    @find_executable_batch_size(starting_batch_size=work.target)
    def train(batch_size):
        nonlocal accelerator, answer
        accelerator.free_memory()
        answer, sizes = batch_size, accumulated(work.target, batch_size)
        accelerator = Accelerator(cpu=work.place == "cpu", gradient_accumulation_steps=len(sizes))
        work.seed()
        model, optimizer = accelerator.prepare(work.build(), work.optimizer())
        work.found(sizes)
        seen = 0
        while work.stepped < work.windows:
            for batch in accelerator.prepare(work.loader(batch_size)):
                with accelerator.accumulate(model):
                    seen += len(batch["inputs"])
                    accelerator.backward(model(**batch))
                    optimizer.step()
                    if accelerator.sync_gradients:
                        work.step_was_made(seen)
                        seen = 0
                    optimizer.zero_grad()
                if work.stepped == work.windows:
                    break

    train()
    return answer
