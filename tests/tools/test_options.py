"""Options that could not be followed are refused before the work, in one line with a remedy."""

from pathlib import Path

import pytest

from megaboat.cli import main

CONFIG = Path(__file__).parents[2] / "configs" / "125m.yaml"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("eval absent --json nowhere/eval.json", "nowhere/eval.json: there is no folder nowhere; make it"),
        ("eval absent --activation-bias 0 --picture .", ".: is a folder; name a file"),
        ("data stats absent --picture nowhere/stats.png", "there is no folder nowhere"),
        ("data stats absent --picture stats.bmp", "--picture stats.bmp: the suffix says the format, one of .png, .svg"),
        ("generate absent --prompt hi --max-tokens -3", "--max-tokens -3: at least 1"),
        ("generate absent --prompt hi --top-p 7", "top_p 7, repetition_penalty 1: temperature and top_k from 0, top_p"),
        ("bench decode --window 0", "--window 0: at least 1"),
        (f"launch {CONFIG} data.path=null", "data.path is not set: name the folder that `megaboat data prepare` wrote"),
        ("bench kernels --json nowhere/kernels.json", "there is no folder nowhere"),
        ("tokenizer train --input absent --vocab-size 0 --out x.model", "--vocab-size 0: at least 1"),
        ("tokenizer train --input absent --vocab-size 9 --max-lines 0 --out x.model", "--max-lines 0: at least 1"),
        ("balance simulate absent --picture nowhere/balance.png", "there is no folder nowhere"),
        ("balance simulate absent --trials 0", "--trials 0: at least 1"),
        ("balance simulate absent --micro-batch -1", "--micro-batch -1: at least 1"),
        ("balance simulate absent --link 0", "--link 0: GB/s, above 0"),
    ],
)
def test_refused_in_one_line(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("trian x.yaml", "argument COMMAND: invalid choice: 'trian'"),
        ("train x.yaml --steps 5", "unrecognized arguments: --steps 5; see 'megaboat train --help'"),
        ("generate runs/a", "the following arguments are required: --prompt; see 'megaboat generate --help'"),
        ("data prepare", "--input, --tokenizer, --out; see 'megaboat data prepare --help'"),
        ("eval runs/a --max-tokens abc", "argument --max-tokens: 'abc', expected a whole number above 0"),
        ("eval runs/a --activation-bias low", "argument --activation-bias: 'low', expected numbers such as -1,0,inf"),
        ("balance simulate runs/a --ranks 8,x", "argument --ranks: '8,x', expected whole numbers above 0"),
    ],
)
def test_what_cannot_be_parsed_is_one_line_too(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(command.split())
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert said in error
    assert error.count("\n") == 1
