"""Progress in a terminal is a bar, in a log file lines: never carriage returns by the thousand."""

import pytest

from megaboat.engine.hooks import ProgressLines
from megaboat.log import get_logger, setup_logging


def metrics(step: int) -> dict:
    return {"step": step, "loss": 2.5, "tokens_per_second": 12_345.0, "activation_ratio": [0.25, 0.75]}


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 4), (3600.0, 1)])
def test_lines_now_and_then_and_at_the_end(seconds: float, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()  # to the stream that is captured here, which is closed afterwards
    hook = ProgressLines(seconds)
    hook.on_start(6, 10)
    for step in range(7, 11):
        hook.on_step(metrics(step))
    hook.on_evaluation(10, {"split": "val", "overall": {"bits_per_byte": 1.25, "nll": 3.5}})
    said = capsys.readouterr().err.splitlines()
    get_logger().handlers.clear()
    assert len(said) == lines + 1
    assert "step 10 of 10, 00:00 left: loss 2.500, tok/s 12.3k, active 0.50" in said[-2]
    assert "held out 1.2500 bits per byte" in said[-1]
