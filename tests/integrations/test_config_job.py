"""A job from a configuration file alone, and a Trainer as it stands, on cards that are not here."""

import json
import subprocess
import sys

import pytest
import torch

from autoaccum.errors import UsageError
from autoaccum.integrations import config_job
from autoaccum.probe import Request
from autoaccum.virtual import estimate_source
from autoaccum.window import parse_source
from tests import command_line

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

SMALL = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return f"hf:{tmp_path}/config.json"


def estimated(config, **settings):
    source = parse_source(config, [f"{name}={value}" for name, value in settings.items()])
    return estimate_source(source, Request(64), ["t4"], on_output=lambda _: None).as_dict()["gpus"][0]


def test_a_configuration_is_estimated_in_full_and_with_lora(config):
    folder = config.removesuffix("/config.json")
    full, lora, short = estimated(config), estimated(config, lora="r=8"), estimated(folder, length=128)
    weights = 4 * (1000 * 256 * 2 + 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512 + 2 * 256) + 256)
    assert full["breakdown"]["parameters"] == pytest.approx(weights, rel=0.02)  # in fp32
    assert lora["breakdown"]["parameters"] < 0.65 * weights and lora["breakdown"]["optimizer"] < 0.2 * full["breakdown"]["optimizer"]
    assert short["measured_at"]["input_ids"][1] == 128 and full["measured_at"]["input_ids"][1] == 512


@pytest.mark.parametrize("saved", ["float16", "bfloat16"])
def test_the_type_that_weights_were_saved_in_is_not_the_type_they_are_trained_in(tmp_path, saved):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "torch_dtype": saved}))
    job = config_job.make_job(str(tmp_path / "config.json"))
    assert {parameter.dtype for parameter in job.model.parameters()} == {torch.float32}
    adapted = config_job.make_job(str(tmp_path), lora="r=8", precision="fp16")
    assert {parameter.dtype for parameter in adapted.model.parameters() if not parameter.requires_grad} == {torch.float16}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"length": 4096}, "the model's 512 positions"),
        ({"lora": "rank=8"}, "--lora takes r=, alpha=, targets=, dropout="),
        ({"lora": "r=x"}, "r and alpha are whole numbers"),
        ({"lora": "r=8,targets=nowhere"}, "--lora 'r=8,targets=nowhere'"),
        ({"precision": "int3"}, "precision must be one of"),
    ],
)
def test_settings_that_are_none_are_refused_in_a_sentence(config, settings, says):
    with pytest.raises(UsageError) as refused:
        config_job.make_job(config.removeprefix("hf:"), **settings)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_setting_that_there_is_not_is_refused_on_the_command_line(config):
    told = command_line.autoaccum("estimate", config, "-b", 64, "-g", "t4", "--set", "colour=1")
    assert told.returncode == 2 and "has no parameter 'colour'" in told.stderr and "Traceback" not in told.stderr


def test_a_file_that_is_not_there_or_no_configuration(tmp_path):
    told = command_line.autoaccum("estimate", f"hf:{tmp_path}/none.json", "-b", 64, "-g", "t4")
    assert told.returncode == 2 and "there is no file" in told.stderr
    (tmp_path / "config.json").write_text('{"model_type": "nothing at all"}')
    told = command_line.autoaccum("estimate", f"hf:{tmp_path}", "-b", 64, "-g", "t4")
    assert told.returncode in (2, 5) and "is no configuration of Transformers" in told.stderr
    told = command_line.autoaccum("estimate", "examples/tiny_gpt.py:make_job", "-b", 64, "-g", "t4", "--length", 5)
    assert told.returncode == 2 and "belong to JOB hf:" in told.stderr


def test_the_file_may_have_any_name_and_its_neighbours_do_not_count(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **small}))
    (tmp_path / "mine.json").write_text(json.dumps({"model_type": "qwen2", **small}))
    kinds = [config_job.make_job(str(tmp_path / name), length=8).model.config.model_type for name in ("mine.json", "config.json", ".")]
    assert kinds == ["qwen2", "llama", "llama"]


TRAINER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
from autoaccum.integrations import huggingface
config = transformers.LlamaConfig(**json.loads(sys.argv[1]))
def trainer(**settings):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    data = [{"input_ids": list(range(3, 3 + length)), "labels": list(range(3, 3 + length))} for length in (10, 128, 40, 60)]
    args = transformers.TrainingArguments(sys.argv[2], report_to=[], use_cpu=True, optim="adamw_torch", **settings)
    def collate(samples):
        most = max(len(each["labels"]) for each in samples)
        return {name: torch.tensor([each[name] + [0] * (most - len(each[name])) for each in samples]) for name in ("input_ids", "labels")}
    return transformers.Trainer(model=model, args=args, train_dataset=data, data_collator=collate)
told = {}
for name, settings in (("plain", {}), ("checkpointed", {"gradient_checkpointing": True, "bf16": True}), ("sgd", {"optim": "sgd"})):
    made = trainer(**{key: value for key, value in settings.items() if key != "optim"})
    if "optim" in settings: made.optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    card = huggingface.estimate(made, target_batch=256, gpus=["2GiB"]).gpus[0]
    same = all(torch.equal(value, before[key]) for key, value in made.model.state_dict().items()) and made.model.lm_head.weight.device.type == "cpu"
    told[name] = {"peak": card.peak_bytes, "sizes": card.micro_batches, "shape": card.measured_at, "parts": card.breakdown, "same": same}
print("told:" + json.dumps(told))
"""


def test_a_trainer_is_estimated_as_it_stands_and_stays_as_it_is(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, json.dumps({key: value for key, value in SMALL.items() if key != "model_type"}), str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.split("told:")[1])
    assert all(each["same"] for each in told.values())
    assert (
        told["plain"]["parts"]["optimizer"] == pytest.approx(2 * told["plain"]["parts"]["parameters"], rel=0.05) and told["sgd"]["parts"]["optimizer"] < 2**20
    )
    steps = {name: len(each["sizes"]) for name, each in told.items()}
    assert steps["checkpointed"] < steps["plain"]
