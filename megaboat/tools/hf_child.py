"""Load an export with torch and transformers alone and write down what it does. Run as a file, in a fresh process:

python -I hf_child.py EXPORT WORK      reads WORK/inputs.json, writes WORK/outputs.json and outputs.safetensors
"""

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any


class Hidden(importlib.abc.MetaPathFinder):
    """Makes an installed megaboat invisible."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == "megaboat":
            raise ModuleNotFoundError(f"{fullname} is hidden: an export must not need it", name=fullname)


def main(export: str, work: Path) -> None:
    """Logits and decisions of the rows, ids of the texts, greedy tokens of the prompts as one left-padded batch."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    inputs = json.loads((work / "inputs.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    ids = [tokenizer(text)["input_ids"] for text in inputs["texts"]]
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.float32).eval()
    wish = {"output_decisions": True} if model.config.model_type == "seqboat" else {}
    if not wish:
        model.set_attn_implementation("eager")  # rounds as the trained model's attention does on a CPU
    results: dict[str, Any] = {}
    with torch.no_grad():
        for number, row in enumerate(inputs["rows"]):
            output = model(input_ids=torch.tensor([row]), **wish)
            results[f"logits.{number}"] = output.logits[0].contiguous()
            if wish:
                results[f"decisions.{number}"] = output.decisions[:, 0].contiguous()
    longest = max(len(prompt) for prompt in inputs["prompts"])
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in inputs["prompts"]]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in inputs["prompts"]]
    model.generation_config.eos_token_id = None  # the comparison wants every token
    written = model.generate(
        input_ids=torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        max_new_tokens=inputs["greedy"],
        do_sample=False,
        pad_token_id=0,
    )
    results["greedy"] = written[:, longest:].contiguous()
    save_file(results, work / "outputs.safetensors")
    (work / "outputs.json").write_text(json.dumps({"ids": ids, "class": type(model).__name__}))


if __name__ == "__main__":
    sys.meta_path.insert(0, Hidden())
    assert "megaboat" not in sys.modules
    main(sys.argv[1], Path(sys.argv[2]))
