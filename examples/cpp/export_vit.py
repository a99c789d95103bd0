"""Compiles a vision transformer with EVA into a package that run_vit.cpp runs, for any number of images.

python -m examples.cpp.export_vit MODEL.pt2
"""

import sys

import torch
from torch.export import Dim

from examples.vit import VisionTransformer


def export(path: str, device: str = "cpu") -> torch.nn.Module:
    """The model that the package at `path` computes: images [B, 1, 28, 28] -> logits [B, 10]."""
    torch.manual_seed(0)
    model = VisionTransformer("eva", patch_size=4, depth=1).to(device).eval()
    images = torch.randn(2, 1, 28, 28, device=device)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    return model


if __name__ == "__main__":
    export(sys.argv[1])
