"""Ops that only some calibration batches run: a mixture of experts, layers that are skipped."""

import pytest
import torch
from torch import nn

import ptq4vit_plugin as ptq
from ptq4vit_plugin.algorithms.gradient import Gradient
from ptq4vit_plugin.algorithms.recording import recorded_in, schedule
from ptq4vit_plugin.errors import DataError, ModelError
from ptq4vit_plugin.integrations.nncf import hooks
from ptq4vit_plugin.integrations.nncf.batch import batches
from ptq4vit_plugin.integrations.nncf.graph import find_ops
from ptq4vit_plugin.integrations.nncf.prepare import prepare
from ptq4vit_plugin.integrations.nncf.replay import replayable_blocks
from ptq4vit_plugin.record import record_of

SHORT = {"search_range": {"alpha": 0.5, "n": 3}, "rounds": 1}


def steps(*algorithms, **fields):
    searches = ("ptq4vit", "base_ptq", "ptq4vit_plus", "ptq4vit_recon")
    return [{"algorithm": a, **((SHORT | fields) if a in searches else {})} for a in algorithms]


class Experts(nn.Module):
    """Runs those experts whose numbers stand in front of the tokens of an image of the batch.

    Of experts in a list NNCF numbers the calls, so that a name means the first that runs.
    """

    def __init__(self, listed, times=1):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        experts = [nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(3)]
        self.listed = nn.ModuleList(experts if listed else [])
        for i, expert in enumerate([] if listed else experts):
            self.add_module(f"expert{i}", expert)
        self.times = times

    def expert(self, i):
        return self.listed[i] if self.listed else getattr(self, f"expert{i}")

    def forward(self, x):
        y = self.norm(self.stem(x[..., 1:]))
        for i in x[..., 0].long().unique().tolist():
            for _ in range(self.times):
                y = y + self.expert(i)(y)
        return self.head(y)


def routed(*experts, seed=0):
    """A batch of six images that together need these experts."""
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = torch.tensor([experts[i % len(experts)] for i in range(6)])
    return x


def error(model, x, y):
    with torch.no_grad():
        return float((y(x) - model(x)).square().mean() / model(x).var())


@pytest.mark.parametrize(
    "algorithms",
    [
        ["ptq4vit"],
        ["base_ptq"],
        ["ptq4vit", "compensate"],
        ["fold_norms", "ptq4vit"],
        ["ptq4vit_plus"],
        ["ptq4vit_recon"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("listed", [False, True])
def test_experts_that_not_every_batch_runs_are_named(listed, algorithms):
    data = [routed(0, 1, 2), routed(0, 2, seed=1)]
    names = "[02]/linear/1" if listed else "expert1/[02]/linear/0"
    with pytest.raises((DataError, ModelError), match=f"^(compensate: )?{names}.* runs ") as raised:
        ptq.quantize(Experts(listed).eval(), data, steps(*algorithms))
    if algorithms == ["ptq4vit"]:
        how = "with another weight" if listed else "0 times"
        assert f" runs {how} in the batch of calibration images 6 to 11 (1 of 2 " in str(
            raised.value
        )


@pytest.mark.parametrize("listed", [False, True])
def test_what_is_ignored_may_run_as_it_likes(listed):
    model = Experts(listed).eval()
    data = [routed(0, 1, 2), routed(0, 2, seed=1)]
    scope = "{re}^\\d/" if listed else "{re}^expert"
    result = ptq.quantize(model, data, steps("ptq4vit", ignored_scopes=[scope]))
    assert [op.name for op in record_of(result).ops] == ["stem/linear/0", "head/linear/0"]
    for experts in ((0,), (1, 2), (0, 1, 2)):
        assert error(model, routed(*experts), result) < 1e-2


@pytest.mark.parametrize("times", [1, 2])
def test_experts_that_every_batch_runs(times):
    """Whatever the sizes of the batches are, and also if it runs them twice, by two names."""
    model = Experts(True, times).eval()
    data = [routed(0, 1, 2), routed(0, 1, 2, seed=1)[:4]]
    result = ptq.quantize(model, data, steps("ptq4vit"))
    assert len(record_of(result).ops) == 2 + 6 * times
    assert error(model, torch.cat(data), result) < 1e-2


def test_an_expert_that_only_later_batches_run_is_left_out_and_not_folded():
    model, data = Experts(False).eval(), [routed(0, 1), routed(0, 1, 2, seed=1)]
    plan = record_of(ptq.quantize(model, data, steps("ptq4vit"))).plan
    found = {op.name: (op.kind, op.reason[:38]) for op in plan.left_out}
    reason = "runs for some calibration images only,"
    assert found == dict.fromkeys(("expert2/0", "expert2/2"), ("linear", reason))
    with pytest.raises(ModelError, match="fold_norms: 'expert2.0' runs for some calibration image"):
        ptq.quantize(model, data, steps("fold_norms", "ptq4vit"))


@pytest.mark.parametrize("blocks", [False, True])
def test_all_ops_are_looked_at_in_the_first_of_several_passes(blocks):
    model = Experts(True).eval()
    data = batches([routed(0, 1, 2), routed(0, 2, seed=1)])
    prepare(model, data[0])
    ops, _ = find_ops(hooks.trace(model, data[0].example), 6)
    alone = replayable_blocks(model, ops, batches([routed(0, 1, 2)])[0], None) if blocks else {}
    passes = schedule(ops, [1.0] * len(ops), dict.fromkeys(alone, 1.0), 1.0)
    assert len(passes) > 3
    done = []
    with pytest.raises(DataError, match=r"0/linear/1: .* likewise 2/linear/1, 0/linear/2, 2/linea"):
        list(recorded_in(passes, model, data, Gradient(), done.append, done.append))
    assert done == [1, 1]


class Repeating(nn.Module):
    """Runs its block once more where the first number says so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.blocks, self.head = nn.ModuleList([block]), nn.Linear(6, 3)

    def forward(self, x):
        y = x[:, 1:]
        for _ in range(1 + int(x[0, 0])):
            y = self.blocks[0](y)
        return self.head(y)


def test_a_block_that_a_batch_runs_twice_is_not_recorded_by_itself():
    model = Repeating().eval()
    data = batches([routed(0), routed(1)])
    prepare(model, data[0])
    ops, _ = find_ops(hooks.trace(model, data[0].example), 6)
    blocks = replayable_blocks(model, ops, data[0], Gradient())
    passes = schedule(ops, [1.0] * len(ops), dict.fromkeys(blocks, 0.0), 9.0)
    assert len(blocks) == len(passes) == 1
    with pytest.raises(DataError, match=r"blocks\.0: runs 3 times in 2 batches"):
        list(recorded_in(passes, model, data, Gradient(), lambda _: None, lambda _: None))


class Stacked(nn.Module):
    """Experts as slices of one parameter, of which the first image of a batch chooses one."""

    def __init__(self, multiply):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.head = nn.Parameter(torch.randn(3, 6, 6)), nn.Linear(6, 3)
        self.multiply = multiply

    def forward(self, x):
        return self.head(self.multiply(x[:, 1:], self.weight[int(x[0, 0])]))


@pytest.mark.parametrize("multiply", [nn.functional.linear, torch.matmul])
def test_a_computed_weight_that_is_another_one_in_every_batch(multiply):
    model = Stacked(multiply).eval()
    name = multiply.__name__
    with pytest.raises(DataError, match=rf"^/{name}/0: runs with another weight .* 6 to 11 \(1 of"):
        ptq.quantize(model, [routed(0), routed(1)], steps("ptq4vit"))
    data = [routed(1), routed(1, seed=1)]
    assert error(model, data[0], ptq.quantize(model, data, steps("ptq4vit"))) < 1e-2


class Attending(nn.Module):
    """Attends where there are several tokens of an image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.stem(x)
        if x.shape[1] > 1 and x[0, 0, 0] > 0:
            y = y + (y @ y.mT).softmax(-1) @ y
        return self.head(y.mean(1))


def test_a_product_that_batches_of_other_shapes_do_not_run():
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0] = 1
    model = Attending().eval()
    with pytest.raises(DataError, match="^/matmul/0: runs 0 times in the batch .* images 4 to 5"):
        ptq.quantize(model, [x, x[:2] * -1], steps("ptq4vit"))
