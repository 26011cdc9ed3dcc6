"""How initial weights, learning rates, epsilon and weight decay change with width and depth: all of it, in this file.

Under the standard parametrisation the best learning rate moves with the size. Two others make it stay, so that it can
be tuned on a small model and used on a large one:

- muP (Yang et al., arXiv 2203.03466): what one step changes in an activation does not depend on the width.
- CompleteP (Dey et al., arXiv 2505.01618, table 1, alpha = 1): nor on the depth. Each residual branch counts for one
  part in the depth. Depth here is *effective*: blocks times passes, since a loop that feeds a state back goes through
  its blocks as often as a stack of so many layers would (a latent chain by l_max + 1, its bound).

Both equal the standard parametrisation at the base shape, the smallest step of the ladder at one pass, so a rate that
was found there is theirs. n is the width, m the effective depth, both as multiples of the base's:

| | initial std | learning rate | AdamW's epsilon |
|---|---|---|---|
| embedding | 1 | n^-1/2 | n^-1/2 |
| matrices of the blocks that read the residual stream | 1 | n^-1 | n^-1 m^-1 |
| matrices that write to it | 1, then as if the depth were the base's, over m | n^-1 m^-1 | n^-1 |
| head | n^-1/2 | n^-1 | 1 |
| a router's last layer (starts at 0) | 1 | n^-1 | 1 |
| its other matrices | 1 | n^-1 | n^-1 |
| gains of the blocks' norms | 1 | 1 | n^-1 m^-1 |
| other vectors | 1 | 1 | n^-1; biases of a router 1 |

Multiples are of what the standard parametrisation has at that shape: its std of matrices is n^-1/2 already. m is 1 for
muP. The papers' multipliers in the forward pass (of the embedding, the logits, each branch) are not there: a factor on
a weight, with its std, rate and epsilon changed to match, is the same to Adam (the papers' abc symmetry), so models
decode and export as ever. Attention keeps 1 / sqrt(head dimension), since the ladder's heads stop growing at 64. Weight
decay is divided by the rate's multiple: what decays a weight is their product (CompleteP scales it likewise).
"""

import math
from dataclasses import dataclass

from haltscale.model.config import SIZES, EmbeddingScale, ModelConfig, Parametrisation

BASE = SIZES["0.6m"]
"""Where all parametrisations are the same, at one pass per token."""


@dataclass(frozen=True)
class Scale:
    """One parameter's multiples of what the standard parametrisation gives it."""

    start: float = 1.0
    """Of the initial value."""
    rate: float = 1.0
    """Of the learning rate; the weight decay is divided by it."""
    epsilon: float = 1.0
    """Of AdamW's epsilon."""


def scale_of(name: str, config: ModelConfig, depth: float) -> Scale:
    """The scale of the parameter with this name.

    Args:
        depth: effective, in blocks.
    """
    if config.parametrisation is Parametrisation.STANDARD:
        return Scale()
    n = config.shape.d / BASE.d
    m, branch = 1.0, 1.0
    if config.parametrisation is Parametrisation.COMPLETEP:
        m = depth / BASE.layers
        branch = math.sqrt(config.shape.layers / BASE.layers) / m  # `initialise` divides by the root of the layers
    if name.startswith("embedding."):
        factor = (
            n**-0.5 if config.embedding_scale is not EmbeddingScale.NONE else 1.0
        )  # it is multiplied by sqrt(2.5 d) on the way in
        return Scale(rate=factor, epsilon=n**-1 / factor)
    if name.startswith("head."):
        return Scale(start=n**-0.5, rate=1 / n)
    if ".score." in name:
        return Scale(rate=1 / n) if name.endswith("weight") else Scale()
    if ".blocks." in name or name.startswith("blocks."):
        if "norm." in name:
            return Scale(epsilon=1 / (n * m))
        if ".out." in name or ".down." in name:
            return Scale(start=branch, rate=1 / (n * m), epsilon=1 / n)
        return Scale(rate=1 / n, epsilon=1 / (n * m))
    if name.endswith("hidden.weight"):
        return Scale(rate=1 / n, epsilon=1 / n)
    return Scale(epsilon=1 / n)
