"""The one door to flash attention: whichever implementation is installed, behind one signature.

Preference: FlashAttention-4 (`flash-attn-4`, Hopper and newer), FlashAttention-3, FlashAttention-2, and else the
FlashAttention-2 kernels that torch itself carries. All take variable-length batches, bf16 or fp16, on CUDA.

The kernels want heads of equal query, key and value width. SeqBoat has one narrow score head and a wide value, so the
value is cut in heads of 128 columns that share queries and keys through a stride of 0, and the scores are computed
E / 128 times. Where documents are long, `band` does with one time.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

HEAD_WIDTH = 128  # the widest head that every backend runs backward; wider ones exceed Hopper's shared memory in FA4

# (q_RHd, k_KHd, v_KHd, cu_q, cu_k, max_q, max_k, window, scale) -> o_RHd
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, int, float], Tensor]


def supports(q: Tensor) -> bool:
    """Flash attention runs bf16 and fp16 heads of at most 128 columns on CUDA devices from sm80 on."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] <= HEAD_WIDTH
        and _capability(q.device) >= (8, 0)
    )


def flash_attention(
    q_RGZ: Tensor,
    k_KGZ: Tensor,
    v_KE: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    window: int,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """`reference.windowed_attention`. max_q, max_k: upper bounds, known on the host, of a document's rows.

    backend: "auto", "fa4", "fa3", "fa2" or "torch".
    The backward pass is deterministic where torch.use_deterministic_algorithms is set.
    """
    R, G, Z = q_RGZ.shape
    E = v_KE.shape[1]
    if R == 0:
        # No launch on an empty grid, yet every input stays in the autograd graph, with zero gradients.
        return v_KE[:0] + q_RGZ.sum() + k_KGZ[:0].sum()
    columns = E // G
    width = min(columns, HEAD_WIDTH)
    parts = -(-columns // width)
    head = -(-max(width, Z) // 8) * 8  # kernels read 16 bytes at a time
    v_KGE = _widened(v_KE.unflatten(1, (G, columns)), parts * width)
    v_KHd = _widened(v_KGE.reshape(len(v_KE), G * parts, width), head)
    attend = backends()[_best(q_RGZ.device) if backend == "auto" else backend]
    o_RHd = attend(
        _repeat(q_RGZ, parts, head), _repeat(k_KGZ, parts, head), v_KHd, cu_q, cu_k, max_q, max_k, window, scale
    )
    return o_RHd[..., :width].reshape(R, G, parts * width)[..., :columns].reshape(R, E)


def _repeat(x_RGZ: Tensor, parts: int, head: int) -> Tensor:
    """(R, G * parts, head): each score head serves `parts` value heads; without a copy when there is one."""
    R, G, Z = x_RGZ.shape
    x_RGZ = _widened(x_RGZ, head)
    return x_RGZ[:, :, None].expand(R, G, parts, head).reshape(R, G * parts, head)


def _widened(x: Tensor, width: int) -> Tensor:
    """Zeros to the right up to `width` columns; `pad` would copy where none are missing."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _best(device: torch.device) -> str:
    hopper = _capability(device) >= (9, 0)
    wanted = ("fa4", "fa3", "fa2", "torch") if hopper else ("fa2", "torch")
    return next(name for name in wanted if name in backends())


@cache
def backends() -> dict[str, Attention]:
    """The implementations that can be imported here, by name."""
    found = {"fa4": _fa4, "fa3": _fa3, "fa2": _fa2, "torch": _torch}
    return {name: attend for name, load in found.items() if (attend := _try(load)) is not None}


def _try(load: Callable[[], Attention]) -> Attention | None:
    try:
        return load()
    except ImportError:
        return None


def _fa4() -> Attention:
    from flash_attn.cute import flash_attn_varlen_func

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, window, scale):  # type: ignore[no-untyped-def]
        out = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=scale,
            causal=True,
            window_size=(window, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out[0] if isinstance(out, tuple) else out

    return attend


def _fa3() -> Attention:
    from flash_attn_interface import flash_attn_varlen_func

    return _as_published(flash_attn_varlen_func)


def _fa2() -> Attention:
    from flash_attn import flash_attn_varlen_func

    return _as_published(flash_attn_varlen_func)


def _as_published(varlen: Callable) -> Attention:
    """FA2 and FA3 name their arguments alike."""

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, window, scale):  # type: ignore[no-untyped-def]
        return varlen(
            q,
            k,
            v,
            cu_q,
            cu_k,
            max_q,
            max_k,
            softmax_scale=scale,
            causal=True,
            window_size=(window, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    return attend


def _torch() -> Attention:
    from torch.nn.attention.varlen import varlen_attn

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, window, scale):  # type: ignore[no-untyped-def]
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(window, 0))

    return attend
