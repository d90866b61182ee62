"""The 29 questions, each with the command that answers it: mostly tests, which anyone can run alone."""

from typing import NamedTuple


class Probe(NamedTuple):
    number: int
    question: str
    commands: tuple[str, ...]
    """Run one after the other; a word that ends in `.py` or holds `::` goes to pytest."""
    gpu: str = ""
    """What only a GPU can show, if anything."""


ENGINE, DATA, TOOLS = "tests/engine", "tests/data", "tests/tools"

PROBES = [
    Probe(
        1,
        "installs without a GPU; import is cheap; doctor ends with 0",
        (f"{TOOLS}/test_doctor.py::test_import_is_cheap", "python -m megaboat doctor"),
    ),
    Probe(
        2,
        "trains on CPU on real text, the loss falls; again: the same digits",
        (f"{ENGINE}/test_runs.py::test_a_run_leaves_its_folder", f"{ENGINE}/test_profile.py::test_the_same_bits_again"),
    ),
    Probe(
        3, "a misspelt key and impossible numbers are named", ("tests/test_configs.py", f"{ENGINE}/test_bad_input.py")
    ),
    Probe(
        4,
        "the README's commands work as printed",
        (
            "tests/test_readme.py",
            "tests/test_readme.py::test_the_first_command_ends_with_a_sample_however_often_it_is_interrupted",
        ),
    ),
    Probe(
        5, "parameters, FLOPs and memory of the 1B model without a GPU", ("python -m megaboat plan configs/1b.yaml",)
    ),
    Probe(
        6,
        "the same losses on more ranks, ZeRO 0 to 3, accumulation, recomputation, tensor parallelism",
        (f"{ENGINE}/test_equality.py", f"{ENGINE}/test_runs.py::test_more_ranks_give_the_same_run", "tests/parallel"),
    ),
    Probe(
        7,
        "the EMA scan against the recurrence, odd lengths; the paper's equations",
        ("tests/kernels/test_ema.py", "tests/layers/test_equations.py"),
        gpu="tests/kernels -m gpu",
    ),
    Probe(8, "nothing passes from one packed document to another", ("tests/model/test_isolation.py",)),
    Probe(
        9,
        "no token active, all active, one-token documents: no hang, finite gradients",
        (
            "tests/kernels/test_rows.py",
            "tests/layers/test_sma.py",
            f"{ENGINE}/test_equality.py::test_equals_one_process",
        ),
    ),
    Probe(
        10,
        "validation loss is the same at every world size",
        (
            f"{DATA}/test_loader.py::test_evaluation_scores_every_token_once_at_any_world_size",
            f"{ENGINE}/test_runs.py::test_more_ranks_give_the_same_run",
        ),
    ),
    Probe(11, "FLOPs by hand; no peak is guessed", ("tests/model/test_flops.py",), gpu="MFU below 100 % on an H200"),
    Probe(
        12,
        "realised shares of the mixture",
        (
            f"{DATA}/test_loader.py::test_realised_shares_approach_the_weights",
            f"{DATA}/test_order.py::test_the_mixture_is_exact_over_a_cycle_and_close_within",
        ),
    ),
    Probe(
        13,
        "kill -9, TERM, USR1, at any moment: the run goes on, digit for digit",
        (
            f"{ENGINE}/test_runs.py::test_kill_9_and_the_same_command_again",
            f"{ENGINE}/test_runs.py::test_sigterm_saves_and_asks_to_be_requeued",
            f"{ENGINE}/test_killed.py",
        ),
    ),
    Probe(
        14,
        "resumed on other ranks and another ZeRO stage: the same data",
        (f"{ENGINE}/test_runs.py::test_resumes_at_another_layout", f"{DATA}/test_resume_killed.py"),
    ),
    Probe(
        15,
        "a damaged newest checkpoint; a full disk during a save",
        (
            f"{ENGINE}/test_bad_input.py::test_a_damaged_newest_checkpoint_is_passed_over",
            f"{ENGINE}/test_explain.py::test_a_file_that_may_not_grow",
            f"{ENGINE}/test_explain.py::test_a_full_disk_that_is_emptied",
        ),
    ),
    Probe(16, "a loss that is not a number, a spike, several in a row", (f"{ENGINE}/test_guard.py",)),
    Probe(
        17,
        "a rank that hangs or dies is named, with stacks",
        ("tests/launch/test_watchdog.py", f"{ENGINE}/test_explain.py::test_kill_9_of_one_of_four_ranks"),
    ),
    Probe(
        18,
        "a corrupt shard or line is named; skip or fail",
        (
            f"{DATA}/test_loader.py::test_a_flipped_byte_stops_the_run_naming_shard_block_and_offset",
            f"{DATA}/test_dead_disk.py",
            f"{TOOLS}/test_data_bad_input.py",
        ),
    ),
    Probe(
        19,
        "out of memory names settings and what they save",
        (f"{ENGINE}/test_explain.py::test_out_of_memory_names_three_knobs",),
        gpu="memory snapshot",
    ),
    Probe(
        20,
        "launch scripts: bash -n, shellcheck, one node and several, every way to start",
        ("tests/launch/test_scripts.py", "tests/launch/test_slurm.py"),
    ),
    Probe(
        21,
        "TensorBoard: curves, activation, pictures, no step twice after a resume",
        (
            f"{ENGINE}/test_runs.py::test_tensorboard_holds_the_same_curve",
            f"{ENGINE}/test_runs.py::test_tensorboard_shows_the_pictures",
            f"{TOOLS}/test_report.py::test_a_killed_and_resumed_run",
        ),
    ),
    Probe(
        22,
        "the Hugging Face export: logits, tokens and decisions the same; back again and on",
        (
            f"{TOOLS}/test_convert.py::test_an_export_proves_itself_in_another_process",
            f"{TOOLS}/test_convert.py::test_training_goes_on_from_an_export",
        ),
    ),
    Probe(23, "lm_eval on the export gives the framework's perplexity", (f"{TOOLS}/test_lm_eval.py",)),
    Probe(
        24,
        "tokenizer: round trips; another one is noticed on resume",
        (f"{DATA}/test_tokenizer.py", f"{ENGINE}/test_bad_input.py::test_a_tokenizer_that_does_not_match"),
    ),
    Probe(
        25,
        "throughput beside a dense baseline, by one command",
        (f"{TOOLS}/test_bench_train.py",),
        gpu="megaboat bench train",
    ),
    Probe(
        26,
        "a scaling study that goes on where it was killed",
        (f"{TOOLS}/test_study.py::test_killed_and_run_again_only_what_is_missing_runs_and_the_report_is_the_same",),
    ),
    Probe(
        27,
        "a profiler trace that opens; no host sync beyond the stated one",
        (f"{ENGINE}/test_profile.py::test_a_trace_of_the_steps_asked_for",),
        gpu="tests/engine/test_capacity.py -m gpu",
    ),
    Probe(28, "the tests pass on CPU", ("tests/test_readme.py::test_the_second_command_passes",), gpu="tests -m gpu"),
    Probe(
        29,
        "sources: no globals, one door a package, licence, hostile input",
        ("tests/test_floors.py", "tests/test_house_rules.py", f"{TOOLS}/test_hostile.py"),
    ),
]
