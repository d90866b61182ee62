"""`initialize` does what its table says, the same for the same seed; and the published number of parameters."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaboat.layers.gau import GatedAttentionUnit
from megaboat.layers.ssm import S5, S4DLin, S4DReal, hippo_normal
from megaboat.model.block import SeqBoatBlock
from megaboat.model.build import build_model
from megaboat.model.config import SeqBoatConfig
from megaboat.model.seqboat import SeqBoat, initialize, initialize_module

WIDTH, SCALE = 256, 0.3


def constant(value: float) -> Callable[[Tensor], None]:
    def check(x: Tensor) -> None:
        assert (x == torch.tensor(value)).all()

    return check


def normal(deviation: float) -> Callable[[Tensor], None]:
    def check(x: Tensor) -> None:
        assert x.std().item() == pytest.approx(deviation, rel=0.02)
        assert abs(x.mean().item()) < 5 * deviation / x.numel() ** 0.5
        assert x.abs().max() > 3 * deviation, "not truncated"

    return check


def truncated(deviation: float) -> Callable[[Tensor], None]:
    """TN(s): cut at two deviations, which leaves 0.8796 s."""

    def check(x: Tensor) -> None:
        assert x.abs().max() <= 2 * deviation * (1 + 1e-6)
        assert x.abs().max() > 1.8 * deviation
        assert x.std().item() == pytest.approx(0.8796 * deviation, rel=3 / x.numel() ** 0.5 + 0.02)
        assert abs(x.mean().item()) < 5 * deviation / x.numel() ** 0.5

    return check


def alternating(x_DN: Tensor) -> None:
    sign_N = torch.tensor([1.0, -1.0]).repeat(x_DN.shape[1] // 2)
    truncated(0.02)(x_DN - sign_N)


SCALES = "GAU scales of q and k | TN(0.02), of two maps + 1; biases 0"
TABLE = [  # the row of the docstring, the parameters it speaks of, the check
    ("embedding (tied head) | N(0, 1/width)", r"embedding\.weight", normal(WIDTH**-0.5)),
    ("linear weights | TN(0.02); biases 0", r".*\.(linear|logits|z|r|v|o|gate|up|down)\.weight", truncated(0.02)),
    ("linear weights | TN(0.02); biases 0", r".*\.(linear|logits|z|r|v|o)\.bias", constant(0)),
    (SCALES, r".*\.scale_[qk]", lambda scale: truncated(0.02)(scale - 1)),
    (SCALES, r".*\.bias_[qk]", constant(0)),
    ("norms | scale 1, shift 0", r".*norm\.weight", constant(1)),
    ("norms | scale 1, shift 0", r".*norm\.bias", constant(0)),
    ("EMA smoothing, damping | TN(0.2)", r".*\.(smoothing|damping)", truncated(0.2)),
    ("EMA expansion | TN(0.02) + 1, -1, 1, -1, ... over N", r".*\.expansion", alternating),
    ("EMA projection, skip | TN(1)", r".*\.(projection|skip)", truncated(1.0)),
    (
        "configurator temperature | temperature_scale * sqrt(width)",
        r".*\.log_temperature",
        constant(math.log(SCALE * WIDTH**0.5)),
    ),
]


def initialized(seed: int) -> SeqBoat:
    """From NaN, so that a parameter that `initialize` forgets cannot look right by chance."""
    config = SeqBoatConfig(vocab_size=500, layers=2, width=WIDTH, qk_dim=128, modules=2, temperature_scale=SCALE)
    model = SeqBoat(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    initialize(model, config, torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize(("row", "pattern", "check"), TABLE, ids=[pattern for _, pattern, _ in TABLE])
def test_each_row_of_the_table(row: str, pattern: str, check: Callable[[Tensor], None]) -> None:
    assert row in re.sub(" +", " ", initialize.__doc__), "the docstring's table and this one are the same"
    parameters = {n: p for n, p in initialized(0).named_parameters() if re.fullmatch(pattern, n)}
    assert parameters
    for parameter in parameters.values():
        check(parameter.detach())


def test_scales_of_one_map_are_drawn_around_zero() -> None:
    (block,) = build_model(SeqBoatConfig(block="paper", vocab_size=50, layers=1, width=WIDTH), 0).blocks
    assert isinstance(block, SeqBoatBlock)
    truncated(0.02)(block.sma.units[0].scale_q.detach())


def test_the_table_is_complete() -> None:
    for name, _ in initialized(0).named_parameters():
        assert sum(re.fullmatch(pattern, name) is not None for _, pattern, _ in TABLE) == 1, name
    rows = [line for line in initialize.__doc__.splitlines() if line.strip().startswith("|")][2:]
    assert len(rows) == len({row for row, _, _ in TABLE})


def test_the_seed_alone_decides() -> None:
    torch.manual_seed(1)
    one = initialized(7).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = SeqBoat(SeqBoatConfig(vocab_size=500, layers=2, width=WIDTH, qk_dim=128, modules=2))
    state = torch.get_rng_state()
    initialize(other, other.config, torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"
    assert not torch.equal(before, state), "as torch's own constructors do"
    for name, value in initialized(7).state_dict().items():
        assert torch.equal(value, one[name]), name
    assert not torch.equal(initialized(8).embedding.weight, one["embedding.weight"])


def test_parameters_of_the_published_enwik8_model() -> None:
    """14 layers of 2,781,883 parameters and a tied embedding of 256 symbols: 39M."""
    config = SeqBoatConfig(
        block="paper", vocab_size=256, layers=14, width=616, qk_dim=128, value_dim=1232, ema_order=16, window=1024
    )
    with torch.device("meta"):
        model = SeqBoat(config)
    assert [sum(p.numel() for p in block.parameters()) for block in model.blocks] == [2_781_883] * 14
    assert sum(p.numel() for p in model.parameters()) == 14 * 2_781_883 + 256 * 616 == 39_104_058


@pytest.mark.parametrize(
    ("given", "value_dim", "heads", "ffn_dim", "calibrate"),
    [
        ({"block": "paper", "width": 616}, 1232, 1, 0, False),
        ({"block": "scaled", "width": 512}, 512, 4, 2752, True),
        ({"block": "scaled", "width": 64}, 64, 1, 384, True),
        ({"block": "scaled", "width": 512, "ffn_dim": 0, "value_dim": 1024}, 1024, 8, 0, True),
    ],
    ids=["paper", "scaled", "scaled-narrow", "scaled-with-choices"],
)
def test_the_style_fills_what_was_not_chosen(
    given: dict, value_dim: int, heads: int, ffn_dim: int, calibrate: bool
) -> None:
    config = SeqBoatConfig(vocab_size=256, layers=1, **given)
    assert (config.value_dim, config.heads, config.ffn_dim, config.calibrate) == (value_dim, heads, ffn_dim, calibrate)
    (block,) = build_model(config, 0).blocks
    assert isinstance(block, SeqBoatBlock)
    (unit,) = block.sma.units
    assert isinstance(unit, GatedAttentionUnit)
    assert unit.v.out_features == value_dim
    assert len(unit.scale_q) == heads
    assert (block.ffn is not None) == bool(ffn_dim)


def test_s4d_real_starts_with_long_memories() -> None:
    ssm = S4DReal(4096, 5)
    initialize_module(ssm, SeqBoatConfig(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssm.log_rate.exp(), torch.arange(1.0, 6.0).expand(4096, 5))
    step_D = ssm.log_step.exp()
    assert 0.001 <= step_D.min() < 0.00101
    assert 0.099 < step_D.max() <= 0.1
    assert ssm.log_step.mean().item() == pytest.approx(math.log(0.01), abs=0.1)
    normal(1.0)(ssm.readout)


def test_s5_starts_as_the_normal_part_of_hippo_in_a_basis_of_eigenvectors() -> None:
    """Blocks of 48, the largest even divisor of 96 up to 64: V diag(poles) V* and its conjugate make the matrix."""
    ssm = S5(96, 16)
    initialize_module(ssm, SeqBoatConfig(), torch.Generator().manual_seed(0))
    poles_P = torch.complex(-ssm.log_rate.exp(), ssm.frequency).to(torch.complex128).detach()
    _, vectors_SP = hippo_normal(48)
    for poles in poles_P.split(24):
        again_SS = 2 * (vectors_SP * poles @ vectors_SP.mH).real
        for n in range(48):
            for k in range(48):
                beside = math.sqrt((n + 0.5) * (k + 0.5)) * (1 if n < k else -1)
                assert again_SS[n, k].item() == pytest.approx(-0.5 if n == k else beside, abs=1e-4)
    basis_SS = torch.cat([vectors_SP, vectors_SP.conj()], 1)
    torch.testing.assert_close(basis_SS.mH @ basis_SS, torch.eye(48, dtype=torch.complex128), rtol=1e-9, atol=1e-9)
    # In the basis of the states, B is real with entries N(0, 1 / width), and C the same with another for each part.
    into_SD = 2 * (vectors_SP @ torch.view_as_complex(ssm.into)[:24].to(torch.complex128)).real
    normal(96**-0.5)(into_SD)
    assert torch.view_as_complex(ssm.readout).abs().square().mean().item() == pytest.approx(2 / 96, rel=0.05)
    assert 0.001 <= ssm.log_step.exp().min() < ssm.log_step.exp().max() <= 0.1


def test_s4d_lin_starts_with_long_memories_of_many_phases() -> None:
    ssm = S4DLin(1024, 6)
    initialize_module(ssm, SeqBoatConfig(), torch.Generator().manual_seed(0))
    decay_DP, _ = ssm.coefficients()
    poles_DP = decay_DP.log() / ssm.log_step.exp()[:, None]
    torch.testing.assert_close(poles_DP.real, torch.full((1024, 3), -0.5), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(poles_DP.imag, (math.pi * torch.arange(3)).expand(1024, 3), rtol=1e-4, atol=1e-4)
    assert torch.view_as_complex(ssm.readout).abs().square().mean().item() == pytest.approx(1, rel=0.05)
