"""Studies: the grid, what is refused, cells that are killed and go on, and one page from real runs."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from megaboat.cli import main
from megaboat.engine.build import open_run
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.engine.stop import write_outcome
from megaboat.errors import BadInput
from megaboat.tools.study_data import Findings, Group, read_findings
from megaboat.tools.study_page import fit_all, write_study_report
from megaboat.tools.study_plan import Plan, check_folders, plan_table, read_study, write_study
from megaboat.tools.study_run import state_of
from megaboat.tools.study_time import bits_after
from megaboat.tools.study_tune import borders, choose, ready
from tests.distributed import run_on_ranks
from tests.engine.conftest import dataset_folder, tiny_tree
from tests.engine.runs import wait_until, write_config
from tests.tools.test_report import Page

__all__ = ["dataset_folder"]

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("study_*.yaml"))
SEEDS = {"a": {"train.seed": 0, "data.seed": 0}, "b": {"train.seed": 1, "data.seed": 1}}
SIZES = {name: {"model.layers": layers} for name, layers in (("one", 1), ("two", 2), ("three", 3))}


def train_cells(ranks: Ranks, configs: list[RunConfig]) -> None:
    """For `run_on_ranks`: one cell after the other in one process, since importing takes longer than they do."""
    for config in configs:
        trainer = open_run(config, ranks)
        outcome, reason = trainer.fit()
        write_outcome(config.train.out, outcome, trainer.step, reason)
        trainer.engine.close()


def write_study_file(folder: Path, data: Path, grids: list[Any], **keys: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_config(folder / "base.yaml", tiny_tree(data, folder / "unused", model__vocab_size=512, train__steps=12))
    tree = {"question": "Which?", "base": "base.yaml", "out": str(folder / "study"), "grids": grids, **keys}
    return write_config(folder / "tiny.yaml", tree)


def study(folder: Path, grids: list[Any], *changes: str, **keys: Any) -> Plan:
    return read_study(write_study_file(folder, folder / "tokens", grids, **keys), changes=list(changes))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_studies_expand_to_runs(path: Path) -> None:
    plan = read_study(path)
    assert len(plan.cells) == len({cell.out for cell in plan.cells}) > 1
    assert plan.seed_axes == (set() if path.stem == "study_confirmation" else {"seed"})
    assert plan.rate_axis == "lr"
    assert len(plan.factors) == 1


def test_a_grid_is_every_combination_and_grids_are_joined(tmp_path: Path) -> None:
    grids = [
        {"size": SIZES, "optim.lr": [1e-3, 2e-3], "seed": SEEDS},
        {"size": {"two": SIZES["two"]}, "optim.lr": [2e-3, 4e-3], "seed": SEEDS},
    ]
    plan = study(tmp_path, grids, "train.steps=7", "train.profile=3:5", set={"model.window": 5, "optim.lr": 9.0})
    assert len(plan.cells) == 12 + 2
    cell = next(cell for cell in plan.cells if cell.levels == {"size": "three", "lr": "0.002", "seed": "b"})
    config = cell.config
    assert (config.model.layers, config.optim.lr, config.train.seed, config.data.seed) == (3, 2e-3, 1, 1)
    assert (config.model.window, config.train.steps, config.train.profile) == (5, 7, "3:5")
    assert cell.out == tmp_path / "study" / "cells" / cell.name
    assert plan.factors == ["size"]
    write_study(plan)
    again = read_study(tmp_path / "study", tmp_path / "study")
    assert [(cell.name, cell.config) for cell in again.cells] == [(cell.name, cell.config) for cell in plan.cells]


def test_where_the_first_seed_tunes_the_others_are_planned_at_one_rate(tmp_path: Path) -> None:
    three = SEEDS | {"c": {"train.seed": 2}}
    grids = [
        {"size": SIZES, "optim.lr": [1e-3, 2e-3, 4e-3], "seed": three},
        {"size": {"two": SIZES["two"]}, "optim.lr": [8e-3], "seed": SEEDS},
    ]
    plan = study(tmp_path, grids, tune="first_seed")
    assert len(plan.cells) == 27 + 2
    two = next(combination for combination in plan.combinations if combination.levels == {"size": "two"})
    assert [cell.levels for cell in two.first] == [
        {"size": "two", "lr": str(rate), "seed": "a"} for rate in (1e-3, 2e-3, 4e-3, 8e-3)
    ]
    assert [cell.levels["seed"] for cell in two.following(2e-3)] == ["b", "c"]
    assert [cell.levels["seed"] for cell in two.following(8e-3)] == ["b"]
    assert {its.levels["size"]: len(its.at_most) for its in plan.combinations} == {"one": 5, "two": 6, "three": 5}
    assert ready(plan) == [cell for combination in plan.combinations for cell in combination.first]
    table = plan_table(plan, "H100")
    planned = {line.split()[0]: line.split()[1] for line in table.splitlines()}
    assert (planned["one"], planned["two"]) == ("5", "6")
    assert re.search(r"in all +16 ", table)
    write_study(plan)
    assert read_study(tmp_path / "study", tmp_path / "study").study.tune == "first_seed"


@pytest.mark.parametrize(("grid", "lacks"), [({"optim.lr": [1e-3]}, "seeds"), ({"train.seed": [0, 1]}, "optim.lr")])
def test_tuning_by_the_first_seed_needs_rates_and_seeds(grid: dict[str, Any], lacks: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"tune: first_seed needs an axis .*{lacks}"):
        study(tmp_path, [grid], tune="first_seed")


@pytest.mark.parametrize(
    ("bits", "rate", "side"),
    [
        ([1.3, 1.1, 1.2], 2e-3, ""),
        ([1.1, 1.2, 1.3], 1e-3, "smallest"),
        ([1.3, 1.2, 1.1], 4e-3, "largest"),
        ([1.3, 1.2, math.nan], 2e-3, ""),  # diverged, so it was tried
        ([1.3, 1.2], 2e-3, "largest"),
        ([1.3], 1e-3, ""),
    ],
)
def test_the_best_rate_and_whether_it_lies_at_the_border(
    bits: list[float], rate: float, side: str, tmp_path: Path
) -> None:
    plan = study(tmp_path, [{"optim.lr": [1e-3, 2e-3, 4e-3], "seed": SEEDS}], tune="first_seed")
    (combination,) = plan.combinations
    found = choose(combination, {cell.name: value for cell, value in zip(combination.first, bits, strict=False)})
    assert found is not None
    assert (found.rate, found.bits, found.side) == (rate, min(bits), side)
    assert choose(combination, {cell.name: 1.0 for cell in combination.others}) is None


def test_overrides_that_are_none_are_refused(tmp_path: Path) -> None:
    for override in ("train.steps", "=5", "model.window=[1"):
        with pytest.raises(BadInput, match="expected section.key=value|not a YAML value"):
            study(tmp_path, [{"model.window": [4]}], override)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([{"model.widht": [16]}], "did you mean 'model.width'?"),
        ([{"model.window": [0]}], "model.window"),
        ([{"size": {"a": {"model.layers": 1}}}, {"size": {"a": {"model.layers": 2}}}], "two cells are named size=a"),
        ([], "grids"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_line(grids: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        study(tmp_path, grids)
    assert message.replace("model.width", "width") in str(caught.value).replace("model.width", "width")
    assert "\n" not in str(caught.value)


def test_a_folder_of_other_settings_is_not_taken_for_a_cell(tmp_path: Path) -> None:
    plan = study(tmp_path, [{"model.window": [4]}])
    (plan.cells[0].out).mkdir(parents=True)
    held = plan.cells[0].config.model_dump(mode="json")
    write_config(plan.cells[0].out / "config.yaml", held)
    check_folders(plan)
    write_config(plan.cells[0].out / "config.yaml", held | {"optim": held["optim"] | {"lr": 5.0}})
    with pytest.raises(BadInput, match="holds a run with optim.lr 5.0, and the study wants 0.01"):
        check_folders(plan)


def test_a_failed_cell_is_told_from_one_that_is_not_finished(tmp_path: Path) -> None:
    cell = study(tmp_path, [{"model.window": [4]}]).cells[0]
    assert state_of(cell) == "missing"
    (cell.out / "checkpoints").mkdir(parents=True)
    (cell.out / "checkpoints" / "latest").write_text("step-5")
    for outcome, state in (("requeue", "begun"), ("fatal", "failed"), ("done", "done")):
        (cell.out / "outcome.json").write_text(json.dumps({"outcome": outcome, "step": 12, "reason": ""}))
        assert state_of(cell) == state


@pytest.fixture(scope="module")
def measured(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A study of three sizes with two rates and two seeds, each cell really trained."""
    folder = tmp_path_factory.mktemp("measured")
    grid = {"size": SIZES, "optim.lr": [1e-3, 1e-2], "seed": SEEDS}
    plan = read_study(write_study_file(folder, dataset_folder, [grid], set={"train.eval_every": 4}))
    write_study(plan)
    run_on_ranks(train_cells, 1, [cell.config for cell in plan.cells])
    return plan


def test_groups_hold_the_seeds_of_the_best_rate(measured: Plan) -> None:
    findings = read_findings(measured)
    assert len(findings.results) == 12
    assert [group.name for group in findings.groups] == list(SIZES)
    for group in findings.groups:
        by_rate = findings.rates(group.levels)
        means = {rate: sum(result.bits for result in its) / 2 for rate, its in by_rate.items()}
        assert group.rate == min(means, key=means.__getitem__)
        assert {result.cell.levels["seed"] for result in group.results} == {"a", "b"}
        assert group.mean(lambda result: result.bits).mean == pytest.approx(means[group.rate])
        assert "may lie outside" in group.notes[0], "of two rates, either is at the border"
    first = findings.groups[0].results[0]
    lines = [json.loads(line) for line in (first.cell.out / "metrics.jsonl").read_text().splitlines()]
    assert first.flops == pytest.approx(sum(line["flops_per_token"] for line in lines) * 4 * 32)
    *_, last, test = map(json.loads, (first.cell.out / "evaluation.jsonl").read_text().splitlines())
    assert (last["split"], test["split"]) == ("val", "test")
    assert first.activation_by_layer.tolist() == last["overall"]["activation_ratio"]
    assert (first.bits, first.test_bits) == (last["overall"]["bits_per_byte"], test["overall"]["bits_per_byte"])


def first_seed_tunes(measured: Plan, folder: Path, *without: str) -> Findings:
    """What a study finds that has the runs of `measured`, but lets the first seed tune; cells left out by name."""
    folder.mkdir()
    for cell in measured.cells:
        if cell.name not in without:
            (folder / "cells" / cell.name).parent.mkdir(exist_ok=True)
            (folder / "cells" / cell.name).symlink_to(cell.out)
    found = read_study(write_study_file(folder, folder, measured.study.grids, tune="first_seed"), out=folder)
    return read_findings(found)


def test_the_first_seed_alone_chooses_the_rate_and_the_others_follow(measured: Plan, tmp_path: Path) -> None:
    everything = read_findings(measured)
    findings = first_seed_tunes(measured, tmp_path / "whole")
    assert (findings.done, findings.wanted, len(findings.results)) == (9, 9, 12)
    following = [cell.name for cell in ready(findings.plan) if cell.levels["seed"] == "b"]
    for group, all_seeds in zip(findings.groups, everything.groups, strict=True):
        of_first = {
            rate: result.bits
            for rate, results in everything.rates(all_seeds.levels).items()
            for result in results
            if result.cell.levels["seed"] == "a"
        }
        assert group.rate == min(of_first, key=of_first.__getitem__)
        assert [result.cell.levels["seed"] for result in group.results] == ["a", "b"]
        assert group.results[1].cell.name in following
        assert [len(results) for results in findings.rates(group.levels).values()] == [1, 1]
    assert len(following) == len(borders(findings.plan)) == 3, "of two rates, either is at the border"
    other = next(cell.name for cell in measured.cells if cell.levels["seed"] == "b" and cell.name not in following)
    assert first_seed_tunes(measured, tmp_path / "enough", other).done == 9, "nobody waits for the worse rate"


def test_a_second_wave_that_has_not_run_is_told(measured: Plan, tmp_path: Path) -> None:
    one, two = (f"lr={rate}_seed=a_size=one" for rate in (0.001, 0.01))
    waits = first_seed_tunes(measured, tmp_path / "waits", one)
    assert (waits.done, waits.wanted) == (7, 9)
    assert waits.notes[:2] == [
        "1 of 9 cells wait for the first seed to have tried all rates.",
        f"1 of 9 cells have not begun: {one}.",
    ]
    notes = {group.name: group.notes for group in waits.groups}
    assert notes["one"] == ["one: 1 of 2 learning rates were tried so far, and may miss the best."]
    assert {group.name for group in first_seed_tunes(measured, tmp_path / "none", one, two).groups} == {"two", "three"}
    seeds = [cell.name for cell in measured.cells if cell.levels["seed"] == "b"]
    first = first_seed_tunes(measured, tmp_path / "first", *seeds)
    assert (first.done, first.wanted, len(first.notes)) == (6, 9, 1)
    assert first.notes[0].startswith("3 of 9 cells have not begun: ")


def test_quality_at_equal_time_lies_between_evaluations_and_stays_when_the_run_has_ended(measured: Plan) -> None:
    group = read_findings(measured).groups[0]
    result = group.results[0]
    alone = Group(group.levels, [result], group.rate)
    lines = [json.loads(line) for line in (result.cell.out / "metrics.jsonl").read_text().splitlines()]
    times = [line["step_time"] for line in lines]
    usual = median(times)
    assert result.seconds[-1] == pytest.approx(sum(time if time <= 2 * usual else usual for time in times))
    bits = [evaluation.overall.bits_per_byte for evaluation in result.run.evaluations]
    assert [evaluation.step for evaluation in result.run.evaluations] == [4, 8, 12]
    assert math.isnan(bits_after(alone, 0.5 * result.seconds[3]))
    assert bits_after(alone, result.seconds[7]) == pytest.approx(bits[1])
    between = bits_after(alone, (result.seconds[3] + result.seconds[7]) / 2)
    assert between == pytest.approx((bits[0] + bits[1]) / 2)
    assert bits_after(alone, 2 * result.seconds[-1]) == bits[2]


def test_the_page_has_every_picture_with_a_sentence_and_the_csv_every_cell(measured: Plan, tmp_path: Path) -> None:
    lines = write_study_report(measured, tmp_path / "report")
    assert sum(line.startswith("warning:") for line in lines) == 3
    assert "on test text" in next(line for line in lines if "bits per byte" in line)
    html = (tmp_path / "report" / "index.html").read_text()
    page = Page(html)
    names = sorted(path.stem for path in (tmp_path / "report").glob("*.png"))
    assert len(page.images) == len(names) == 12
    assert html.count("<figcaption>") == 12
    assert "on test text" in html
    assert "At equal time" in html
    assert not re.search(r'(src|href)="(?!data:)', html), "nothing is fetched"
    assert "logit-linear" in html
    with (tmp_path / "report" / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["size"] for row in rows} == set(SIZES)
    laws, layers = fit_all(read_findings(measured))
    assert {law.law.name for law in laws["activation"]} == {"constant", "logit-linear", "power with a floor"}
    assert len(layers) == 3


def test_a_study_that_was_not_run_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study_file(tmp_path, tmp_path, [{"model.window": [4]}])
    assert main(["study", "report", str(path)]) == 2
    assert "comes first" in capsys.readouterr().err


def report_of(folder: Path) -> tuple[str, list[list[str]]]:
    """The page, and the CSV without its last column: the speed."""
    assert main(["study", "report", str(folder / "tiny.yaml")]) == 0
    with (folder / "study" / "report" / "cells.csv").open() as file:
        return (folder / "study" / "report" / "index.html").read_text(), [row[:-1] for row in csv.reader(file)]


def start_command(*arguments: str) -> "subprocess.Popen[str]":
    """`megaboat ARGUMENTS` as a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megaboat", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_and_run_again_only_what_is_missing_runs_and_the_report_is_the_same(
    dataset_folder: Path, tmp_path: Path
) -> None:
    """With a cell that fails beside the others, the noise of the Gumbel arm, which must be drawn again alike, and a
    second seed that waits for the first to choose its rate."""
    grids = [
        {"model.configurator": ["gumbel"], "optim.lr": [1e-3, 1e-2], "seed": SEEDS},
        {"broken": {"yes": {"data.max_epochs": 1e-6}}},
    ]
    files = [write_study_file(tmp_path / name, dataset_folder, grids, tune="first_seed") for name in ("calm", "killed")]
    calm = start_command("study", "run", str(files[0]), "train.steps=40", "--jobs", "2")
    words = calm.communicate(timeout=900)[0]
    assert calm.returncode == 1
    assert "broken=yes failed: exit code 2" in words
    last = r"3 of 4 cells are done: megaboat study report .*; the best learning rate is at the border .*gumbel \(0.0"
    assert re.search(last, words)
    killed = start_command("study", "run", str(files[1]), "train.steps=40", "--jobs", "2")
    cells = tmp_path / "killed" / "study" / "cells"
    wait_until(lambda: any(path.read_text().count("\n") > 10 for path in cells.glob("*/metrics.jsonl")), killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    done = {
        path.parent: path.stat().st_mtime_ns for path in cells.glob("*/outcome.json") if '"done"' in path.read_text()
    }
    assert len(done) < 3
    again = start_command("study", "run", str(files[1]), "train.steps=40", "--jobs", "2")
    assert re.search(last, again.communicate(timeout=900)[0])
    for folder, written in done.items():
        assert (folder / "outcome.json").stat().st_mtime_ns == written, "a cell that was done ran again"
    ran = [sorted(path.name for path in (tmp_path / name / "study" / "cells").iterdir()) for name in ("calm", "killed")]
    assert ran[0] == ran[1]
    page, table = report_of(tmp_path / "killed")
    assert report_of(tmp_path / "calm") == (page, table)
    assert "3 of 4 cells are done" in page
    assert "that seed alone tried all rates" in page
    assert yaml.safe_load((tmp_path / "killed" / "study" / "study.yaml").read_text())["set"] == {"train.steps": 40}
