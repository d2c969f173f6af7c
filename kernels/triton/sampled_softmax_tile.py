"""Online log-sum-exp over tiles of logits, a running pair a lane."""

import triton
import triton.language as tl


@triton.jit
def add_logits(largest, total, logits):
    """`(largest, total)` with `logits` added: the sum so far is `total * exp(largest)`. -inf adds nothing."""
    larger = tl.maximum(largest, logits)
    return larger, total * tl.exp(largest - larger) + tl.exp(logits - larger)


@triton.jit
def loss_and_logsumexp(largest, total, positive):
    """Of a token, from its lanes and the logit of its positive, which no lane holds yet."""
    most = tl.max(largest, 0)
    whole = tl.log(tl.sum(total * tl.exp(largest - most), 0) + tl.exp(positive - most))
    return (most - positive) + whole, most + whole
