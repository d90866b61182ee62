"""Write an export and prove it; import one back."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaboat import __version__
from megaboat.config import dump_config
from megaboat.data.tokenizer import Tokenizer
from megaboat.engine.checkpoint import Checkpoint, save_checkpoint
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.engine.start import load_weights
from megaboat.errors import BadInput
from megaboat.model.build import LanguageModel, build_model, count_parameters
from megaboat.model.config import LlamaConfig, SeqBoatConfig
from megaboat.model.llama import Llama
from megaboat.tools import hf_proof
from megaboat.tools.hf_card import write_card
from megaboat.tools.hf_files import CONFIG_FILE, EXPORT_FILE, Export, seal, write_weights
from megaboat.tools.hf_source import Flattener
from megaboat.tools.hf_tokenizer import write_tokenizer
from megaboat.tools.loading import newest_checkpoint, start_id, tokenizer_of, with_unsaved

CONFIGURATION = "configuration_seqboat"
HEADER = f'''"""The SeqBoat model in one file, generated from the sources of megaboat {__version__}.

Each part is headed by the file that it comes from; changes belong there.
"""'''


def export(
    run: Path, out: Path, license: str = "unknown", text: Path | None = None, shard_bytes: int = 2 << 30,
    force: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write the newest checkpoint of `run` to `out` for Hugging Face. Returns the figures of the proof.

    Raises BadInput for a folder that is no run, an `out` in use (`force` replaces an older export) or a tokenizer that
    cannot be read; DamagedData for a broken checkpoint and for an export that does not do what the model does.
    Then `out` is as it was.
    """
    _check_free(out, EXPORT_FILE if force else None)
    checkpoint = newest_checkpoint(run)
    checkpoint.verify()
    config, tokenizer = checkpoint.config, tokenizer_of(checkpoint)
    begin = start_id(checkpoint, tokenizer)
    held_out = hf_proof.held_out(config, tokenizer, text)
    tensors = checkpoint.model()
    state = {key: value for key, value in checkpoint.state.items() if key not in ("format", "balance")}
    with _Folder(out) as folder:
        write_tokenizer(tokenizer, begin, folder)
        write_weights(folder, tensors, config, shard_bytes)
        _write_configs(folder, config, tokenizer, begin)
        if isinstance(config.model, SeqBoatConfig):
            (folder / "modeling_seqboat.py").write_text(modeling_code())
            shutil.copyfile(Path(__file__).with_name("hf_config.py"), folder / f"{CONFIGURATION}.py")
        proof = hf_proof.prove(folder, lambda: _open(checkpoint), tokenizer, held_out)
        count = count_parameters(config.model)
        write_card(folder, out.name, _run_of(checkpoint), config, state, proof, count, license)
        seal(folder, state, proof)
    return proof


def import_export(source: Path, run: Path, force: bool = False) -> Path:
    """Make a run folder of an export, to go on training from its step. AdamW's moments start at zero.

    Raises BadInput where `source` is no export of megaboat or `run` is in use, DamagedData for broken files.
    """
    if not (source / EXPORT_FILE).is_file():
        raise BadInput(f"{source}: no {EXPORT_FILE}; expected a folder that `megaboat convert to-hf` wrote")
    _check_free(run, "checkpoints" if force else None)
    exported = Export(source)
    exported.verify()
    tokenizer = tokenizer_of(exported)
    config = exported.config.model_copy(update={"train": exported.config.train.model_copy(update={"out": run})})
    model = _open(exported)
    with _Folder(run) as folder:
        dump_config(config, folder / "config.yaml")
        content = tokenizer.model_bytes()
        if content is not None:
            (folder / "tokenizer.model").write_bytes(content)
        alone = Ranks(0, 1, torch.device("cpu"))
        weights = (dict(model.named_parameters()) | dict(model.named_buffers())).items()
        save_checkpoint(folder / "checkpoints", weights, _zeros(model), exported.state, config, 1, alone)
    return run / "checkpoints" / f"step-{exported.state['step']}"


def modeling_code() -> str:
    """modeling_seqboat.py: the Hugging Face class with all of the package that it needs."""
    beside = {"megaboat.tools.hf_config": CONFIGURATION, "megaboat.model.config": CONFIGURATION}
    return Flattener("megaboat.tools.hf_model", beside).flatten(HEADER)


def _open(source: Checkpoint | Export) -> LanguageModel:
    model = build_model(source.config.model, seed=0)
    load_weights(model, with_unsaved(model, source.model()), str(source.folder))
    return model.eval()


def _zeros(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            yield f"{key}.{name}", torch.zeros_like(parameter)


def _write_configs(folder: Path, config: RunConfig, tokenizer: Tokenizer, begin: int | None) -> None:
    dump_config(config, folder / CONFIG_FILE)
    symbols = {"bos_token_id": begin, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    symbols = {name: index for name, index in symbols.items() if index is not None}
    sizes = _llama_sizes(config.model) if isinstance(config.model, LlamaConfig) else _seqboat_sizes(config.model)
    _write_json(folder / "config.json", {"dtype": "float32", "tie_word_embeddings": True} | sizes | symbols)
    _write_json(folder / "generation_config.json", symbols | {"do_sample": False})


def _seqboat_sizes(model: SeqBoatConfig) -> dict[str, Any]:
    training_only = {"family", "block", "calibrate"}
    return model.model_dump(exclude=training_only) | {
        "qk_maps": model.qk_maps,
        "architectures": ["SeqBoatForCausalLM"],
        "model_type": "seqboat",
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION}.SeqBoatConfig",
            "AutoModelForCausalLM": "modeling_seqboat.SeqBoatForCausalLM",
        },
    }


def _llama_sizes(model: LlamaConfig) -> dict[str, Any]:
    built = Llama(model.model_copy(update={"layers": 1, "vocab_size": 1})).body.config
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rope_parameters",
             "max_position_embeddings", "rms_norm_eps", "hidden_act")  # fmt: skip
    sizes = {name: getattr(built, name) for name in names}
    return sizes | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": False,
        "num_hidden_layers": model.layers,
        "vocab_size": model.vocab_size,
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def _run_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.folder.parent.parent


def _check_free(out: Path, replaceable: str | None) -> None:
    """Refuse a folder that holds something, unless it holds `replaceable`, the mark of what we would write."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (replaceable and (out / replaceable).exists())):
        hint = f"has no {replaceable}, so --force leaves it alone" if replaceable else "choose another or add --force"
        raise BadInput(f"{out}: exists and is not empty; {hint}")


class _Folder:
    """A folder that appears under its name when the block ends well, and not at all when it does not."""

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()
        self.scratch = self.out.with_name(f".{self.out.name}.unfinished")  # a name that no folder of the user's has

    def __enter__(self) -> Path:
        shutil.rmtree(self.scratch, ignore_errors=True)
        try:
            self.scratch.mkdir(parents=True)
        except OSError as error:
            raise BadInput(f"{self.out}: cannot be written: {error.strerror}") from None
        return self.scratch

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)
            return
        if self.out.exists():
            shutil.rmtree(self.out)
        self.scratch.rename(self.out)
