"""A model in shards over the processes (`--device-map fsdp`): the same run, with a part of base and adapter in each."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import call
from launched import Call, free_ports, launch
from test_forget_in_several import events, line, moved, same
from torch import Tensor
from torch.distributed.tensor import DTensor

from qunlearn.config.settings import Config, LoraConfig, ModelConfig, TrainConfig
from qunlearn.errors import ConfigError
from qunlearn.model import device
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.kernels.lora import make_lean
from qunlearn.model.load import LoadSpec, decoder_blocks, load_base
from qunlearn.model.policy import Policy
from qunlearn.model.sharded import _DOWN, _UP, _WAITS, Shards, check_sharding, shard
from qunlearn.parallel.group import Group
from qunlearn.parallel.parts import cut, in_shards, part
from qunlearn.sandbox import ASSETS
from qunlearn.training.optimizer import make_optimizer, optimizer_state
from qunlearn.training.stopping import BACK_TO
from qunlearn.utils.file_names import RECORD
from qunlearn.utils.staging import staging_folder

FSDP = ("--device-map", "fsdp")


class _Alone(Group):
    """A group of one process, whose wishes are followed."""

    def highest(self, mine: int) -> int:
        return mine


@contextlib.contextmanager
def one_process() -> Iterator[Group]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield _Alone(0, 1, 0)
    finally:
        dist.destroy_process_group()


def gradients(policy: Policy) -> dict[str, Tensor]:
    ids = torch.randint(5, 200, (3, 17), generator=torch.Generator().manual_seed(1))
    policy.model.train()
    policy.base.model(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g.clone() for name, g in found.items()}


@pytest.mark.parametrize(("checkpointing", "whole"), [(True, False), (False, False), (True, True)])
def test_a_policy_in_shards_computes_the_same_bits(checkpointing: bool, whole: bool, sandbox_folder: Path) -> None:
    """With layer and adapter in one, as on a GPU, as well."""

    def policy(device_map: str) -> Policy:
        base = load_base(sandbox_folder, LoadSpec(device="cpu", device_map=device_map))
        return Policy.new(base, LoraConfig(), seed=0, checkpointing=checkpointing)

    plain, prompts = policy("none"), [[5, 6, 7, 8], [9, 10, 11], [30, 31, 32, 33, 34]]
    with one_process() as ranks:
        made = shard(policy("fsdp"), torch.device("cpu"), ranks)
        for one in (plain, made):
            make_lean(one.layers, whole=whole)
        assert made.base.parameters == plain.base.parameters and ranks.shards is not None
        made.seal_base()
        for how in (Sampling(12), Sampling(12, 1.0, seed=3)):
            assert generate(made.base, prompts, how) == generate(plain.base, prompts, how)
        ours, theirs = gradients(made), gradients(plain)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        made.check_base()
        state = made.adapter_state()
        assert state.keys() == plain.adapter_state().keys() and {type(t) for t in state.values()} == {Tensor}


def test_a_block_without_adapter_is_refused(sandbox_folder: Path) -> None:
    policy = Policy.new(load_base(sandbox_folder, LoadSpec(device="cpu")), LoraConfig(), seed=0)
    for p in decoder_blocks(policy.base.model)[2].parameters():
        p.requires_grad_(False)
    with one_process() as ranks, pytest.raises(ConfigError, match="block 2 has no adapter"):
        shard(policy, torch.device("cpu"), ranks)


class _Block:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def unshard(self) -> None:
        self.log.append(f"gather {self.name}")

    def reshard(self) -> None:
        self.log.append(f"free {self.name}")


def test_who_has_another_pass_to_make_gathers_first() -> None:
    """Of a way up that is wanted while others go down, and of a wait while others make both."""

    class Others:
        def __init__(self, wanted: list[int]) -> None:
            self.wanted = wanted

        def highest(self, mine: int) -> int:
            return max(mine, self.wanted.pop(0))

    def said(wanted: list[int], act: Callable[[Shards], None]) -> list[str]:
        log: list[str] = []
        others = Others(wanted)
        act(Shards([_Block("a", log), _Block("b", log)], others))  # type: ignore[list-item]
        assert not others.wanted
        return [entry.removeprefix("gather ") for entry in log if entry.startswith("gather")]

    assert said([_UP], lambda shards: shards.before_pass()) == []
    assert said([_WAITS], lambda shards: shards.before_pass()) == []
    assert said([_DOWN, _UP], lambda shards: shards.before_pass()) == ["b", "a"]
    assert said([_UP, _DOWN, _WAITS], lambda shards: shards.wait()) == ["a", "b", "b", "a"]
    assert said([_UP], lambda shards: shards.announce(_DOWN)) == []


def test_gradients_that_are_summed_apart_have_passes_of_their_own() -> None:
    """A way back for another sum comes first, and is told of; the own one is announced before it begins, once."""
    wanted, told, back = [_DOWN + 2, _DOWN + 1, _DOWN], [], []

    class Others:
        def highest(self, mine: int) -> int:
            return max(mine, wanted.pop(0))

    shards = Shards(["a", "b"], Others(), back.append)  # type: ignore[list-item, arg-type]
    shards.received = told.append
    shards.ready(1)
    assert (told, back) == ([2], ["b", "a"])
    shards._before_way_back(torch.zeros(1))
    assert wanted == [_DOWN], "it was announced"
    shards._before_way_back(torch.zeros(1))
    assert wanted == [] and told == [2]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_whole_tensor_is_cut_as_it_is_sharded(count: int, dim: int) -> None:
    """In order, the last parts short or empty."""
    whole, parts = torch.arange(24).view(4, 6), []
    for number in range(count):
        mesh = SimpleNamespace(size=lambda: count, get_local_rank=lambda number=number: number)
        like = SimpleNamespace(to_local=None, placements=(SimpleNamespace(dim=dim),), device_mesh=mesh)
        parts.append(cut(whole, like))
    assert torch.equal(torch.cat(parts, dim), whole)
    assert [p.shape[1 - dim] for p in parts] == [whole.shape[1 - dim]] * count
    assert cut(whole, whole) is whole and part(whole) is whole and not in_shards(whole)


@pytest.mark.parametrize(
    ("config", "layered", "where"),
    [
        (Config(model=ModelConfig(quant="int8")), False, "--quant int8"),
        (Config(model=ModelConfig(embeddings="cpu")), False, "--embeddings cpu"),
        (Config(model=ModelConfig(head="8bit")), False, "--head 8bit"),
        (Config(train=TrainConfig(offload=True)), False, "train.offload"),
        (Config(), True, "--objective"),
    ],
)
def test_what_a_base_in_shards_cannot_do(
    config: Config, layered: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="several processes"):
        check_sharding(config, layered=layered)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as caught:
        check_sharding(config, layered=layered)
    assert str(caught.value.where).startswith(where)
    check_sharding(Config(), layered=False)


def test_one_process_is_told_to_be_several(tmp_path: Path) -> None:
    ran = call(*line(tmp_path / "run", "logodds", *FSDP))
    assert ran.code == 2 and "it takes several processes" in ran.stderr and "torchrun" in ran.stderr
    assert not (tmp_path / "run").exists() and not staging_folder(tmp_path / "run").exists()


# -- with processes --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: False)


OWN = [
    *("--set", "data.own_share=0.5", "--set", "data.normal_count=300", "--set", "data.reworded=8"),
    *("--reference", "cached", "--set", "stop.eval_every=2"),
]
KINDS: dict[str, tuple[str, list[object]]] = {
    "logodds": ("logodds", []),
    "mollm": ("mollm", []),
    "live": ("llmu", ["--reference", "live"]),
    "own": ("llmu", [*OWN]),
    "kept": ("logodds", ["--set", "train.checkpointing=never", "--set", "train.max_tokens=256"]),
    "altpo": ("altpo", []),
    "pdu": ("pdu", []),
    "back": ("logodds", ["--set", "stop.max_drift=1e-4", "--set", "stop.check_every=1", "--set", "train.clip=0.05"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_equal_to_one_process_that_holds_it_whole(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes in unlike numbers, rows that one of them generates longer, gradients kept apart, caches, checks."""
    kinds = KINDS if count == 2 else {name: KINDS[name] for name in ("logodds", "own")}
    monkeypatch.setenv("QUNLEARN_CACHE", str(tmp_path / "cache-one"))
    for name, (objective, more) in kinds.items():
        assert call(*line(tmp_path / f"one-{name}", objective, *more)).code in (0, 5)
    monkeypatch.setenv("QUNLEARN_CACHE", str(tmp_path / "cache-several"))
    calls = [Call(line(tmp_path / name, objective, *more, *FSDP)) for name, (objective, more) in kinds.items()]
    told = launch(count, tmp_path, calls)
    for n, name in enumerate(kinds):
        assert [process[n]["code"] in (0, 5) for process in told] == [True] * count, told[0][n]["stderr"]
        assert {process[n]["stderr"] + process[n]["stdout"] for process in told[1:]} == {""}
        same(tmp_path / name, tmp_path / f"one-{name}")
        assert moved(tmp_path / name) or name == "back"
        if name == "back":
            assert any(BACK_TO in event for event in events(tmp_path / name))
        if name == "own":
            ours, theirs = ((tmp_path / run / "normal.jsonl").read_bytes() for run in (name, f"one-{name}"))
            assert ours == theirs


@pytest.mark.slow
def test_each_process_holds_its_part(tmp_path: Path) -> None:
    """Of the blocks' weights, counted in two processes."""
    code = tmp_path / "count.py"
    code.write_text(COUNT)
    port, started = str(free_ports(1)[0]), []
    for rank in ("0", "1"):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(subprocess.Popen([sys.executable, code], env={**os.environ, **env}, stdout=-1, text=True))
    said = [process.communicate(timeout=200)[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    for whole, held in (map(int, words[-2:]) for words in said):
        assert held == pytest.approx(whole / 2, rel=0.01)


COUNT = """
from pathlib import Path
import torch
from qunlearn.config.settings import LoraConfig
from qunlearn.model.load import LoadSpec, decoder_blocks, load_base
from qunlearn.model.policy import Policy
from qunlearn.model.sharded import shard
from qunlearn.parallel.group import joined
from qunlearn.sandbox import ASSETS

def held(policy):
    found = (p for p in decoder_blocks(policy.base.model).parameters() if not p.requires_grad)
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in found)

with joined() as ranks:
    base = load_base(ASSETS / "model", LoadSpec(device="cpu", device_map="fsdp"))
    policy = Policy.new(base, LoraConfig(), seed=0)
    whole = held(policy)
    policy = shard(policy, torch.device("cpu"), ranks)
    with policy.reference():
        policy.base.model(input_ids=torch.tensor([[5, 6, 7 + ranks.number]]))
    print(whole, held(policy))
"""


# Of each process the lengths of the rows that it puts through: none of the last.
PASSES = ([7, 19], [11], [])
RANK = 32  # large enough for 8-bit state, in two parts as well as in three


def passed(policy: Policy, lengths: Sequence[int]) -> None:
    for n in lengths:
        ids = (torch.arange(n)[None] * n) % 200 + 5
        policy.base.model(input_ids=ids, labels=ids).loss.backward()


def begun(device_map: str) -> Policy:
    """A policy whose B is not 0, so that all of it has a gradient."""
    base = load_base(ASSETS / "model", LoadSpec(device="cpu", device_map=device_map))
    policy = Policy.new(base, LoraConfig(r=RANK), seed=0)
    g = torch.Generator().manual_seed(2)
    policy.load_adapter_state({n: torch.randn(p.shape, generator=g) / 30 for n, p in policy.trainable().items()})
    return policy


@pytest.mark.slow
@pytest.mark.parametrize(("count", "bf16"), [(2, True), (3, False)])
def test_each_process_holds_its_part_of_the_adapter(
    count: int, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of weights, gradients and optimizer state, and the numbers that stand there; put together they are those of
    one process, and what was put together comes back as it was. In bf16 the adapter is of another dtype than
    the rest of its block."""
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: bf16)
    rounding = 1e-2 if bf16 else 1e-4
    code, here = tmp_path / "share.py", Path(__file__).parent
    code.write_text(f"import sys\nsys.path[:0] = {[str(here), str(here.parent)]!r}\n{SHARE}")
    port, started = str(free_ports(1)[0]), []
    for rank in map(str, range(count)):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, code, tmp_path, str(int(bf16))]
        started.append(subprocess.Popen(command, env={**os.environ, **env}, stdout=-1, text=True))
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * count
    told = [json.loads(text.splitlines()[-1]) for text in said]
    plain = begun("none")
    passed(plain, [n for lengths in PASSES[:count] for n in lengths])
    parameters = plain.parts()
    numbers = sum(p.numel() for p in parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, 0.5))
    for one in told:
        assert one["norm"] == pytest.approx(norm, rel=rounding)
        assert one["same"] == {"adamw": True, "adamw8bit": True}
        assert one["bytes"]["weights"] == one["bytes"]["gradients"] == pytest.approx(4 * numbers / count, rel=0.05)
        assert one["bytes"]["adamw"] == pytest.approx(8 * numbers / count, rel=0.05)
        assert one["bytes"]["adamw8bit"] < one["bytes"]["adamw"], "some of it is in 8 bits"
    for part_of in ("weights", "adamw"):
        assert sum(one["bytes"][part_of] for one in told) == {"weights": 4, "adamw": 8}[part_of] * numbers
    optimizer = make_optimizer(parameters, TrainConfig(), 1e-3)
    optimizer.step()
    wanted, _ = optimizer_state(optimizer)
    found = {kind: torch.load(tmp_path / f"{kind}.pt") for kind in ("adamw", "adamw8bit")}
    names = {"exp_avg": "state1", "exp_avg_sq": "state2"}
    for name, theirs in wanted.items():
        number, _, key = name.partition(".")
        ours = found["adamw"][name]
        assert ours.shape == theirs.shape and float((ours - theirs).norm()) <= 4 * rounding * float(theirs.norm())
        if key in names:  # in 8 bits within their rounding
            ours = found["adamw8bit"][f"{number}.{names[key]}"]
            assert ours.shape == theirs.shape and float((ours - theirs).norm()) <= 0.1 * float(theirs.norm())


SHARE = """
import json
from pathlib import Path
import torch
from test_sharded import PASSES, begun, passed
from qunlearn.config.settings import TrainConfig
from qunlearn.model import device
from qunlearn.model.sharded import shard
from qunlearn.parallel.group import joined
from qunlearn.training.optimizer import clip, load_optimizer_state, make_optimizer, optimizer_state

def tensors_of(optimizer):
    found = (t for state in optimizer.state.values() for n, t in state.items() if n != "step" and "qmap" not in n)
    return [t for t in found if isinstance(t, torch.Tensor)]

device._cpu_has_bf16 = lambda: sys.argv[2] == "1"
def alike(a, b):  # a scale is found again within its rounding
    return torch.equal(a, b) if a.dtype == torch.uint8 or a.ndim > 1 else torch.allclose(a, b, rtol=1e-6, atol=0)

folder = Path(sys.argv[1])
with joined() as ranks:
    policy = shard(begun("fsdp"), torch.device("cpu"), ranks)
    passed(policy, PASSES[ranks.number])
    ranks.wait()
    policy.take_gradients()
    parts, likes = policy.parts(), [*policy.trainable().values()]
    held = {"weights": sum(p.nbytes for p in parts)}
    held["gradients"] = sum(p.grad.nbytes for p in parts if p.grad is not None)
    held["gradients"] += sum(p.grad.to_local().nbytes for p in likes if p.grad is not None)
    norm, same = clip(policy, parts, 0.5), {}
    for kind in ("adamw", "adamw8bit"):
        optimizer = make_optimizer(parts, TrainConfig(optimizer=kind), 1e-3)
        optimizer.step()
        mine = tensors_of(optimizer)
        held[kind] = sum(t.nbytes for t in mine)
        tensors, scalars = optimizer_state(optimizer, likes)
        if ranks.main:
            torch.save(tensors, folder / f"{kind}.pt")
        tensors, scalars = torch.load(folder / f"{kind}.pt") if ranks.first(lambda: True) else {}, ranks.from_main(
            lambda: scalars
        )
        again = make_optimizer(parts, TrainConfig(optimizer=kind), 1e-3)
        load_optimizer_state(again, tensors, scalars, likes)
        same[kind] = len(mine) > 0 and all(map(alike, mine, tensors_of(again)))
    print(json.dumps({"bytes": held, "norm": norm, "same": same}))
"""


@pytest.mark.slow
def test_what_happens_to_one_is_agreed_on_in_shards(tmp_path: Path) -> None:
    """A number that is not finite, a signal; and what one number of processes has left another goes on with."""
    skip, stop, kinds = tmp_path / "skip", tmp_path / "stop", ("logodds", "mollm")
    calls = [Call(line(skip, "logodds", *FSDP), "not finite at step 2", [1])]
    calls += [Call(line(tmp_path / f"stop-{kind}", kind, *FSDP), "SIGTERM at step 3", [1]) for kind in kinds]
    told = launch(3, tmp_path, calls)
    assert [process[0]["code"] in (0, 5) for process in told] == [True] * 3
    assert json.loads((skip / RECORD).read_text())["training"]["skipped"] == 1
    assert [[one["code"] for one in process[1:]] for process in told] == [[130, 130]] * 3
    resumed = [Call(line(tmp_path / f"stop-{kind}", kind, "--resume", *FSDP)) for kind in kinds]
    told = launch(2, tmp_path, resumed)
    for n, kind in enumerate(kinds):
        stop, one = tmp_path / f"stop-{kind}", tmp_path / f"one-{kind}"
        assert told[0][n]["code"] in (0, 5) and "resuming after step 3" in told[0][n]["stderr"], told[0][n]["stderr"]
        assert call(*line(one, kind)).code in (0, 5)
        same(stop, one)


@pytest.mark.slow
def test_one_that_ends_does_not_leave_the_others_behind(tmp_path: Path) -> None:
    """Killed while it computes, or out of memory, which cannot be repeated with the others in the same pass."""
    short = launch(2, tmp_path, [Call(line(tmp_path / "short", "logodds", *FSDP), "out of memory at step 2", [1])])
    assert (short[0][0]["code"], short[1][0]["code"]) == (8, 4)
    run = tmp_path / "run"
    told = launch(2, tmp_path, [Call(line(run, "logodds", *FSDP), "SIGKILL at step 4", [1])])
    assert told[0][0]["code"] == 8 and "a process of this run is gone" in told[0][0]["stderr"]
    told = launch(3, tmp_path, [Call(line(run, "logodds", "--resume", *FSDP))])
    assert told[0][0]["code"] in (0, 5) and "resuming after step 2" in told[0][0]["stderr"]
    assert call(*line(tmp_path / "one")).code in (0, 5)
    same(run, tmp_path / "one")
