"""Damaged and hostile input: one line, the exit code, nothing lost, nothing run (the kinds are in hostile.py)."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megaboat
from megaboat.cli import main
from megaboat.data.tokenizer import open_tokenizer
from megaboat.data.train_tokenizer import train_tokenizer
from megaboat.tools.hf_export import _write_configs, modeling_code
from megaboat.tools.hf_files import CONFIG_FILE, EXPORT_FILE, seal, write_weights
from megaboat.tools.hf_tokenizer import write_tokenizer
from megaboat.tools.loading import newest_checkpoint
from tests.corpus import real_texts, write_jsonl
from tests.tools.hf_runs import SMALL, make_dataset, make_run
from tests.tools.hostile import CASES, Case, World


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a run and an export, all sound."""
    folder = tmp_path_factory.mktemp("originals")
    dataset = make_dataset(folder)
    run = make_run(folder / "run", dataset, SMALL)
    checkpoint = newest_checkpoint(run)
    export = folder / "export"
    export.mkdir()
    (export / "tokenizer.model").write_bytes((run / "tokenizer.model").read_bytes())
    tokenizer = open_tokenizer(run / "tokenizer.model")
    write_tokenizer(tokenizer, None, export)
    write_weights(export, checkpoint.model(), checkpoint.config, 1 << 30)
    _write_configs(export, checkpoint.config, tokenizer, None)
    (export / "modeling_seqboat.py").write_text(modeling_code())
    (export / CONFIG_FILE).write_text((checkpoint.folder / "config.yaml").read_text())
    seal(export, checkpoint.state, {})
    texts = write_jsonl(folder / "other.jsonl", real_texts(8))
    train_tokenizer([texts], 400, folder / "other.model")
    return folder


@pytest.fixture
def world(originals: Path, tmp_path: Path) -> World:
    (tmp_path / "other.model").write_bytes((originals / "other.model").read_bytes())
    (tmp_path / "case").mkdir()
    return World(tmp_path / "case", originals / "tokens", originals / "run", originals / "export")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    case.arrange(world)
    before = everything(world.folder.parent)
    words = [word.format(**vars(world)) for word in case.command.split(" ")]
    assert main(words) == case.code
    said = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    lines = [line for line in said if line.startswith("megaboat ")]
    assert lines == said[-1:], said
    assert re.search(case.message, lines[0]), lines[0]
    assert len(lines[0]) < 2000
    assert not world.canary.exists(), "something ran"
    after = everything(world.folder.parent)
    assert {path: after.get(path) for path in before} == before, "nothing lost, nothing written over"


def test_the_sound_originals_are_not_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Or the table would prove nothing."""
    assert main(["data", "verify", str(world.tokens), "--workers", "1"]) == 0
    for source in (world.run, world.export):
        assert main(["generate", str(source), "--prompt", "a", "--max-tokens", "2", "--temperature", "0"]) == 0
    said = capsys.readouterr().out.splitlines()[1:]
    assert len(said) >= 2


def test_an_export_runs_code_only_where_it_is_asked(world: World) -> None:
    """Sealed again with hostile code in it, an export is read natively: weights, configuration, tokenizer."""
    for hostile in ("modeling_seqboat.py", "tokenization.py", "conftest.py", "sitecustomize.py"):
        (world.export / hostile).write_text(f"import os\nos.system({world.touch()!r})\n")
    (world.export / EXPORT_FILE).unlink()
    seal(world.export, newest_checkpoint(world.run).state, {})
    assert main(["generate", str(world.export), "--prompt", "a", "--max-tokens", "2"]) == 0
    assert main(["convert", "from-hf", str(world.export), "--out", str(world.folder / "back")]) == 0
    assert not world.canary.exists()


SECRETS = {"HF_TOKEN": "hf_ThisIsASecret", "WANDB_API_KEY": "wandbSecret1", "AWS_SECRET_ACCESS_KEY": "awsSecret2"}


def test_secrets_stay_in_the_environment(world: World) -> None:
    """Neither a run that ends well nor one that fails writes the environment anywhere."""
    commands = [
        ["train", str(world.config), "train.steps=2", "data.seq_len=32", "train.global_batch=2", "train.micro_batch=2",
         f"train.out={world.folder / 'trained'}", "model.width=32", "model.layers=1", "train.profile=1:2"],
        ["train", str(world.config), "optim.lr=1e30", "optim.warmup=0", "train.precision=fp32", "data.seq_len=32",
         "train.global_batch=2", "train.micro_batch=2", f"train.out={world.folder / 'diverged'}", "model.layers=1"],
        ["doctor"],
    ]  # fmt: skip
    codes = []
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "megaboat", *command],
            env=os.environ | SECRETS | {"HOME": str(world.folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        codes.append(done.returncode)
        assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())
    assert codes[:2] == [0, 4]
    for path, content in everything(world.folder).items():
        assert not any(secret.encode() in content for secret in SECRETS.values()), path


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "telnetlib", "xmlrpc"}
FORBIDDEN_CALLS = {
    "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec",
    "os.system", "os.popen", "tar.extract", "tar.extractall", "shutil.unpack_archive", "zipfile.ZipFile",
}  # fmt: skip


def sources() -> list[Path]:
    return sorted(Path(megaboat.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.stem)
def test_no_file_loads_what_can_run(path: Path) -> None:
    """No pickle, no eval, no archive unpacked to disk; foreign model code only in the process that proves an export."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not FORBIDDEN_MODULES & {name.split(".")[0] for name in names}
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in FORBIDDEN_CALLS
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert name != "torch.load" or keywords.get("weights_only") == "True"
        assert keywords.get("allow_pickle") in (None, "False")
        assert keywords.get("shell") in (None, "False")
        if keywords.get("trust_remote_code") == "True":
            assert path.name == "hf_child.py", "the child has just been given the code by its parent"
