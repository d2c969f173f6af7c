"""Stand-ins for the fused operators of torch_npu (`torch.ops.npu`); see vendor_standins.py."""

from __future__ import annotations

import torch
from torch import Tensor
from vendor_standins import FLOATS, StandIn, require

# --- npu_fusion_attention

_ATTENTION = (
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, {} int pre_tockens=2147483647, "
    "int next_tockens=2147483647, int inner_precise=0, {} int[]? prefix=None, int[]? actual_seq_qlen=None, "
    "int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, "
    'str softmax_layout="", Tensor? sink=None'
)
SEED, OFFSET = 71, 5  # what the forward pass hands to the backward pass


def _masks(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, atten_mask: Tensor | None,
    pre_tockens: int, next_tockens: int, actual_seq_qlen: list[int] | None, actual_seq_kvlen: list[int] | None,
    sparse_mode: int,
) -> list[tuple[slice, Tensor]]:  # fmt: skip
    """The checks; for each sequence its rows and True where a row sees a column."""
    require(input_layout == "TND" and query.dim() == 3 and query.shape[1] == head_num, "layout")
    require(query.shape == key.shape == value.shape, "shapes")
    require(1 <= query.shape[0] <= 2**20 and 1 <= head_num <= 256 and 1 <= query.shape[2] <= 768, "sizes")
    require(query.dtype in FLOATS and query.dtype == key.dtype == value.dtype, "dtype")
    assert actual_seq_qlen is not None
    require(actual_seq_qlen == actual_seq_kvlen and 1 <= len(actual_seq_qlen) <= 1024, "lengths")
    require(actual_seq_qlen[-1] == query.shape[0], "all tokens")
    if atten_mask is not None:
        later = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        require(sparse_mode in (3, 4) and torch.equal(atten_mask, later), "the compressed mask")
    masks, start = [], 0
    for end in actual_seq_qlen:
        row, column = torch.arange(end - start)[:, None], torch.arange(end - start)[None, :]
        seen = torch.ones(end - start, end - start, dtype=torch.bool)
        if atten_mask is not None:
            seen = column <= row
            if sparse_mode == 4:
                seen = (column >= row - pre_tockens) & (column <= row + next_tockens)
        masks.append((slice(start, end), seen))
        start = end
    return masks


def _weights(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax `[H, n, n]`, and the largest score and the sum of exponentials `[n, H, 8]` of its rows."""
    scores = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    largest = scores.amax(2, keepdim=True)
    sums = (scores - largest).exp().sum(2, keepdim=True)
    rows = [x.transpose(0, 1).expand(-1, -1, 8).float() for x in (largest, sums)]
    return (scores - largest).exp() / sums, rows[0], rows[1]


def _fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: Tensor | None = None,
    padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = 2147483647, next_tockens: int = 2147483647, inner_precise: int = 0,
    prefix: list[int] | None = None, actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None, sparse_mode: int = 0, gen_mask_parallel: bool = True,
    sync: bool = False, softmax_layout: str = "", sink: Tensor | None = None, dropout_mask: Tensor | None = None,
    seed: int = 0, offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:  # fmt: skip
    require(pse is None and keep_prob == 1.0, "packed, without bias and dropout")
    out = torch.empty_like(value)
    largest, sums = torch.empty(2, *query.shape[:2], 8)
    for rows, seen in _masks(
        query, key, value, head_num, input_layout, atten_mask, pre_tockens, next_tockens, actual_seq_qlen,
        actual_seq_kvlen, sparse_mode,
    ):  # fmt: skip
        if seen.numel():
            weights, largest[rows], sums[rows] = _weights(query[rows], key[rows], seen, scale)
            out[rows] = torch.einsum("hij,jhd->ihd", weights, value[rows].double()).to(value.dtype)
    return out, largest, sums, torch.empty(0), SEED, OFFSET, query.numel()


def _fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *,
    pse: Tensor | None = None, padding_mask: Tensor | None = None, atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None, softmax_sum: Tensor | None = None, softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None, scale_value: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = 2147483647, next_tockens: int = 2147483647, inner_precise: int = 0, seed: int = 0,
    offset: int = 0, numels: int = 0, prefix: list[int] | None = None, actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None, sparse_mode: int = 0, gen_mask_parallel: bool = True,
    sync: bool = False, softmax_layout: str = "", sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    require((seed, offset, numels) == (SEED, OFFSET, query.numel()), "what the forward pass gave")
    require(dy.shape == value.shape and dy.dtype == value.dtype, "dy")
    assert softmax_max is not None
    assert softmax_sum is not None
    assert attention_in is not None
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for rows, seen in _masks(
        query, key, value, head_num, input_layout, atten_mask, pre_tockens, next_tockens, actual_seq_qlen,
        actual_seq_kvlen, sparse_mode,
    ):  # fmt: skip
        if not seen.numel():
            continue
        weights, largest, sums = _weights(query[rows], key[rows], seen, scale_value)
        require(torch.equal(largest, softmax_max[rows]) and torch.equal(sums, softmax_sum[rows]), "statistics")
        q, k, v, grad, out = (x[rows].double() for x in (query, key, value, dy, attention_in))
        d_weights = torch.einsum("ihd,jhd->hij", grad, v)
        d_scores = weights * (d_weights - (grad * out).sum(2).t().unsqueeze(2)) * scale_value
        dq[rows] = torch.einsum("hij,jhd->ihd", d_scores, k).to(dq.dtype)
        dk[rows] = torch.einsum("hij,ihd->jhd", d_scores, q).to(dk.dtype)
        dv[rows] = torch.einsum("hij,ihd->jhd", weights, grad).to(dv.dtype)
    return dq, dk, dv, torch.empty(0), torch.empty(0)


FUSION_ATTENTION: list[StandIn] = [
    (
        "npu::npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
        + _ATTENTION.format("float scale=1., float keep_prob=1.,", "")
        + ", Tensor? dropout_mask=None, int seed=0, int offset=0) "
        "-> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
        _fusion_attention,
    ),
    (
        "npu::npu_fusion_attention_grad(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, "
        "str input_layout, *, "
        + _ATTENTION.format(
            "Tensor? softmax_max=None, Tensor? softmax_sum=None, Tensor? softmax_in=None, Tensor? attention_in=None, "
            "float scale_value=1., float keep_prob=1.,",
            "int seed=0, int offset=0, int numels=0,",
        )
        + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _fusion_attention_grad,
    ),
]


# --- rows and channels; some releases call the first argument `self`, some `input`


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    require(x.dtype in FLOATS and gamma.dtype in (torch.float32, x.dtype), "dtype")
    require(x.dim() >= 2 and gamma.shape == x.shape[-1:], "shape")
    rstd = (x.double().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x.double() * rstd * gamma.double()).to(x.dtype), rstd.float()


def _rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    require(dy.dtype == x.dtype and rstd.dtype == torch.float32 and rstd.shape == (*x.shape[:-1], 1), "rstd")
    normalised, g = x.double() * rstd.double(), dy.double()
    along = (g * gamma.double() * normalised).mean(-1, keepdim=True)
    dx = rstd.double() * (g * gamma.double() - normalised * along)
    return dx.to(x.dtype), (g * normalised).sum(0).float()


RMS_NORM: list[StandIn] = [
    ("npu::npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)", _rms_norm),
    (
        "npu::npu_rms_norm_backward(Tensor dy, Tensor self, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)",
        _rms_norm_backward,
    ),
]


def _turn(width: int, mode: str) -> Tensor:
    """The matrix by which channels are turned, `[D, D]`."""
    matrix = torch.zeros(width, width, dtype=torch.float64)
    for i in range(width // 2):
        first, second = (i, i + width // 2) if mode == "half" else (2 * i, 2 * i + 1)
        matrix[second, first], matrix[first, second] = -1.0, 1.0
    return matrix


def _check_rotary(x: Tensor, r1: Tensor, r2: Tensor, mode: str) -> None:
    require(x.dim() == 3 and r1.shape == r2.shape == (x.shape[0], 1, x.shape[2]), "layout TND with T1D")
    require(x.numel() > 0 and x.shape[1] < 1000 and x.shape[2] < 896 and x.shape[2] % 2 == 0, "sizes")
    require(x.dtype in FLOATS and x.dtype == r1.dtype == r2.dtype and mode in ("half", "interleave"), "dtype")


def _rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    _check_rotary(x, r1, r2, rotary_mode)
    turned = x.double() @ _turn(x.shape[2], rotary_mode)
    return (x.double() * r1.double() + turned * r2.double()).to(x.dtype)


def _rotary_mul_backward(
    grad: Tensor, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rotary(x, r1, r2, rotary_mode)
    require(grad.shape == x.shape and grad.dtype == x.dtype, "grad")
    back = (grad.double() * r2.double()) @ _turn(x.shape[2], rotary_mode).t()
    return (grad.double() * r1.double() + back).to(x.dtype), torch.empty(0), torch.empty(0)


ROTARY: list[StandIn] = [
    (
        "npu::npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) "
        "-> Tensor",
        _rotary_mul,
    ),
    (
        "npu::npu_rotary_mul_backward(Tensor grad, Tensor self, Tensor r1, Tensor r2, str rotary_mode='half') "
        "-> (Tensor, Tensor, Tensor)",
        _rotary_mul_backward,
    ),
]


def _swiglu(x: Tensor, dim: int = -1) -> Tensor:
    require(x.numel() > 0 and x.is_contiguous() and x.shape[dim] % 2 == 0 and x.dtype in FLOATS, "tensor")
    a, b = x.double().chunk(2, dim)
    return (a / (1.0 + (-a).exp()) * b).to(x.dtype)


def _swiglu_backward(grad_output: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    require(grad_output.is_contiguous() and x.is_contiguous() and grad_output.dtype == x.dtype, "tensors")
    a, b = x.double().chunk(2, dim)
    g, s = grad_output.double(), 1.0 / (1.0 + (-a).exp())
    return torch.cat([g * b * (s + a * s * (1.0 - s)), g * a * s], dim).to(x.dtype)


SWIGLU: list[StandIn] = [
    ("npu::npu_swiglu(Tensor self, int dim=-1) -> Tensor", _swiglu),
    ("npu::npu_swiglu_backward(Tensor grad_output, Tensor self, int dim=-1) -> Tensor", _swiglu_backward),
]
