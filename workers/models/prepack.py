"""Linear layers for the CPU whose weights are laid out once, for oneDNN, instead of in every call.

Torch multiplies float32 with MKL, which leaves half of the matrix rate of some processors unused, and lays bfloat16
weights out anew in each call. `benchmarks/serving.py` measures what this gives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Per type: largest difference from torch's own product on unit input, relative to the largest result."""

STEP = 8
"""Fewest rows between two sizes of `rounded`."""


def rounded(rows: int) -> int:
    """`rows` rounded up to one of a few sizes: by at most a thirty-second, or by fewer than 8.

    oneDNN keeps code for every size it has seen, 0.7 MB each: with batches of any size, a server grew by a gigabyte.
    """
    step = max(STEP, 1 << max(0, rows.bit_length() - 6))
    return -(-rows // step) * step


class PrepackedLinear(nn.Module):
    """x ↦ x·Wᵀ + b, for inference on a CPU. weight: [out, in]; bias: [out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # plain attributes: an opaque tensor can neither be moved nor saved as a module's buffers are
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] → [..., out]."""
        rows = x.numel() // self.in_features
        more = rounded(rows) - rows
        if not more:
            return self._product(x)
        flat = F.pad(x.reshape(rows, self.in_features), (0, 0, 0, more))
        return self._product(flat)[:rows].view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return result


def prepack(blocks: nn.Module, dtype: torch.dtype) -> int:
    """Replace the linear layers inside `blocks`, in place, and free their own weights.

    Each is compared with the layer that it replaces; where oneDNN is missing or the results differ, the layer stays.

    Returns:
        The number of layers replaced.
    """
    if dtype not in TOLERANCE or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    replaced = 0
    with torch.inference_mode(False), torch.no_grad():
        for parent in list(blocks.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    weight, bias = child.weight, child.bias
                elif type(child) is Conv1D:
                    weight, bias = child.weight.t(), child.bias
                else:
                    continue
                packed = _checked(weight, bias)
                if packed is not None:
                    setattr(parent, name, packed)
                    replaced += 1
    return replaced


def _checked(weight: Tensor, bias: Tensor | None) -> PrepackedLinear | None:
    try:
        packed = PrepackedLinear(weight, bias)
        x = torch.linspace(-1, 1, 3 * weight.shape[1], dtype=torch.float32).to(weight.dtype).view(3, -1)
        ours, own = packed(x).float(), F.linear(x, weight, bias).float()
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    close = (ours - own).abs().max() <= TOLERANCE[weight.dtype] * own.abs().max().clamp(min=1)
    return packed if bool(close) else None
