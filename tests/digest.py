"""A digest of everything that tuning promises not to change, written without looking at how snapshots work."""

import hashlib
import pickle
import random

import numpy as np
import torch


def digest(model, *others):
    """Hex digest of tensors (contents and identity), gradients, modes, plain attributes, and all generators."""
    told = []
    for name, module in model.named_modules():
        told.append((name, module.training, sorted(key for key in vars(module) if key not in ("_buffers", "_parameters", "_modules"))))
        for key, value in sorted({**vars(module), **module._buffers}.items(), key=lambda item: item[0]):
            if isinstance(value, torch.Tensor):
                told.append((name, key, id(value), tensor(value)))
            elif isinstance(value, (int, float, str)):
                told.append((name, key, value))
            elif isinstance(value, list):
                told.append((name, key, [tensor(each) if isinstance(each, torch.Tensor) else each for each in value]))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        told.append((name, id(parameter), parameter.data_ptr(), parameter.requires_grad, tensor(parameter), tensor(parameter.grad)))
    told += [state(each) for each in others]
    told += [random.getstate(), [str(each) for each in np.random.get_state()], tensor(torch.get_rng_state())]
    told += [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), str(torch.get_default_dtype())]
    return hashlib.sha256(pickle.dumps(told)).hexdigest()


def tensor(value):
    return None if value is None else (str(value.dtype), tuple(value.shape), value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def state(thing):
    """`state_dict` with tensors as bytes; for a scaler also what its `state_dict` leaves out."""
    extra = str(sorted(getattr(thing, "_per_optimizer_states", {}).items(), key=str)) if hasattr(thing, "_per_optimizer_states") else ""
    return [flat(thing.state_dict()), extra, type(thing.__dict__.get("step", None)).__name__]


def flat(value):
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if isinstance(value, dict):
        return [(str(key), flat(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [flat(each) for each in value]
    return str(value)
