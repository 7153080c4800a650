"""`initialize` at stage 0: what comes back, who wins, and that it trains as plain torch does."""

from __future__ import annotations

import base64
import gc
import json
import logging
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import IterableDataset, TensorDataset

import ds_core
from ds_core.setup import plugins
from ds_core.setup.config import ConfigError
from ds_core.setup.deepspeed_engine import DeepSpeedEngine
from ds_core.setup.estimate import DoesNotFit
from ds_core.testing.distributed import distributed
from ds_core.train.lr import WarmupLR
from ds_core.train.sampler import ResumableLoader

FILE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_type": "linear"}},
    "gradient_clipping": 0.5,
}


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def rows(step: int, micro: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator)


def start(changes: dict[str, Any] | None = None, **options: Any) -> DeepSpeedEngine:
    engine, _, _, _ = ds_core.initialize(
        model=options.pop("model", None) or tiny(), config={**FILE, **(changes or {})}, **options
    )
    made: DeepSpeedEngine = engine
    return made


def train(engine: DeepSpeedEngine, steps: int, first: int = 0, rank: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        for micro in range(engine.gradient_accumulation_steps()):
            x, y = rows(step, micro, rank)
            loss = F.mse_loss(engine(x).float(), y)
            engine.backward(loss)
            engine.step()
        assert engine.report is not None
        losses.append(engine.report.loss)
    return losses


def twin(steps: int, world: int = 1) -> tuple[list[float], list[Tensor], list[float], list[float]]:
    """Plain torch: losses over all ranks, weights, the rate each step used, gradient norms."""
    model = tiny()
    optimizer = AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = WarmupLR(optimizer, warmup_num_steps=3, warmup_type="linear")
    losses, rates, norms = [], [], []
    for step in range(steps):
        mine = []
        for micro in range(2):
            for rank in range(world):
                x, y = rows(step, micro, rank)
                loss = F.mse_loss(model(x), y)
                (loss / 2 / world).backward()
                mine.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(sum(mine) / 2 / world)
    return losses, [p.detach().clone() for p in model.parameters()], rates, norms


def test_trains_as_plain_torch_does() -> None:
    losses, weights, rates, norms = twin(6)
    engine = start()
    seen = []
    for step in range(6):
        seen += train(engine, 1, step)
        assert engine.report is not None
        assert engine.global_steps == step + 1
        assert engine.get_global_grad_norm() == pytest.approx(norms[step], rel=1e-5)
    assert seen == pytest.approx(losses, rel=1e-5)
    for mine, theirs in zip(engine.parameters(), weights, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    assert rates[:3] == [0.0, 0.0, pytest.approx(0.01 / 3)]  # the lowest rate twice, as in DeepSpeed


@distributed(world_size=2)
def test_trains_on_two_ranks(rank: int, world: int) -> None:
    losses, weights, _, norms = twin(4, world)
    engine = start()
    assert (engine.train_batch_size(), engine.world_size, engine.global_rank) == (16, 2, rank)
    seen = train(engine, 4, rank=rank)
    assert engine.get_global_grad_norm() == pytest.approx(norms[-1], rel=1e-5)
    assert seen == pytest.approx(losses, rel=1e-5)
    for mine, theirs in zip(engine.parameters(), weights, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_what_comes_back() -> None:
    data = TensorDataset(torch.randn(20, 6), torch.randn(20, 3))
    model = tiny()
    engine, optimizer, loader, scheduler = ds_core.initialize(model=model, config=FILE, training_data=data)
    assert engine.module is model
    assert isinstance(optimizer, AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert isinstance(scheduler, WarmupLR)
    assert isinstance(loader, ResumableLoader)
    assert [len(x) for x, _ in loader] == [4] * 6  # padded to whole steps of 8
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (8, 4)
    assert engine.gradient_accumulation_steps() == 2
    assert engine.zero_optimization_stage() == 0
    assert engine.get_lr() == [0.0]
    assert engine.get_global_grad_norm() is None
    assert len(list(engine.parameters())) == 4
    assert engine.eval() is model
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = engine.no_such_thing


def test_boundaries() -> None:
    engine = start()
    x, y = rows(0, 0)
    assert not engine.is_gradient_accumulation_boundary()
    loss = F.mse_loss(engine(x), y)
    with engine.no_sync():
        assert engine.backward(loss) is loss
    assert engine.step() is None
    assert engine.is_gradient_accumulation_boundary()
    engine.backward(F.mse_loss(engine(x), y))
    assert engine.step() is not None
    assert engine.was_step_applied()


def test_a_caller_may_say_where_the_boundary_is() -> None:
    # accelerate calls step() on boundaries only, after saying so
    mine, theirs = start(), start()
    train(theirs, 3)
    for step in range(3):
        for micro in range(2):
            engine_rows = rows(step, micro)
            mine.set_gradient_accumulation_boundary(micro == 1)
            mine.backward(F.mse_loss(mine(engine_rows[0]), engine_rows[1]))
            if micro == 1:
                mine.step()
    assert mine.global_steps == 3
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_loss_may_come_divided() -> None:
    one, other = start(), start()
    for micro in range(2):
        x, y = rows(0, micro)
        one.backward(F.mse_loss(one(x), y))
        one.step()
        other.backward(F.mse_loss(other(x), y) / 2, scale_wrt_gas=False)
        other.step()
    assert one.get_global_grad_norm() == other.get_global_grad_norm()  # Adam would hide a factor
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_graph_may_be_kept() -> None:
    engine = start({"gradient_accumulation_steps": 1})
    x, y = rows(0, 0)
    loss = F.mse_loss(engine(x), y)
    engine.backward(loss, retain_graph=True)
    loss.backward()  # would raise without
    with pytest.raises(ValueError, match="lr_kwargs"):
        engine.step(lr_kwargs={"epoch": 3})


# -- who wins ------------------------------------------------------------------------------------------------


def test_code_wins_over_the_config_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    optimizer = SGD(model.parameters(), lr=0.3)
    schedule = StepLR(optimizer, 1)
    engine, back, _, scheduler = ds_core.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=FILE
    )
    assert back is optimizer
    assert scheduler.scheduler is schedule
    assert "optimizer: the SGD given in code is used, not the config's AdamW" in caplog.text
    assert "scheduler: the StepLR given in code is used, not the config's WarmupLR" in caplog.text
    train(engine, 1)
    assert engine.get_lr() == pytest.approx([0.03])


def test_optimizer_and_scheduler_as_functions() -> None:
    engine, optimizer, _, scheduler = ds_core.initialize(
        model=tiny(),
        optimizer=lambda params: SGD(params, lr=0.3),
        lr_scheduler=lambda opt: WarmupLR(opt, warmup_num_steps=2),
        config={"train_batch_size": 4},
    )
    assert isinstance(optimizer, SGD)
    assert scheduler.get_last_lr() == [0.0]
    assert engine.train_batch_size() == 4


class Kernel(AdamW):
    """Stands for ds-kernels' FusedAdamW."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0) -> None:  # fmt: skip
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


@pytest.mark.parametrize(
    ("params", "want"), [({}, Kernel), ({"torch_adam": True}, AdamW), ({"amsgrad": True}, AdamW)]
)
def test_a_kernel_is_used_where_it_does_the_same(
    params: dict[str, Any], want: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "find", lambda kind, name: {"fused_adamw": Kernel}.get(name))
    made = start({"optimizer": {"type": "Adam", "params": params}}).optimizer.optimizer
    assert type(made) is want
    assert made.param_groups[0]["weight_decay"] == (0.01 if "torch_adam" in params else 0.0)


def test_parameter_groups_keep_their_options() -> None:
    model = tiny()
    groups = [{"params": [model[0].weight], "weight_decay": 0.0}, {"params": [model[2].weight]}]
    _, optimizer, _, _ = ds_core.initialize(model=model, model_parameters=groups, config=FILE)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]


class Unknown(SGD):
    """An optimizer nobody has declared element-wise."""


def test_untested_optimizers_can_be_refused() -> None:
    model = tiny()
    engine = start(model=model, optimizer=Unknown(model.parameters(), lr=0.1))
    assert engine.global_steps == 0
    model = tiny()
    with pytest.raises(ValueError, match="Unknown is not known to be element-wise"):
        start({"zero_allow_untested_optimizer": False}, model=model, optimizer=Unknown(model.parameters()))


# -- precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "dtype"),
    [({"fp16": {"enabled": True}}, torch.float16), ({"bf16": {"enabled": True}}, torch.bfloat16)],
)
def test_low_precision_with_fp32_masters(section: dict[str, Any], dtype: torch.dtype) -> None:
    engine = start({**section, "gradient_accumulation_steps": 1})
    assert {p.dtype for p in engine.parameters()} == {dtype}
    assert {p.dtype for group in engine.optimizer.param_groups for p in group["params"]} == {torch.float32}
    x, y = rows(0, 0)
    engine.backward(F.mse_loss(engine(x.to(dtype)).float(), y))
    report = engine.step()
    assert report is not None
    assert report.loss_scale == (65536.0 if dtype == torch.float16 else 1.0)


def test_auto_cast_casts_inputs() -> None:
    engine = start({"fp16": {"enabled": True, "auto_cast": True, "loss_scale": 8}})
    x, _ = rows(0, 0)
    assert engine(x).dtype == torch.float16
    assert engine.scaler is not None
    assert engine.scaler.value == 8


def test_overflow_skips_and_the_scheduler_stays() -> None:
    engine = start(
        {"fp16": {"enabled": True, "auto_cast": True, "hysteresis": 1}, "gradient_accumulation_steps": 1}
    )
    before = [p.detach().clone() for p in engine.parameters()]
    x, y = rows(0, 0)
    engine.backward(F.mse_loss(engine(x).float(), y) * 1e30)
    engine.step()
    assert not engine.was_step_applied()
    assert engine.lr_scheduler.last_batch_iteration == -1
    assert all(torch.equal(p, q) for p, q in zip(engine.parameters(), before, strict=True))
    assert engine.scaler is not None
    assert engine.scaler.value == 32768.0


def test_bf16_may_skip_what_is_not_finite() -> None:
    bf16 = {"enabled": True, "check_grad_overflow": True}
    engine = start({"bf16": bf16, "gradient_accumulation_steps": 1})
    x, y = rows(0, 0)
    engine.backward(F.mse_loss(engine(x.bfloat16()).float(), y) * torch.inf)
    engine.step()
    assert (engine.skipped_steps, engine.was_step_applied()) == (1, False)
    engine = start({"bf16": {"enabled": True}, "gradient_accumulation_steps": 1})
    engine.backward(F.mse_loss(engine(x.bfloat16()).float(), y) * torch.inf)
    with pytest.raises(ds_core.NonFiniteError, match="step 1"):
        engine.step()


def test_autocast() -> None:
    engine = start({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}})
    x, _ = rows(0, 0)
    assert engine(x).dtype == torch.bfloat16
    assert {p.dtype for p in engine.parameters()} == {torch.float32}


# -- reporting -----------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_loggers() -> Iterator[None]:
    yield
    for name in ("ds_core", "ds_zero"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.NOTSET)
        logger.handlers.clear()


@pytest.mark.usefixtures("quiet_loggers")
def test_progress_lines(caplog: pytest.LogCaptureFixture) -> None:
    engine = start({"steps_per_print": 2, "wall_clock_breakdown": True, "dump_state": True})
    assert "gradient_clipping = 0.5 (code): Engine(max_norm); 0 switches it off" in caplog.text
    train(engine, 5)
    lines = [record.message for record in caplog.records if record.message.startswith("step=")]
    assert [line.split(",")[0] for line in lines] == ["step=2", "step=4"]
    for part in ("skipped=0", "lr=[0.0", "loss=", "samples/s=", "forward=", "backward=", " ms"):
        assert part in lines[0]


@pytest.mark.usefixtures("quiet_loggers")
def test_progress_is_heard_without_any_logging_set_up(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, ds_core\n"
        "model = torch.nn.Linear(2, 1)\n"
        "engine, *_ = ds_core.initialize(model=model, config={'train_batch_size': 1, 'steps_per_print': 1,\n"
        "    'timers': {'throughput': {'enabled': False}},\n"
        "    'optimizer': {'type': 'SGD', 'params': {'lr': 0.1}}})\n"
        "engine.backward(engine(torch.ones(1, 2)).sum()); engine.step()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True
    )
    assert "step=1, skipped=0, lr=[0.1]" in done.stderr
    assert "samples/s" not in done.stderr
    assert done.stdout == ""


def test_monitors_become_sinks(tmp_path: Path) -> None:
    csv = {"enabled": True, "output_path": str(tmp_path / "out"), "job_name": "run"}
    engine = start({"csv_monitor": csv})
    train(engine, 2)
    text = (tmp_path / "out" / "run.csv").read_text()
    assert "loss" in text


@pytest.mark.usefixtures("quiet_loggers")
def test_other_switches() -> None:
    start({"log_level": "error"})
    assert logging.getLogger("ds_core").level == logging.ERROR
    assert gc.isenabled()
    try:
        start({"disable_python_gc": True})
        assert not gc.isenabled()
    finally:
        gc.enable()
    data = TensorDataset(torch.randn(20, 6))
    _, _, loader, _ = ds_core.initialize(
        model=tiny(), config={**FILE, "dataloader_drop_last": True}, training_data=data
    )
    assert loader is not None
    assert len(loader) == 4


# -- checkpoints ---------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    data = TensorDataset(*(torch.randn(40, n) for n in (6, 3)))
    straight = start(training_data=data)
    want = train(straight, 6)
    first = start(training_data=data)
    train(first, 3)
    list(zip(range(2), first.loader or (), strict=False))
    assert first.save_checkpoint(tmp_path, client_state={"epoch": 7})
    assert (tmp_path / "latest").read_text() == "global_step3"
    second = start(training_data=data)
    path, state = second.load_checkpoint(tmp_path)
    assert (path, state) == (str(tmp_path / "global_step3"), {"epoch": 7})
    assert second.global_steps == 3
    assert second.loader is not None
    assert second.loader.sampler.consumed == 8
    assert train(second, 3, 3) == want[3:]
    for one, other in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(one, other)


def test_load_less_than_everything(tmp_path: Path) -> None:
    first = start()
    train(first, 3)
    first.save_checkpoint(tmp_path, tag="mine", save_latest=False)
    second = start()
    second.load_checkpoint(tmp_path, "mine", load_module_only=True)
    assert second.global_steps == 0
    assert not second.optimizer.optimizer.state
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    third = start()
    third.load_checkpoint(tmp_path, "mine", load_optimizer_states=False, load_lr_scheduler_states=False)
    assert third.global_steps == 3
    assert third.lr_scheduler.last_batch_iteration == -1


def test_loading_what_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = start()
    assert engine.load_checkpoint(tmp_path) == (None, None)
    assert "nothing is loaded" in caplog.text
    engine.save_checkpoint(tmp_path, tag="there")
    with pytest.raises(LookupError, match=r"no complete checkpoint 'gone' in .*; tags there: there"):
        engine.load_checkpoint(tmp_path, tag="gone")
    with pytest.raises(ValueError, match="load_module_strict=False is not there"):
        engine.load_checkpoint(tmp_path, load_module_strict=False)
    with pytest.raises(ValueError, match="given tag 'a/b'; allowed: a plain name"):
        engine.save_checkpoint(tmp_path, tag="a/b")


@distributed(world_size=2)
def test_tags_must_agree(rank: int, tmp_path: Path) -> None:
    engine = start({"checkpoint": {"tag_validation": "Fail"}})
    with pytest.raises(ValueError, match=f"rank {rank} saves with tag 'tag{rank}', another rank"):
        engine.save_checkpoint(tmp_path, tag=f"tag{rank}")
    assert not any(tmp_path.iterdir())


def test_16bit_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    engine = start({"bf16": {"enabled": True}})
    assert engine.save_16bit_model(tmp_path / "new")
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert found.keys() == tiny().state_dict().keys()
    assert torch.equal(found["0.weight"], tiny()[0].weight.bfloat16())
    with pytest.raises(
        ValueError, match=r"given save_filename 'pytorch_model.bin'; allowed: a name that ends"
    ):
        engine.save_16bit_model(tmp_path, "pytorch_model.bin")


# -- bad input -----------------------------------------------------------------------------------------------


def test_where_the_config_may_come_from(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(FILE))
    encoded = base64.urlsafe_b64encode(json.dumps(FILE).encode()).decode()
    for options in ({"config": str(file)}, {"config_params": FILE}, {"config": encoded}):
        assert ds_core.initialize(model=tiny(), **options)[0].train_batch_size() == 8
    engine, *_ = ds_core.initialize(Namespace(deepspeed_config=str(file)), tiny())
    assert engine.train_batch_size() == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": FILE, "config_params": FILE}, "config given as config and as config_params; keep one"),
        ({}, "no config given; allowed: config, config_params, args.deepspeed_config"),
        ({"config": FILE, "model": None}, "no model given"),
        ({"config": {"train_batch_size": 4}}, "no optimizer given; allowed"),
        ({"config": FILE, "mpu": object()}, "given mpu; model parallelism needs ds-pipe"),
        ({"config": FILE, "mesh_param": (1, 2)}, r"given mesh_param \(1, 2\); allowed: \(data, 1\)"),
        ({"config": FILE, "optimizer": lambda params: 3}, "the optimizer is a int; it must be a torch.optim"),
        ({"config": FILE, "training_data": "ITERABLE"}, "without a length; give a map-style dataset"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    class Endless(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    if options.get("training_data") == "ITERABLE":
        options = {**options, "training_data": Endless()}
    with pytest.raises(ValueError, match=message):
        ds_core.initialize(**{"model": tiny(), **options})


def test_stages_need_ds_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "find", lambda kind, name: None)
    with pytest.raises(LookupError, match=r'no owner "zero"; .* comes with ds-zero \(pip install ds-zero\)'):
        start({"zero_optimization": {"stage": 2}})


def test_contradictory_batch_sizes_name_the_ranks() -> None:
    with pytest.raises(ConfigError, match=r"x 1 ranks \(derived: the ranks of this job\)"):
        start({"train_batch_size": 1000})


def test_more_tensor_than_memory_is_an_error_before_anything_is_touched() -> None:
    with torch.device("meta"):
        model = nn.Linear(1_000_000, 1_000_000)
    with pytest.raises(
        DoesNotFit, match=r"1,000,001,000,000 parameters in float32 at stage 0 on 1 ranks need"
    ):
        ds_core.initialize(model=model, config=FILE)
    assert model.weight.is_meta


def test_a_launched_job_must_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"dist_init_required=False, but torch.distributed is not initialised"
    ):
        ds_core.initialize(model=tiny(), config=FILE, dist_init_required=False)
