"""Trains the small vision transformer of this example on scikit-learn's handwritten digits.

Writes digits_vit.safetensors beside this file. On one machine the weights are the same every time:
one seed, one thread. Run it again only to change the model; the weights are in the repository.
"""

import time
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ptq4vit_plugin.data import loader, open_dataset
from ptq4vit_plugin.evaluation import evaluate

CHECKPOINT = Path(__file__).with_name("digits_vit.safetensors")
MODEL = dict(  # the same in the configs beside this file
    model_name="vit_tiny_patch16_224",
    img_size=16,
    patch_size=4,
    in_chans=1,
    embed_dim=96,
    depth=4,
    num_heads=3,
    num_classes=10,
)
EPOCHS = 50
BATCH = 64
LEARNING_RATE = 2e-3


def jitter(images: torch.Tensor) -> torch.Tensor:
    """Rotate, scale and shift each image a little: 1,438 digits are few for a transformer."""
    n = len(images)
    angle = (torch.rand(n) - 0.5) * 0.5
    scale = 1 + (torch.rand(n) - 0.5) * 0.3
    shift = (torch.rand(n, 2) - 0.5) * 0.3
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def main() -> None:
    torch.set_num_threads(1)  # the order of sums, and so the weights, depends on the threads
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    model = timm.create_model(**MODEL, drop_path_rate=0.1)
    digits = SimpleNamespace(source="digits", root=None, options={})
    x, y = next(iter(loader(open_dataset(digits, "train", model), batch_size=2000)))
    held_out = loader(open_dataset(digits, "val", model))

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15
    )
    for epoch in range(EPOCHS):
        model.train()
        for batch in torch.randperm(len(x)).split(BATCH):
            if len(batch) < BATCH:
                continue
            loss = F.cross_entropy(model(jitter(x[batch])), y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}", flush=True)

    metrics = evaluate(model, held_out)
    save_file(model.state_dict(), CHECKPOINT)
    print(
        f"top-1 {metrics.top1:.2f} % of {metrics.images} held-out digits, "
        f"{time.perf_counter() - start:.0f} s, {CHECKPOINT.stat().st_size / 1024:.0f} KiB"
    )


if __name__ == "__main__":
    main()
