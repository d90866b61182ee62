"""Every shipped configuration loads, and a wrong key, type or value is refused in one line."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from megaboat.cli import main
from megaboat.config import Section, build_config, dump_config, load_config
from megaboat.config_keys import describe_keys
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[1] / "configs").glob("*.yaml")
    if not path.stem.startswith("study_")
    and "\ntask:" not in path.read_text()  # tests/tools/test_study.py, test_classify.py
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(RunConfig, path)
    dump_config(config, tmp_path / "again.yaml")
    assert load_config(RunConfig, tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.leraning_rate=1", "unknown key 'optim.leraning_rate'"),
        ("optim.sheduel=cosine", "did you mean 'schedule'?"),
        ("model.widht=64", "did you mean 'width'?"),
        ("trian.steps=1", "did you mean 'train'?"),
        ("train.steps=0", "greater than 0 (given: 0)"),
        ("train.steps=many", "valid integer"),
        ("model.family=mamba", "model.family: expected one of seqboat, llama (given: 'mamba')"),
        ("model.heads=3", "value_dim 512 is not a multiple of heads 3; set heads to a divisor of it"),
        ("train.steps", "expected section.key=value"),
        ("model=llama", "model: expected a section such as {family: llama} (given: 'llama')"),
        ("model.value_dim=abc", "value_dim"),
        ("model.block=[1]", "block"),
        ("optim.betas=[1.5, 2]", "betas"),
    ],
)
def test_refuses_in_one_line(override: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_config(RunConfig, None, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_llama_has_keys_of_its_own() -> None:
    config = load_config(RunConfig, None, ["model.family=llama", "model.kv_heads=4"])
    assert config.model.family == "llama"
    with pytest.raises(BadInput, match="unknown key 'model.window'"):
        load_config(RunConfig, None, ["model.family=llama", "model.window=4"])


def test_file_errors_name_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [1, 2")
    with pytest.raises(BadInput, match=r"broken\.yaml: not valid YAML"):
        load_config(RunConfig, broken)
    with pytest.raises(BadInput, match="no such config file"):
        load_config(RunConfig, tmp_path / "absent.yaml")


def test_the_batch_must_fit_the_ranks() -> None:
    config = build_config(RunConfig, {"train": {"global_batch": 6, "micro_batch": 4}}, "test")
    with pytest.raises(BadInput, match="6 is not a multiple of 2 ranks x train.micro_batch 4"):
        config.check_world(2)


def leaves(kind: type[BaseModel]) -> int:
    return sum(
        leaves(field.annotation) if isinstance(field.annotation, type) and issubclass(field.annotation, Section) else 1
        for field in kind.model_fields.values()
    )


def test_options_stay_few() -> None:
    from megaboat.model.config import LlamaConfig, SeqBoatConfig

    assert leaves(RunConfig) + leaves(SeqBoatConfig) + leaves(LlamaConfig) <= 81


def written_keys(tree: dict[str, Any], prefix: str = "") -> set[str]:
    """The keys of a resolved configuration, as a user writes them."""
    found: set[str] = set()
    for name, value in tree.items():
        found |= written_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found


def test_help_lists_every_key_with_default_type_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    keys = dict(re.findall(r"^  ([a-z_.\[\]]+)((?: = .*)?   \(.+\))$", text, re.MULTILINE))
    for family in ("seqboat", "llama"):
        config = load_config(RunConfig, None, [f"model.family={family}"])
        assert written_keys(config.model_dump(mode="json")) <= set(keys)
    assert keys["train.steps"] == " = 1000   (int > 0)"
    assert keys["model.vocab_size"] == " = null   (int > 0, or null)"
    assert keys["optim.betas"] == " = [0.9, 0.95]   (list of 2: float >= 0, < 1)"
    assert keys["data.shuffle"] == " = full   (full | grouped | contiguous)"
    assert keys["data.phases[].from_window"] == "   (int >= 0)"
    assert "Folder written by `megaboat data prepare`." in text
    unexplained = re.findall(r"^  (\S+).*\)\n(?!      )", describe_keys(RunConfig) + "\n", re.MULTILINE)
    assert not unexplained, "a key's docstring stands below it"


def test_the_command_ends_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(CONFIGS[0]), "optim.leraning_rate=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megaboat train: ")
    assert error.count("\n") == 1
