"""Weights in four and eight bits and 8-bit optimizers, of the real bitsandbytes, on a card that is not here."""

import json
from dataclasses import replace

import pytest

from autoaccum.probe import Child, Limits
from autoaccum.window import parse_source
from tests.simulated import in_a_process

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

HEAD = """
import bitsandbytes as bnb
from torch import nn
from autoaccum.probe import Limits
from autoaccum.simulate import profiles
from autoaccum.virtual.simulation import Simulation
fake.enable()
WIDE, HIGH = 512, 2048

def job(layer, optimizer=torch.optim.AdamW, moved=False):
    model = nn.Sequential(nn.Linear(WIDE, WIDE), layer(WIDE, HIGH), nn.GELU(), layer(HIGH, WIDE), nn.Linear(WIDE, 1))
    if moved: model.to("cpu")  # packs on the host
    return autoaccum.Job(model, optimizer([each for each in model.parameters() if each.requires_grad], lr=1e-3), lambda m, b: m(b).mean(), torch.zeros(4, WIDE))

def told_of(job):
    card = Simulation([job], profiles.load("t4"), Limits()).estimate(64)
    return {"peak": card.peak_bytes, "warnings": card.warnings, "sizes": card.micro_batches, **card.breakdown}
"""
PLAIN = 4 * (512 * 512 + 512 + 512 + 1 + 2048 + 512)  # bytes of the weights and biases that stay in fp32
PACKED = 2 * 512 * 2048  # weights


def test_weights_take_what_their_storage_takes_and_are_unpacked_layer_by_layer():
    told = in_a_process(
        HEAD
        + """
four = lambda *sizes, **given: bnb.nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.bfloat16, **given)
tell({"plain": told_of(job(nn.Linear)), "scaled": told_of(job(lambda *sizes: four(*sizes, compress_statistics=False))), "twice": told_of(job(four)),
      "eight": told_of(job(lambda *sizes: bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0))), "moved": told_of(job(four, moved=True))})
"""
    )
    assert told["plain"]["parameters"] == pytest.approx(PLAIN + 4 * PACKED, rel=0.01)
    assert told["scaled"]["parameters"] == pytest.approx(PLAIN + PACKED / 2 + 4 * PACKED / 64, rel=0.01)  # a scale in fp32 for 64 weights
    assert told["twice"]["parameters"] == pytest.approx(PLAIN + PACKED / 2 + PACKED / 64 + 4 * PACKED / 64 / 256, rel=0.01)
    assert told["eight"]["parameters"] == pytest.approx(PLAIN + PACKED + 4 * (2048 + 512), rel=0.01)
    assert told["moved"] == told["twice"]
    for name in ("scaled", "twice", "eight"):
        assert told[name]["peak"] < told["plain"]["peak"] and not told[name]["warnings"], name


def test_the_state_of_an_eight_bit_optimizer_is_a_quarter_and_pages_are_on_the_host():
    told = in_a_process(
        HEAD
        + """
optimizers = {"torch": torch.optim.AdamW, "whole": bnb.optim.AdamW, "eight": bnb.optim.AdamW8bit, "one state": bnb.optim.Lion8bit, "paged": bnb.optim.PagedAdamW8bit}
tell({name: told_of(job(nn.Linear, each)) for name, each in optimizers.items()})
"""
    )
    state = {name: each["optimizer"] for name, each in told.items()}
    assert state["whole"] == pytest.approx(state["torch"], rel=0.01)
    assert state["eight"] == pytest.approx(state["torch"] / 4 * (1 + 4 / 256), rel=0.02)
    assert state["one state"] == pytest.approx(state["eight"] / 2, rel=0.02)
    assert state["paged"] < 0.1 * state["eight"]
    for each in told.values():  # the window is evaluated once
        assert each["gradients"] == each["parameters"] and not each["warnings"]


def test_qlora_from_a_configuration_alone_and_as_a_what_if(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 500})
    )

    def estimated(*changes, **settings):
        source = parse_source(f"hf:{tmp_path}", [f"{name}={value}" for name, value in {"length": 32, **settings}.items()])
        with Child(replace(source, changes=changes), "virtual:t4", Limits()) as child:
            return child.simulated("estimated", gpu="t4", target=4)

    linear = 4 * 512 * 512 + 3 * 512 * 2048
    packed = estimated(lora="r=8", quantize="nf4", optimizer="paged_adamw8bit")
    assert packed["breakdown"]["parameters"] == pytest.approx(linear / 2 * (1 + 1 / 32) + 2 * 500 * 512 * 4 + 4 * 8 * (4 * 1024 + 3 * 2560), rel=0.03)
    assert estimated("nf4", "lora", "checkpointing")["peak_bytes"] < estimated("lora", "checkpointing")["peak_bytes"]
