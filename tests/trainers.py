"""What trainers do with optimizers, run by `test_trainers.py` in processes of their own: fine-tune on digits, save, and go on bitwise.

A network that knows upright digits learns digits that are turned by a quarter. A resumed run starts from other weights, so that what it
knows of the first run comes out of the file: weights, anchors, radii, moments and learned values.
"""

import copy
import functools
import gc
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import hyperopt_nested as hn
from ftp import FTP, SGDP, AdamP

Make = Callable[[nn.Module], torch.optim.Optimizer]

RATE, DECAY = 3e-3, 1e-2
LEARNED, OFF = (hn.learn(RATE, by=hn.sgd(lr=lr)) for lr in (1e-3, 0.0))
REFERENCE: dict[str, Any] = {"backend": "reference"}  # nothing is compiled: what steps is of no concern to trainers
STEPS = 6

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
turned = images.rot90(1, (2, 3))
rows = [{"pixel_values": x, "labels": y} for x, y in zip(turned[:96], labels[:96], strict=True)]


def optimizer(kind: str, model: nn.Module, head: str) -> Any:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    match kind:
        case "AdamP":
            return AdamP(named, RATE, exclude=f"*{head}.*", **REFERENCE)
        case "SGDP":
            return SGDP(named, 10 * RATE, 0.9, exclude=f"*{head}.*", **REFERENCE)
        case "FTP":
            return FTP(torch.optim.AdamW(named, RATE), exclude=f"*{head}.*", **REFERENCE)
        case "AdamP, learned":
            return AdamP(named, LEARNED, weight_decay=hn.learn(DECAY, per="tensor"), exclude=f"*{head}.*", **REFERENCE)
        case "AdamP, off":
            return AdamP(named, OFF, exclude=f"*{head}.*", **REFERENCE)
        case "learned":
            return hn.optim.AdamW(named, hn.learn(RATE), weight_decay=hn.learn(DECAY, per="tensor"), **REFERENCE)
        case "off":
            return hn.optim.AdamW(named, OFF, **REFERENCE)
        case "constant":
            return hn.optim.AdamW(named, RATE, **REFERENCE)
    raise ValueError(kind)


KINDS = "AdamP", "SGDP", "FTP", "AdamP, learned", "learned"
SAME = (("off", "constant"), ("AdamP, off", "AdamP"))
"""What gives the same weights, bit by bit: a learner of rate 0, and nothing learned."""


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in model.state_dict().items()}


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    return F.cross_entropy(getattr(logits, "logits", logits), y)


def error(model: nn.Module) -> float:
    with torch.no_grad():
        return loss(copy.deepcopy(model).eval(), turned[:96], labels[:96]).item()


@functools.cache
def pretrained(make: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    """Makes copies of a network that was trained on upright digits; or other networks of the same shape, which know nothing."""

    def built(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return make()

    model = built(0)
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(100):
        batch = slice(64 * step % 1600, 64 * (step + 1) % 1600 or 1600)
        opt.zero_grad()
        loss(model, images[batch], labels[batch]).backward()
        opt.step()
    right = (model(images[1600:]) if not hasattr(model, "config") else model(images[1600:]).logits).argmax(1) == labels[1600:]
    assert right.double().mean() > 0.5, right.double().mean()
    return lambda fresh=False: built(1) if fresh else copy.deepcopy(model)


def equal(one: Any, other: Any) -> bool:
    """Whether all numbers of states are the same, bit by bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def same_run(one: tuple[nn.Module, Any], other: tuple[nn.Module, Any]) -> None:
    """Check that two runs have the same end: weights, radii, learned values and the rest of the state."""
    assert equal(weights(one[0]), weights(other[0]))
    assert not hasattr(one[1], "learned") or one[1].learned() == other[1].learned()
    assert equal(one[1].state_dict(), other[1].state_dict())


def fine_tuned(kind: str, start: nn.Module, model: nn.Module, opt: Any) -> None:
    """Check that a run learned something, and what the optimizer did."""
    assert error(model) < error(start) - 0.02, (kind, error(start), error(model))
    radii = [value for name, value in getattr(opt, "learned", dict)().items() if name.startswith("radius")]
    assert bool(radii) == (kind in ("AdamP", "SGDP", "FTP", "AdamP, learned", "AdamP, off")), (kind, radii)
    assert not radii or max(radii) > 1e-4, radii
    decays = [value for name, value in getattr(opt, "learned", dict)().items() if name.startswith("weight_decay")]
    assert not decays or any(value not in (0.0, DECAY) for value in decays), decays


def cnn() -> nn.Sequential:
    body = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GELU()
    return nn.Sequential(nn.Sequential(*body), nn.Flatten(), nn.Linear(64, 10))


def transformer() -> nn.Module:
    """Not ViT: transformers 5.24 saves its weights by old names, and a Trainer that goes on then leaves them as they are."""
    from transformers import PvtConfig, PvtForImageClassification

    shape = {"image_size": 8, "num_channels": 1, "num_encoder_blocks": 1, "hidden_sizes": [32], "patch_sizes": [4], "strides": [4]}
    block = {"depths": [1], "sequence_reduction_ratios": [1], "num_attention_heads": [2], "mlp_ratios": [2], "initializer_range": 0.1}
    return PvtForImageClassification(PvtConfig(**shape, **block, num_labels=10))


def lightning() -> None:
    import pytorch_lightning as pl

    class Model(pl.LightningModule):
        def __init__(self, kind: str, net: nn.Module) -> None:
            super().__init__()
            self.kind, self.net = kind, net

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return loss(self.net, batch["pixel_values"], batch["labels"])

        def configure_optimizers(self) -> Any:
            opt = optimizer(self.kind, self.net, "2")
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 2 * STEPS)
            return [opt], [{"scheduler": schedule, "interval": "step"}]

    class Logger(pl.loggers.logger.DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[Any, dict[str, float]] = {}

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.seen.setdefault(step, {}).update(metrics)

    network = pretrained(cnn)

    def train(kind: str, net: nn.Module, folder: str, start: str | None = None) -> tuple[nn.Module, Any, Logger]:
        torch.manual_seed(0)
        model, logger = Model(kind, net), Logger()
        callbacks = [hn.integrations.LightningCallback(every=2), pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)]
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=logger,
            callbacks=callbacks,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(model, DataLoader(rows, batch_size=16), ckpt_path=start)
        return net, trainer.optimizers[0], logger

    ends = {}
    for kind in (*KINDS, "off", "constant", "AdamP, off"):
        with tempfile.TemporaryDirectory() as folder:
            net, opt, logger = train(kind, network(), folder)
            ends[kind] = weights(net)
            fine_tuned(kind, network(), net, opt)
            if kind in KINDS:
                same_run((net, opt), train(kind, network(fresh=True), folder, f"{folder}/epoch=0.ckpt")[:2])
            if kind == "learned":
                assert [*logger.seen] == [2, 4, 6], logger.seen
                assert logger.seen[6] == {f"learned/{name}": value for name, value in opt.learned().items()}, logger.seen
                assert opt.learned()["lr"] != opt.param_groups[0]["lr"] != RATE
    for one, other in SAME:
        assert equal(ends[one], ends[other])


def trainer() -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments, get_linear_schedule_with_warmup

    gc.freeze()

    class Reports(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            self.seen.append(dict(logs))

    network = pretrained(transformer)

    def by_names(kind: type[torch.optim.Optimizer]) -> Callable[[], Callable[..., torch.optim.Optimizer]]:
        """A factory, which the Trainer calls with the model: parameters have names."""
        return lambda: lambda model, **kwargs: kind(model.named_parameters(), **kwargs)

    def ftp_factory() -> Callable[..., FTP]:
        return lambda model, lr: optimizer("FTP", model, "classifier")

    def of_class(kind: Any, **kwargs: Any) -> Callable[[nn.Module], dict[str, Any]]:
        return lambda model: {"optimizer_cls_and_kwargs": (kind, {"lr": RATE, **kwargs, **REFERENCE})}

    def excluding(kind: Any, **kwargs: Any) -> Callable[[nn.Module], dict[str, Any]]:
        return lambda model: of_class(kind, exclude=[model.classifier], **kwargs)(model)

    def both(kind: str) -> Callable[[nn.Module], dict[str, Any]]:
        def pair(model: nn.Module) -> dict[str, Any]:
            opt = optimizer(kind, model, "classifier")
            return {"optimizers": (opt, get_linear_schedule_with_warmup(opt, 0, STEPS))}

        return pair

    def run(way: Callable[[nn.Module], dict[str, Any]], start: nn.Module, folder: str, resume: str | None = None, decay: float = 0) -> Any:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            logging_steps=2,
            max_steps=STEPS,
            save_steps=4,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            report_to=[],
            disable_tqdm=True,
            weight_decay=decay,
        )
        reports = Reports()
        trainer = Trainer(start, arguments, train_dataset=rows, callbacks=[reports], **way(start))
        hn.integrations.HuggingFaceCallback().add_to(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return start, trainer.callback_handler.optimizer.optimizer, trainer, reports

    by_name = {"exclude": ["classifier.*"]}
    off = {"lr": OFF}
    learned = {"lr": hn.learn(RATE), "weight_decay": hn.learn(DECAY, per="tensor")}
    ways: dict[str, Any] = {
        "AdamP": both("AdamP"),
        "AdamP, class": excluding(AdamP),
        "AdamP, factory": of_class(by_names(AdamP), **by_name),
        "AdamP, off": excluding(AdamP, **off),
        "FTP": both("FTP"),
        "FTP, factory": lambda model: {"optimizer_cls_and_kwargs": (ftp_factory, {"lr": RATE})},
        "SGDP": excluding(SGDP, momentum=0.9),
        "learned": of_class(hn.optim.AdamW, **learned),
        "constant": of_class(hn.optim.AdamW),
        "off": of_class(hn.optim.AdamW, **off),
    }
    resumed = "AdamP", "AdamP, class", "AdamP, factory", "FTP", "SGDP", "learned"
    ends = {}
    for name, way in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            decay = DECAY if name == "learned" else 0.0
            model, opt, trainer, reports = run(way, network(), folder, decay=decay)
            ends[name] = weights(model)
            fine_tuned(name.split(", ")[0], network(), model, opt)
            if name in resumed:
                same_run((model, opt), run(way, network(fresh=True), folder, f"{folder}/checkpoint-4", decay)[:2])
            if name == "learned":
                last, values = [entry for entry in trainer.state.log_history if "loss" in entry][-1], opt.learned()
                assert {f"learned/{name}" for name in values} <= set(last), (last, values)
                assert last["learned/lr"] == values["lr"] != last["learning_rate"], (last, values)
                assert any("learned/lr" in each for each in reports.seen)
            if name == "AdamP, factory":
                assert "radius/pvt.encoder.layer_norm.weight" in opt.learned(), opt.learned()
                assert not any("classifier" in name for name in opt.learned())
    for one, other in (*SAME, ("AdamP", "AdamP, class"), ("AdamP", "AdamP, factory"), ("FTP", "FTP, factory")):
        assert equal(ends[one], ends[other]), (one, other)
    refused = Trainer(network(), TrainingArguments(tempfile.mkdtemp(), use_cpu=True), **of_class(AdamP, **by_name)(network()))
    with pytest.raises(ValueError, match=r"'classifier\.\*' matches none.*have no names: .* give modules, such as exclude=\[model\.head\]"):
        refused.create_optimizer()


def accelerate() -> None:
    from accelerate import Accelerator

    network = pretrained(cnn)

    def run(kind: str, start: nn.Module, folder: str, first: int = 0) -> tuple[nn.Module, Any]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        opt = optimizer(kind, start, "2")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 2 * STEPS)
        recorder = hn.integrations.Recorder(opt) if kind == "learned" else None
        model, prepared, schedule, loader = accelerator.prepare(start, opt, schedule, DataLoader(rows, batch_size=8))
        if first:
            accelerator.load_state(folder)
        for step, batch in enumerate(loader):
            if step < first:
                continue
            if step == STEPS and not first:
                accelerator.save_state(folder)
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, batch["pixel_values"], batch["labels"]))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                prepared.step()
                rate = opt.learned()["lr"] if kind == "learned" else None
                schedule.step()
                prepared.zero_grad()
        assert prepared.optimizer is opt
        assert recorder is None or recorder.record().values["lr"][-1] == rate
        return start, opt

    ends = {}
    for kind in (*KINDS, "off", "constant", "AdamP, off"):
        with tempfile.TemporaryDirectory() as folder:
            net, opt = run(kind, network(), folder)
            ends[kind] = weights(net)
            fine_tuned(kind, network(), net, opt)
            if kind in KINDS:
                same_run((net, opt), run(kind, network(fresh=True), folder, STEPS))
    for one, other in SAME:
        assert equal(ends[one], ends[other])


def peft() -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = pretrained(transformer)()
    config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    zero: dict[str, Any] = {"anchor": "zero", "exclude": "*classifier*", **REFERENCE}

    def trained(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    makes: dict[str, Callable[[nn.Module], Any]] = {
        "AdamP": lambda model: AdamP(trained(model), 10 * RATE, **zero),
        "AdamP, all": lambda model: AdamP(model.named_parameters(), 10 * RATE, **zero),
        "AdamP, off": lambda model: AdamP(trained(model), hn.learn(10 * RATE, by=hn.sgd(lr=0.0)), **zero),
        "FTP": lambda model: FTP(torch.optim.AdamW(trained(model), 10 * RATE), **zero),
        "FTP, all": lambda model: FTP(torch.optim.AdamW(model.named_parameters(), 10 * RATE), **zero),
    }

    def train(model: nn.Module, opt: Any, steps: range) -> None:
        for step in steps:
            batch = slice(16 * step, 16 * step + 16)
            opt.zero_grad()
            loss(model, turned[batch], labels[batch]).backward()
            opt.step()

    ends = {}
    for name, make in makes.items():
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), config)
        before, opt = weights(model), make(model)
        with tempfile.TemporaryDirectory() as folder:
            train(model, opt, range(4))
            model.save_pretrained(folder)
            torch.save(opt.state_dict(), f"{folder}/optimizer.pt")
            train(model, opt, range(4, STEPS))
            other = PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
            again = make(other)
            again.load_state_dict(torch.load(f"{folder}/optimizer.pt", weights_only=True))
            train(other, again, range(4, STEPS))
        same_run((model, opt), (other, again))
        fine_tuned(name.split(", ")[0], base, model, opt)
        ends[name], names = weights(model), {name for name, _ in trained(model)}
        for key, p in model.named_parameters():
            assert (key in names) != torch.equal(p, before[key]), key
            state = {**opt.state.get(p, {}), **(opt.projection.state.get(p, {}) if isinstance(opt, FTP) else {})}
            assert key in names or not any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in state.values()), (key, state)
            assert not any(entry.endswith("anchor") for entry in state), (key, state)
    for one, other in (("AdamP", "AdamP, off"), ("AdamP", "AdamP, all"), ("FTP", "FTP, all")):
        assert equal(ends[one], ends[other]), (one, other)


class Torchvision:
    """Stands in for torchvision, whose wheel does not import beside the CPU build of torch: timm imports names, and runs nothing of it."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None  # type: ignore[arg-type]

    def create_module(self, _: ModuleSpec) -> Any:
        return MagicMock()

    def exec_module(self, _: Any) -> None:
        pass


def timm() -> None:
    sys.path.append(str(Path(sys.prefix) / "no-deps"))
    sys.meta_path.append(Torchvision())  # type: ignore[arg-type]
    from timm import create_model
    from timm.models import resume_checkpoint
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry
    from timm.scheduler import CosineLRScheduler
    from timm.utils import CheckpointSaver

    for name, kind in {"ftpadamp": AdamP, "ftpsgdp": SGDP, "hnadamw": hn.optim.AdamW}.items():
        momentum = name == "ftpsgdp"
        default_registry.register(OptimInfo(name=name, opt_class=kind, has_betas=not momentum, has_momentum=momentum))
    shape = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    network = pretrained(functools.partial(create_model, "vit_tiny_patch16_224", **shape))

    def registered(name: str, lr: Any = RATE, **kwargs: Any) -> Make:
        """Groups by depth, with and without decay."""

        def make(model: Any) -> torch.optim.Optimizer:
            exclude = {} if name == "hnadamw" else {"exclude": [model.head]}
            opt: Any = create_optimizer_v2(model, name, lr=lr, weight_decay=DECAY, layer_decay=0.7, **exclude, **kwargs, **REFERENCE)
            assert {group["weight_decay"] for group in opt.param_groups} == {0.0, DECAY}
            assert len({group["lr_scale"] for group in opt.param_groups}) == 4
            return opt

        return make

    def wrapped(model: Any) -> torch.optim.Optimizer:
        inside = create_optimizer_v2(model, "adamw", lr=RATE, weight_decay=DECAY, layer_decay=0.7)
        return FTP(inside, exclude=[model.head], **REFERENCE)

    def run(make: Make, model: Any, folder: str, resume: bool = False) -> tuple[nn.Module, Any]:
        opt = make(model)
        schedule = CosineLRScheduler(opt, t_initial=STEPS, warmup_t=2, warmup_lr_init=1e-4, t_in_epochs=False)
        first = resume_checkpoint(model, f"{folder}/last.pth.tar", opt, log_info=False) if resume else 0
        schedule.step_update(first)
        for step in range(first, STEPS):
            batch = slice(16 * step, 16 * step + 16)
            opt.zero_grad()
            loss(model, turned[batch], labels[batch]).backward()
            opt.step()
            schedule.step_update(step + 1)
            rates = torch.tensor([group["lr"] / group["lr_scale"] for group in opt.param_groups])
            assert torch.allclose(rates, rates[:1].expand_as(rates))
            assert step > 1 or rates.min() > 0
            if step == 3 and not resume:
                CheckpointSaver(model, opt, checkpoint_dir=folder, recovery_dir=folder).save_checkpoint(3)
        return model, opt

    makes = {
        "AdamP": registered("ftpadamp"),
        "AdamP, off": registered("ftpadamp", OFF),
        "SGDP": registered("ftpsgdp", 10 * RATE),
        "FTP": wrapped,
        "learned": registered("hnadamw", hn.learn(RATE)),
        "constant": registered("hnadamw"),
        "off": registered("hnadamw", OFF),
    }
    ends = {}
    for kind, make in makes.items():
        with tempfile.TemporaryDirectory() as folder:
            model, opt = run(make, network(), folder)
            ends[kind] = weights(model)
            fine_tuned(kind, network(), model, opt)
            if kind in KINDS:
                same_run((model, opt), run(make, network(fresh=True), folder, resume=True))
    assert not equal(ends["learned"], ends["constant"])
    for one, other in SAME:
        assert equal(ends[one], ends[other])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        gc.freeze()  # trainers collect garbage in each run: modules are none
        globals()[name]()
        print(name, flush=True)
