"""The model card of an export: what the model is, what it read, how well it does, and how to use it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaboat.engine.run_config import RunConfig
from megaboat.model.config import LlamaConfig

CARD = """---
license: {license}
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {title}

{what}

| | |
|---|---|
| parameters | {parameters:,} |
| trained on | {data} |
| training tokens | {tokens:,} ({steps:,} steps) |
{figures}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}"{trust})
model = AutoModelForCausalLM.from_pretrained("{folder}"{trust})
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

With EleutherAI's harness: `lm_eval --model hf --model_args pretrained={folder}{harness},max_length={length} ...`

## Checked at export

A process without megaboat loaded this folder and was compared with the trained model on {proof_tokens:,} tokens of
{text}: logits differ by at most {largest_logit_difference}, {decisions:,} of {decisions:,} activation decisions and
{greedy_tokens:,} of {greedy_tokens:,} greedy tokens are the same, and so are {tokenizer_ids:,} tokenizer ids.

## Licence

Model: `{license}`{license_note}. Data: see the corpus; the exporter does not know its terms.
The code in this folder is part of megaboat (MIT).
"""

SEQBOAT = """A SeqBoat language model (Ren et al., NeurIPS 2023): a linear recurrence reads every token, and layer by
layer the model decides for each token whether attention runs. Memory and time per generated token do not grow with the
length of the text. `model(..., output_decisions=True).decisions` shows which tokens each layer chose.

The code here is plain torch. Where megaboat is installed, `megaboat.tools.hf_model.SeqBoatForCausalLM.from_pretrained`
loads the same folder with its GPU kernels."""
LLAMA = """A Llama model, trained by megaboat as the dense baseline of its SeqBoat models. In training one matrix was
the head and, times sqrt(width), the embedding; here they are two, and the parameters below count it once."""


def write_card(
    folder: Path, title: str, run: Path, config: RunConfig, state: dict[str, Any], proof: dict[str, Any],
    parameters: int, license: str,
) -> None:  # fmt: skip
    """Write README.md. Figures come from metrics.jsonl and evaluation.jsonl of the run where these exist."""
    llama = isinstance(config.model, LlamaConfig)
    text = CARD.format(
        license=license,
        license_note=" (not chosen yet: `--license` sets it)" if license == "unknown" else "",
        tags="llama" if llama else "seqboat, custom_code",
        title=title,
        what=LLAMA if llama else SEQBOAT,
        parameters=parameters,
        data=config.data.path.name if config.data.path else "unknown data",
        tokens=state["tokens"],
        steps=state["step"],
        figures="\n".join(f"| {name} | {value} |" for name, value in _figures(run, state["step"])),
        folder=title,
        trust="" if llama else ", trust_remote_code=True",
        harness="" if llama else ",trust_remote_code=True",
        length=config.data.seq_len,
        prompt="import os",
        proof_tokens=proof["tokens"],
        **{key: value for key, value in proof.items() if key != "tokens"},
    )
    (folder / "README.md").write_text(text.replace("\n\n\n", "\n\n"))


def _figures(run: Path, step: int) -> list[tuple[str, str]]:
    """Rows of the table: the figures of this very step only."""
    rows = []
    metrics = _at_step(run / "metrics.jsonl", step)
    if metrics:
        rows.append(("training loss, last step", f"{metrics['loss']:.4f} nats a token"))
        if metrics.get("flops_per_token"):
            rows.append(("FLOPs a token, forward and backward", f"{metrics['flops_per_token']:.3g}"))
        spent = _flops_spent(run / "metrics.jsonl", step)
        if spent:
            rows.append(("FLOPs of the whole training", f"{spent:.3g}"))
    evaluation = _at_step(run / "evaluation.jsonl", step)
    if evaluation:
        overall = evaluation["overall"]
        rows.append(("held-out loss", f"{overall['nll']:.4f} nats a token, {overall['bits_per_byte']:.4f} bits a byte"))
    ratios = (evaluation["overall"] if evaluation else metrics or {}).get("activation_ratio")
    if ratios:
        rows.append(("tokens that activate attention, layer by layer", " ".join(f"{ratio:.2f}" for ratio in ratios)))
    return rows


def _at_step(path: Path, step: int) -> dict[str, Any] | None:
    """The last object of a jsonl file with this step."""
    return {entry.get("step"): entry for entry in _entries(path)}.get(step)


def _flops_spent(path: Path, step: int) -> float | None:
    """Of all steps up to this one, as counted at each; None where a step is missing or its work is unknown."""
    by_step = {entry["step"]: entry for entry in _entries(path) if entry.get("flops_per_token")}
    if not all(number in by_step for number in range(1, step + 1)):
        return None
    tokens = [0, *(by_step[number]["tokens"] for number in range(1, step + 1))]
    return sum((tokens[n] - tokens[n - 1]) * by_step[n]["flops_per_token"] for n in range(1, step + 1))


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl file; none where there is no such file."""
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut short
        if isinstance(entry, dict):
            yield entry
