"""The Hugging Face class as a citizen: generation, padding, caches, precision, training, saving. Run from the package's
own sources; that the generated file does the same is proved at each export (test_convert)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megaboat.errors import DamagedData
from megaboat.layers.documents import Documents
from megaboat.model.generate import Sampling, generate
from megaboat.tools import hf_export, hf_proof
from megaboat.tools.hf_model import SeqBoatCache, SeqBoatForCausalLM
from megaboat.tools.hf_proof import HeldOut
from megaboat.tools.loading import LoadedRun, load_run
from tests.corpus import real_texts
from tests.tools.hf_runs import SMALL, make_run

LENGTHS = [30, 7, 19]
SPEECH = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run over bytes and its export, without the proof."""
    run = make_run(tmp_path_factory.mktemp("runs") / "boat", None, SMALL, tokenizer="bytes")
    out = tmp_path_factory.mktemp("exports") / "boat"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_proof, "prove", lambda *_: dict.fromkeys(PROVED, 0))
        hf_export.export(run, out)
    return run, out


PROVED = ("text", "tokens", "largest_logit_difference", "decisions", "greedy_tokens", "tokenizer_ids")


@pytest.fixture(scope="module")
def ours(folders: tuple[Path, Path]) -> LoadedRun:
    return load_run(folders[0])


@pytest.fixture
def theirs(folders: tuple[Path, Path]) -> SeqBoatForCausalLM:
    return SeqBoatForCausalLM.from_pretrained(folders[1]).eval()


def prompts() -> list[list[int]]:
    return [list(text.encode())[:length] for text, length in zip(real_texts(3), LENGTHS, strict=True)]


def batch(side: str = "left") -> dict[str, Tensor]:
    pads = [max(LENGTHS) - length for length in LENGTHS]
    left = side == "left"
    rows = [[7] * p + prompt if left else prompt + [7] * p for p, prompt in zip(pads, prompts(), strict=True)]
    masks = [[0] * p + [1] * n if left else [1] * n + [0] * p for p, n in zip(pads, LENGTHS, strict=True)]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def new(model: SeqBoatForCausalLM, given: dict[str, Tensor], **options: object) -> Tensor:
    return model.generate(**given, **(SPEECH | options))[:, given["input_ids"].shape[1] :]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}], ids=str)
def test_greedy_batches_are_our_generation(ours: LoadedRun, theirs: SeqBoatForCausalLM, options: dict) -> None:
    expected = torch.stack(list(generate(ours.model, prompts(), 25, Sampling(temperature=0))), 1)
    assert torch.equal(new(theirs, batch(), **options), expected)
    for row, prompt in enumerate(prompts()):
        alone = {"input_ids": torch.tensor([prompt])}
        assert torch.equal(new(theirs, alone, **options)[0], expected[row])


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True, "top_k": 20}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=str,
)
def test_sampling_and_beams_are_the_same_with_and_without_memory(theirs: SeqBoatForCausalLM, options: dict) -> None:
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(new(theirs, batch(), use_cache=use_cache, **options))
    assert torch.equal(*results)


def test_a_conversation_goes_on_from_its_cache(theirs: SeqBoatForCausalLM) -> None:
    first = theirs.generate(**batch(), **SPEECH, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, SeqBoatCache)
    more = torch.cat([first.sequences, torch.tensor([[100, 101, 102]] * 3)], 1)
    mask = torch.cat([batch()["attention_mask"], torch.ones(3, more.shape[1] - max(LENGTHS), dtype=torch.int64)], 1)
    given = {"input_ids": more, "attention_mask": mask}
    assert torch.equal(new(theirs, given, past_key_values=first.past_key_values), new(theirs, given))


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_ignores_padding_on_either_side(side: str, ours: LoadedRun, theirs: SeqBoatForCausalLM) -> None:
    given = batch(side)
    labels = given["input_ids"].masked_fill(given["attention_mask"].cumsum(1) <= 1, -100)  # nothing precedes the first
    labels = labels.masked_fill(given["attention_mask"] == 0, -100)
    expected = 0.0
    for prompt in prompts():
        tokens = torch.tensor([prompt])
        docs = Documents.whole(1, len(prompt) - 1)
        expected += float(ours.model(tokens[:, :-1], docs, tokens[:, 1:]).nll.detach())
    loss = float(theirs(**given, labels=labels).loss.detach())
    assert loss == pytest.approx(expected / (sum(LENGTHS) - 3), rel=1e-6)


def test_packed_documents_do_not_see_each_other(theirs: SeqBoatForCausalLM) -> None:
    """As a collator without padding packs them: one row, positions that start again."""
    row = torch.tensor([sum(prompts(), [])])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        together = theirs(row, position_ids=positions).logits[0].split(LENGTHS)
        for part, prompt in zip(together, prompts(), strict=True):
            torch.testing.assert_close(part, theirs(torch.tensor([prompt])).logits[0], rtol=0, atol=1e-5)


def test_decisions_and_kept_logits(ours: LoadedRun, theirs: SeqBoatForCausalLM) -> None:
    tokens = torch.tensor([prompts()[0]] * 2)
    with torch.no_grad():
        output = theirs(tokens, output_decisions=True)
        expected = ours.model(tokens, Documents.whole(*tokens.shape))
        last = theirs(tokens, logits_to_keep=1).logits
    decided = torch.stack([routing.active_XM.unflatten(0, tokens.shape) for routing in expected.routings])
    assert torch.equal(output.decisions, decided)
    torch.testing.assert_close(output.logits[:, -1:], last, rtol=0, atol=1e-5)
    assert theirs(tokens).decisions is None
    assert len(theirs(tokens, return_dict=False)) == 1


def test_recomputation_gives_the_same_gradients(theirs: SeqBoatForCausalLM) -> None:
    gradients = []
    for recompute in (False, True):
        if recompute:
            theirs.gradient_checkpointing_enable()
        theirs.zero_grad()
        theirs.train()(**batch(), labels=batch()["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in theirs.parameters()])
    assert theirs.model.checkpoint_activations
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_keeps_recurrence_and_decisions_in_fp32(folders: tuple[Path, Path], theirs: SeqBoatForCausalLM) -> None:
    half = SeqBoatForCausalLM.from_pretrained(folders[1], dtype=torch.bfloat16).eval()
    precise = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert {name.split(".")[3] for name in precise} == {"norm", "ffn_norm", "ema", "sma"}
    assert all("configurator" in name for name in precise if ".sma." in name)
    assert {buffer.dtype for buffer in half.buffers()} == {torch.float32}
    with torch.no_grad():
        difference = (half(**batch()).logits.float() - theirs(**batch()).logits).abs().max()
    assert difference < 0.5
    assert new(half, batch()).shape == (3, 25)


def test_saved_again_it_is_the_same_model(
    folders: tuple[Path, Path], theirs: SeqBoatForCausalLM, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as a, safe_open(folders[1] / "model.safetensors", "pt") as b:
        assert sorted(a.keys()) == sorted(b.keys())
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in b.keys())  # noqa: SIM118
    again = SeqBoatForCausalLM.from_pretrained(tmp_path)
    assert again.model.head.weight is again.model.embedding.weight


def test_a_new_model_is_drawn_as_training_draws_it(theirs: SeqBoatForCausalLM) -> None:
    fresh = SeqBoatForCausalLM(theirs.config)
    width = theirs.config.width
    assert fresh.model.embedding.weight.std().item() == pytest.approx(width**-0.5, rel=0.05)
    assert fresh.model.blocks[0].linear.weight.std().item() == pytest.approx(0.0176, rel=0.1)
    assert all(torch.isfinite(parameter).all() for parameter in fresh.parameters())
    fresh.resize_token_embeddings(300)
    assert fresh(torch.tensor([[299]])).logits.shape == (1, 1, 300)
    assert fresh.model.head.weight is fresh.model.embedding.weight


def test_embeddings_stand_for_their_tokens(theirs: SeqBoatForCausalLM) -> None:
    given = batch()
    embeds = theirs.get_input_embeddings()(given["input_ids"])
    mask = given["attention_mask"]
    with torch.no_grad():
        a, b = theirs(**given).logits, theirs(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(a, b)
    assert torch.equal(theirs.generate(inputs_embeds=embeds, attention_mask=mask, **SPEECH), new(theirs, given))
    for wrong in ({}, {"input_ids": given["input_ids"], "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            theirs(**wrong)


def test_hidden_states_are_those_of_each_layer(theirs: SeqBoatForCausalLM) -> None:
    given = batch()
    with torch.no_grad():
        output = theirs(**given, output_hidden_states=True)
        assert len(output.hidden_states) == theirs.config.layers + 1
        assert torch.equal(output.logits, theirs.model.head(output.hidden_states[-1]))
        embedded = theirs.model.embedding(given["input_ids"]) * theirs.config.width**0.5
    assert torch.equal(output.hidden_states[0], embedded)
    assert theirs(**given).hidden_states is None
    said = theirs.generate(**given, **SPEECH, return_dict_in_generate=True, output_hidden_states=True)
    assert torch.equal(said.sequences[:, max(LENGTHS) :], new(theirs, given))
    assert [states[-1].shape[1] for states in said.hidden_states] == [max(LENGTHS)] + [1] * 24


def test_a_prompt_at_the_end_of_other_prompts_is_itself(theirs: SeqBoatForCausalLM) -> None:
    """Left padding of any length, with and without a cache: the same last logits."""
    for use_cache in (False, True):
        with torch.no_grad():
            together = theirs(**batch(), use_cache=use_cache).logits[:, -1]
            alone = [theirs(torch.tensor([prompt]), use_cache=use_cache).logits[0, -1] for prompt in prompts()]
        torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["cache", "past_key_values"])
def test_both_names_of_the_cache(side: str, theirs: SeqBoatForCausalLM) -> None:
    """transformers renamed it in 5.24; callers use either."""
    tokens = torch.tensor([prompts()[0]])
    with torch.no_grad():
        first = theirs(tokens[:, :20], use_cache=True)
        assert isinstance(first.past_key_values, SeqBoatCache)
        rest = theirs(tokens[:, 20:], **{side: first.past_key_values}).logits
        whole = theirs(tokens).logits[:, 20:]
    torch.testing.assert_close(rest, whole, rtol=0, atol=1e-5)


def test_drawn_in_half_precision_the_recurrence_is_fp32(theirs: SeqBoatForCausalLM) -> None:
    fresh = SeqBoatForCausalLM._from_config(theirs.config, dtype=torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in fresh.named_parameters()}
    precise = ("ema.smoothing", "norm.weight", "sma.configurator.logits.weight")
    assert {kinds[f"model.blocks.0.{name}"] for name in precise} == {torch.float32}
    assert kinds["model.blocks.0.linear.weight"] == torch.bfloat16


def test_spread_over_devices_by_accelerate(folders: tuple[Path, Path], theirs: SeqBoatForCausalLM) -> None:
    pytest.importorskip("accelerate", reason="pip install accelerate")
    spread = SeqBoatForCausalLM.from_pretrained(folders[1], device_map="auto").eval()
    given = {key: value.to(spread.device) for key, value in batch().items()}
    assert torch.equal(new(spread, given).cpu(), new(theirs, batch()))


def child(ours: LoadedRun, spoil: str) -> object:
    """In place of the other process: what our model gives, but for one thing."""

    def run(export: Path, work: Path) -> None:
        inputs = json.loads((work / "inputs.json").read_text())
        results = {}
        for number, row in enumerate(inputs["rows"]):
            with torch.no_grad():
                output = ours.model(torch.tensor([row]), Documents.whole(1, len(row)))
            results[f"logits.{number}"] = ours.model.head(output.hidden_BTD)[0].clone()
            results[f"decisions.{number}"] = torch.stack([routing.active_XM for routing in output.routings])
        greedy = generate(ours.model, inputs["prompts"], inputs["greedy"], Sampling(temperature=0))
        results["greedy"] = torch.stack(list(greedy), 1)
        ids = [ours.tokenizer.encode(text).tolist() for text in inputs["texts"]]
        if spoil == "logits":
            results["logits.1"][3, 5] += 1e-4
        elif spoil == "decisions":
            results["decisions.2"][1, 40, 0] ^= True
        elif spoil == "greedy":
            results["greedy"][2, 63] += 1
        elif spoil == "ids":
            ids[0][-1] += 1
        save_file(results, work / "outputs.safetensors")
        (work / "outputs.json").write_text(json.dumps({"ids": ids}))

    return run


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("logits", "gives logits that differ by 1.0e-04"),
        ("decisions", "decides otherwise on row 2"),
        ("greedy", "writes other greedy tokens"),
        ("ids", "has a tokenizer that gives other ids"),
        ("nothing", ""),
    ],
)
def test_the_proof_sees_one_wrong_number(
    spoil: str, reason: str, ours: LoadedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hf_proof, "_run_child", child(ours, spoil))
    text = real_texts(1)[0]
    ids = ours.tokenizer.encode(text).tolist()
    held_out = HeldOut("a text", [text], [ids[i : i + 200] for i in range(0, 800, 200)])
    if reason:
        with pytest.raises(DamagedData, match=reason):
            hf_proof.prove(tmp_path, lambda: ours.model, ours.tokenizer, held_out)
    else:
        proof = hf_proof.prove(tmp_path, lambda: ours.model, ours.tokenizer, held_out)
        assert proof["decisions"] == 800 * 3 * 2
        assert proof["greedy_tokens"] == 4 * 64
