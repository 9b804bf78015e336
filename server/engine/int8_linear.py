"""Linear layers in 8-bit integers: half of bfloat16's memory, and up to twice its products a second on a CPU.

Weights have a scale for each output channel and activations one for each row, found as they come, so that a row's
result does not depend on what runs beside it: sums of integers are exact in any order. There is nothing here for
outliers in the activations of very large models (LLM.int8(), arXiv 2208.07339): measure a model before trusting it.
"""

from __future__ import annotations

import torch

from server.engine.int8_rows import LARGEST, SMALLEST, ZERO_POINT, round_rows, scale_rows

# Rows that the packing is tuned for; other sizes run too.
ROWS_HINT = 64


class Int8Linear(torch.nn.Module):
    """`x W^T + b` for a frozen `W` `[out, in]`, rounded. Raises RuntimeError where this build of torch cannot."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        weight = weight.detach().float()
        # Plain attributes: an opaque tensor cannot be a parameter, and nobody saves a packed model.
        self.scales = (weight.abs().amax(1) / LARGEST).clamp_min(SMALLEST)
        rounded = (weight / self.scales[:, None]).round_().to(torch.int8).contiguous()  # strides would be passed over
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, [ROWS_HINT, rounded.shape[1]])
        self.zero_points = torch.zeros(len(rounded), dtype=torch.int64)
        self.bias_term = bias.detach().float() if bias is not None else torch.zeros(len(rounded))

    @property
    def weight(self) -> torch.Tensor:
        """Opaque: for T5, which asks for its dtype."""
        return self.packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`. A row that is not finite has no finite result."""
        rounded, scales = round_rows(x.reshape(-1, x.shape[-1]))
        products = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, ZERO_POINT, self.packed, self.scales, self.zero_points,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return scale_rows(products, scales, self.bias_term, x.dtype).view(*x.shape[:-1], len(self.bias_term))


def works() -> bool:
    """Whether products are exact here, the largest too: processors without VNNI may add up in 16 bits."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-LARGEST, LARGEST + 1, (24, 64), generator=generator)
    x = torch.randint(-LARGEST, LARGEST + 1, (5, 64), generator=generator)
    for numbers in (weight, x):
        numbers[:, 0] = numbers[0] = LARGEST  # so every scale is 1, and one sum is the largest there can be
    try:
        output = Int8Linear(weight.float(), None)(x.float())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(output, (x @ weight.t()).float())
