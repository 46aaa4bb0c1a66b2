"""Accuracy over bits, and why softmax needs two ranges: a notebook of cells (`# %%`), or a script.

python examples/plots.py        # writes runs/plots/*.png; needs matplotlib
"""

# %% The digits model and its calibration set
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from ptq4vit_plugin import commands, describe, evaluate, quantize
from ptq4vit_plugin.config import read
from ptq4vit_plugin.data import loader, open_dataset
from ptq4vit_plugin.quantizers.twin_softmax import TwinSoftmaxQuantizer

os.chdir(Path(__file__).resolve().parents[1])  # paths in the config start there
folder = Path("runs/plots")
folder.mkdir(parents=True, exist_ok=True)
config = read("examples/digits/ptq4vit.yaml")
model = commands.float_model(config)
calibration = commands.calibration(config, model)
held_out = loader(open_dataset(config.data, "val", model))

# %% Logit SQNR and agreement with the float model, from 8 bits down to 3
bits = [8, 7, 6, 5, 4, 3]
results = {}
for algorithm in ("base_ptq", "ptq4vit"):
    for k in bits:
        compression = {"algorithm": algorithm, "weights": {"bits": k}, "activations": {"bits": k}}
        quantized = quantize(model, calibration, compression)
        results[algorithm, k] = (evaluate(quantized, held_out, model), quantized)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for algorithm in ("base_ptq", "ptq4vit"):
    metrics = [results[algorithm, k][0] for k in bits]
    left.plot(bits, [m.sqnr_db for m in metrics], "o-", label=algorithm)
    right.plot(bits, [m.agreement for m in metrics], "o-", label=algorithm)
left.set(xlabel="bits of weights and activations", ylabel="logit SQNR, dB")
right.set(xlabel="bits of weights and activations", ylabel="same class as the float model, %")
for axes in (left, right):
    axes.invert_xaxis()
    axes.legend()
figure.savefig(folder / "bits.png", dpi=120)

# %% Softmax outputs, and the levels of a uniform and of a twin quantizer at 4 bits
records = describe(results["ptq4vit", 4][1])
operand = next(o for record in records for o in record.operands if o.source == "softmax")
edges, counts = operand.histogram.edges, operand.histogram.counts
twin = TwinSoftmaxQuantizer(4, torch.tensor(operand.searched_max))
levels = {
    "uniform": torch.arange(16) / 15,
    "twin": twin.from_codes(torch.arange(16, dtype=torch.uint8)).sort().values,
}
figure, rows = plt.subplots(2, 1, figsize=(9, 4.5), sharex=True, layout="constrained")
for axes, (name, values) in zip(rows, levels.items(), strict=True):
    axes.stairs(counts, [edges[1] / 2, *edges[1:]], fill=True, color="0.7")
    axes.vlines(values[values > 0], 0.7, 2 * max(counts), linewidth=0.8)
    axes.set(xscale="log", yscale="log", ylabel=f"{name}, 4 bits", xlim=(1e-6, 1.3))
rows[1].set_xlabel("attention probability; lines are the quantizer's levels above zero")
figure.savefig(folder / "softmax.png", dpi=120)
print(f"written: {folder}/bits.png, softmax.png")
