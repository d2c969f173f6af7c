"""`hstu_attention`: arguments and backends that it refuses, and with what words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies import backends, known_backends, one_thread  # noqa: F401

from npu_rec.errors import BackendError
from npu_rec.ops import OPERATORS, Backend, RelativeBias, hstu_attention

ALL = backends("hstu_attention", interpreted=False)  # Triton under its interpreter: test_triton_attention.py


def arguments() -> dict[str, Any]:
    q, k, v = torch.zeros(5, 2, 3), torch.zeros(5, 2, 3), torch.zeros(5, 2, 4)
    return {"q": q, "k": k, "v": v, "offsets": torch.tensor([0, 3, 5]), "max_seq_len": 4}


TIMES = {"query_time": torch.zeros(5, dtype=torch.int64), "key_time": torch.zeros(5, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": torch.zeros(5, 6)}, r"q, k, v must be \[T, H, Dqk\].*\[5, 6\]"),
        ({"k": torch.zeros(5, 2, 4)}, r"q, k, v must be .*\[5, 2, 4\]"),
        ({"v": torch.zeros(4, 2, 4)}, r"q, k, v must be .*\[4, 2, 4\]"),
        ({"v": torch.zeros(5, 1, 4)}, r"q, k, v must be .*\[5, 1, 4\]"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, r"offsets must be \[B \+ 1\], got \[0\]"),
        ({"offsets": torch.tensor([[0, 5]])}, r"offsets must be \[B \+ 1\]"),
        ({"offsets": torch.tensor([0, 4, 3, 5])}, "offsets must rise from 0 to T = 5"),
        ({"offsets": torch.tensor([1, 3, 5])}, "offsets must rise from 0 to T = 5"),
        ({"offsets": torch.tensor([0, 3, 4])}, "offsets must rise from 0 to T = 5"),
        ({"offsets": torch.tensor([0])}, "offsets must rise from 0 to T = 5"),
        ({"max_seq_len": 2}, "a sequence has 3 tokens, max_seq_len is 2"),
        ({"num_targets": torch.tensor([1])}, r"num_targets must be \[B\] = \[2\], got \[1\]"),
        ({"num_targets": torch.tensor([1, 3])}, "num_targets must be between 0 and the length"),
        ({"num_targets": torch.tensor([-1, 0])}, "num_targets must be between 0 and the length"),
        ({"max_seq_len": 0}, "max_seq_len must be 1 or more, got 0"),
        ({"divisor": 0.0}, "divisor must be positive and finite, got 0.0"),
        ({"divisor": torch.nan}, "divisor must be positive and finite, got nan"),
        ({"alpha": torch.inf}, "alpha must be finite, got inf"),
        ({name: torch.zeros(5, 0, 3) for name in "qkv"}, "heads and their widths must be 1 or more"),
        ({name: torch.zeros(5, 2, 0) for name in "qk"}, "heads and their widths must be 1 or more"),
        ({"v": torch.zeros(5, 2, 0)}, "heads and their widths must be 1 or more"),
        ({"contextual_seq_len": -1}, "contextual_seq_len must be 0 or more, got -1"),
        ({"max_attn_len": -2}, "max_attn_len must be 0 or more, got -2"),
        ({"min_full_attn_seq_len": -3}, "min_full_attn_seq_len must be 0 or more, got -3"),
        ({"bias": RelativeBias(torch.zeros(8))}, r"position_weight must be .* = \[7\], got \[8\]"),
        ({"bias": RelativeBias(torch.zeros(7), None, **TIMES)}, "query_time and key_time given without time_weight"),
        (
            {"bias": RelativeBias(torch.zeros(7), torch.zeros(9))},
            r"time_weight needs query_time of shape \[T\] = \[5\]",
        ),
        (
            {"bias": RelativeBias(torch.zeros(7), torch.zeros(9), TIMES["query_time"], TIMES["key_time"][:4])},
            r"time_weight needs key_time of shape \[T\] = \[5\], got \[4\]",
        ),
        ({"bias": RelativeBias(torch.zeros(7), torch.zeros(1), **TIMES)}, r"time_weight must be \[buckets \+ 1\]"),
    ],
)
def test_arguments_that_do_not_fit_raise_value_error(change: dict[str, Any], text: str) -> None:
    for backend in ("auto", *ALL):
        with pytest.raises(ValueError, match=text):
            hstu_attention(**{**arguments(), **change}, backend=backend)


def test_an_unknown_backend_raises_and_names_the_known_ones() -> None:
    known = known_backends("hstu_attention")
    with pytest.raises(BackendError, match=f"hstu_attention: no backend 'cuda'; known: {known}"):
        hstu_attention(**arguments(), backend="cuda")


def test_a_forced_backend_that_cannot_run_raises_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Backend("absent", None, None, supports=lambda request: f"needs heads of 64, got {request.q.shape[2]}")
    operator = OPERATORS["hstu_attention"]
    monkeypatch.setattr(operator, "backends", [broken, *operator.backends])
    with pytest.raises(BackendError, match="backend 'absent' cannot run here: needs heads of 64, got 3"):
        hstu_attention(**arguments(), backend="absent")
    assert hstu_attention(**arguments()).shape == (5, 2, 4)  # auto passes it over
