"""What LoRA keeps for the backward pass: q, k and v of one input, here and in PEFT, in units of that input.

    python benchmarks/saved_for_backward.py

One unit is the input itself, 1,024 x 512 in the base's dtype; a frozen layer keeps nothing. Weights are not counted. On
a CPU PyTorch's dropout keeps its mask in the input's dtype; on a GPU in a byte.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from loralab import LoRASpec, attach

ROWS, WIDTH, RANK = 1024, 512, 8


class Projections(nn.Module):
    """Three linear maps of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.q(x), self.k(x), self.v(x)]


def units(model: nn.Module, dtype: torch.dtype) -> float:
    """Bytes kept by one forward pass, over the bytes of its input."""
    x = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True) * 1.0001  # an activation, not a leaf
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor) and tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model.train()(x)  # held while counting: what is kept hangs on it
    size = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)
    assert all(y.requires_grad for y in outputs)
    return size / (x.numel() * x.element_size())


def main() -> None:
    print(f"{'base':<10} {'dropout':>7} {'loralab':>8} {'PEFT':>6}")
    for dtype in (torch.float32, torch.bfloat16):
        for rate in (0.0, 0.1):
            ours = Projections().to(dtype)
            attach(ours, LoRASpec(rank=RANK, alpha=RANK, rules=["q", "k", "v"], dropout=rate))
            config = LoraConfig(r=RANK, target_modules=["q", "k", "v"], lora_dropout=rate)
            theirs = get_peft_model(Projections().to(dtype), config)
            name = str(dtype).removeprefix("torch.")
            print(f"{name:<10} {rate:>7} {units(ours, dtype):>8.2f} {units(theirs, dtype):>6.2f}")


if __name__ == "__main__":
    main()
