"""emma_train.evaluate.vlmevalkit on a CPU: torchvision's wheel is a CUDA build, whose import fails beside a CPU torch
unless two of its operators are declared."""

import torch

if torch.version.cuda is None:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from emma_train.evaluate.vlmevalkit import main

if __name__ == "__main__":
    raise SystemExit(main())
