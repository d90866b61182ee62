"""What a model is made of. A family is a class; a `block` style sets the defaults of the choices below it."""

from typing import Annotated, Any, Literal

import pydantic

from megaboat.config import Section

# What the two styles choose where the user did not: `paper` is SeqBoat as published, `scaled` what trains best at size.
STYLES: dict[str, dict[str, Any]] = {
    "paper": {"value_ratio": 2.0, "ffn_ratio": 0.0, "head_dim": 0, "calibrate": False},
    "scaled": {"value_ratio": 1.0, "ffn_ratio": 16 / 3, "head_dim": 128, "calibrate": True},
}


class SeqBoatConfig(Section):
    """A SeqBoat decoder. Widths left at None follow from `width` and the block style."""

    family: Literal["seqboat"] = "seqboat"
    """What is trained; each family has keys of its own."""
    block: Literal["paper", "scaled"] = "scaled"
    """paper: as published; scaled: what trains best at size, with queries and keys of a map each. Sets the keys below
    that are null."""
    vocab_size: int | None = pydantic.Field(None, gt=0)
    """None: the vocabulary of the token shards."""
    layers: int = pydantic.Field(12, gt=0)
    """Blocks, one after the other."""
    width: int = pydantic.Field(512, gt=0)
    """Numbers that describe a token between blocks (D)."""
    qk_dim: int = pydantic.Field(128, gt=0, multiple_of=2)
    """Query/key width Z; even, for the rotary pairs."""
    value_dim: int | None = pydantic.Field(None, gt=0)
    """Value width E. None: 2 x width (paper), width (scaled)."""
    heads: int | None = pydantic.Field(None, gt=0)
    """Score heads with their own scales on the same z. None: 1 (paper), E / 128 (scaled)."""
    ffn_dim: int | None = pydantic.Field(None, ge=0)
    """Hidden width of a SwiGLU feed-forward after each block, 0: none. None: 0 (paper), 16/3 x width (scaled)."""
    ssm: Literal["ema", "s4d-real", "s4d-lin", "s5"] = "ema"
    """What every token passes: the published moving average, or to compare it with S4D with as large a state, of real
    poles or of pairs of complex ones (s4d-lin), or S5, with a state of D numbers for all channels together. The last
    two have no GPU kernel: slow."""
    ema_order: int = pydantic.Field(16, gt=0, le=64)
    """States of the moving average a channel (N)."""
    window: int = pydantic.Field(1024, gt=0)
    """An active token sees itself and this many active tokens before it in its document."""
    modules: int = pydantic.Field(1, gt=0)
    """GAUs a layer, each with its own decision."""
    configurator: Literal["tempered", "gumbel", "always", "never"] = "tempered"
    """How tokens are picked. tempered: as published. The others are to compare it with: gumbel, a noisy decision in
    training; always, attention on every token; never, none."""
    temperature_scale: float = pydantic.Field(1.0, gt=0)
    """Initial temperature of the configurator in units of sqrt(width)."""
    calibrate: bool | None = None
    """Start every layer at one half of its tokens active, from one batch. None: no (paper), yes (scaled)."""
    rope_base: float = pydantic.Field(10000.0, gt=1)
    """Base of the rotary frequencies."""
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of the numbers set to zero in training; drawn by each rank for itself."""

    @property
    def qk_maps(self) -> int:
        """Maps that queries and keys are made of: one for both (paper), one each (scaled)."""
        return 1 if self.block == "paper" else 2

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_from_style(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        block, value_dim = values.get("block", "scaled"), values.get("value_dim")
        style = STYLES.get(block) if isinstance(block, str) else None
        width = values.get("width", cls.model_fields["width"].default)
        if style is None or not isinstance(width, int) or not isinstance(value_dim, int | None):
            return values  # the field's own check says what is wrong
        value_dim = value_dim or int(style["value_ratio"] * width)
        head_dim = style["head_dim"]
        derived = {
            "value_dim": value_dim,
            "heads": max(1, value_dim // head_dim) if head_dim else 1,
            "ffn_dim": _round_up(style["ffn_ratio"] * width, 64),
            "calibrate": style["calibrate"],
        }
        return values | {key: value for key, value in derived.items() if values.get(key) is None}

    @pydantic.model_validator(mode="after")
    def _states_come_in_pairs(self) -> "SeqBoatConfig":
        if self.ssm == "s5" and self.width % 2:
            raise ValueError(f"width {self.width} is odd, and the poles of ssm s5 come in pairs")
        if self.ssm == "s4d-lin" and self.ema_order % 2:
            raise ValueError(f"ema_order {self.ema_order} is odd, and the poles of ssm s4d-lin come in pairs")
        return self

    @pydantic.model_validator(mode="after")
    def _heads_divide_values(self) -> "SeqBoatConfig":
        if self.value_dim % self.heads:
            hint = "set heads to a divisor of it, or with both left out width to a multiple of 128"
            raise ValueError(f"value_dim {self.value_dim} is not a multiple of heads {self.heads}; {hint}")
        return self


class LlamaConfig(Section):
    """The dense baseline: Hugging Face's Llama."""

    family: Literal["llama"]
    """What is trained; each family has keys of its own."""
    vocab_size: int | None = pydantic.Field(None, gt=0)
    """None: the vocabulary of the token shards."""
    layers: int = pydantic.Field(12, gt=0)
    """Blocks, one after the other."""
    width: int = pydantic.Field(512, gt=0)
    """Numbers that describe a token between blocks (D)."""
    heads: int = pydantic.Field(8, gt=0)
    """Heads of the attention."""
    kv_heads: int | None = pydantic.Field(None, gt=0)
    """Heads of the keys and values. None: as many as heads."""
    ffn_dim: int | None = pydantic.Field(None, gt=0)
    """Hidden width of the feed-forward. None: 8/3 x width."""
    rope_base: float = pydantic.Field(10000.0, gt=1)
    """Base of the rotary frequencies."""

    @pydantic.model_validator(mode="after")
    def _heads_divide_width(self) -> "LlamaConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        return self

    @property
    def hidden(self) -> int:
        return self.ffn_dim or _round_up(8 / 3 * self.width, 64)


def _family(value: Any) -> str:
    return value.get("family", "seqboat") if isinstance(value, dict) else getattr(value, "family", "")


ModelConfig = Annotated[
    Annotated[SeqBoatConfig, pydantic.Tag("seqboat")] | Annotated[LlamaConfig, pydantic.Tag("llama")],
    pydantic.Discriminator(_family),
]


def _round_up(value: float, multiple: int) -> int:
    return -int(-value // multiple) * multiple
