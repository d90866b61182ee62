"""Say what a configuration needs before a GPU is there: parameters, FLOPs, memory a rank, communication, time a step.

examples:
  megaboat plan configs/1b.yaml
  megaboat plan configs/7b.yaml train.micro_batch=2 --gpus 8,64 --gpu H100 --activation 0.3
"""

import argparse
from dataclasses import fields
from pathlib import Path

from megaboat.config import load_config
from megaboat.data.index import read_index
from megaboat.engine.run_config import RunConfig
from megaboat.engine.start import sample_rows
from megaboat.errors import BadInput
from megaboat.model.config import SeqBoatConfig
from megaboat.model.flops import training_flops
from megaboat.model.memory import Memory, Parameters, starting_bytes
from megaboat.parallel.sequence import traffic
from megaboat.tools.plan_layout import (
    GAPS,
    GPUS,
    HOST_BANDWIDTH,
    HOST_LINK,
    IMBALANCE,
    NODE,
    SEQUENCE_SECONDS,
    STAGE_3_SECONDS,
    USABLE,
    Gpu,
    Layout,
    cut_obstacle,
    large_enough,
    layout_memory,
    layouts,
    micro_steps,
    rank_parameters,
    recommend,
    sent_bytes,
    step_seconds,
)

GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="takes precedence over the file")
    parser.add_argument("--gpus", default="8,64,512,4096", metavar="N,N,...", help="default: 8,64,512,4096")
    parser.add_argument("--gpu", default="H200", choices=sorted(GPUS), help="default: H200")
    parser.add_argument(
        "--activation", type=float, default=0.5, metavar="A", help="expected share of active tokens; default: 0.5"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the plan."""
    config = with_vocabulary(load_config(RunConfig, arguments.config, arguments.overrides))
    counts, activation, name = gpu_counts(arguments.gpus), arguments.activation, arguments.gpu
    if not 0 <= activation <= 1:
        raise BadInput(f"--activation {activation:g}: a share of tokens, from 0 to 1")
    parameters, first = rank_parameters(config, 1), first_count(config, counts)
    print(f"{arguments.config}: {parameters.total / 1e6:,.1f} M parameters\n")
    print(flops_table(config, parameters, activation), end="\n\n")
    print(memory_table(config, first, activation), end="\n\n")
    print(layout_table(config, counts, GPUS[name], activation, name), end="\n\n")
    if config.parallel.sequence > 1 and isinstance(config.model, SeqBoatConfig):
        print(border_table(config, config.model, activation), end="\n\n")
    print(assumptions(GPUS[name]))


def with_vocabulary(config: RunConfig) -> RunConfig:
    """The config with the vocabulary of its dataset, where it names none itself. Raises BadInput without either."""
    if config.model.vocab_size is not None:
        return config
    if config.data.path is None or not config.data.path.exists():
        raise BadInput(f"model.vocab_size is not set and there is no dataset at data.path {config.data.path}; set it")
    return config.with_vocabulary(read_index(config.data.path)["vocab_size"])


def gpu_counts(text: str) -> list[int]:
    """[8, 64] of "8,64". Raises BadInput for anything but positive numbers."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise BadInput(f"--gpus {text!r}: expected numbers such as 8,64,512")
    return [int(part) for part in parts]


def first_count(config: RunConfig, counts: list[int]) -> int:
    """The first number of GPUs over which the model and its rows can be cut as configured. Raises BadInput for none."""
    cuts = config.parallel.tensor, config.parallel.sequence
    obstacles = {gpus: cut_obstacle(config, gpus, *cuts) for gpus in counts}
    found = next((gpus for gpus, said in obstacles.items() if said is None), None)
    if found is None:
        raise BadInput(f"on {counts[0]} GPUs: {obstacles[counts[0]]}")
    return found


def flops_table(config: RunConfig, parameters: Parameters, activation: float) -> str:
    """GFLOP a token of a training step, dense-equivalent (6 a parameter) and by activation."""
    length = config.data.seq_len
    to_the_end = config.train.precision == "bf16"
    lines = [f"{'GFLOP a token, forward and backward':<40}{6 * parameters.total / 1e9:10.3f}  as 6 a parameter"]
    shares = sorted({activation, config.train.capacity or 1.0}) if isinstance(config.model, SeqBoatConfig) else [1.0]
    for share in shares:
        useful = training_flops(config.model, 1, length, share) / 1e9
        executed = training_flops(config.model, 1, length, share, True, to_the_end) / 1e9
        lines.append(f"{'':<40}{useful:10.3f}  at activation {share:g}; {executed:.3f} with recomputation")
    return "\n".join(lines)


def memory_table(config: RunConfig, gpus: int, activation: float) -> str:
    """GB a rank by category, for every ZeRO stage with and without checkpointing, otherwise as configured."""
    names = [field.name for field in fields(Memory)]
    micro_batch, groups = config.train.micro_batch, (config.parallel.tensor, config.parallel.sequence)
    parameters = rank_parameters(config, groups[0])
    cuts = f"tensor {groups[0]}, sequence {groups[1]}, micro-batch {micro_batch} x {config.data.seq_len:,}"
    worst = config.train.capacity or 1.0
    title = f"GB a rank on {gpus} GPUs, {cuts}, {'all active' if worst == 1 else f'rows for {worst:g} of the tokens'}"
    head = f"{'zero':<6}{'checkpoints':<13}" + "".join(f"{name:>13}" for name in (*names, "total"))
    lines = [title, head + f"{f'total at {activation:g}':>15}"]
    for zero in (0, 1, 2, 3):
        for checkpointing in (False, True):
            layout = Layout(gpus, zero, micro_batch, checkpointing, *groups)
            most, usual = (layout_memory(config, parameters, layout, share) for share in (worst, activation))
            values = [*vars(most).values(), most.total]
            cells = "".join(f"{value / GB:13.2f}" for value in values) + f"{usual.total / GB:15.2f}"
            mine = zero == config.parallel.zero and checkpointing == config.train.checkpoint_activations
            lines.append(
                f"{zero:<6}{'on' if checkpointing else 'off':<13}{cells}{'  <- as configured' if mine else ''}"
            )
    try:
        config.check_world(gpus)
    except BadInput as error:
        lines.append(f"as configured it does not train on {gpus} GPUs: {error}")
    return "\n".join([*lines, *host_line(config, parameters, gpus), start_line(config, parameters, gpus)])


def host_line(config: RunConfig, parameters: Parameters, gpus: int) -> list[str]:
    """GB of the host's memory, where AdamW lies there."""
    if config.parallel.offload == "none":
        return []
    mine = 12 * parameters.total / (gpus // config.parallel.tensor) / GB
    return [f"AdamW takes {mine:.2f} GB a rank of the host's memory, {mine * min(gpus, NODE):.2f} GB a node"]


def start_line(config: RunConfig, parameters: Parameters, gpus: int) -> str:
    """GB a rank before the first step, as configured."""
    copies, tokens = gpus // config.parallel.tensor, sample_rows(config) * config.data.seq_len
    bf16 = config.train.precision == "bf16"
    most = starting_bytes(config.model, parameters, config.parallel.zero, copies, tokens, bf16) / GB
    beside = f", with {tokens:,} tokens that calibrate it" if tokens else ""
    return f"a new model is built in {most:.2f} GB under zero {config.parallel.zero}, block by block{beside}"


def border_table(config: RunConfig, model: SeqBoatConfig, activation: float) -> str:
    """What a piece of a row receives in each layer, beside what attention over every token would send."""
    length, sequence = config.data.row_len or config.data.seq_len, config.parallel.sequence
    found = traffic(model, length, sequence, activation)
    words = (
        "at the borders, whatever is active",
        f"more in a layer that evens out active rows, if all of a piece's move, at activation {activation:g}",
        "ring attention",
        "DeepSpeed-Ulysses",
    )
    title = f"MB that a GPU receives in a layer's forward pass for a row of {length:,} tokens over {sequence} GPUs"
    return "\n".join([title, *(f"{size / 1e6:>12,.1f}  {word}" for size, word in zip(found, words, strict=True))])


def layout_table(given: RunConfig, counts: list[int], gpu: Gpu, activation: float, name: str) -> str:
    """The recommended layout for each number of GPUs, or what stands in its way."""
    head = f"{'GPUs':>6}{'tensor':>8}{'sequence':>10}{'zero':>6}{'micro':>7}{'accum':>7}{'checkpoints':>13}"
    head += f"{'GB worst':>10}{'GB sent':>10}"
    lines = [
        f"recommended on {name}, global batch {given.train.global_batch} x {given.data.seq_len:,}",
        head + f"{'s computing':>13}{'s waiting':>11}{'tokens/s/GPU at best':>22}",
    ]
    for gpus in counts:
        config = large_enough(given, gpus)
        batch = config.train.global_batch
        layout = recommend(config, gpus, gpu, activation)
        if layout is None:
            lines.append(f"{gpus:>6}  {obstacle(config, gpus, gpu)}")
            continue
        parameters = rank_parameters(config, layout.tensor)
        worst = layout_memory(config, parameters, layout, 1.0).total / GB
        sent = sent_bytes(config, parameters, layout) / GB
        computing, waiting = step_seconds(config, parameters, layout, gpu, activation)
        rate = batch * config.data.seq_len / gpus / (computing + waiting)
        larger = f"  with train.global_batch={batch}" if batch > given.train.global_batch else ""
        lines.append(
            f"{gpus:>6}{layout.tensor:>8}{layout.sequence:>10}{layout.zero:>6}{layout.micro_batch:>7}"
            f"{micro_steps(config, layout):>7}{'on' if layout.checkpointing else 'off':>13}{worst:>10.1f}{sent:>10.2f}"
            f"{computing:>13.3f}{waiting:>11.3f}{rate:>22,.0f}{larger}"
        )
    return "\n".join(lines)


def obstacle(config: RunConfig, gpus: int, gpu: Gpu) -> str:
    """Why no layout was found, and the remedy."""
    if any(layouts(config, gpus)):
        return f"nothing fits in {USABLE * gpu.memory / GB:.0f} GB: shorten data.seq_len or take more GPUs"
    return f"nothing can be cut over them: {cut_obstacle(config, gpus, 1, 1)}"


def assumptions(gpu: Gpu) -> str:
    """What the simulation takes for granted."""
    return "\n".join(
        [
            "assumptions: rows are single documents; parameters, AdamW and gradients in fp32, products in bf16;",
            f"  {gpu.products / 1e12:,.0f} TFLOP/s in products, {gpu.bandwidth / 1e12:.1f} TB/s of memory, "
            f"{gpu.link / 1e9:.0f} GB/s within nodes of {NODE}, {gpu.network / 1e9:.0f} GB/s a GPU between them;",
            f"  the busiest rank has {IMBALANCE:g} times the mean work, and work takes {GAPS:g} times its floors;",
            "  stages 0 to 2 do not hide communication, stage 3 hides as much as it computes and takes",
            f"  {1e3 * STAGE_3_SECONDS:g} ms more for each block that is gathered or cut; pieces of rows wait "
            f"{1e3 * SEQUENCE_SECONDS:g} ms in a block;",
            f"  {USABLE:.0%} of memory is usable; an optimizer in the host's memory has {HOST_BANDWIDTH / 1e9:g} GB/s",
            f"  a node and {HOST_LINK / 1e9:g} GB/s a GPU on the way. Evaluation, checkpoints and data are left out.",
            "  Small models, whose kernels are shorter than their launches, and GPUs full to the last gigabyte",
            "  take up to three times as long.",
        ]
    )
