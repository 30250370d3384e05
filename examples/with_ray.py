"""Ray Train at an effective batch of 120 over two workers, each with what its GPU holds: `pip install 'ray[train]'`.

python examples/with_ray.py
"""

import ray
import ray.train.torch
import torch
from ray.train import ScalingConfig
from torch.utils.data import DataLoader, TensorDataset

import autoaccum


def loss(model, batch):
    inputs, targets = batch
    return torch.nn.functional.mse_loss(model(inputs), targets)


def train():
    """What every worker runs. Ray has started the process group."""
    torch.manual_seed(0)
    device = ray.train.torch.get_device()
    inputs = torch.randn(1300, 8)
    dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = ray.train.torch.prepare_model(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)).to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    plan = autoaccum.tune(model, optimizer, loss, dataset[:8], target_batch=120, max_micro_batch=20)
    loop = autoaccum.Accumulator(model, optimizer, plan)
    loader = DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset))  # not prepare_data_loader: the plan's sampler gives each worker its share
    for epoch in range(3):
        results = [loop.step(window, loss) for window in plan.windows(loader)]
        ray.train.report({"epoch": epoch, "loss": results[-1].loss})
        if plan.rank == 0:
            samples = sum(result.samples for result in results)
            print(f"epoch {epoch + 1}  loss {results[-1].loss:.4f}  {len(results)} steps, {samples} samples")


if __name__ == "__main__":
    scaling = ScalingConfig(num_workers=2, use_gpu=torch.cuda.is_available())
    ray.train.torch.TorchTrainer(train, scaling_config=scaling).fit()
