"""TRL's and Sentence Transformers' own trainers, tiny random models, twenty steps: the parameters are those of whole batches."""

import copy
import inspect
import sys
import textwrap
import warnings

import datasets
import pytest
import torch
import transformers
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from autoaccum.errors import PlanError, UsageError
from autoaccum.integrations import huggingface

transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS, TARGET, MOST = 20, 7, 3
SAMPLES = STEPS * TARGET + 3
WORDS = [f"w{index}" for index in range(40)]


@pytest.fixture(autouse=True, scope="module")
def double_throughout():
    """What TRL and Transformers compute in single precision whatever the model's type is, in double: otherwise all agree to 1e-7 only."""
    with pytest.MonkeyPatch.context() as patch:
        kind = trl.trainer.utils._ChunkedLogProbFunction
        scope = sys.modules[kind.__module__].__dict__
        for name in (kind.__name__, *({"_addmm_fp32", "_mm_fp32"} & set(scope))):
            source = textwrap.dedent(inspect.getsource(scope[name])).replace("torch.float32", "torch.float64").replace(".float()", ".double()")
            before = scope[name]
            exec(compile(source, "in_double", "exec"), scope)
            scope[name], made = before, scope[name]
            patch.setitem(scope, name, made)
        patch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", scope[kind.__name__])

        def norm(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

        patch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
        patch.setattr(modeling_mixtral.MixtralRMSNorm, "forward", norm)
        yield


def tokenizer():
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "</s>", "<s>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", bos_token="<s>")


SIZES = {
    "vocab_size": 46, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 3, "initializer_range": 0.3,
}  # fmt: skip


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).double()


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5, output_router_logits=True)
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config).double()


def words(start, count):
    return " ".join(WORDS[(7 * start + 3 * at * at + at) % 40] for at in range(count))


def texts():
    return Dataset.from_list([{"text": words(index, 3 + index * 5 % 11)} for index in range(SAMPLES)])


def answers():
    return Dataset.from_list([{"prompt": words(index, 2 + index % 5), "completion": " " + words(index + 9, 1 + index * 5 % 8)} for index in range(SAMPLES)])


def preferences():
    chosen, rejected = (lambda index: " " + words(index + 9, 1 + index * 5 % 8)), (lambda index: " " + words(index + 21, 1 + index * 3 % 7))
    return Dataset.from_list([{"prompt": words(index, 2 + index % 5), "chosen": chosen(index), "rejected": rejected(index)} for index in range(SAMPLES)])


class InOrder:
    """The dataset's own order, so that every batch size sees the same samples in the same step."""

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Sft(InOrder, SFTTrainer): ...


class Dpo(InOrder, DPOTrainer): ...


class Reward(InOrder, RewardTrainer): ...


def settings(folder, per_device, steps, **given):
    return {
        "output_dir": str(folder), "per_device_train_batch_size": per_device, "gradient_accumulation_steps": steps, "learning_rate": 1e-2,
        "optim": "adamw_torch", "adam_epsilon": 1e-3, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_steps": STEPS, "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "seed": 3, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        **given,
    }  # fmt: skip


def adapted(trainer):
    """The adapters in double precision, and not at nought."""
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return trainer


def sft(folder, per_device, steps, data=texts, peft=None, model=llama, callbacks=(), **given):
    config = SFTConfig(**settings(folder, per_device, steps, **{"max_length": 64, **given}))
    made = Sft(model=model(), args=config, train_dataset=data(), processing_class=tokenizer(), peft_config=peft, callbacks=list(callbacks))
    return made if peft is None else adapted(made)


def dpo(folder, per_device, steps, callbacks=(), **given):
    model = llama()
    reference = copy.deepcopy(model)
    torch.manual_seed(5)
    for parameter in reference.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    config = DPOConfig(**settings(folder, per_device, steps, **{"beta": 0.5, "max_length": 64, **given}))
    return Dpo(model=model, ref_model=reference, args=config, train_dataset=preferences(), processing_class=tokenizer(), callbacks=list(callbacks))


def rewarded(folder, per_device, steps, callbacks=(), **given):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).double()
    config = RewardConfig(**settings(folder, per_device, steps, **{"max_length": 64, **given}))
    pairs = preferences().remove_columns("prompt")
    return Reward(model=model, args=config, train_dataset=pairs, processing_class=tokenizer(), callbacks=list(callbacks))


def reward(completions, **_):
    return [float(len(set(text.split())) + 0.1 * (sum(map(ord, text)) % 7)) for text in completions]


def grpo(folder, per_device, steps, **given):
    model = llama()
    model.generation_config.eos_token_id = [2, *range(6, 16)]  # completions of unlike lengths
    chosen = {"max_completion_length": 8, "num_generations": 3, "beta": 0.0, "max_steps": 5, **given}
    config = GRPOConfig(**settings(folder, per_device, steps, **chosen))
    prompts = Dataset.from_list([{"prompt": words(index, 2 + index % 5)} for index in range(40)])
    return GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=prompts, processing_class=tokenizer())


def trained(trainer):
    trainer.remove_callback(transformers.PrinterCallback)
    torch.manual_seed(7)
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters() if parameter.requires_grad])


def error(make, folder, target=TARGET, most=MOST, start=(2, 1), **given):
    """The relative error of the parameters after training with a plan, against the same trainer with whole batches."""
    whole = trained(make(folder, target, 1))
    planned = make(folder, *start)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plan = huggingface.tune(planned, target_batch=target, max_micro_batch=most, **given)
    assert plan.accumulation_steps > 1
    plan.apply(planned)
    return float((trained(planned) - whole).norm() / whole.norm())


PACKED = {"data": lambda: datasets.concatenate_datasets([texts()] * 3), "packing": True, "max_length": 24}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"data": answers, "completion_only_loss": True},
        {"peft": LORA},
        PACKED,
        {"padding_free": True, "max_length": None},
        {"loss_type": "dft"},
        {"model": mixtral, "router_aux_loss_coef": 0.0},
    ],
    ids=["texts", "completions", "lora", "packed", "padding_free", "dft", "experts"],
)
def test_supervised_fine_tuning_is_exact(given, tmp_path):
    assert error(lambda *where: sft(*where, **given), tmp_path) < 1e-12


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"precompute_ref_log_probs": True},
        {"loss_type": "sft"},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ],
    ids=["sigmoid", "precomputed", "sft", "mixed"],
)
def test_preference_losses_are_exact_in_pairs_and_in_tokens(given, tmp_path):
    assert error(lambda *where: dpo(*where, **given), tmp_path) < 1e-12


@pytest.mark.parametrize(
    ("make", "learns"),
    [(sft, True), (lambda *where, **given: sft(*where, **PACKED, **given), False), (dpo, False), (rewarded, False)],
    ids=["texts", "packed", "pairs", "rewards"],
)
def test_the_callback_learns_or_measures_where_samples_cannot_be_cut(make, learns, tmp_path):
    whole, callback = trained(make(tmp_path, TARGET, 1)), huggingface.EffectiveBatch(TARGET, max_micro_batch=MOST)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing of these is wrong
        ours = trained(make(tmp_path, 2, 1, callbacks=[callback]))
    assert float((ours - whole).norm() / whole.norm()) < 1e-12
    assert (callback.plan.learned_windows > 0) is learns and callback.plan.micro_batches == (3, 2, 2)
    if not learns:
        with pytest.raises(
            UsageError, match=r"measures before training where batches cannot be cut into samples \(pairs, packed texts\): leave tune=False out"
        ):
            make(tmp_path, 2, 1, callbacks=[huggingface.EffectiveBatch(TARGET, tune=False)]).train()


@pytest.mark.parametrize(("loss_type", "most", "start"), [("dapo", 3, (3, 4)), ("dapo", 4, (12, 1)), ("grpo", 4, (12, 1)), ("dr_grpo", 4, (3, 4))])
def test_what_a_trainer_generates_itself_is_cut_exactly(loss_type, most, start, tmp_path):
    assert error(lambda *where: grpo(*where, loss_type=loss_type), tmp_path, 12, most, start) < 1e-12


def test_a_plan_from_elsewhere_sets_what_is_generated(tmp_path):
    plan = huggingface.tune(grpo(tmp_path, 3, 4), target_batch=24, max_micro_batch=4)
    trainer = grpo(tmp_path, 12, 1)
    plan.apply(trainer)
    arguments = trainer.args
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 6)
    assert (arguments.generation_batch_size, arguments.steps_per_generation) == (24, 6)
    trained(trainer)


def test_losses_that_depend_on_the_micro_batch_are_refused_and_the_remedy_is_exact(tmp_path):
    with pytest.raises(UsageError, match="loss_type='bnpo' is a mean over the tokens of each micro-batch: take 'dapo'"):
        huggingface.tune(grpo(tmp_path, 12, 1, loss_type="bnpo"), target_batch=12, max_micro_batch=4)
    with pytest.raises(UsageError, match=r"the entropy bonus is a mean over the tokens of each micro-batch.*leave entropy_coef at 0"):
        huggingface.tune(grpo(tmp_path, 12, 1, entropy_coef=0.1), target_batch=12, max_micro_batch=4)
    with pytest.raises(UsageError, match=r"loss_type='aot' sorts the samples of a batch.*gradient_accumulation_steps=1, or take another loss_type"):
        huggingface.tune(dpo(tmp_path, 2, 1, loss_type="aot"), target_batch=6, max_micro_batch=3)
    # 'dapo' in micro-batches is what 'bnpo' is in one piece.
    whole = trained(grpo(tmp_path, 12, 1, loss_type="bnpo"))
    planned = grpo(tmp_path, 12, 1, loss_type="dapo")
    huggingface.tune(planned, target_batch=12, max_micro_batch=4).apply(planned)
    assert float((trained(planned) - whole).norm() / whole.norm()) < 1e-12


def test_groups_that_a_target_does_not_divide_are_told(tmp_path):
    trainer = grpo(tmp_path, 12, 1)
    plan = huggingface.tune(trainer, target_batch=10, max_micro_batch=5)
    with pytest.raises(PlanError, match=r"not whole groups of num_generations=3.*give a target_batch that 3 divides"):
        plan.apply(trainer)
    huggingface.tune(trainer, target_batch=9, max_micro_batch=5).apply(trainer)  # the remedy
    assert trained(trainer) is not None


def test_a_balance_loss_is_named_with_its_remedy(tmp_path):
    with pytest.warns(UserWarning, match=r"looks at several samples at once.*router_aux_loss_coef=0.0 is exact"):
        huggingface.tune(sft(tmp_path, 2, 1, model=mixtral), target_batch=6, max_micro_batch=3)


def test_tuning_leaves_nothing_behind_in_what_a_trainer_logs(tmp_path):
    def logged(tuned):
        trainer = sft(tmp_path, 2, 1, logging_strategy="steps", logging_steps=1, max_steps=2)
        if tuned:
            before = set(vars(trainer))
            huggingface.tune(trainer, target_batch=6, max_micro_batch=3)
            assert set(vars(trainer)) - before <= {"_autoaccum_count", "_autoaccum_compared"} and not trainer._metrics["train"]
        trained(trainer)
        return [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]

    assert logged(True) == logged(False) != []


# Sentence Transformers


def sentences(folder, per_device, steps, loss="CosineSimilarityLoss", data=None, **of_loss):
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer import modules as parts
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 46, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    BertModel(BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3)).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    encoder = parts.Transformer(str(folder / "bert"), max_seq_length=32)
    model = SentenceTransformer(modules=[encoder, parts.Pooling(16)], device="cpu").double()
    chosen = settings(folder, per_device, steps)
    arguments = SentenceTransformerTrainingArguments(**{name: value for name, value in chosen.items() if name != "gradient_checkpointing"})
    torch.manual_seed(2)
    scored = [{"one": words(index, 3 + index % 5), "two": words(index + 9, 2 + index * 5 % 8), "score": index * 37 % 100 / 100} for index in range(SAMPLES)]
    rows = scored if loss == "CosineSimilarityLoss" else [{"anchor": row["one"], "positive": row["two"]} for row in scored]

    class Trainer(InOrder, SentenceTransformerTrainer):
        def get_batch_sampler(self, dataset, batch_size, drop_last, **_):
            return torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(dataset), batch_size, drop_last)

    return Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=getattr(losses, loss)(model, **of_loss).double())


def test_sentence_losses_that_are_means_over_pairs_are_exact(tmp_path):
    assert error(sentences, tmp_path) < 1e-12


def test_in_batch_negatives_are_named_and_the_remedy_is_exact(tmp_path):
    ranked = "MultipleNegativesRankingLoss"
    with pytest.warns(UserWarning, match=r"looks at several samples at once.*take CachedMultipleNegativesRankingLoss"):
        huggingface.tune(sentences(tmp_path, 2, 1, ranked), target_batch=6, max_micro_batch=3)
    whole, cached = trained(sentences(tmp_path, 6, 1, ranked)), trained(sentences(tmp_path, 6, 1, f"Cached{ranked}", mini_batch_size=2))
    assert float((cached - whole).norm() / whole.norm()) < 1e-12
