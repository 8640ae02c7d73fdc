"""torch's attention of several heads with the samples first: the same function, in an order that tells samples apart.

`nn.MultiheadAttention` turns its inputs to [tokens, samples, width] and projects them so, which folds the samples into
every token's row. Here they stay the first axis throughout. What torch refuses or does at random is left to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward`."""
    given: dict[str, Any] = dict(locals())
    extras = any(extra is not None for extra in (static_k, static_v)) or (bias_k is None) != (bias_v is None)
    random, hinted = training and dropout_p > 0, is_causal and attn_mask is None
    if extras or random or hinted or query.ndim != 3 or query.shape[2] != embed_dim_to_check:
        return F.multi_head_attention_forward(**given)
    causal = is_causal and key_padding_mask is None and not need_weights  # then torch drops the mask it is given
    q, k, v = _projected(given)
    width, bias, tokens = q.shape[-1], None if causal else _bias(given), k.shape[1]
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([part, own.expand(len(part), -1, -1)], 1) for part, own in ((k, bias_k), (v, bias_v)))
    if add_zero_attn:
        k, v = (F.pad(part, (0, 0, 0, 1)) for part in (k, v))
    bias = None if bias is None else F.pad(bias, (0, k.shape[1] - tokens))
    q, k, v = (
        part.reshape(*part.shape[:2], num_heads, part.shape[2] // num_heads).transpose(1, 2) for part in (q, k, v)
    )
    weights: Tensor | None = None
    if need_weights:
        scores = (q * (width // num_heads) ** -0.5) @ k.transpose(-1, -2)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    out = F.linear(mixed.transpose(1, 2).flatten(-2), out_proj_weight, out_proj_bias)
    return out.transpose(0, 1), weights


def _projected(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [samples, tokens, width]."""
    names = ("query", "key", "value")
    x, same = [given[name].transpose(0, 1) for name in names], given["query"] is given["key"] is given["value"]
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    if same and not given["use_separate_proj_weight"]:
        q, k, v = F.linear(x[0], weight, bias).chunk(3, -1)
        return q, k, v
    biases = (None, None, None) if bias is None else bias.chunk(3)
    separate = tuple(given[f"{name}_proj_weight"] for name in "qkv")
    weights = separate if given["use_separate_proj_weight"] else weight.chunk(3)
    q, k, v = (F.linear(one, w, b) for one, w, b in zip(x, weights, biases))
    return q, k, v


def _bias(given: dict[str, Any]) -> Tensor | None:
    """What is added to the scores: both masks, -inf where a truth value says that a key is out."""
    query, key, heads = given["query"], given["key"], given["num_heads"]
    attention, padding = given["attn_mask"], given["key_padding_mask"]
    found: Tensor | None = None
    if attention is not None:
        found = _added(attention, query)
        found = found if found.ndim == 2 else found.reshape(len(found) // heads, heads, *found.shape[1:])
    if padding is not None:
        own = _added(padding, query).reshape(key.shape[1], 1, 1, key.shape[0])
        found = own if found is None else found + own
    return found


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -torch.inf)
