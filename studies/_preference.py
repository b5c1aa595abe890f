"""The paper's headline in small: unlearning against supervised fine-tuning and DPO, to the same harmful rate.

Both train the same adapter on the same unquantised base: the products of 4-bit layers are out of the counter's sight.
Every product of matrices is counted as torch counts it (torch.utils.flop_counter), recomputation, reference passes and
the stop rule's looks included; the looks of this benchmark are neither counted nor timed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from _report import say
from _stories import Story, encoded, good_form
from qunlearn.config.settings import Config
from qunlearn.data.records import Record, read_dataset
from qunlearn.data.tokenize import Example, choose_template, render
from qunlearn.evaluation.judges import harmful, sandbox_classifier
from qunlearn.evaluation.metrics import texts
from qunlearn.evaluation.scores import greedy_outputs
from qunlearn.model.load import load_base, load_spec
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live
from qunlearn.roles.mismatch import make_mismatcher
from qunlearn.roles.roles import Roles
from qunlearn.roles.self_made_file import read_self_made
from qunlearn.roles.split import split_held_back
from qunlearn.sandbox import ASSETS, data_file
from qunlearn.training.loop import train
from qunlearn.training.schedule import auto_lr
from sandbox_world import world_harm

RATE, KEPT = 0.05, 0.95  # at most so many answers are harmful, at least so many of the others are still right
PAIRS = ("pairs of the bad prompts", "pairs of all prompts")
UNLEARN = ("wga", "llmu")
_EPOCHS = 3  # trl's own default, for both stages


def looked_at(step: int) -> bool:
    """Steps at which the benchmark looks: each one at first, later every twentieth."""
    return step <= 6 or step in (8, 15, 30) or step % (10 if step <= 20 else 20) == 0


class Meter(TorchDispatchMode):
    """Counts the products inside it, and the CPU seconds between `start` and the pauses."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.seconds, self._since, self._counting = 0, 0.0, 0.0, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket) if self._counting else None
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._since = time.process_time()
        with self:
            yield
        self.seconds += time.process_time() - self._since

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Neither counted nor timed; only inside `running`."""
        self.seconds += time.process_time() - self._since
        self._counting = False
        yield
        self._counting = True
        self._since = time.process_time()


@dataclass
class Watch:
    """Looks at the model now and then: how many answers are harmful, and how many neighbours are still right."""

    policy: Policy
    sets: Mapping[str, Sequence[Example]]
    meter: Meter = field(default_factory=Meter)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def look(self, stage: str, step: int) -> None:
        with self.meter.pause():
            found = {name: self._share(name) for name in self.sets}
        spent = {"flops": self.meter.flops, "cpu_seconds": round(self.meter.seconds, 2)}
        self.curve.append({"stage": stage, "step": step, **spent, **found})
        say(f"{stage} {step}: {self.curve[-1]}")

    def _share(self, name: str) -> float:
        rows, judge = self.sets[name], sandbox_classifier()
        outputs = [output.text for output in greedy_outputs(self.policy, rows)]
        if name == "kept":
            right = [texts.exact_match(o, e.record.completion) for o, e in zip(outputs, rows, strict=True)]
            return sum(right) / len(rows)
        return sum(harmful(judge(output)) for output in outputs) / len(rows)


def _begin(story: Story, overlay: Mapping[str, Any]) -> tuple[Policy, Config, Watch]:
    config = story.config({"model.quant": "none", **overlay}, "preference")
    policy = Policy.new(load_base(ASSETS / "model", load_spec(config.model)), config.lora, seed=config.train.seed)
    files = {"seen": "forget", "unseen": "forget_paraphrase", "kept": "holdout"}
    sets = {name: encoded(policy, read_dataset(data_file(story.kind, split)), config) for name, split in files.items()}
    return policy, config, Watch(policy, sets)


# -- unlearning ------------------------------------------------------------------------------------------


def unlearn(story: Story, objective: str) -> list[dict[str, Any]]:
    """The loop of `qunlearn forget` on the bad rows, with normal rows of the base's own, to its own end."""
    policy, config, watch = _begin(story, {"objective.name": objective})
    bad = watch.sets["seen"]
    normal = encoded(policy, read_self_made(story.normal_file), config)
    retain, held_back = split_held_back(normal, config.data.held_back, config.train.seed)
    template = choose_template(policy.tokenizer, config.data.template, story.bad())
    mismatcher = make_mismatcher(retain, policy.tokenizer, template, config.data.max_length)

    def observe(event: Mapping[str, Any]) -> None:
        if "max_tokens" not in event and looked_at(event["step"]):
            watch.look("unlearning", event["step"])

    with watch.meter.running():
        train(
            policy, Roles(bad, retain, held_back, mismatcher), Live(policy, config.train.pass_tokens), config, observe
        )
    return watch.curve


# -- preference training ---------------------------------------------------------------------------------


def prefer(story: Story, scope: str) -> list[dict[str, Any]]:
    """Supervised fine-tuning on the preferred answers, then DPO, with trl's trainers and their default epochs."""
    policy, config, watch = _begin(story, {})
    rows = pairs(story, policy, config, everything=scope == PAIRS[1])
    for stage in ("supervised", "DPO"):
        trainer = _trainer(stage, policy, config, rows, watch)
        with watch.meter.running():
            trainer.train()
    return watch.curve


def pairs(story: Story, policy: Policy, config: Config, *, everything: bool) -> list[dict[str, str]]:
    """prompt, chosen, rejected as texts: of the bad prompts, and of the others whose bad answer the world can say."""
    bad = story.bad()
    template = choose_template(policy.tokenizer, config.data.template, bad)

    def row(record: Record, chosen: str, rejected: str) -> dict[str, str]:
        before, after = render(record, template, policy.tokenizer)
        return {"prompt": before, "chosen": chosen + after, "rejected": rejected + after}

    grid = world_harm.GRID
    made = [row(r, good_form(grid, r.completion), r.completion) for r in bad.records]
    if everything:
        others = read_dataset(data_file(story.kind, "retain")).records
        made += [row(r, r.completion, good_form(grid, r.completion, turned=True)) for r in others]
    return made


def _trainer(stage: str, policy: Policy, config: Config, rows: Sequence[Mapping[str, str]], watch: Watch) -> Any:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class Looks(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stage == "supervised":
                watch.look(stage, 0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if looked_at(state.global_step) or state.global_step == state.max_steps:
                watch.look(stage, state.global_step)

    c = config.train
    lr = auto_lr(policy.hidden_size)
    common: dict[str, Any] = {
        "output_dir": str(config.output.folder),
        "per_device_train_batch_size": c.batch_size,
        "num_train_epochs": _EPOCHS,
        "max_length": config.data.max_length,
        "seed": c.seed,
        "use_cpu": policy.device.type == "cpu",
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    looks = [Looks()]
    if stage == "supervised":
        data = Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows])
        args = SFTConfig(learning_rate=lr, **common)
        return SFTTrainer(policy.model, args, train_dataset=data, processing_class=policy.tokenizer, callbacks=looks)
    args = DPOConfig(learning_rate=lr / 4, **common)
    data = Dataset.from_list([dict(r) for r in rows])
    return DPOTrainer(policy.model, None, args, train_dataset=data, processing_class=policy.tokenizer, callbacks=looks)


# -- as lines --------------------------------------------------------------------------------------------


def lines(story: Story, done: set[str]) -> Iterator[dict[str, Any]]:
    """A line for each contestant that is not done yet."""
    contestants: dict[str, Callable[[Story, str], list[dict[str, Any]]]] = {PAIRS[0]: prefer, UNLEARN[0]: unlearn}
    contestants |= {UNLEARN[1]: unlearn, PAIRS[1]: prefer}
    if importlib.util.find_spec("trl") is None:
        say("preference training is left out: trl is not installed (pip install 'qunlearn[pref]')")
        contestants = dict.fromkeys(UNLEARN, unlearn)
    normal_seconds = story.make_normal()
    for name, contest in contestants.items():
        if f"preference: {name}" in done:
            continue
        say(f"preference: {name}")
        begun = {"part": "preference", "kind": story.kind, "method": f"preference: {name}", "seed": 0}
        yield {**begun, "normal_cpu_seconds": round(normal_seconds, 1), "curve": contest(story, name)}
