"""An export fine-tuned as its readers would: transformers' Trainer, and LoRA by PEFT, on the generated code."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from megaboat.tools import hf_export, hf_proof
from tests.corpus import real_texts
from tests.tools.hf_runs import SMALL, make_run

pytest.importorskip("accelerate", reason="pip install accelerate")
peft = pytest.importorskip("peft", reason="pip install peft")

PROOF = dict.fromkeys(("text", "tokens", "largest_logit_difference", "decisions", "greedy_tokens", "tokenizer_ids"), 0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "boat", None, SMALL, tokenizer="bytes")
    out = tmp_path_factory.mktemp("exports") / "tuned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_proof, "prove", lambda *_: PROOF)
        hf_export.export(run, out)
    return out


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    text = "".join(real_texts(8)).encode()
    ids = [torch.tensor(list(text[start : start + 64])) for start in range(0, 64 * count, 64)]
    return [{"input_ids": row, "labels": row} for row in ids]


def loss_of(model: torch.nn.Module) -> float:
    batch = torch.stack([row["input_ids"] for row in rows(16)])
    with torch.no_grad():
        return float(model.eval()(input_ids=batch, labels=batch).loss)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_trainer_lowers_the_loss(recompute: bool, exported: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    before = loss_of(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=10,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        gradient_checkpointing=recompute,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(64))
    trainer.train()
    assert model.gradient_checkpointing == recompute
    assert loss_of(model) < before - 0.1
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert loss_of(again) == pytest.approx(loss_of(model), rel=1e-6)


def test_lora_lowers_the_loss_and_touches_nothing_else(exported: Path, tmp_path: Path) -> None:
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    before, held = loss_of(base), {name: value.clone() for name, value in base.state_dict().items()}
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["linear", "z", "v", "o"], lora_alpha=16))
    adapters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    batch = torch.stack([row["input_ids"] for row in rows(16)])
    for _ in range(12):
        optimizer.zero_grad()
        tuned.train()(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    after = loss_of(tuned)
    assert after < before - 0.1
    now = {name.replace("base_layer.", ""): value for name, value in base.state_dict().items()}
    assert all(torch.equal(now[name], value) for name, value in held.items())

    tuned.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert loss_of(loaded) == pytest.approx(after, rel=1e-6)
    assert loss_of(loaded.merge_and_unload()) == pytest.approx(after, rel=1e-4)
