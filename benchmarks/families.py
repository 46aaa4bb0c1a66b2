"""`ptq4vit_plus` against `ptq4vit` on small models of seven families, trained here for it.

    python benchmarks/families.py --bench FOLDER --models FOLDER2

FOLDER has ``data.npz`` (``test_images``, ``calib_images``: uint8 RGB, 32 x 32; their labels).
Every model is trained on the test images for some epochs (about two minutes each on two cores) and
kept in FOLDER2, calibrated on the first 32 calibration images, and compared with itself in float on
the other ones. Short training on 2,000 images makes poor classifiers, but activations that were
learned. Without FOLDER the script says so and stops.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from accuracy import SEARCH, data_in, images, logits, measure
from safetensors.torch import load_model, save_model

PLAIN = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 96, "num_heads": 4}
#: timm's name and arguments.
FAMILIES = {
    "ViT with registers, norms of q and k": (
        "vit_small_patch16_224",
        {**PLAIN, "depth": 6, "reg_tokens": 4, "qk_norm": True},
    ),
    "DeiT III (factors per channel)": ("deit3_small_patch16_224", {**PLAIN, "depth": 6}),
    "BEiT (relative positions)": ("beit_base_patch16_224", {**PLAIN, "depth": 5}),
    "EVA-02 (rotary, SwiGLU)": ("eva02_tiny_patch14_224", {**PLAIN, "depth": 5}),
    "SigLIP's ViT (attention pooling)": ("vit_base_patch16_siglip_224", {**PLAIN, "depth": 5}),
    "Swin (windows)": (
        "swin_tiny_patch4_window7_224",
        {**PLAIN, "embed_dim": 64, "window_size": 4, "depths": (2, 4), "num_heads": (2, 4)},
    ),
    "XCiT (attention between channels)": (
        "xcit_nano_12_p16_224",
        {**PLAIN, "patch_size": 8, "depth": 4},
    ),
}
EPOCHS, BATCH, RATE = 12, 100, 2e-3
CALIBRATION = 32


def train(model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> None:
    """Cross entropy on shifted and mirrored images."""
    adam = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = EPOCHS * len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, steps)
    model.train()
    for _ in range(EPOCHS):
        for some in torch.randperm(len(x)).split(BATCH):
            shift = torch.randint(-3, 4, (2,)).tolist()
            batch = torch.roll(x[some], shift, (2, 3))
            batch = batch.flip(-1) if torch.rand(1) < 0.5 else batch
            loss = F.cross_entropy(model(batch), labels[some], label_smoothing=0.1)
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", type=Path, help="folder with data.npz")
    parser.add_argument("--models", type=Path, required=True, help="where trained models are kept")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    args = parser.parse_args()
    data = data_in(args.bench)
    args.models.mkdir(parents=True, exist_ok=True)
    seen, labels = images(data["test_images"]), torch.from_numpy(data["test_labels"]).long()
    unseen = images(data["calib_images"])
    calibration, test = unseen[:CALIBRATION], unseen[CALIBRATION:]
    classes = torch.from_numpy(data["calib_labels"]).long()[CALIBRATION:]
    print("| family | float top-1 % | bits | `ptq4vit` | `ptq4vit_plus` | gain, dB | CPU time |")
    print("|---|---|---|---|---|---|---|")
    for family, (name, arguments) in FAMILIES.items():
        torch.manual_seed(0)
        model = timm.create_model(name, **arguments)
        file = args.models / f"{name}.safetensors"
        if file.exists():
            load_model(model, file)
        else:
            train(model, seen, labels)
            save_model(model, file)
        expected = logits(model.eval(), test)
        top1 = 100 * float((expected.argmax(1) == classes).double().mean())
        for bits in args.bits:
            fields = {**SEARCH["coarse"], "weights": {"bits": bits}, "activations": {"bits": bits}}
            old, new = (
                measure(model, calibration, test, expected, {**fields, "algorithm": algorithm})
                for algorithm in ("ptq4vit", "ptq4vit_plus")
            )
            cells = [f"{found['agree']:.1f} / {found['sqnr']:.1f}" for found in (old, new)]
            gain = new["sqnr"] - old["sqnr"]
            ratio = new["cpu_seconds"] / old["cpu_seconds"]
            row = (family, f"{top1:.0f}", f"W{bits}A{bits}", *cells, f"{gain:+.1f}", f"{ratio:.1f}")
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
