"""What a calibration costs: against the literal procedure, and as the work grows.

    python benchmarks/calibration.py cost vit_small_patch16_224
    python benchmarks/calibration.py gap vit_small_patch16_224 --bits 8 --images 4
    python benchmarks/calibration.py grow images
    python benchmarks/calibration.py plot

Each part puts its numbers into the file --results, ``calibration.json`` in the working directory if
not given; `plot` draws those of `grow` into --drawing, ``calibration-growth.svg`` there. The
repository's own are ``benchmarks/calibration.json`` and ``docs/calibration-growth.svg``. Ratios
are of times measured in one run on one machine. Images are noise unless --npz names a file, and
weights random unless --weights names a checkpoint: costs hardly depend on either.

The *literal procedure* is written out here, independently of the package: for every op a forward
and backward pass, then three rounds of 100 candidates for each operand, every candidate's output by
a float32 product over all tokens. It is timed on one op of every shape, a few candidates each, and
scaled to the whole model by counting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import ptq4vit_plugin as ptq
from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import batches
from ptq4vit_plugin.integrations.nncf.capture import record
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.timm.attention import unfuse_attention
from ptq4vit_plugin.record import record_of

RESULTS = Path("calibration.json")
DRAWING = Path("calibration-growth.svg")
CANDIDATES, ROUNDS = 100, 3
#: What `grow` varies; everything else stays at depth 3, 197 tokens, 16 images.
GROWTH = {"images": (16, 32, 64, 128), "depth": (3, 6, 12), "tokens": (65, 197, 577)}
SIZES = {65: 128, 197: 224, 577: 384}  # tokens to image size, patches of 16


# The literal procedure ---------------------------------------------------------------------------


def literal_candidate(kind, left, right, output, gradient, call, bits, operand, factor, fixed):
    """Time of one candidate: quantize one operand, full output, weighted squared error, summed."""
    start = time.perf_counter()
    levels = 2 ** (bits - 1)
    x = left if operand == 0 else right
    if operand == 1 and kind != "matmul":  # per output channel
        scale = x.abs().flatten(1).amax(1).view(-1, *[1] * (x.ndim - 1)) / (levels - 0.5)
    elif kind == "matmul" and x.ndim == 4:  # per head
        scale = x.abs().amax((0, 2, 3), keepdim=True) / (levels - 0.5)
    else:
        scale = x.abs().amax() / (levels - 0.5)
    scale = scale * factor
    tried = (x / scale).round().clamp(-levels, levels - 1) * scale
    pair = (tried, fixed) if operand == 0 else (fixed, tried)
    if kind == "linear":
        candidate = nn.functional.linear(*pair)
    elif kind == "conv2d":
        candidate = nn.functional.conv2d(*pair, **call)
    else:
        candidate = pair[0] @ pair[1]
    loss = (gradient.square() * (candidate - output).square()).sum()
    float(loss)
    return time.perf_counter() - start


def literal_seconds(model, images, ops, bits, forward_backward, tries):
    """Seconds of the literal procedure on the whole model, and those per op kind."""
    shapes = defaultdict(list)
    for op in ops:
        shapes[op.kind, op.role, op.shapes[0], op.shapes[1], op.output_shape].append(op)
    seconds = defaultdict(float)
    for alike in shapes.values():
        op = alike[len(alike) // 2]
        seen = record(model, batches(images), [op], Gradient())[op.name]
        left, gradient = torch.cat(seen.inputs[0]), torch.cat(seen.fisher).sqrt()
        parameter = op.sources[1].parameter
        with torch.no_grad():
            right = model.get_parameter(parameter) if parameter else torch.cat(seen.inputs[1])
            call = op.convolution
            if op.kind == "linear":
                output = nn.functional.linear(left, right)
            elif op.kind == "conv2d":
                output = nn.functional.conv2d(left, right, **call)
            else:
                output = left @ right
            del seen
            one = 0.0
            for operand in (0, 1):
                times = [
                    literal_candidate(
                        op.kind,
                        left,
                        right,
                        output,
                        gradient,
                        call,
                        bits,
                        operand,
                        0.4 + 0.2 * i,
                        right if operand == 0 else left,
                    )
                    for i in range(tries + 1)
                ]
                one += statistics.median(times[1:])  # the first one warms up
        each = ROUNDS * CANDIDATES * one + forward_backward
        seconds[op.kind] += each * len(alike)
        print(
            f"  literal {op.role:16s} {op.name:34s} x{len(alike):3d}  {one / 2:.3f} s a candidate",
            flush=True,
        )
    return sum(seconds.values()), dict(seconds)


# Parts -------------------------------------------------------------------------------------------


def build(args, **extra):
    torch.manual_seed(0)
    model = timm.create_model(args.model, **{**args.args, **extra}).eval()
    if args.weights:
        model.load_state_dict(load_file(args.weights))
    return model


def images_for(model, args, count, batch_size=8):
    """Noise of the model's size, or the first images of a file, normalised as timm's models are."""
    if args.npz:
        pixels = torch.from_numpy(np.load(args.npz, allow_pickle=False)["calib_images"][:count])
        mean, std = (
            torch.tensor(model.default_cfg[name]).view(3, 1, 1) for name in ("mean", "std")
        )
        return list(((pixels.permute(0, 3, 1, 2) / 255 - mean) / std).split(batch_size))
    size = model.default_cfg["input_size"]
    if hasattr(model, "patch_embed") and getattr(model.patch_embed, "img_size", None):
        size = (size[0], *model.patch_embed.img_size)
    generator = torch.Generator().manual_seed(1)
    starts = range(0, count, batch_size)
    return [torch.randn(min(batch_size, count - s), *size, generator=generator) for s in starts]


def forward_backward_seconds(model, images):
    """One forward and backward pass over all images: to the images, and with weight gradients."""
    seconds = []
    for weights in (False, True):
        for parameter in model.parameters():
            parameter.requires_grad_(weights)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            for batch in images:
                logits = model(batch.clone().requires_grad_())
                logits.logsumexp(-1).sum().backward()
            times.append(time.perf_counter() - start)
        model.zero_grad()
        seconds.append(min(times))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return seconds


def compression(bits, **fields):
    section = {"bits": bits}
    return {"algorithm": "ptq4vit", "weights": section, "activations": section, **fields}


def calibrate(model, images, **fields):
    start = time.perf_counter()
    quantized = ptq.quantize(model, images, compression(**fields))
    return record_of(quantized), time.perf_counter() - start


def cost(args):
    """The engine on the whole model against the literal procedure, and against one pass."""
    model = build(args)
    images = images_for(model, args, args.images)
    # The engine first: its peak memory is the process's.
    found, seconds = calibrate(model, images, bits=args.bits)
    one_pass, with_weights = forward_backward_seconds(model, images)
    result = {
        "model": args.model,
        "args": args.args,
        "images": args.images,
        "bits": args.bits,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "passes": found.passes,
        "peak_gib": found.peak_memory / 2**30,
        "evaluations_per_op": statistics.mean(op.evaluations for op in found.ops),
        "forward_backward": one_pass,
        "forward_backward_with_weights": with_weights,
        "multiple_of_forward_backward": seconds / one_pass,
        "search_seconds": sum(op.seconds for op in found.ops),
    }
    by_role = defaultdict(list)
    for op in found.ops:
        by_role[op.role].append(op)
    result["per_role"] = {
        role: {
            "ops": len(ops),
            "seconds": sum(op.seconds for op in ops),
            "evaluations": statistics.mean(op.evaluations for op in ops),
        }
        for role, ops in by_role.items()
    }
    if args.literal:
        unfuse_attention(model)
        ops = find_ops(hooks.trace(model, images[0]), len(images[0]))[0]
        quantized = {op.name for op in found.ops}
        literal, kinds = literal_seconds(
            model,
            images,
            [op for op in ops if op.name in quantized],
            args.bits,
            with_weights,
            args.tries,
        )
        result |= {"literal_seconds": literal, "literal_kinds": kinds, "ratio": literal / seconds}
    keep(args.results, "cost", result)


def memory(args):
    """Peak memory of a calibration; few candidates, which take as much memory as many."""
    model = build(args)
    fields = {"search_range": {"n": args.candidates}, "rounds": 1}
    found, _ = calibrate(model, images_for(model, args, args.images), bits=8, **fields)
    keep(
        args.results,
        "memory",
        {
            "model": args.model,
            "args": args.args,
            "images": args.images,
            "passes": found.passes,
            "peak_gib": found.peak_memory / 2**30,
        },
    )


def gap(args):
    """The objective that `fast` chooses, relative to what `exhaustive` chooses, per op kind."""
    model = build(args)
    images = images_for(model, args, args.images)
    fields = {"bits": args.bits}
    fast, _ = calibrate(model, images, **fields)
    best, _ = calibrate(model, images, search="exhaustive", **fields)
    gaps = defaultdict(list)
    for one, other in zip(fast.ops, best.ops, strict=True):
        if other.objective_after > 0:
            gaps[one.kind].append(one.objective_after / other.objective_after - 1)
    keep(
        args.results,
        "gap",
        {
            "model": args.model,
            "args": args.args,
            "weights": Path(args.weights).name if args.weights else None,
            "images": args.images,
            "bits": args.bits,
            "evaluations": sum(op.evaluations for op in fast.ops),
            "exhaustive_evaluations": sum(op.evaluations for op in best.ops),
            "kinds": {
                kind: {
                    "ops": len(values),
                    "median": statistics.median(values),
                    "worst": max(values),
                    "best": min(values),
                }
                for kind, values in gaps.items()
            },
        },
    )


def grow(args):
    """Cost as one dimension of the work grows; a process for each point."""
    if args.value is None:
        for value in GROWTH[args.dimension]:
            command = [sys.executable, __file__, "grow", args.dimension, "--value", str(value)]
            subprocess.run([*command, "--results", str(args.results)], check=True)
        return
    work = {"images": 16, "depth": 3, "tokens": 197, args.dimension: args.value}
    model = build(args, depth=work["depth"], img_size=SIZES[work["tokens"]])
    images = images_for(model, args, work["images"])
    found, seconds = calibrate(model, images, bits=8)
    one_pass, _ = forward_backward_seconds(model, images)
    keep(
        args.results,
        "grow",
        {
            "model": args.model,
            "dimension": args.dimension,
            **work,
            "seconds": seconds,
            "forward_backward": one_pass,
            "peak_gib": found.peak_memory / 2**30,
            "passes": found.passes,
            "evaluations_per_op": statistics.mean(op.evaluations for op in found.ops),
        },
    )


def plot(args):
    """Draw what `grow` measured, as far as it is there."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    try:
        points = json.loads(args.results.read_text())["grow"]
    except (OSError, KeyError) as error:
        raise SystemExit(f"plot: {args.results} has no points of `grow`: {error}") from error
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3), layout="constrained")
    for axis, dimension in zip(axes, GROWTH, strict=True):
        mine = {p[dimension]: p["seconds"] for p in points if p["dimension"] == dimension}
        x = sorted(mine)
        axis.loglog(x, [mine[v] for v in x], "o-", label="measured")
        axis.loglog(x, [mine[x[0]] * v / x[0] for v in x], "--", color="grey", label="linear")
        axis.set(xlabel=dimension, xticks=x, xticklabels=x)
        axis.minorticks_off()
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    figure.savefig(args.drawing)
    print(args.drawing)


def keep(path, part, result):
    """Print a result and put it into a file, in place of an earlier one of the same work."""
    print(json.dumps(result, indent=2))
    everything = json.loads(path.read_text()) if path.exists() else {}
    work = ("model", "args", "weights", "images", "bits", "dimension", "depth", "tokens")
    same = [result.get(name) for name in work]
    others = [r for r in everything.get(part, []) if [r.get(name) for name in work] != same]
    everything[part] = [*others, result]
    path.write_text(json.dumps(everything, indent=1) + "\n")


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FILE",
        help=f"JSON file of the numbers (default: {RESULTS} in the working directory)",
    )
    for run in (cost, memory, gap):
        part = parts.add_parser(run.__name__, help=run.__doc__, parents=[common])
        part.add_argument("model")
        part.add_argument("--images", type=int, default=4 if run is gap else 32)
        part.add_argument("--bits", type=int, default=8)
        part.add_argument("--weights", help="a .safetensors checkpoint")
        part.add_argument("--args", type=json.loads, default={}, help="JSON, for create_model")
        part.add_argument("--npz", help="file with uint8 images [N, H, W, C] in 'calib_images'")
        part.set_defaults(run=run)
        if run is memory:
            part.add_argument("--candidates", type=int, default=4)
        if run is cost:
            part.add_argument("--tries", type=int, default=3, help="candidates timed per operand")
            part.add_argument("--no-literal", dest="literal", action="store_false")
    part = parts.add_parser("grow", help=grow.__doc__, parents=[common])
    part.add_argument("dimension", choices=GROWTH)
    part.add_argument("--value", type=int, help="one point only")
    part.set_defaults(run=grow, model="vit_tiny_patch16_224", weights=None, args={}, npz=None)
    part = parts.add_parser("plot", help=plot.__doc__, parents=[common])
    part.add_argument(
        "--drawing",
        type=Path,
        default=DRAWING,
        metavar="FILE",
        help=f"SVG file to write (default: {DRAWING} in the working directory)",
    )
    part.set_defaults(run=plot)
    args = parser.parse_args(given)
    args.run(args)


if __name__ == "__main__":
    main()
