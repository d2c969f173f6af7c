"""Weights of Meta's research HSTU (meta-recsys/generative-recommenders), in and out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from npu_rec.errors import CheckpointError

_IGNORED = ("_attn_mask",)  # a buffer, not a weight


def _pairs(ours: Mapping[str, Tensor]) -> dict[str, tuple[str, bool]]:
    """Meta's name -> (our name, whether Meta stores it transposed)."""
    pairs = {
        "_embedding_module._item_emb.weight": ("items.weight", False),
        "_input_features_preproc._pos_emb.weight": ("positions", False),
    }
    layers = sum(name.startswith("backbone.layers.") and name.endswith(".uvqk.weight") for name in ours)
    for i in range(layers):
        here, there = f"backbone.layers.{i}", f"_hstu._attention_layers.{i}"
        pairs[f"{there}._uvqk"] = (f"{here}.uvqk.weight", True)
        pairs[f"{there}._o.weight"] = (f"{here}.output.weight", False)
        pairs[f"{there}._o.bias"] = (f"{here}.output.bias", False)
        pairs[f"{there}._rel_attn_bias._ts_w"] = (f"{here}.time_weight", False)
        pairs[f"{there}._rel_attn_bias._pos_w"] = (f"{here}.position_weight", False)
    return pairs


def _strange(model: nn.Module, own: Mapping[str, Tensor], pairs: Mapping[str, tuple[str, bool]]) -> list[str]:
    """Weights that Meta's research HSTU has not, or alone has, and options that change what its weights compute."""
    ablations: list[str] = getattr(getattr(model, "backbone", None), "ablations", [])
    return [*sorted({name for name, _ in pairs.values()} ^ set(own)), *(f"model.options.{name}" for name in ablations)]


def load_meta_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the state dict of Meta's research HSTU into a research `SequenceEncoder`.

    A `module.` prefix (checkpoints of the training script) and the buffer `_attn_mask` are dealt with.

    Raises:
        CheckpointError: names or shapes do not fit; each one is named.
    """
    own = model.state_dict()
    pairs = _pairs(own)
    strange = _strange(model, own, pairs)
    if strange:
        raise CheckpointError(f"the model is not Meta's research HSTU, they differ in {', '.join(strange[:5])}")
    given = {name.removeprefix("module."): value for name, value in state_dict.items()}
    given = {name: value for name, value in given.items() if name.rpartition(".")[2] not in _IGNORED}
    problems = [f"missing {name}" for name in pairs if name not in given]
    problems += [f"unknown {name}" for name in given if name not in pairs]
    for name, (here, transposed) in pairs.items():
        if name in given:
            shape = given[name].T.shape if transposed else given[name].shape
            if shape != own[here].shape:
                problems.append(
                    f"{name} has {list(given[name].shape)}, the model wants {list(own[here].shape)} as {here}"
                )
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"Meta state dict does not fit: {'; '.join(problems[:5])}{more}")
    with torch.no_grad():
        for name, (here, transposed) in pairs.items():
            own[here].copy_(given[name].T if transposed else given[name])


def to_meta_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a research `SequenceEncoder` under Meta's names.

    Raises:
        CheckpointError: the model has parts Meta's research HSTU lacks, or lacks some of its parts.
    """
    own = model.state_dict()
    pairs = _pairs(own)
    strange = _strange(model, own, pairs)
    if strange:
        raise CheckpointError(f"not a research HSTU: {', '.join(strange[:5])}")
    return {name: (own[here].T if transposed else own[here]).contiguous() for name, (here, transposed) in pairs.items()}
