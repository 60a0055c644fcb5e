"""pytest test_all.py: properties with a known answer first, then every script from end to end on drawn clothes."""
import argparse
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import cosine_ddim
import fid
import karras
import no_t
import noise_pred
import unet

HERE = Path(__file__).parent
not_windows = pytest.mark.skipif(os.name == "nt", reason="needs what only Unix has")


# ---------------------------------------------------------------------------------------------- unet.py

def small_net():
    return unet.UNet(channels=(16, 32), layers=1)


def fill(model):
    """Weights that anyone can write down again: sines, scaled to keep activations near 1."""
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.state_dict().items())):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 0.7 + i).reshape(p.shape)
            norm = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.1 * wave if norm else wave / max(1, p[0].numel()) ** 0.5)
    return model


def test_unet_has_the_parameters_of_the_lectures_network():
    model = unet.UNet()
    assert sum(p.numel() for p in model.parameters()) == 15_890_753
    listing = "\n".join(f"{name} {tuple(p.shape)}" for name, p in sorted(model.state_dict().items()))
    # the same listing of diffusers 0.42.1's UNet2DModel has this digest
    assert hashlib.sha256(listing.encode()).hexdigest()[:16] == "1c72e9a670d905ca"


def test_unet_computes_what_the_lectures_network_computes():
    model = fill(small_net())
    x = torch.sin(torch.arange(2 * 32 * 32, dtype=torch.float64) * 0.3).float().reshape(2, 1, 32, 32)
    with torch.no_grad():
        out = model(x, torch.tensor([0.25, 7.0]))
    # what diffusers 0.42.1's UNet2DModel answers with the same weights, image and times
    expected = torch.tensor([[-0.349567, -1.825842, 0.187294, -0.895779], [-1.225213, -1.406186, 0.354300, -1.529226]])
    assert torch.allclose(out[:, 0, 5:21:5, 9], expected, atol=1e-4)


def test_unet_takes_one_time_for_all_and_starts_as_the_constant_zero():
    torch.manual_seed(0)
    model, x = small_net(), torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(x, 0.3), model(x, torch.full((3,), 0.3)), atol=1e-6)
        assert not torch.allclose(model(x, 0.3), model(x, 0.9), atol=1e-4)
        assert (unet.init_ddpm(model)(x, 0.3) == 0).all()
        for level in [*model.down_blocks, *model.up_blocks]:                 # and its blocks as their shortcuts
            for block in level.resnets:
                x, emb = torch.randn(2, block.conv1.in_channels, 4, 4), torch.randn(2, block.time_emb_proj.in_features)
                assert torch.equal(block(x, emb), (block.conv_shortcut or torch.nn.Identity())(x))
    w = model.down_blocks[0].downsamplers[0].conv.weight.flatten(1)
    assert torch.allclose(w @ w.T, torch.eye(16), atol=1e-5)


def test_weights_kept_in_half_precision_give_the_same():
    torch.manual_seed(0)
    model, again, x = small_net(), small_net(), torch.randn(3, 1, 32, 32)
    again.load_state_dict({name: weight.half() for name, weight in model.state_dict().items()}, strict=True)
    with torch.no_grad(): one, other = model(x, 0.3), again(x, 0.3)
    assert other.dtype == torch.float32 and 0 < (one - other).norm() < 1e-3 * one.norm()


def test_unet_answers_in_float32_where_it_computes_in_bfloat16():
    torch.manual_seed(0)
    model, x = small_net(), torch.randn(3, 1, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside, answer = model.conv_in(x), model(x, 0.3)
        estimate = karras.denoise_epsilon(model, x, 2.0)
    assert (inside.dtype, answer.dtype, estimate.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = small_net()
    model(torch.randn(2, 1, 32, 32), torch.rand(2)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_timestep_embedding():
    emb = unet.timestep_embedding(torch.tensor([0.0, 2.0]), 8)
    assert emb[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    frequencies = [1, 0.1, 0.01, 0.001]                                      # 10,000 to the powers 0, -1/4, -1/2, -3/4
    expected = [math.cos(2 * f) for f in frequencies] + [math.sin(2 * f) for f in frequencies]
    assert torch.allclose(emb[1], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("pixels, channels", [(16, 8), (64, 8), (256, 8), (256, 32)])
@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_attend_is_softmax_attention(vendor, pixels, channels, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(unet, "processor", lambda: vendor)
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 4, pixels, channels).to(dtype).requires_grad_()
    q, k, v = qkv
    expected = (q.float() @ k.float().transpose(-1, -2) / math.sqrt(channels)).softmax(-1) @ v.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = unet.attend(q, k, v)
    assert (found - expected).abs().max() < tolerance
    slope, expected_slope = (torch.autograd.grad(out.square().sum(), qkv)[0].float() for out in (found, expected))
    assert (slope - expected_slope).abs().max() < tolerance * expected_slope.abs().max()


@pytest.mark.parametrize("vendor, flags, units", [
    ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", True),
    ("GenuineIntel", "avx512f avx512_bf16", False),                        # there slower than float32
    ("AuthenticAMD", "avx512f avx512_bf16", True),
    ("AuthenticAMD", "avx2", False)])
def test_bfloat16_where_a_cpu_gains_by_it(vendor, flags, units, monkeypatch):
    monkeypatch.setattr(unet, "processor", lambda: f"vendor_id : {vendor}\nflags : fpu {flags}\n")
    assert unet.has_matrix_units.__wrapped__(torch.device("cpu")) == units
    assert not unet.has_matrix_units.__wrapped__(torch.device("mps"))


def test_bfloat16_where_the_gpu_that_was_asked_for_gains_by_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 5), (8, 0), (9, 0)][device.index])
    assert [unet.has_matrix_units.__wrapped__(torch.device("cuda", i)) for i in range(3)] == [False, True, True]


class Line(torch.nn.Module):
    """The smallest network: one weight."""
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.w * x


def test_fit_learns_and_labels_reach_noisify():
    images, labels = torch.randn(64, 1, 4, 4), torch.full((64,), 3.0)
    model = Line()
    record = unet.fit(model, lambda x, y: ((x,), x * y[:, None, None, None]), images, labels=labels, epochs=50,
                      batch_size=16, lr=0.2, amp=False)
    assert abs(model.w.item() - 3) < 0.01 and record["losses"][-1] < record["losses"][0] / 1000
    assert len(record["losses"]) == 200


def test_only_what_is_trained_in_mixed_precision_is_compiled(monkeypatch):
    asked = []
    monkeypatch.setattr(unet, "compiled", lambda model, device: asked.append(device.type) or model)
    for amp in (False, True):
        unet.fit(Line(), noisy, torch.randn(16, 1, 4, 4), epochs=1, batch_size=8, lr=0.1, amp=amp)
        assert asked == ["cpu"] * amp


def noisy(x):
    return (x,), 2 * x + torch.randn_like(x)


def test_a_clock_that_stands_still_or_is_set_back_does_no_harm(monkeypatch):
    ticks = itertools.count(1e9, -60)
    monkeypatch.setattr(unet.time, "time", lambda: next(ticks))
    record = unet.fit(Line(), noisy, torch.randn(8, 1, 4, 4), epochs=3, batch_size=8, lr=0.1)
    assert 0 < record["first_step"] <= record["seconds"] < 60


def interrupted_at(step):
    calls = []

    def noisify(x):
        calls.append(1)
        if len(calls) > step: raise KeyboardInterrupt
        return noisy(x)
    return noisify


@pytest.mark.parametrize("step", [1, 4, 7, 12, 15])
def test_a_broken_off_training_ends_with_the_weights_of_an_unbroken_one(tmp_path, monkeypatch, step):
    images, recipe = torch.randn(32, 1, 4, 4), dict(epochs=4, batch_size=8, lr=0.1)
    unet.fit(whole := Line(), noisy, images, **recipe)
    monkeypatch.setattr(unet, "SAVE_EVERY", -1)                              # a checkpoint after every step
    with pytest.raises(KeyboardInterrupt, match=f"stopped at step {step} of 16.*continues from"):
        unet.fit(Line(), interrupted_at(step), images, path=tmp_path / "n.pt", **recipe)
    resumed, began = Line(), lambda name: torch.load(tmp_path / name, weights_only=True)["began"]
    before = began("n.part")
    record = unet.fit(resumed, noisy, images, path=tmp_path / "n.pt", **recipe)
    assert record["first_step"] > 0 and began("n.pt") == before and 0 < record["seconds"] < 60
    assert torch.equal(resumed.w, whole.w) and (record["losses"] > 0).all()
    assert [p.name for p in tmp_path.iterdir()] == ["n.pt"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_training_continues_where_weights_are_laid_out_otherwise(tmp_path, monkeypatch, layout):
    # as on another kind of CPU, or a GPU: fused Adam takes numbers in the order in which they lie in memory
    images, recipe, path = torch.randn(32, 1, 8, 8), dict(epochs=4, batch_size=8, lr=0.1), tmp_path / "n.pt"

    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1))
    unet.fit(whole := network(), noisy, images, **recipe)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unet, "SAVE_EVERY", -1)
        unet.fit(network(), interrupted_at(7), images, path=path, **recipe)
    part = torch.load(tmp_path / "n.part", weights_only=True)
    for name, moments in [(n, m) for m in part["optimizer"]["state"].values() for n in m if m[n].ndim == 4]:
        moments[name] = moments[name].contiguous(memory_format=layout)
    unet.save_atomically(part, tmp_path / "n.part")
    unet.fit(resumed := network(), noisy, images, path=path, **recipe)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_a_training_with_another_optimiser_continues_too(tmp_path, monkeypatch):
    images, path = torch.randn(32, 1, 4, 4), tmp_path / "n.pt"
    recipe = dict(epochs=4, batch_size=8, lr=0.1, optimizer=functools.partial(torch.optim.SGD, momentum=0.9))
    unet.fit(whole := Line(), noisy, images, **recipe)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unet, "SAVE_EVERY", -1)
        unet.fit(Line(), interrupted_at(7), images, path=path, **recipe)
    unet.fit(resumed := Line(), noisy, images, path=path, **recipe)
    assert torch.equal(whole.w, resumed.w) and whole.w != 0


def test_a_finished_network_is_used_and_retrain_keeps_it_until_the_new_one_is_complete(tmp_path):
    images, recipe = torch.randn(32, 1, 4, 4), dict(epochs=2, batch_size=8, lr=0.1, path=tmp_path / "n.pt")
    unet.fit(first := Line(), noisy, images, **recipe)
    unet.fit(again := Line(), interrupted_at(0), images, **recipe)           # would be interrupted if it trained
    assert torch.equal(first.w, again.w)
    kept = (tmp_path / "n.pt").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        unet.fit(Line(), interrupted_at(3), images, retrain=True, **recipe)
    assert (tmp_path / "n.pt").read_bytes() == kept
    unet.fit(Line(), lambda x: ((x,), -x), images, retrain=True, **recipe)
    unet.fit(other := Line(), noisy, images, **recipe)
    assert other.w < 0


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def test_damaged_and_foreign_checkpoints_are_refused_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, path = torch.randn(32, 1, 4, 4), tmp_path / "n.pt"
    recipe = dict(epochs=1, batch_size=8, lr=0.1, path=path, settings={"channels": (1, 2)})
    unet.fit(Line(), noisy, images, **recipe)
    good = path.read_bytes()
    at = good.index(torch.load(path, weights_only=True)["model"]["w"].numpy().tobytes())
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1:]
    torch.save({"settings": {"channels": [1, 2]}, "model": Exploit()}, tmp_path / "exploit")
    torch.save({"settings": {"channels": [1, 2]}, "model": {}}, tmp_path / "incomplete")
    torch.save(torch.zeros(3), tmp_path / "foreign")
    for bad in (flipped, good[:len(good) // 2], b"", b"hello", pickle.dumps(Exploit()),
                *((tmp_path / name).read_bytes() for name in ("exploit", "incomplete", "foreign"))):
        path.write_bytes(bad)
        with pytest.raises(unet.Problem, match=r"n\.pt is damaged or not a checkpoint.*delete it"):
            unet.fit(Line(), noisy, images, **recipe)
        assert path.read_bytes() == bad
    assert not (tmp_path / "exploited").exists()
    path.write_bytes(good)

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))
    with monkeypatch.context() as patch:                                     # sound for all we know: not to be deleted
        patch.setattr(zipfile, "ZipFile", forbidden)
        with pytest.raises(PermissionError): unet.fit(Line(), noisy, images, **recipe)
    with pytest.raises(unet.Problem, match=r"other settings \(channels \[1, 2\], not \[3\]\)"):
        unet.fit(Line(), noisy, images, **recipe | dict(settings={"channels": (3,)}))
    with pytest.raises(unet.Problem, match=r"does not fit this network \(.*conv.* if you changed the network take "):
        unet.fit(small_net(), noisy, images, **recipe)


def test_a_size_without_a_recipe_is_refused():
    with pytest.raises(unet.Problem, match="--size own has no recipe: add one to RECIPE in no_t.py"):
        unet.train(argparse.Namespace(size="own"), "no_t", no_t.RECIPE, None, None)


def test_a_training_of_one_step_is_refused():
    """Its rate would be where the one-cycle schedule begins and ends, next to nothing."""
    with pytest.raises(unet.Problem, match="one step of 32 images is no training.*--batch-size.*--epochs"):
        unet.fit(Line(), noisy, torch.randn(32, 1, 4, 4), epochs=1, batch_size=64, lr=0.1)


def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path):
    calls = []

    def noisify(x):
        calls.append(1)
        return (x,), x * (math.nan if len(calls) == 3 else 1)
    with pytest.raises(unet.Problem, match="nan at step 3 of 4.*--lr"):
        unet.fit(Line(), noisify, torch.randn(32, 1, 4, 4), epochs=1, batch_size=8, lr=0.1, path=tmp_path / "n.pt")
    assert not list(tmp_path.iterdir())


def test_generate_starts_from_the_same_noise_in_any_batches():
    cpu = torch.device("cpu")
    whole, seconds = unet.generate(lambda noise: noise, 20, 3, cpu, batch=20)
    assert torch.equal(whole, unet.generate(lambda noise: noise, 20, 3, cpu, batch=8)[0])
    assert not torch.equal(whole, unet.generate(lambda noise: noise, 20, 4, cpu)[0])
    assert abs(whole.std() - 1) < 0.03 and seconds > 0
    drawn = [unet.generate(lambda noise: torch.randn_like(noise), 4, 3, cpu)[0] for _ in range(2)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], whole[:4])      # a sampler's own noise is other noise
    assert not torch.equal(drawn[0], unet.generate(lambda noise: torch.randn_like(noise), 4, 4, cpu)[0])


def test_a_script_ends_with_one_line_and_a_status(capsys):
    def ends(error):
        def main(argv=None): raise error
        with pytest.raises(SystemExit) as stop: unet.script(main)()
        return stop.value.code, capsys.readouterr().err
    assert ends(KeyboardInterrupt()) == (130, "\ntest_all.py: stopped; the same command goes on from what is saved\n")
    assert ends(KeyboardInterrupt("stopped at 3")) == (130, "\ntest_all.py: stopped at 3\n")
    assert ends(unet.Problem("no such thing")) == (2, "test_all.py: error: no such thing\n")
    assert ends(PermissionError(13, "Permission denied", "x/y")) == (2, "test_all.py: error: x/y: Permission denied\n")
    status, line = ends(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\na lot"))
    assert status == 2 and line.count("\n") == 1 and "memory" in line and "--size small" in line
    with pytest.raises(ZeroDivisionError): unet.script(lambda argv: 1 / 0)()   # a defect of ours keeps its traceback


def test_steps_draw_from_seeds_of_their_own():
    assert len({unet.step_seed(seed, step) for seed in range(4) for step in range(2000)}) > 7990
    assert unet.step_seed(0, 1) != unet.step_seed(1, 0)


def test_a_seed_settles_the_start_the_order_and_the_noise_and_the_loss_is_of_the_last_100_steps(tmp_path, monkeypatch):
    images, seen, losses, fit = torch.arange(32.0).reshape(32, 1, 1, 1).expand(-1, 1, 8, 8), {}, {}, unet.fit

    def train(seed):
        args = argparse.Namespace(size="tiny", epochs=50, batch_size=8, lr=0.1, data="drawn", seed=seed, retrain=False,
                                  out_dir=tmp_path / str(seed), device=torch.device("cpu"))
        seen[seed] = start, order, noise = [], [], []

        def question(x0):
            order.extend(x0[:, 0, 0, 0].tolist())
            noise.append(torch.randn(1).item())
            return (x0,), x0
        build = lambda: start.append(torch.randn(1).item()) or Line()
        recipe = {"tiny": dict(epochs=1, batch_size=2, lr=1.0)}
        return unet.train(args, "a lesson", recipe, question, images, build=build, amp=False)[1]
    monkeypatch.setattr(unet, "fit", lambda *how, **more: losses.update(now=fit(*how, **more)) or losses["now"])
    origins = [train(seed) for seed in (0, 1)]
    for one, other in zip(seen[0], seen[1]): assert one != other
    start, order, noise = seen[0]
    assert len(set(noise)) == 200 and not set(noise) & {*start, *seen[1][2]}
    assert order[:32] != order[32:64] and sorted(order[:32]) == sorted(order[32:64]) == list(range(32))
    assert origins[1]["loss"] == pytest.approx(losses["now"]["losses"][-100:].mean().item())
    assert len(losses["now"]["losses"]) == 200 and losses["now"]["losses"][:100].mean() > 2 * origins[1]["loss"]


def test_adam_runs_under_a_one_cycle_rate(monkeypatch):
    seen, step = [], torch.optim.Adam.step

    def listen(self, *how):
        seen.extend((group["lr"], *group["betas"], group["eps"]) for group in self.param_groups)
        return step(self, *how)
    monkeypatch.setattr(torch.optim.Adam, "step", listen)
    unet.fit(Line(), noisy, torch.randn(400, 1, 8, 8), epochs=1, batch_size=4, lr=0.02, amp=False)
    rates, momentum, *others = np.array(seen).T
    assert len(seen) == 100 and rates.argmax() == momentum.argmin() == 29    # 30 of the 100 steps climb
    assert np.allclose([rates[0], rates[29], rates[-1]], [0.02 / 25, 0.02, 0.02 / 25e4], rtol=1e-6)
    assert np.allclose(momentum[[0, 29, -1]], [0.95, 0.85, 0.95], atol=1e-6) and np.diff(rates[29:]).max() < 0
    assert np.allclose(others, np.array([[0.999], [1e-5]]), rtol=1e-9, atol=0)


# ---------------------------------------------------------------------------------------------- fid.py

def test_frechet_distance_of_gaussians_with_known_answer():
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    sd1, sd2, mu1, mu2 = rng.uniform(0.5, 2, 5), rng.uniform(0.5, 2, 5), rng.normal(size=5), rng.normal(size=5)
    cov1, cov2 = turn @ np.diag(sd1 ** 2) @ turn.T, turn @ np.diag(sd2 ** 2) @ turn.T
    expected = ((mu1 - mu2) ** 2).sum() + ((sd1 - sd2) ** 2).sum()
    assert fid.frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(mu2, cov2, mu1, cov1) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(mu1, cov1, mu1, cov1) == pytest.approx(0, abs=1e-9)
    a, b = np.array([[2.0, 1], [1, 3]]), np.array([[1.0, -0.5], [-0.5, 2]])   # these two do not commute; for 2x2
    product = a @ b                                                          # (tr sqrt M)^2 = tr M + 2 sqrt det M
    root_trace = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = np.trace(a) + np.trace(b) - 2 * root_trace
    assert fid.frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, rel=1e-9)


def test_statistics():
    features = np.random.default_rng(0).normal(3, 1, size=(3000, 5)).astype(np.float32)
    mean, cov = fid.statistics(torch.from_numpy(features))
    assert np.allclose(mean, features.mean(0, dtype=np.float64)) and mean.dtype == cov.dtype == np.float64
    off = features.astype(np.float64) - mean
    assert np.allclose(cov, off.T @ off / 2999, rtol=1e-10)


def test_frechet_distance_with_fewer_samples_than_features():
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=(10, 64)), rng.normal(size=(2000, 64))
    value = fid.frechet_distance(*fid.statistics(few), *fid.statistics(many))
    assert isinstance(value, float) and math.isfinite(value) and value > 1
    assert fid.frechet_distance(*fid.statistics(few), *fid.statistics(few)) == pytest.approx(0, abs=1e-6)
    same = np.ones((10, 64))
    assert math.isfinite(fid.frechet_distance(*fid.statistics(same), *fid.statistics(many)))


def test_kernel_distance():
    x, y = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.arange(15.).reshape(5, 3) / 10
    k = lambda a, b: float((a @ b / 3 + 1) ** 3)
    y = torch.cat([y, -y[:2]])                                               # 7 and 7: one subset is all of them
    expected = (sum(k(x[i], x[j]) + k(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
                - 2 * sum(k(a, b) for a in x for b in y) / 49)
    assert fid.kernel_distance(x, y) == pytest.approx(expected, rel=1e-6)
    features = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1))
    halves = fid.kernel_distance(features[:2000], features[2000:])
    assert abs(halves) < 0.005 and halves == fid.kernel_distance(features[:2000], features[2000:], 100, 1000)
    assert fid.kernel_distance(features[:2000], features[2000:] + 0.5) > 0.1
    sorted_ones = torch.cat([torch.zeros(1000, 4), torch.ones(1000, 4)])     # subsets are not the first of either side
    assert abs(fid.kernel_distance(sorted_ones, sorted_ones.flip(0), subsets=20)) < 0.1


def test_residual_noise_is_that_of_the_border_alone():
    images = torch.full((4, 1, 32, 32), -1.0)
    images[:, :, 2:-2, 2:-2] = torch.rand(4, 1, 28, 28)
    assert fid.residual_noise(images) == 0
    noise = 0.1 * torch.randn(400, 1, 32, 32)
    assert fid.residual_noise(noise) == pytest.approx(0.1, rel=0.01)
    images[:, :, 1:-1, 1:-1] = 1                                           # the inner ring of the border is 116 of 240
    share = 116 / 240
    assert fid.residual_noise(images) == pytest.approx(2 * math.sqrt(share * (1 - share)), rel=0.01)


def test_drawn_clothes():
    images, labels = fid.fashion_mnist(data="drawn", count=200)
    assert images.shape == (200, 1, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() == -1 and 0.5 < images.max() <= 1 and set(labels.tolist()) == set(range(10))
    assert fid.residual_noise(images) == 0
    fewer, _ = fid.fashion_mnist(data="drawn", count=20)
    test, _ = fid.fashion_mnist(data="drawn", train=False, count=20)
    assert torch.equal(fewer, images[:20]) and not torch.equal(fewer, test)
    assert len(images.flatten(1).unique(dim=0)) == 200                       # no two alike


def test_without_the_data_set(monkeypatch, capsys, tmp_path):
    def refuse(*args, **kwargs):
        raise RuntimeError("Error downloading")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", refuse)
    assert fid.find_data("auto", tmp_path) == "drawn" and "drawn clothes" in capsys.readouterr().out
    with pytest.raises(unet.Problem, match="cannot be downloaded"):
        fid.find_data("fashion", tmp_path)


def test_a_damaged_data_file_is_named_and_left_alone(monkeypatch, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in fid.FILES: (raw / name).write_bytes(b"not what it says")      # torchvision looks at names only
    with pytest.raises(unet.Problem, match="train-images-idx3-ubyte is damaged: delete it"):
        fid.find_data("auto", tmp_path)
    assert (raw / "train-images-idx3-ubyte").read_bytes() == b"not what it says"


@pytest.mark.parametrize("fault", [RuntimeError("File not found or corrupted."), KeyboardInterrupt()])
def test_a_download_that_breaks_off_leaves_nothing_half_done(monkeypatch, tmp_path, fault):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources",
                        [(f"{name}.gz", hashlib.md5(b"whole").hexdigest()) for name in fid.FILES])

    def break_off(*args, **kwargs):
        (raw / "train-images-idx3-ubyte.gz").write_bytes(b"whole")
        (raw / "train-images-idx3-ubyte").write_bytes(b"half unpack")
        (raw / "train-labels-idx1-ubyte.gz").write_bytes(b"who")
        raise fault
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "__init__", break_off)
    for _ in range(2):                                                       # the second time as the first
        if isinstance(fault, RuntimeError): assert fid.find_data("auto", tmp_path) == "drawn"
        else: pytest.raises(KeyboardInterrupt, fid.find_data, "auto", tmp_path)
        assert [path.name for path in raw.iterdir()] == ["train-images-idx3-ubyte.gz"]


def test_a_packed_file_matters_only_where_it_is_to_be_unpacked(monkeypatch, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    monkeypatch.setattr(fid, "FILES", dict.fromkeys(fid.FILES, hashlib.md5(b"whole").hexdigest()))
    for name in fid.FILES: (raw / name).write_bytes(b"whole")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "__init__", lambda *args, **how: None)       # reads nothing
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(b"cut off")
    assert fid.find_data("fashion", tmp_path) == "fashion"
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(unet.Problem, match="t10k-labels-idx1-ubyte.gz is damaged: delete it"):
        fid.find_data("auto", tmp_path)


def test_the_pinned_classifier():
    assert fid.WEIGHTS.stat().st_size < 10_000_000
    model, record = fid.load_classifier("cpu")
    assert record["accuracy"] >= 0.93 and record["settings"]["seed"] == 0
    assert all(v.dtype == torch.float16 for k, v in record["model"].items() if v.is_floating_point())
    images, labels = fid.fashion_mnist(data="drawn", count=300)
    seen = fid.run(model, images).argmax(1)
    for name in ("Trouser", "Bag"):                                          # even drawn ones it knows
        assert (seen[labels == fid.CLASSES.index(name)] == fid.CLASSES.index(name)).float().mean() > 0.5


def test_the_classifier_learns_from_shifted_and_mirrored_images_and_is_judged_by_test_images(tmp_path, monkeypatch):
    (images, labels), others = fid.draw_clothes(300, 1), fid.fashion_mnist(data="drawn", count=200)
    images = torch.nn.functional.pad(images[:, None] / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    monkeypatch.setattr(fid, "fashion_mnist", lambda data_dir, train, data: (images, labels) if train else others)
    monkeypatch.setattr(fid, "WEIGHTS", tmp_path / "weights" / "fid.pt")
    right = torch.full((200,), 0.9) > torch.linspace(0, 1, 200)              # 180 of 200 guesses

    def fit(model, augment, x, *, labels, loss, optimizer, **more):
        assert x.equal(images) and more.get("amp", True) and more["retrain"] and optimizer is torch.optim.AdamW
        sure = torch.full((1, 10), 0.1 / 10).index_fill(1, torch.tensor([3]), 0.9 + 0.1 / 10).log()
        assert loss(sure, torch.tensor([3])).item() == pytest.approx(-(sure.exp() * sure).sum().item(), rel=1e-5)
        (made,), same = augment(x, labels)
        moved = torch.stack([torch.roll(flipped, (down, across), (2, 3)) for flipped in (x, x.flip(3))
                             for down in range(-2, 3) for across in range(-2, 3)])
        found = (made == moved).all(dim=(2, 3, 4))                           # (50 ways, images)
        assert same is labels and found.any(0).all() and found.any(1).all()
        assert 0.3 < (found[:25].any(0) & ~found[25:].any(0)).float().mean() < 0.6
        return {"seconds": 1.0, "device": "none"}

    def judge(model, x):
        assert x.equal(others[0]) and all(p.eq(p.half()).all() for p in model.parameters())
        return torch.nn.functional.one_hot(torch.where(right, others[1], (others[1] + 1) % 10), 10)
    monkeypatch.setattr(fid, "fit", fit)
    monkeypatch.setattr(fid, "run", judge)
    retrain = ["--retrain", "--size", "small", "--data", "fashion", "--out-dir", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(fid, "find_data", lambda *how: "fashion")
    with pytest.raises(SystemExit): fid.main(retrain)                        # 90% are not enough
    assert not fid.WEIGHTS.exists()
    right[:] = torch.arange(200) < 190
    fid.main(retrain)
    assert fid.load_classifier("cpu")[1]["accuracy"] == pytest.approx(0.95)


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    return fid.ImageEval("drawn", samples=64, cache=tmp_path_factory.mktemp("cache"), count=256)


def test_images_are_judged_as_they_are_seen(evaluate):
    images = 3 * torch.randn(4, 1, 32, 32)
    for judge in (evaluate.features, fid.residual_noise):
        assert torch.equal(*(torch.as_tensor(judge(x)) for x in (images, images.clamp(-1, 1))))


def test_image_eval(evaluate, tmp_path):
    test, _ = fid.fashion_mnist(data="drawn", train=False, count=256)
    assert evaluate.fid(test) == pytest.approx(0, abs=1e-6)
    train, _ = fid.fashion_mnist(data="drawn", count=64)
    noisy = train + 0.3 * torch.randn_like(train)
    assert abs(evaluate.fid(train) - evaluate.floor) < 5 * evaluate.floor_sd
    assert evaluate.fid(noisy) > 2 * evaluate.fid(train) and evaluate.kid(noisy) > evaluate.kid(train)
    random = np.random.default_rng(0)                                        # the floor, drawn one by one
    train, _ = fid.fashion_mnist(data="drawn", count=256)
    draws = [evaluate.fid(train[torch.from_numpy(random.choice(256, 64, replace=False))]) for _ in range(20)]
    freely = np.std(draws, ddof=1) / (1 - 64 / 256) ** 0.5                   # had no two draws an image in common
    assert (evaluate.floor, evaluate.floor_sd) == pytest.approx((np.mean(draws), freely))
    same = train[:1].expand(64, -1, -1, -1)
    score = evaluate.score(same)
    assert math.isfinite(score["fid"]) and math.isfinite(score["kid"]) and sum(score["classes"]) == 64
    assert max(score["classes"]) == 64 and "drawn clothes" in fid.describe(score)


def test_image_eval_refuses_what_no_score_should_be_made_of(evaluate, tmp_path):
    images = torch.zeros(4, 1, 32, 32)
    for bad, why in ((images * math.nan, "NaN"), (images[:1], "two images"), (images[..., :28], "32, 32"),
                     (images[:, 0], "32, 32"), (images.expand(-1, 3, -1, -1), "32, 32"), (images.byte(), "uint8")):
        with pytest.raises(unet.Problem, match=why): evaluate.fid(bad)
        with pytest.raises(unet.Problem, match=why): evaluate.kid(bad)
    with pytest.raises(unet.Problem, match="4 images have another floor than 64"): evaluate.score(images)
    for samples in 1, 8:
        with pytest.raises(unet.Problem, match=f"{samples} images cannot be compared"):
            fid.ImageEval("drawn", samples=samples, cache=tmp_path, count=8)


def test_reals_are_measured_once_and_a_damaged_cache_is_named(tmp_path, monkeypatch):
    first = fid.ImageEval("drawn", samples=8, cache=tmp_path, count=32)
    monkeypatch.setattr(fid.ImageEval, "measure_reals", None)                # not to be called again
    again = fid.ImageEval("drawn", samples=8, cache=tmp_path, count=32)
    assert (again.floor, again.floor_sd) == (first.floor, first.floor_sd) and torch.equal(again.real, first.real)
    with monkeypatch.context() as patch:                                     # fid.py was changed: seen by other code,
        patch.setattr(fid, "CODE", "another")                                # real images may have other features
        patch.setattr(fid.ImageEval, "measure_reals", lambda *how: dict(real=first.real, floor=3.0, floor_sd=1.0))
        for _ in range(2): assert fid.ImageEval("drawn", samples=8, cache=tmp_path, count=32).floor == 3
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(unet.Problem, match=f"{path.name} is damaged"):
        fid.ImageEval("drawn", samples=8, cache=tmp_path, count=32)


def test_a_score_outlives_a_picture_that_cannot_be_saved(tmp_path, evaluate):
    images = fid.fashion_mnist(data="drawn", count=64)[0]
    record = {"what": "lms", "seed": 0, "sample_seconds": 1.0, **evaluate.score(images)}
    with pytest.raises(OSError): fid.report("no/such/folder", record, images, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == [record]


def test_each_row_of_a_comparison_has_its_own_figure_of_the_lecture(tmp_path, capsys, evaluate):
    score = evaluate.score(fid.fashion_mnist(data="drawn", count=64)[0]) | {"evaluations": 7}
    fid.comparison([score | {"n": "a"}, score | {"n": "b"}], lambda r: r["n"], {"a": "1.98", "c": "3"}, tmp_path)
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()[:3]]
    assert head == "evaluations FID x floor lecture KID residual noise".split()      # and no solver error
    assert all(row[1] == "7" and row[5:] == [f"{score['kid']:.4f}", f"{score['border']:.4f}"] for row in rows)
    assert [[row[0], *row[3:5]] for row in rows] == [
        [name, f"{score['fid'] / score['floor']:.1f}", figure] for name, figure in (("a", "1.98"), ("b", "-"))]


def test_results_replace_those_of_the_same_settings_only(tmp_path):
    one = {"what": "lms", "steps": 20, "seed": 0, "fid": 5.0}
    fid.save_results(tmp_path, [one])
    fid.save_results(tmp_path, [one | {"fid": 4.0}, one | {"steps": 10}])
    assert json.loads((tmp_path / "results.json").read_text()) == [one | {"fid": 4.0}, one | {"steps": 10}]
    other = one | {"classifier": "another"}                                  # another judge's score is another result
    fid.save_results(tmp_path, [other])
    assert len(json.loads((tmp_path / "results.json").read_text())) == 3
    for key in "eta churn rho spacing clip rescue network weights predictor size samples seed data device".split():
        fid.save_results(tmp_path, [one | {key: "another"}])
    assert len(json.loads((tmp_path / "results.json").read_text())) == 3 + 14
    (tmp_path / "results.json").write_text("[{")
    with pytest.raises(unet.Problem, match="results.json"): fid.save_results(tmp_path, [one])


def test_pictures():
    images = torch.linspace(-1, 1, 3)[:, None, None, None].expand(-1, -1, 32, 32)
    pixels = np.asarray(fid.grid(images, ["a", "b", "c"], columns=2, zoom=2))
    assert [int(pixels[y, x, 0]) for x, y in ((30, 30), (100, 30), (30, 110))] == [0, 128, 255]
    titled = np.asarray(fid.grid(images, columns=1, title="a title wider than one garment"))
    assert pixels.shape[1] == 140 < titled.shape[1]                        # a title is not cut off
    assert (titled[:, -4:] == 255).all() and (titled[:20, 100:] < 100).any()
    chart = np.asarray(fid.plot([("up", [1, 2, 3], [1, 10, 100], "line"), ("at", [2], [50], "points"),
                                 ("n", [1, 2, 3], [3, 2, 1], "bars")], "t", "x", "y", log_y=True))
    assert {tuple(c) for c in chart.reshape(-1, 3)} >= set(fid.COLOURS[:2])
    chart = np.asarray(fid.plot([("none", [1, 2], [0, 0], "line"), ("one", [1, 2], [1, 1], "line")], "", "x", "y"))
    assert (chart[355] == fid.COLOURS[0]).all(-1).sum() > 500              # from 0 on, a chart stands on its axis
    empty = np.asarray(fid.plot([("none", [1, 2], [math.nan, math.nan], "points")], "", "x", "y", log_y=True))
    assert not (empty == fid.INK).all(-1)[40:350, 70:600].any()            # but for its frame and names
    assert fid.ticks(0, 10, False) == [(n, f"{n}") for n in (0, 2, 4, 6, 8, 10)]
    assert fid.ticks(-0.5, 5, False) == [(n, f"{n}") for n in range(6)]       # not -0
    assert fid.ticks(-2, math.log10(90), True) == [(-2, "0.01"), (-1, "0.1"), (0, "1"), (1, "10")]
    few = fid.ticks(math.log10(0.0126), math.log10(0.0181), True)           # no 1, 2 or 5 in there
    assert [text for _, text in few] == ["0.013", "0.014", "0.015", "0.016", "0.017", "0.018"]
    assert few[0][0] == pytest.approx(math.log10(0.013))
    assert fid.scaled([0.01, 0, -1, 100], True)[[0, 3]].tolist() == [-2, 2]
    assert np.isnan(fid.scaled([0.01, 0, -1, math.inf], True)).tolist() == [False, True, True, True]


# ---------------------------------------------------------------------------------------------- karras.py

SIGMAS = torch.tensor([0.002, 0.1, 0.33, 1.0, 7.0, 80.0])


@pytest.mark.parametrize("sig_data", [0.33, 0.5, 1.0])
def test_scalings_give_unit_variance_whatever_the_noise(sig_data):
    c_skip, c_out, c_in = karras.scalings(SIGMAS, sig_data)
    assert torch.allclose(c_in ** 2 * (SIGMAS ** 2 + sig_data ** 2), torch.ones(6))
    rest = (1 - c_skip) ** 2 * sig_data ** 2 + c_skip ** 2 * SIGMAS ** 2       # variance of y - c_skip (y + n)
    assert torch.allclose(rest / c_out ** 2, torch.ones(6), rtol=1e-4)
    for nearby in (c_skip * 0.9, c_skip * 1.1):                              # and no other c_skip leaves less to do
        assert ((1 - nearby) ** 2 * sig_data ** 2 + nearby ** 2 * SIGMAS ** 2 > rest).all()


@pytest.mark.parametrize("how", [{}, {"sig_data": 0.5}, {"log_sigma": True}, {"centre": -0.28}])
def test_noisify_and_denoise_undo_each_other(how):
    torch.manual_seed(0)
    x0 = torch.rand(6, 1, 8, 8) - 0.5
    (inputs, told), target = karras.noisify(x0, sig=SIGMAS, **how)
    c_in = karras.scalings(SIGMAS, how.get("sig_data", 0.33))[2][:, None, None, None]
    x = inputs / c_in + how.get("centre", 0)
    restored = karras.denoise(lambda given, s: target, x, SIGMAS, **how)
    assert torch.allclose(restored, x0, atol=1e-4)
    one = karras.denoise(lambda given, s: target[3:4], x[3:4], 1.0, **how)    # one level for the whole batch
    assert torch.allclose(one, x0[3:4], atol=1e-5)
    seen = []
    karras.denoise(lambda given, s: seen.append((given, s)) or target, x, SIGMAS, **how)
    assert torch.allclose(seen[0][0], inputs, atol=1e-5) and torch.equal(seen[0][1], told)
    assert torch.equal(told, SIGMAS.log() / 4 if "log_sigma" in how else SIGMAS)


def test_without_their_mean_inputs_and_targets_have_mean_0():
    torch.manual_seed(0)
    (inputs, _), target = karras.noisify(0.33 * torch.randn(20_000, 1, 4, 4) - 0.28, centre=-0.28)
    assert inputs.mean().abs() < 0.01 and target.mean().abs() < 0.01


def test_the_true_deviation_gives_unit_inputs_and_targets_on_the_screen(capsys):
    torch.manual_seed(0)
    karras.show_scale(0.66 * torch.randn(4096, 1, 8, 8), 0.25, 0)
    first, _, *rows, _ = capsys.readouterr().out.splitlines()
    assert "0.66" in first and first.endswith("it is 0.1650")
    rows = {(row.split()[0], float(row.split()[1])): [float(sd) for sd in row.split()[2:]] for row in rows}
    for true in (("-0.5..0.5", 0.33), ("-1..1", 0.66)): assert rows[true] == pytest.approx([1, 1], abs=0.01)
    assert rows["-1..1", 0.33][1] > 1.4 and rows["-0.5..0.5", 0.66][1] < 0.9


def test_inputs_and_targets_of_gaussian_data_have_unit_deviation():
    torch.manual_seed(0)
    (inputs, _), target = karras.noisify(0.33 * torch.randn(20_000, 1, 4, 4))
    assert inputs.std() == pytest.approx(1, abs=0.01) and target.std() == pytest.approx(1, abs=0.01)


def test_with_sig_data_1_the_target_is_minus_v():
    torch.manual_seed(0)
    x0 = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    _, target = karras.noisify(x0, 1.0, SIGMAS.double())
    torch.manual_seed(1)
    noise, sig = torch.randn_like(x0), SIGMAS.double()[:, None, None, None]
    alpha, sigma = 1 / (1 + sig ** 2) ** 0.5, sig / (1 + sig ** 2) ** 0.5      # v = alpha * noise - sigma * x0
    assert torch.allclose(target, -(alpha * noise - sigma * x0), atol=1e-9)


def test_the_sigmas_of_training():
    torch.manual_seed(0)
    sigmas = karras.draw_sigmas(200_000)
    assert sigmas.median().item() == pytest.approx(math.exp(-1.2), rel=0.02)
    assert (sigmas > 1).float().mean().item() == pytest.approx(0.1587, abs=0.004)


def test_sigmas_karras():
    sigs = karras.sigmas_karras(10)
    assert len(sigs) == 11 and sigs[0] == 80 and sigs[-2].item() == pytest.approx(0.01) and sigs[-1] == 0
    assert (sigs[:-1] > sigs[1:]).all()
    steps = (sigs[:-1].double() ** (1 / 7)).diff()
    assert torch.allclose(steps, steps[0].expand(9), rtol=1e-4)              # even in the 7th root
    assert torch.allclose(karras.sigmas_karras(3, 1, 5, rho=1), torch.tensor([5.0, 3.0, 1.0, 0.0]))
    assert karras.sigmas_karras(1).tolist() == [80, 0]
    sigs = karras.sigmas_karras(20)
    assert 0.73 < sigs[1] / sigs[0] < 0.77 and sigs[-2] / sigs[-3] < 0.5     # as its docstring has it


def test_karras_gives_more_evaluations_to_high_noise_than_lesson_1_does():
    def high(ts):
        a = cosine_ddim.abar(ts[:-1].double())
        sig = ((1 - a) / a).sqrt()
        return int((sig > 5).sum()), int(((sig > 1) & (sig <= 5)).sum())
    levels = karras.sigmas_karras(20)
    even, late = (high(cosine_ddim.timesteps(20, spacing)) for spacing in ("uniform", "late"))
    assert said_in_the_readme(f"{(levels > 5).sum()} of its 20 levels are above 5, of lesson 1's even times {even[0]}, "
                              f"of its late ones {late[0]}.")
    between = ((levels > 1) & (levels <= 5)).sum()
    assert said_in_the_readme(f"it gives {between}, lesson 1 gives {even[1]} and {late[1]}.")


# Where the data is a Gaussian of deviation S the best denoiser is known, D(x; sigma) = x S^2 / (S^2 + sigma^2), and so
# is the path: x(sigma) proportional to sqrt(S^2 + sigma^2). A sampler's error can be measured without any network.
S = 0.5


def gaussian(x, sig):
    return x * S ** 2 / (S ** 2 + sig ** 2)


def error(name, n):
    """How far a sampler is off, relatively, at sigma_min after n - 1 steps."""
    sigs = karras.sigmas_karras(n)[:-1]
    x = karras.sample(karras.SAMPLERS[name], gaussian, torch.ones(1, dtype=torch.float64), sigs)
    path = lambda sig: math.sqrt(S ** 2 + sig ** 2)
    exact = sigs[0].item() * path(sigs[-1].item()) / path(sigs[0].item())
    return abs(x.item() - exact) / exact


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_error_falls_with_the_power_of_the_step_that_the_method_promises(name, order):
    for n in (40, 80):
        assert error(name, n) / error(name, 2 * n) == pytest.approx(2 ** order, rel=0.15)


def test_dpmpp_takes_the_estimate_of_the_middle_of_an_uneven_step():
    estimate = lambda x, sig: torch.full_like(x, -math.log(sig))
    steps = list(karras.sample_dpmpp_2m(estimate, torch.zeros(1), [8, 4, 0.5]))
    middle = -(math.log(4) + math.log(0.5)) / 2                              # a straight line goes on to there
    assert steps[1].item() == pytest.approx(0.125 * steps[0].item() + 0.875 * middle, rel=1e-6)


def test_lms_is_of_higher_order_and_cheaper_than_heun():
    assert error("lms", 40) / error("lms", 80) > 6 and error("lms", 80) / error("lms", 160) > 7
    assert error("lms", 79) < error("heun", 40) / 5                          # at equal evaluations


@pytest.mark.parametrize("sampler, options", [(karras.sample_euler_ancestral, dict(eta=1.0)),
                                              (karras.sample_euler_ancestral, dict(eta=0.5)),
                                              (karras.sample_heun, dict(s_churn=40.0))])
def test_samplers_that_add_noise_end_with_the_datas_deviation(sampler, options):
    torch.manual_seed(0)
    noise = torch.randn(30_000, dtype=torch.float64)
    x = karras.sample(sampler, gaussian, noise, karras.sigmas_karras(1000), **options)
    assert x.std().item() == pytest.approx(S, rel=0.02)
    plain = karras.sample(sampler, gaussian, noise, karras.sigmas_karras(1000), **{k: 0.0 for k in options})
    assert not torch.allclose(x, plain, atol=0.1)                            # another sample, not the same again


def test_ancestral_without_noise_is_euler_and_fresh_noise_fills_the_gap():
    noise, sigs = torch.randn(8, generator=torch.Generator().manual_seed(0)).double(), karras.sigmas_karras(12)
    euler = karras.sample(karras.sample_euler, gaussian, noise, sigs)
    assert torch.allclose(karras.sample(karras.sample_euler_ancestral, gaussian, noise, sigs, eta=0.0), euler)
    torch.manual_seed(0)
    nothing = lambda x, sig: torch.zeros_like(x)                             # with D = 0, x is all noise: its deviation
    wide = torch.randn(100_000, dtype=torch.float64)                         # after a step must be the next sigma
    for x, sig2 in zip(karras.sample_euler_ancestral(nothing, wide * 80, sigs, eta=0.7), sigs[1:-1]):
        assert x.std().item() == pytest.approx(sig2.item(), rel=0.02)


def test_lms_coefficients():
    even = [4.0, 3.0, 2.0, 1.0, 0.0]
    assert karras.lms_coefficients(even, 3, 4) == pytest.approx([-55 / 24, 59 / 24, -37 / 24, 9 / 24])
    assert karras.lms_coefficients(even, 0, 1) == pytest.approx([-1.0])       # order 1 is Euler
    sigs = karras.sigmas_karras(10).tolist()
    for i in (5, 9):                                                         # uneven: cubics are integrated exactly
        c = karras.lms_coefficients(sigs, i, 4)
        for power in range(4):
            exact = (sigs[i + 1] ** (power + 1) - sigs[i] ** (power + 1)) / (power + 1)
            assert sum(w * sigs[i - j] ** power for j, w in enumerate(c)) == pytest.approx(exact, rel=1e-6)


def test_lms_follows_slopes_that_are_cubics_in_sigma_exactly_once_it_has_four():
    slope, integral = lambda s: 1 + 2 * s - 3 * s ** 2 + s ** 3, lambda s: s + s ** 2 - s ** 3 + s ** 4 / 4
    sigs = torch.linspace(2, 0, 11, dtype=torch.float64) ** 1.5
    path = list(karras.sample_lms(lambda x, s: x - s * slope(s), torch.zeros(1, dtype=torch.float64), sigs))
    for x, sig in zip(path[3:-1], sigs[4:-1]):
        assert (x - path[2]).item() == pytest.approx((integral(sig) - integral(sigs[3])).item(), rel=1e-6)
    assert (path[-1] - path[-2]).item() == pytest.approx(-(sigs[-2] * slope(sigs[-2])).item())      # to 0: Euler


@pytest.mark.parametrize("name", ["euler", "ancestral", "heun", "lms", "dpmpp_2m"])
def test_no_sampler_magnifies_rounding_however_many_its_steps(name):
    random, error = torch.Generator().manual_seed(0), 0.002
    rounded = lambda x, sig: 0.3 + error * torch.randn(x.shape, generator=random)     # the truth is 0.3
    sigs = karras.sigmas_karras(100).tolist()                                 # as sample_lms says
    assert sum(map(abs, karras.lms_coefficients(sigs, 99, 4))) / sigs[99] == pytest.approx(78, abs=0.5)
    for steps in (20, 100, 500):
        states = karras.SAMPLERS[name](rounded, 80 * torch.ones(1000), karras.sigmas_karras(steps))
        assert (list(states)[-1] - 0.3).std() < 1.5 * error


@pytest.mark.parametrize("name", ["euler", "ancestral", "heun", "lms", "dpmpp_2m"])
def test_every_sampler_asks_as_often_as_it_says_and_ends_on_the_estimate(name):
    calls, target = [], torch.tensor([0.3, -0.2])

    def denoise(x, sig):
        calls.append(float(sig))
        return target.expand_as(x)
    for steps in (1, 2, 7, 20):
        calls.clear()
        sigs = karras.sigmas_karras(steps)
        options = {"eta": 0.0} if name == "ancestral" else {}
        states = list(karras.SAMPLERS[name](denoise, 80 * torch.ones(3, 2), sigs, **options))
        assert len(states) == steps
        assert len(calls) == karras.evaluations(name, steps) == (2 * steps - 1 if name == "heun" else steps)
        assert all(s > 0 for s in calls)
        assert torch.allclose(states[-1], target.expand(3, 2), atol=1e-4)     # where D is constant, all are exact


def test_churn_is_undone_at_the_level_it_makes():
    seen, sigs = [], torch.tensor([4.0, 1.0, 0.0])
    denoise = lambda x, sig: seen.append(float(sig)) or x * 0
    list(karras.sample_heun(denoise, torch.ones(2), sigs, s_churn=0.4, s_tmax=2.0))
    assert seen == pytest.approx([4.0, 1.0, 1.2])                            # 1 + 0.4/2 at the second step only
    torch.manual_seed(0)
    seen.clear()                                                             # at most the variance doubles; not below 2
    denoise = lambda x, sig: seen.append((sig, x.std().item())) or x * 0
    list(karras.sample_heun(denoise, torch.zeros(100_000), sigs, s_churn=40.0, s_tmin=2.0, s_noise=1.5))
    assert [sig for sig, _ in seen] == pytest.approx([4 * math.sqrt(2), 1, 1])
    assert seen[0][1] == pytest.approx(1.5 * 4, rel=0.02)                    # sqrt(32 - 16) times s_noise


def test_lms_takes_as_many_slopes_as_its_order_and_sampling_starts_at_the_first_sigma():
    x, sigs = torch.randn(5, dtype=torch.float64), [7.0, 3.0, 1.0, 0.2, 0.0]
    curved = lambda x, sig: torch.tanh(x) / (1 + sig)
    ends = [karras.sample(karras.sample_lms, curved, x, sigs, order=order) for order in (1, 2, 3)]
    assert torch.allclose(ends[0], karras.sample(karras.sample_euler, curved, x, sigs))
    assert not torch.allclose(ends[1], ends[2])
    assert torch.equal(karras.sample(karras.sample_euler, lambda x, sig: 0 * x, x, [7.0, 3.5]), 3.5 * x)


# ---------------------------------------------------------------------------------------------- noise_pred.py

def test_the_target_is_the_logit_of_how_much_is_image_and_always_finite(monkeypatch):
    torch.manual_seed(0)
    (x_t,), target = noise_pred.noisify(torch.ones(20_000, 1, 4, 4))
    share = noise_pred.alphabar(target)
    assert target.shape == (20_000,) and share.min() < 0.001 and share.max() > 0.999
    assert share.mean().item() == pytest.approx(0.5, abs=0.01)
    assert share.var().item() == pytest.approx(1 / 12, abs=0.002)
    off = x_t.mean((1, 2, 3)) - share.sqrt()                                 # the image is 1, so the mean is its weight
    assert off.mean().abs() < 0.01 and (off.square().mean() * 16).item() == pytest.approx(0.5, abs=0.02)
    for extreme in (0.0, 1.0):                                               # what torch.rand might draw, or round to
        monkeypatch.setattr(torch, "rand", lambda n, device=None: torch.full((n,), extreme))
        (x_t,), target = noise_pred.noisify(torch.ones(3, 1, 4, 4))
        assert target.isfinite().all() and x_t.isfinite().all() and (target.abs() > 11).all()
    given = torch.tensor([0.1, 0.9])
    _, target = noise_pred.noisify(torch.ones(2, 1, 4, 4), given, "alphabar")
    assert torch.equal(target, given) and torch.equal(noise_pred.alphabar(target[:, None], "alphabar"), given)


def test_constant_answers_score_what_they_should(capsys):
    torch.manual_seed(0)
    noise_pred.show_baselines(torch.zeros(50_000, 1, 2, 2))
    said = re.findall(r"always answering (\S+): loss (\S+) over 50000 .* (\S+) expected", capsys.readouterr().out)
    assert [(answer, expected) for answer, _, expected in said] == [("0", "3.29"), ("0.5", "3.54")]
    for _, loss, expected in said: assert float(loss) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("target, answer", [("logit", -1.0), ("alphabar", 0.3)])
def test_the_errors_of_an_answer_that_never_changes(target, answer, tmp_path, monkeypatch):
    model, x0 = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1)), torch.zeros(4000, 1, 4, 4)
    for parameter, value in zip(model[1].parameters(), (0.0, answer)): torch.nn.init.constant_(parameter, value)
    always = 1 / (1 + math.e) if target == "logit" else 0.3
    logit = lambda a: math.log(a / (1 - a))
    expected = [[abs(level - always), abs(logit(level) - logit(always))] for level in noise_pred.LEVELS]
    assert np.allclose(noise_pred.errors(model, x0, target), expected, atol=1e-5)
    charts, plot = {}, noise_pred.plot
    monkeypatch.setattr(noise_pred, "plot", lambda series, *rest, **how:
                        charts.update({name: (xs, ys) for name, xs, ys, _ in series}) or plot(series, *rest, **how))
    said, right, x_t = noise_pred.guess(model, x0, target=target)
    pred, actual = noise_pred.alphabar(said, target), noise_pred.alphabar(right, target)
    noise_pred.show_guesses(tmp_path, x0, x_t, pred, actual, target)
    middles, off = charts["network"]
    assert torch.allclose(torch.stack(off), (middles - always).abs(), atol=0.01) and len(off) == 20
    assert torch.equal(charts["test images"][0], actual) and torch.equal(charts["test images"][1], pred)


def test_losses_are_of_training_and_test_images_and_the_logits_error_is_the_logits(tmp_path, monkeypatch):
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.nothing = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x): return x.mean((1, 2, 3))[:, None].abs()
    origin = dict(train_seconds=0.0, trained_on="")
    monkeypatch.setattr(noise_pred, "network", lambda args, x0, target: (Mean(), origin))
    noise_pred.main("--size tiny --data drawn --device cpu --target alphabar --out-dir".split() + [str(tmp_path)])
    (record,) = json.loads((tmp_path / "noise_pred" / "results.json").read_text())
    for key, train in (("train_loss", True), ("test_loss", False)):
        x0 = fid.fashion_mnist(train=train, data="drawn", count=unet.SIZES["tiny"]["count"])[0] / 2
        _, actual, x_t = noise_pred.guess(Mean(), x0, target="alphabar")
        said = x_t.mean((1, 2, 3)).abs().clamp(1e-5, 1 - 1e-5)
        assert record[key] == pytest.approx((said - actual).square().mean().item(), rel=1e-4)
    assert record["train_loss"] != record["test_loss"]
    assert record["mae"] == pytest.approx((said - actual).abs().mean().item(), rel=1e-4)
    assert record["logit_mse"] == pytest.approx((said.logit() - actual.logit()).square().mean().item(), rel=1e-4)


def test_the_loss_is_taken_at_every_alphabar_alike_and_little_is_left_to_luck(monkeypatch):
    """A network that always answers 0 has pi^2 / 3. By 2000 independent draws it is off by some 4%."""
    nothing = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 1))
    for parameter in nothing.parameters(): torch.nn.init.zeros_(parameter)
    said, right, _ = noise_pred.guess(nothing, torch.zeros(2000, 1, 2, 2))
    assert noise_pred.flat_mse(said, right).item() == pytest.approx(math.pi ** 2 / 3, rel=0.01)
    assert sorted((right.sigmoid() * 2000).long().tolist()) == list(range(2000))
    assert right[:1000].mean().abs() < 0.2                                   # in no order
    monkeypatch.setattr(torch, "rand", lambda n: torch.full((n,), 1 - 2 ** -24))
    _, right, _ = noise_pred.guess(nothing, torch.zeros(2000, 1, 2, 2))      # the nearest to 1 would round to it
    assert right.isfinite().all()


def test_flat_mse_does_not_broadcast():
    right = torch.tensor([1.0, 2.0, 4.0])
    assert noise_pred.flat_mse(right[:, None], right) == 0
    assert noise_pred.flat_mse(right[:, None] + 1, right) == 1
    assert (right[:, None] - right).square().mean() > 1                      # what happens without


# ---------------------------------------------------------------------------------------------- cosine_ddim.py

CURVES = [("linear",), ("cosine",), ("cosine", 0.2, 1.0, 1.0), ("cosine", 0.0, 0.9, 2.0), ("sigmoid",),
          ("sigmoid", 0.0, 3.0, 0.3), ("sigmoid", -3.0, 3.0, 1.1)]


def test_abar_and_its_inverse():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert cosine_ddim.abar(0) == 1 and cosine_ddim.abar(1.0) < 1e-12
    assert cosine_ddim.abar(0.5).item() == pytest.approx(0.5) and cosine_ddim.abar(1 / 3).item() == pytest.approx(0.75)
    assert torch.allclose(cosine_ddim.inv_abar(cosine_ddim.abar(t)), t, atol=1e-7)


@pytest.mark.parametrize("curve", CURVES)
def test_every_schedule_falls_from_1_to_0(curve):
    gamma = cosine_ddim.noise_schedule(*curve)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert gamma(0.0).item() == pytest.approx(1, abs=1e-6) and gamma(1.0).item() == pytest.approx(0, abs=1e-6)
    assert (gamma(t).diff() <= 0).all() and (gamma(t) >= 1e-9).all() and (gamma(t.float()) <= 1).all()


def test_the_default_schedule_is_abar_and_a_sigmoid_is_what_the_paper_says(monkeypatch):
    t = torch.linspace(0, 0.999, 100)
    assert torch.allclose(cosine_ddim.noise_schedule()(t), cosine_ddim.abar(t), rtol=1e-6)
    with monkeypatch.context() as patch:                                     # whoever changes abar changes the lesson
        patch.setattr(cosine_ddim, "abar", lambda t: 0.9 * (1 - torch.as_tensor(t)) ** 3 + 0.05)       # not 1 to 0
        assert torch.equal(cosine_ddim.noise_schedule()(t), cosine_ddim.abar(t))
    bent = cosine_ddim.noise_schedule("cosine", 0.2, 0.9, 1.5)               # in the paper's own form
    form = lambda u: np.cos(u * np.pi / 2) ** 3
    assert bent(0.4).item() == pytest.approx((form(0.9) - form(0.2 + 0.4 * 0.7)) / (form(0.9) - form(0.2)), rel=1e-5)
    for start in (0.0, 0.1, 0.3, 0.7):                                       # a small tau magnifies what is left of 0
        steep = cosine_ddim.noise_schedule("cosine", start, 1.0, 0.1)
        for at in (0.5, 0.999):
            expected = (np.cos((start + at * (1 - start)) * np.pi / 2) / np.cos(start * np.pi / 2)) ** 0.2
            assert steep(at).item() == pytest.approx(expected, rel=1e-4)
        assert steep(1.0).item() == pytest.approx(1e-9)
    sigmoid = lambda u: 1 / (1 + math.exp(-u))                               # from 0 to 3 with tau 0.3, at t = 0.1
    expected = (sigmoid(10) - sigmoid(1)) / (sigmoid(10) - sigmoid(0))
    assert cosine_ddim.noise_schedule("sigmoid", 0.0, 3.0, 0.3)(0.1).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("curve", [("cosine", 0.5, 0.5), ("cosine", -0.1), ("cosine", 0, 1.1), ("cosine", 0, 1, 0),
                                   ("sigmoid", 3, -3), ("sigmoid", -3, 3, -1), ("sigmoid", 50, 60, 0.1), ("linear", 0),
                                   ("sigmoid", 15, 17), ("cosine", 0, 0.001), ("linear", None, None, 1),
                                   ("sigmoid", -1000, 1000), ("sigmoid", -3, 3, 0.001), ("cosine", 0, 1, 1e-9)])
def test_parameters_that_make_no_schedule_are_refused(curve):
    with pytest.raises(unet.Problem, match="--(start|end|tau)"): cosine_ddim.noise_schedule(*curve)


@pytest.mark.parametrize("curve", CURVES)
def test_noising_and_denoising_undo_each_other_at_every_t(curve):
    torch.manual_seed(0)
    x0, t = torch.rand(9, 1, 8, 8, dtype=torch.float64) - 0.5, torch.linspace(0, 0.99, 9, dtype=torch.float64)
    gamma = cosine_ddim.noise_schedule(*curve)
    (x_t, same), noise = cosine_ddim.noisify(x0, t, gamma)
    assert torch.equal(same, t) and torch.allclose(cosine_ddim.denoise(x_t, noise, t, gamma), x0, atol=1e-6)
    assert torch.allclose(x_t[:1], x0[:1], atol=1e-3)
    (x_t, drawn), _ = cosine_ddim.noisify(torch.zeros(5000, 1, 2, 2))
    assert 0 <= drawn.min() and 0.99 < drawn.max() < 0.999 and drawn.mean().item() == pytest.approx(0.4995, abs=0.02)
    assert x_t.var().item() == pytest.approx(0.5, abs=0.02)                  # the mean of 1 - abar over t


def test_timesteps():
    assert torch.allclose(cosine_ddim.timesteps(4), torch.tensor([0.75, 0.5, 0.25, 0, 0]))
    for steps in (2, 3, 50, 293, 1000):
        for spacing in ("uniform", "late"):
            ts = cosine_ddim.timesteps(steps, spacing)
            assert len(ts) == steps + 1 and (ts[:-1].diff() < 0).all() and ts[-2:].tolist() == [0, 0]
            assert ts[0].item() == pytest.approx(1 - 1 / steps)
    with pytest.raises(unet.Problem, match="1 steps"): cosine_ddim.timesteps(1)
    from_1 = cosine_ddim.sample(lambda x_t, t: x_t, torch.randn(1, 1, 4, 4), torch.linspace(1, 0, 5))
    with pytest.raises(ValueError, match="time 1: sampling has to begin below 1"): next(from_1)
    left = [cosine_ddim.noise_schedule(*dials)(cosine_ddim.timesteps(50)[0]).item()
            for dials in (("cosine",), ("linear",), ("cosine", None, None, 0.2))]
    assert "it is {:.3f} for cosine, {:.2f} for linear, {:.2f} for cosine with tau 0.2".format(
        *left) in cosine_ddim.noise_schedule.__doc__
    with pytest.raises(ValueError, match="Late"): cosine_ddim.timesteps(3, "Late")
    late = cosine_ddim.timesteps(293, "late")                                # 10 + 11 + 12 + .. + 100 of a thousand
    assert [int(((late[:-1] < high) & (late[:-1] >= high - 0.1)).sum()) for high in (1, 0.1)] == [10, 100]


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_ancestral_euler_in_other_symbols(eta):
    """x = x_t / sqrt(abar), sigma^2 = (1 - abar) / abar, and the same draws: the same path, whatever the network."""
    ts = torch.linspace(0.95, 0.05, 12, dtype=torch.float64)
    abar = cosine_ddim.abar(ts)
    sigs = ((1 - abar) / abar).sqrt()
    find_noise = lambda x_t, t: torch.tanh(3 * x_t + t) + 0.2 * x_t
    start = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def denoise(x, sig):
        a = 1 / (1 + sig ** 2)
        return x - sig * find_noise(x * a ** 0.5, cosine_ddim.inv_abar(torch.tensor(a, dtype=torch.float64)))
    torch.manual_seed(1)
    in_sigma = list(karras.sample_euler_ancestral(denoise, start / abar[0].sqrt(), sigs, eta=eta))
    torch.manual_seed(1)
    schedule = lambda t: cosine_ddim.abar(torch.tensor(t, dtype=torch.float64))
    in_t = [x for _, x in cosine_ddim.sample(find_noise, start, ts, eta, abar=schedule)]
    for x, x_t, a in zip(in_sigma, in_t, abar[1:]):
        assert torch.allclose(x, x_t / a.sqrt(), rtol=1e-6)                  # sigs go through float32 nowhere


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_of_a_gaussian_ends_with_its_deviation(eta):
    def find_noise(x_t, t):                                                  # the best guess where x0 has deviation S
        a = cosine_ddim.abar(t)
        return x_t * (1 - a).sqrt() / (a * S ** 2 + 1 - a)
    torch.manual_seed(0)
    noise, off = torch.randn(30_000, 1, 1, 1), []
    for steps in (50, 400):
        for _, x in cosine_ddim.sample(find_noise, noise, cosine_ddim.timesteps(steps), eta): pass
        off.append(abs(x.std().item() - S) / S)
    assert off[1] < 0.02 and off[1] < off[0]


def test_a_step_at_alphabar_1_changes_nothing_and_clip_bounds_the_estimate():
    x, noise = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    x_0_hat, x_t1 = cosine_ddim.ddim_step(x, noise, 1.0, 1.0)
    assert torch.equal(x_t1, x) and torch.equal(x_0_hat, x)
    x_0_hat, x_t1 = cosine_ddim.ddim_step(x, noise, torch.full((3,), 0.1), torch.full((3,), 0.2), clip=1.5)
    assert x_0_hat.abs().max() == 1.5 and x_t1.isfinite().all()
    for how in (dict(clip=0.5), dict(abar_hat=torch.tensor([0.1, 0.2, 0.5]))):           # and nothing but the estimate
        x_0_hat, x_t1 = cosine_ddim.ddim_step(x, noise, 0.3, 0.6, 0.0, **how)
        assert torch.allclose(x_t1, 0.6 ** 0.5 * x_0_hat + 0.4 ** 0.5 * noise, atol=1e-6)


@pytest.mark.parametrize("curve", CURVES)
def test_nothing_is_nan_at_any_t_in_any_schedule(curve):
    gamma = cosine_ddim.noise_schedule(*curve)
    t = torch.linspace(0, 1, 21)
    (x_t, _), noise = cosine_ddim.noisify(torch.rand(21, 1, 4, 4), t, gamma)
    assert x_t.isfinite().all() and cosine_ddim.denoise(x_t, noise, t, gamma).isfinite().all()
    for steps in (2, 3, 20, 1000):
        for spacing in ("uniform", "late"):
            ts = cosine_ddim.timesteps(steps, spacing)
            path = cosine_ddim.sample(lambda x_t, t: x_t, torch.randn(2, 1, 4, 4), ts, 1.0, abar=gamma)
            assert all(x_0_hat.isfinite().all() and x.isfinite().all() for x_0_hat, x in path)


@pytest.mark.parametrize("scalings", [karras.scalings, lambda sig, sig_data: (0 * sig, 0 * sig + 1, 0 * sig + 1)],
                         ids=["Karras et al.", "no preconditioning"])
def test_what_the_mean_image_alone_is_worth(scalings, monkeypatch):
    monkeypatch.setattr(karras, "scalings", scalings)
    torch.manual_seed(0)
    x0, sigmas, sig_data = 0.2 + torch.rand(4000, 1, 8, 8) * torch.rand(8, 8), np.array([0.01, 0.3, 1.0, 50.0]), 0.4
    mean = x0.mean(0)

    def knows_the_mean(x, sig):
        c_skip, c_out, _ = karras.scalings(sig[0], sig_data)
        return (1 - c_skip) * mean / c_out + 0 * x
    found = karras.loss_by_sigma(knows_the_mean, x0, sigmas, {"sig_data": sig_data})
    assert found == pytest.approx(karras.loss_of_the_mean(x0, sigmas, sig_data), rel=0.02)


def test_every_line_of_the_chart_of_the_loss_is_what_its_name_says(tmp_path, monkeypatch):
    torch.manual_seed(0)
    x0, sig_data, lines, plot = torch.rand(16, 1, 32, 32) - 0.2, 0.66, {}, karras.plot
    c_skip = lambda sig: karras.scalings(sig, sig_data)[0]

    def knows_the_mean(x, sig):
        return (1 - c_skip(sig[0])) * x0.mean(0) / karras.scalings(sig[0], sig_data)[1] + 0 * x
    monkeypatch.setattr(karras, "plot", lambda series, *rest, **how:
                        lines.update({name: (xs, ys) for name, xs, ys, _ in series}) or plot(series, *rest, **how))
    karras.show_loss(tmp_path, knows_the_mean, x0, {"sig_data": sig_data})
    before, after, mean, density = lines.values()
    sigmas, weight = before[0], c_skip(before[0])
    whole = (1 - weight) ** 2 * float(x0.square().mean()) + (weight * sigmas) ** 2       # the target, which a 0 misses
    assert before[1] == pytest.approx(whole / karras.scalings(sigmas, sig_data)[1] ** 2, rel=0.05)
    assert mean[1] == pytest.approx(karras.loss_of_the_mean(x0, sigmas, sig_data))
    assert after[1] == pytest.approx(mean[1], rel=0.05) and max(before[1] / mean[1]) > 1.5
    assert density[1].max() == 1 and sigmas[density[1].argmax()] == pytest.approx(math.exp(karras.P_MEAN), rel=0.3)


def test_a_network_that_finds_noise_is_a_denoiser_in_karras_terms():
    network = lambda x_t, t: torch.tanh(x_t) * (1 + t)
    x_t, t = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)), 0.4
    a = cosine_ddim.abar(t)
    direct = cosine_ddim.denoise(x_t, network(x_t, t), torch.full((4,), t))
    wrapped = karras.denoise_epsilon(network, x_t / a.sqrt(), ((1 - a) / a).sqrt().item())
    assert torch.allclose(wrapped, direct, atol=1e-5)


def test_pooling_by_k_raises_log_snr_by_2_ln_k():
    torch.manual_seed(0)
    x0, t = torch.rand(50, 1, 32, 32), torch.full((50,), 0.6)
    a = cosine_ddim.abar(0.6)
    for k in (1, 2, 4):
        rest = cosine_ddim.pooled(x0, k, t) - a.sqrt() * x0
        measured = (a * x0.square().mean() / rest.square().mean()).log() - x0.square().mean().log()
        assert measured.item() == pytest.approx(cosine_ddim.log_snr(a).item() + 2 * math.log(k), abs=0.03)


def test_scaling_by_b_shifts_log_snr_by_2_ln_b():
    torch.manual_seed(0)
    x0, t, a = torch.rand(50, 1, 32, 32) - 0.5, torch.full((50,), 0.6), cosine_ddim.abar(0.6)
    for b in (1.0, 0.5, 0.3):
        (x_t, _), noise = cosine_ddim.noisify(b * x0, t)
        image = x_t - (1 - a).sqrt() * noise
        measured = (image.square().mean() / (x_t - image).square().mean()).log() - x0.square().mean().log()
        assert measured.item() == pytest.approx(cosine_ddim.log_snr(a).item() + 2 * math.log(b), abs=0.02)


def test_normalising_gives_every_image_unit_variance():
    x = torch.randn(3, 1, 8, 8) * torch.tensor([0.1, 1.0, 7.0])[:, None, None, None] + 2
    assert torch.allclose(cosine_ddim.unit_variance(x).std(dim=(1, 2, 3)), torch.ones(3), atol=1e-5)
    assert cosine_ddim.unit_variance(torch.ones(1, 1, 8, 8)).isfinite().all()               # a burnt-out image


def test_no_unbiased_guess_is_better_than_the_best():
    x0 = torch.zeros(20_000, 1, 8, 8)                                        # black: x_t has variance 1 - alphabar
    torch.manual_seed(0)
    (x_t,), _ = noise_pred.noisify(x0, torch.full((20_000,), 0.6))
    off = (1 - x_t.square().mean(dim=(1, 2, 3)) - 0.6).abs().mean().item()
    assert off == pytest.approx(noise_pred.best(0.6, x0), rel=0.03)

    # With an image: two close alphabars a step h apart are told apart by what their x_t differ, a Kullback-Leibler
    # divergence of h^2 / 2 times the Fisher information. Of Gaussians it is known exactly.
    image, h = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5, 1e-4
    for a in (0.1, 0.6, 0.95):
        b, ratio = a + h, (1 - a) / (1 - a - h)
        apart = (a ** 0.5 - b ** 0.5) ** 2 * image.square().sum().item()
        divergence = 64 / 2 * (ratio - 1 - math.log(ratio)) + apart / (2 * (1 - b))
        deviation = h / (2 * divergence) ** 0.5
        assert noise_pred.best(a, image) == pytest.approx((2 / math.pi) ** 0.5 * deviation, rel=2e-3)


# ---------------------------------------------------------------------------------------------- no_t.py

def test_the_network_is_never_told_t():
    x0, t = torch.rand(6, 1, 8, 8) - 0.5, torch.linspace(0, 0.99, 6)
    torch.manual_seed(0)
    (x_t, told), noise = no_t.noisify(x0, t)
    torch.manual_seed(0)
    (expected, _), same_noise = cosine_ddim.noisify(x0, t)
    assert torch.equal(x_t, expected) and torch.equal(noise, same_noise)
    model = fill(small_net())                                                # so its answer depends on x_t alone
    with torch.no_grad():
        answers = model(*no_t.noisify(x0, t)[0]), model(*cosine_ddim.noisify(x0, t)[0])
        torch.manual_seed(0)
        (again, told), _ = no_t.noisify(x0, t)
        assert torch.equal(model(again, told), model(x_t, 0.0)) and not torch.allclose(*answers, atol=0.1)
    assert torch.equal(told, torch.zeros(6))


def test_predictions_far_from_the_median_are_moved_nearer():
    told = torch.tensor([0.001, 0.2, 0.4, 0.5, 0.99])
    assert no_t.near_median(told).tolist() == pytest.approx([0.2, 0.2, 0.4, 0.5, 0.8])
    assert no_t.near_median(torch.tensor([0.9, 0.95, 0.99])).tolist() == pytest.approx([0.9, 0.95, 0.99])


def test_alphabar_is_predicted_to_all_decimals_in_a_sampler_in_bfloat16_too():
    tmodel, x = fid.resnet(1), 0.5 * torch.randn(16, 1, 32, 32)
    tmodel[-2].p = 0.0                                                       # no dropout; batch norm as in training
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): said = no_t.predict(tmodel, x)
    with torch.no_grad(): assert torch.equal(said, no_t.predict(tmodel, x))
    assert len(set(said.tolist())) == 16


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rescue", list(no_t.RESCUES))
def test_with_perfect_predictions_the_rescue_is_plain_ddim(eta, rescue):
    ts, start = cosine_ddim.timesteps(8), torch.randn(4, 1, 8, 8)
    find_noise = lambda x_t: torch.tanh(2 * x_t)
    steps = {"every": range(8), "none": [], "last": [7], "but-last": range(7), "late": range(2, 8)}
    truth = iter([ts[i].item() for i in steps[rescue]])                      # 0.875, 0.75, 0.625, ..
    perfect = lambda x_t: cosine_ddim.abar(next(truth)).expand(len(x_t))
    torch.manual_seed(1)
    rescued = [x for _, x in no_t.sample(find_noise, perfect, start, ts, eta, 2.0, rescue)]
    torch.manual_seed(1)
    plain = [x for _, x in cosine_ddim.sample(lambda x_t, t: find_noise(x_t), start, ts, eta, 2.0)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(rescued, plain)) and len(rescued) == len(plain) == 8
    assert next(truth, None) is None                                         # asked at these steps and at no other


def test_the_last_call_removes_the_noise_that_is_left_only_where_it_is_told_how_much():
    """Black images, a gauge that is right, and a denoiser that finds 95% of the noise, at whatever level it is."""
    level = lambda x: x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    find_noise, left = lambda x_t: 0.95 * x_t / level(x_t), {}
    gauge = lambda x_t: (1 - level(x_t).flatten() ** 2).clamp(1e-5, 1 - 1e-5)
    start = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for rescue in ("none", "last"):
        torch.manual_seed(0)
        for _, x in no_t.sample(find_noise, gauge, start, cosine_ddim.timesteps(20), 1.0, 2.0, rescue): pass
        left[rescue] = level(x)
    assert left["none"].min() > 0.05
    assert torch.allclose(left["last"], 0.05 * left["none"] / (1 - left["none"] ** 2).sqrt(), rtol=1e-2)


def test_the_ideal_answer_is_the_mean_over_images_and_times():
    """Beside a sum over 20,000 evenly spaced times, in float64, and over three images that are hard to tell apart."""
    torch.manual_seed(0)
    x0 = torch.rand(3, 1, 4, 4) - 0.5
    told = torch.tensor([0.03, 0.2, 0.5, 0.8])
    (x_t, _), _ = cosine_ddim.noisify(x0[[0, 1, 2, 0]], told)
    ask = no_t.ideal(x0)

    def mean(x, t):
        """-> the noise (1, 4, 4), the logit of alphabar, for t (T,) of equal probability."""
        a = torch.cos(t.double() * torch.pi / 2) ** 2
        noise = (x.double() - a.sqrt().view(-1, 1, 1, 1, 1) * x0.double()) / (1 - a).sqrt().view(-1, 1, 1, 1, 1)
        log_p = -0.5 * noise.square().sum((2, 3, 4)) - 16 / 2 * (1 - a)[:, None].log()       # normal density of x
        p = log_p.flatten().softmax(0).view_as(log_p)
        return torch.einsum("ti,tichw->chw", p, noise), (p.sum(1) * a.logit()).sum()
    even = 0.005 + (torch.arange(20_000) + 0.5) / 20_000 * 0.994
    noise, alphabar = ask(x_t)
    for i, (x, t) in enumerate(zip(x_t, told)):
        expected, logit = mean(x, even)
        assert torch.allclose(noise[i].double(), expected, atol=5e-3), t
        assert alphabar[i].logit().item() == pytest.approx(logit.item(), abs=0.05), t    # coarse near t = 1
        assert torch.allclose(ask(x_t, told)[0][i].double(), mean(x, t[None])[0], atol=1e-4), t
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(no_t.ideal(x0)(x_t)[0], noise)
    assert ask(x_t, told)[0] is ask(x_t, told)[0] and ask(x_t)[0] is not ask(x_t, told)[0]   # computed only once


@pytest.mark.parametrize("t", [0.2, 0.5, 0.7, 0.8])
def test_not_being_told_t_costs_what_luck_in_the_noise_is_worth(t):
    """One image, which the ideal network knows, of energy Q. The root mean square of the noise's n = 1024 numbers is by
    luck off by 1 / sqrt(2 n). How noisy x_t should be shows in the image's weight, to sqrt(abar / ((1 - abar) Q)); what
    is seen of the luck is the share that two such measurements have in their mean. The loss is the posterior variance
    of the weight, v, times the change of the noise with it: v = 1 / (Q / b + 2 n abar / b^2), b = 1 - abar, and
    (Q / b + n abar / b^2) v / n. (Above t = 0.8 the weight is too close to 0 for such a formula.)"""
    torch.manual_seed(0)
    x0 = fid.fashion_mnist(data="drawn", count=1)[0] * 0.5
    (x_t, times), noise = cosine_ddim.noisify(x0.expand(400, -1, -1, -1), torch.full((400,), t))
    n, a, energy = 1024, cosine_ddim.abar(t).item(), x0.square().sum().item()
    luck, weight = 1 / (2 * n), a / ((1 - a) * energy)
    answer, _ = no_t.ideal(x0)(x_t)
    strength, found = (x.square().mean((1, 2, 3)).sqrt() for x in (noise, answer))
    slope = torch.cov(torch.stack([strength, found]))[0, 1] / strength.var()
    assert slope.item() == pytest.approx(luck / (luck + weight), abs=0.06)
    loss = (energy / (1 - a) + n * a / (1 - a) ** 2) / (energy / (1 - a) + 2 * n * a / (1 - a) ** 2) / n
    assert (answer - noise).square().mean().item() == pytest.approx(loss, rel=0.2) and 0.5 < loss * n < 1
    assert torch.allclose(no_t.ideal(x0)(x_t, times)[0], noise, atol=1e-3)   # told t it has nothing to guess


def test_without_t_and_fresh_noise_even_an_ideal_denoiser_leaves_noise_and_the_rescue_removes_it():
    x0 = fid.fashion_mnist(data="drawn", count=16)[0] * 0.5
    ask = no_t.ideal(x0)
    start, far = torch.randn(32, 1, 32, 32, generator=torch.Generator().manual_seed(0)), {}
    for rescue in ("none", "every"):
        path = no_t.sample(lambda x: ask(x)[0], lambda x: ask(x)[1], start, cosine_ddim.timesteps(25), 0.0, 2.0, rescue)
        end = list(path)[-1][1]
        far[rescue] = torch.cdist(end.flatten(1), x0.flatten(1)).amin(1) / 32                # root mean square
    assert far["every"].max() < 0.01 and far["none"].max() > 0.1 and far["none"].median() > 0.02
    end = list(cosine_ddim.sample(lambda x, t: ask(x, t)[0], start, cosine_ddim.timesteps(25), 0.0, 2.0))[-1][1]
    assert torch.cdist(end.flatten(1), x0.flatten(1)).amin(1).max() / 32 < 0.01              # told t, down to t = 0


# ---------------------------------------------------------------------------------------------- the scripts, whole

def test_nothing_is_left_on_the_cpu_when_the_images_are_elsewhere():
    # "meta" has shapes and no numbers, and refuses what is on two devices as a GPU does: a GPU for those who have none
    device = torch.device("meta")
    with pytest.raises(RuntimeError): torch.zeros(3, device=device) + torch.zeros(3)
    model, x = unet.UNet((8, 16), 1).to(device), torch.zeros(4, 1, 32, 32, device=device)
    tmodel = fid.resnet(1).to(device)
    asked = [lambda x0: karras.noisify(x0, log_sigma=True, centre=0.1), no_t.noisify]
    asked += [lambda x0, a=cosine_ddim.noise_schedule(name, *how): cosine_ddim.noisify(x0, abar=a)
              for name, *how in (["linear"], ["cosine"], ["cosine", 0.2, 1, 2], ["sigmoid"])]
    for noisify in asked:
        inputs, target = noisify(x)
        assert (model(*inputs) - target).device == device
    assert noise_pred.flat_mse(tmodel(*noise_pred.noisify(x)[0]), noise_pred.noisify(x)[1]).device == device
    ends = [cosine_ddim.denoise(x, x, torch.zeros(4, device=device)), cosine_ddim.unit_variance(x)]
    for denoise in (lambda x, sig: karras.denoise(model, x, sig, log_sigma=True, centre=0.1),
                    lambda x, sig: karras.denoise_epsilon(model, x, sig)):
        ends += [list(sampler(denoise, x, karras.sigmas_karras(3)))[-1] for sampler in karras.SAMPLERS.values()]
    for eta in (0.0, 0.5):
        ts = cosine_ddim.timesteps(3)
        ends += list(cosine_ddim.sample(model, x, ts, eta, 1.0))[-1]
        ends += list(no_t.sample(lambda x: model(x, 0.0), lambda x: no_t.predict(tmodel, x), x, ts, eta))[-1]
    ends += no_t.ideal(x)(x)
    assert len(ends) == 22 and all(end.device == device and end.shape in (x.shape, (4,)) for end in ends)


def run(main, folder, *argv):
    main(["--size", "tiny", "--data", "drawn", "--device", "cpu", "--out-dir", str(folder), *argv])


MEASURED = {}


def measure_once(self, data_dir, samples, count, measure=fid.ImageEval.measure_reals):
    """What real images score, for a test in an empty folder too."""
    key = self.data, samples, count
    if key not in MEASURED: MEASURED[key] = measure(self, data_dir, samples, count)
    return MEASURED[key]


@pytest.fixture(autouse=True, scope="module")
def quicker():
    """Fewer images and steps in the tests, for seconds' sake."""
    few = lambda folder, model, x0, how, show=karras.show_loss: show(folder, model, x0[:16], how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(karras, "EXACT_STEPS", 10)
        patch.setattr(noise_pred, "LEVELS", (0.01, 0.5, 0.99))
        patch.setattr(karras, "show_loss", few)
        patch.setitem(unet.SIZES["tiny"], "samples", 16)
        patch.setattr(fid.ImageEval, "measure_reals", measure_once)
        yield


def drawn(folder):
    """What is in the pictures of a folder."""
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_noise_pred_from_end_to_end(tmp_path, capsys, monkeypatch):
    asked, measure = [], noise_pred.errors
    monkeypatch.setattr(noise_pred, "errors",
                        lambda model, x0, target: asked.append(target) or measure(model, x0, target))
    run(noise_pred.main, tmp_path, "--compare")
    assert asked == ["logit", "alphabar"]
    out, folder = capsys.readouterr().out, tmp_path / "noise_pred"
    pictures = {"question", "guesses-logit", "guesses-alphabar", "scatter-logit", "scatter-alphabar"}
    assert {p.stem for p in folder.glob("*.png")} == pictures and len(list(folder.glob("*.pt"))) == 2
    assert "always answering 0.5" in out and "lecture: 0.075" in out and "drawn clothes, not Fashion-MNIST" in out
    before, (logit, plain) = drawn(folder), json.loads((folder / "results.json").read_text())
    assert (logit["what"], plain["what"]) == ("logit", "alphabar") and len(logit["errors"]) == len(noise_pred.LEVELS)
    run(noise_pred.main, tmp_path)                                           # again: same numbers, and no training
    assert "epoch" not in capsys.readouterr().out
    again = next(r for r in json.loads((folder / "results.json").read_text()) if r["what"] == "logit")
    assert again == logit and drawn(folder) == before


def test_no_t_from_end_to_end(tmp_path, capsys):
    run(no_t.main, tmp_path, "--steps", "4")                                 # from an empty folder: lesson 2 as well
    out, folder = capsys.readouterr().out, tmp_path / "no_t"
    assert out.count("epoch 1/1") == 2 and "lecture: 0.034" in out and "drawn clothes, not Fashion-MNIST" in out
    assert "with t not known" in out
    assert len(list((tmp_path / "noise_pred").glob("*.pt"))) == len(list(folder.glob("*.pt"))) == 1
    plain, rescued, late = json.loads((folder / "results.json").read_text())
    assert [(r["what"], r["steps"], r["eta"], r["rescue"], r["clip"]) for r in (plain, rescued, late)] == [
        ("no t", 4, 1, rescue, 4) for rescue in ("none", "every", "late")]
    assert [r["predictions"] for r in (plain, rescued, late)] == [0, 4, 3] and plain["fid"] != rescued["fid"]
    run(no_t.main, tmp_path, "--steps", "4", "--rescue", "every")            # again: same numbers, and no training
    assert "epoch" not in capsys.readouterr().out
    again = json.loads((folder / "results.json").read_text())
    assert len(again) == 3 and all(again[-1][k] == rescued[k] for k in ("fid", "kid", "border", "classes"))
    run(no_t.main, tmp_path, "--steps", "10", "--clip", "3")                 # a bound is for all; "late" includes 0.7
    run(no_t.main, tmp_path, "--steps", "10", "--rescue", "last")
    run(no_t.main, tmp_path, "--steps", "10", "--rescue", "but-last")
    records = json.loads((folder / "results.json").read_text())[3:]
    assert [(r["rescue"], r["clip"], r["predictions"]) for r in records] == [
        ("none", 3, 0), ("every", 3, 10), ("late", 3, 8), ("last", 4, 1), ("but-last", 4, 9)]
    run(noise_pred.main, tmp_path)                                           # the same network as lesson 2's own
    assert "epoch" not in capsys.readouterr().out
    run(cosine_ddim.main, tmp_path, "--steps", "2")                          # and now the loss with t is known
    known = json.loads((tmp_path / "cosine_ddim" / "results.json").read_text())[0]["loss"]
    capsys.readouterr()

    run(no_t.main, tmp_path, "--trace", "--steps", "3", "--rescue", "none")
    out = capsys.readouterr().out
    assert f"with t {known:.4f}" in out
    table = out.split("x_0_hat from")[1].splitlines()[1:]
    assert [line.split()[:2] for line in table] == [["1", "0.667"], ["2", "0.333"], ["3", "0.000"]]
    assert [float(line.split()[2]) for line in table] == pytest.approx([0.25, 0.75, 1], abs=1e-3)

    run(no_t.main, tmp_path, "--curve", "--steps", "4")                      # it ends on what is sampled without it
    curves = [r for r in json.loads((folder / "results.json").read_text()) if r["what"] == "curve"]
    assert [r["rescue"] for r in curves] == ["none", "every"] and all(len(r["fid_by_step"]) == 4 for r in curves)
    for key in ("fid", "kid", "border"):
        assert [r[f"{key}_by_step"][-1] for r in curves] == [plain[key], rescued[key]]
    assert (folder / "curve.png").exists() and (folder / "steps.png").exists()

    run(no_t.main, tmp_path, "--epochs", "2", "--steps", "2")                # of this lesson's network, not lesson 2's
    out = capsys.readouterr().out
    assert "epoch 2/2" in out and len(list((tmp_path / "noise_pred").glob("*.pt"))) == 1


def test_plain_ddim_alone_needs_no_network_of_lesson_2(tmp_path):
    run(no_t.main, tmp_path, "--rescue", "none", "--steps", "2")
    (record,) = json.loads((tmp_path / "no_t" / "results.json").read_text())
    assert record["predictor"] is None and not (tmp_path / "noise_pred").exists()


def test_no_t_compare(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(no_t, "COMPARED", [("none", 1.0), ("every", 0.0), ("late", 1.0)])
    run(no_t.main, tmp_path, "--compare", "--steps", "3", "--clip", "1")
    records = json.loads((tmp_path / "no_t" / "results.json").read_text())
    assert [(r["rescue"], r["eta"], r["clip"]) for r in records] == [("none", 1, 1), ("every", 0, 1), ("late", 1, 1)]
    assert len({r["fid"] for r in records}) == 3 and "x floor" in capsys.readouterr().out


def test_no_t_ideal(tmp_path, capsys):
    run(no_t.main, tmp_path, "--ideal", "--steps", "3")
    out, folder = capsys.readouterr().out, tmp_path / "no_t"
    assert "epoch" not in out and not list(tmp_path.rglob("network-*.pt"))
    assert "know their 256 images" in out and "is what a perfect sampler does: FID" in out and "lecture's" not in out
    perfect, *records = json.loads((folder / "results.json").read_text())
    assert perfect["what"] == "ideal images, drawn" and perfect["fid"] < 2 * perfect["floor"]
    assert [(r["what"], r["rescue"], r["network"]) for r in records] == [
        ("ideal", rescue, "ideal of 256 images") for rescue in ("none", "every", "late")]
    assert records[0]["loss"] - records[0]["loss_with_t"] == pytest.approx(1 / 2048, rel=0.25)
    run(no_t.main, tmp_path, "--ideal", "--steps", "20", "--eta", "0", "--rescue", "every")
    rescued = json.loads((folder / "results.json").read_text())[-1]
    assert rescued["border"] < 0.01 and rescued["fid"] < 2 * rescued["floor"]
    run(no_t.main, tmp_path, "--ideal", "--trace", "--steps", "2")
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["2", "0.000"]
    run(no_t.main, tmp_path, "--ideal", "--curve", "--steps", "2")
    assert len(json.loads((folder / "results.json").read_text())) == 7


class Stop(Exception):
    pass


@pytest.mark.parametrize("lesson, argv", [(karras, ["--steps", "3"]), (karras, ["--steps", "3", "--model", "cosine"]),
                                          (cosine_ddim, ["--steps", "3"]), (no_t, ["--steps", "3"])])
def test_images_are_scored_in_the_range_of_real_ones(tmp_path, monkeypatch, lesson, argv):
    """Put real images in place of the noise, and samplers that leave them alone: what is scored is the real images."""
    real, _ = fid.fashion_mnist(data="drawn", count=16)
    generated = torch.no_grad()(lambda sampler, n, *rest, **more: (sampler(real[:n] * 0.5), 1.0))      # as generate is
    monkeypatch.setattr(lesson, "generate", generated)
    still = lambda denoise, x, sigs, **options: iter([x / sigs[0]])
    monkeypatch.setattr(karras, "sample_lms", still)
    monkeypatch.setitem(karras.SAMPLERS, "lms", still)
    monkeypatch.setattr(cosine_ddim, "sample", lambda find_noise, x, *rest: iter([(x, x)]))
    monkeypatch.setattr(no_t, "sample", lambda find_noise, predict, x, *rest, **more: iter([(x, x)]))

    def score(self, images):
        assert torch.allclose(images, real, atol=1e-5)
        raise Stop
    monkeypatch.setattr(fid.ImageEval, "score", score)
    with pytest.raises(Stop): run(lesson.main, tmp_path, *argv)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """-> asked(trainer, lesson, *argv): main as far as the first score, and what it handed on up to there: the question
    and the images to train on, what every sampler got, and the seed and the batch of every call of generate."""
    def asked(trainer, lesson, *argv):
        seen = {"samples": [], "generated": []}

        def train(args, name, recipes, question, images, **settings):
            assert args.seed == 7
            seen.update(question=question, images=images.clone())
            return listening, dict(network="n", weights="w", loss=0.0, train_seconds=0.0, trained_on="")

        def sample(*how, **options):
            seen["samples"].append((how, options))
            x = torch.zeros(2, 1, 32, 32)
            return x if lesson is karras else iter([(x, x)])

        def generate(sampler, n, seed, device, batch=None, amp=True):
            seen["generated"].append((seed, batch))
            return sampler(torch.zeros(2, 1, 32, 32)), 1.0

        def score(images):
            raise Stop
        monkeypatch.setattr(trainer, "train", train)
        judge = lambda *how: argparse.Namespace(score=score)
        for name, heard in (("sample", sample), ("generate", generate), ("ImageEval", judge)):
            monkeypatch.setattr(lesson, name, heard)
        monkeypatch.setattr(karras, "evaluations", lambda name, steps: steps)      # which samples, too
        with pytest.raises(Stop): run(lesson.main, tmp_path, "--seed", "7", *argv)
        assert {seed for seed, _ in seen["generated"]} == {7}
        return seen
    return asked


def listening(x, told):
    """A network whose answer says what it was given."""
    return 0.1 * x + 0.01 * torch.as_tensor(told, dtype=x.dtype).reshape(-1, 1, 1, 1)


def same_question(one, other):
    """Whether two noisify ask the same of the same images, with the same draws."""
    x0, answers = fid.fashion_mnist(data="drawn", count=8)[0], []
    for noisify in (one, other):
        torch.manual_seed(0)
        inputs, target = noisify(x0)
        answers.append([*inputs, target])
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*answers, strict=True))


def test_karras_trains_and_samples_as_it_is_asked_to(asked):
    real, x = fid.fashion_mnist(data="drawn", count=256)[0], torch.randn(2, 1, 32, 32)
    how = dict(sig_data=0.5, log_sigma=True, centre=round(float(0.3 * real.mean()), 4))
    argv = "--input-scale 0.3 --sig-data 0.5 --log-sigma --centre --rho 3 --steps 3".split()
    seen = asked(karras, karras, *argv, "--sampler", "ancestral", "--eta", "0.5")
    assert torch.allclose(seen["images"], 0.3 * real)
    assert same_question(seen["question"], lambda x0: karras.noisify(x0, **how))
    ((sampler, denoise, _, sigs), options), = seen["samples"]
    assert sampler is karras.sample_euler_ancestral and options == {"eta": 0.5}
    assert torch.equal(sigs, karras.sigmas_karras(3, rho=3.0))
    assert torch.allclose(denoise(x, 2.0), karras.denoise(listening, x, 2.0, **how))
    (_, options), = asked(karras, karras, "--sampler", "heun", "--churn", "5")["samples"]
    assert options == {"s_churn": 5.0}
    seen = asked(cosine_ddim, karras, "--model", "cosine")                   # first the exact ends, then all, then some
    assert torch.allclose(seen["images"], 0.5 * real) and len(seen["samples"]) == len(seen["generated"]) == 3
    assert same_question(seen["question"], cosine_ddim.noisify)
    assert torch.allclose(seen["samples"][1][0][1](x, 2.0), karras.denoise_epsilon(listening, x, 2.0))


def test_cosine_ddim_trains_and_samples_as_it_is_asked_to(asked):
    real, x = fid.fashion_mnist(data="drawn", count=256)[0], torch.randn(2, 1, 32, 32)
    argv = "--schedule sigmoid --tau 0.7 --input-scale 0.3 --normalise --steps 5 --eta 0.5 --spacing late --clip 1.5"
    seen, gamma = asked(cosine_ddim, cosine_ddim, *argv.split()), cosine_ddim.noise_schedule("sigmoid", None, None, 0.7)

    def question(x0):
        (x_t, t), noise = cosine_ddim.noisify(x0, abar=gamma)
        return (x_t / x_t.std((1, 2, 3), keepdim=True), t), noise
    assert torch.allclose(seen["images"], 0.3 * real) and same_question(seen["question"], question)
    ((find_noise, _, ts, eta, clip, abar), _), = seen["samples"]
    assert torch.equal(ts, cosine_ddim.timesteps(5, "late")) and (eta, clip) == (0.5, pytest.approx(1.5 * 0.3))
    assert torch.equal(abar(ts), gamma(ts))
    assert torch.allclose(find_noise(x, 0.2), listening(x / x.std((1, 2, 3), keepdim=True), 0.2))


def test_no_t_trains_and_samples_as_it_is_asked_to(asked, monkeypatch):
    real, x = fid.fashion_mnist(data="drawn", count=256)[0], torch.randn(2, 1, 32, 32)
    tmodel = lambda x_t: x_t.mean((1, 2, 3)).double()

    def network(args, x0):                                                   # lesson 2's keeps its own recipe
        assert torch.allclose(x0, 0.5 * real)
        assert (args.epochs, args.batch_size, args.lr, args.retrain, args.seed) == (None, None, None, False, 7)
        return tmodel, {"weights": "its"}
    monkeypatch.setattr(noise_pred, "network", network)
    argv = "--rescue late --eta 0.5 --clip 3 --steps 4 --epochs 2 --batch-size 8 --lr 0.1 --retrain".split()
    seen = asked(no_t, no_t, *argv)
    assert torch.allclose(seen["images"], 0.5 * real) and same_question(seen["question"], no_t.noisify)
    ((find_noise, find_abar, _, ts, eta, clip, rescue), _), = seen["samples"]
    assert (eta, clip, rescue) == (0.5, 1.5, "late") and torch.equal(ts, cosine_ddim.timesteps(4))
    assert torch.equal(find_noise(x), listening(x, 0.0)) and torch.equal(find_abar(x), no_t.predict(tmodel, x))
    assert seen["generated"] == [(7, no_t.BATCH)]


@pytest.mark.parametrize("target", ["logit", "alphabar"])
def test_noise_pred_trains_as_it_is_asked_to(tmp_path, monkeypatch, target):
    real = fid.fashion_mnist(data="drawn", count=256)[0]

    def train(args, name, recipes, question, images, *, loss, amp, **settings):
        assert torch.allclose(images, 0.5 * real) and loss is noise_pred.flat_mse and not amp
        assert same_question(question, lambda x0: noise_pred.noisify(x0, target=target))
        raise Stop
    monkeypatch.setattr(noise_pred, "train", train)
    with pytest.raises(Stop): run(noise_pred.main, tmp_path, "--target", target)


@pytest.mark.parametrize("size", ["small", "lecture"])
@pytest.mark.parametrize("lesson, small", [(cosine_ddim, "cosine_ddim"), (noise_pred, "noise_pred"), (no_t, "no_t"),
                                           (karras, "first-command")])
def test_the_networks_on_record_are_those_that_the_scripts_train(tmp_path, monkeypatch, lesson, small, size):
    """A checkpoint's name is made of all that its network depends on: size, recipe, scales, seed, number of images."""
    paths = []
    images = lambda data_dir, train, data, count=None: (torch.zeros(count or (60_000 if train else 1000), 1, 32, 32), 0)
    for what, stand_in in (("fashion_mnist", images), ("find_data", lambda *how: "fashion"),
                           ("ImageEval", lambda *how: None)):
        if hasattr(lesson, what): monkeypatch.setattr(lesson, what, stand_in)

    def fit(model, *how, path, **more):
        paths.append(path.stem)
        assert lesson is noise_pred or not model.conv_out.weight.any()       # it starts as the constant 0
        raise Stop
    monkeypatch.setattr(unet, "fit", fit)
    argv = ["--size", size, "--device", "cpu", "--out-dir", str(tmp_path)]
    with pytest.raises(Stop): lesson.main([*argv, *["--rescue", "none"] * (lesson is no_t)])
    first = next(r for r in kept(small if size == "small" else lesson.__name__, size)
                 if r["seed"] == 0 and r["what"] != "alphabar" and r.get("model") != "cosine")
    assert paths == [first["network"]]


def test_the_loss_with_t_is_that_of_the_same_recipe(tmp_path, capsys):
    args = argparse.Namespace(out_dir=tmp_path, size="small", seed=3, data="fashion")
    recipe = dict(epochs=2, batch_size=32, lr=4e-3)
    with_t = vars(args) | recipe | dict(loss=0.0383, schedule="cosine", normalise=False, input_scale=0.5)
    del with_t["out_dir"]
    others = [with_t | {key: value, "loss": 0.1, "what": key} for key, value in dict(
        size="tiny", seed=4, data="drawn", epochs=3, batch_size=64, lr=1e-2, schedule="linear", normalise=True,
        input_scale=1.0).items()]

    def said(results):
        (tmp_path / "cosine_ddim").mkdir(exist_ok=True)
        fid.save_results(tmp_path / "cosine_ddim", results)
        no_t.show_losses(args, recipe | dict(loss=0.0389, train_seconds=1.0, trained_on="a CPU"))
        return capsys.readouterr().out
    assert "without t 0.0389, with t not known" in said(others[1:])
    assert "without t 0.0389, with t 0.0383" in said([with_t, others[0]])


def test_the_trace_tells_what_was_said_of_x_t_before_each_step(monkeypatch, capsys):
    halved = lambda find_noise, find_abar, x, ts, *how: ((x * 3, x := x / 2) for _ in ts[:-1])
    monkeypatch.setattr(no_t, "sample", halved)
    args = argparse.Namespace(steps=3, eta=1.0, clip=4.0, rescue="every", seed=0, device=torch.device("cpu"))
    no_t.show_trace(args, None, lambda x: x.abs().amax((1, 2, 3)) / 10)
    first = torch.randn(no_t.BATCH, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for i, line in enumerate(capsys.readouterr().out.splitlines()[-3:]):
        x = first / 2 ** i
        said = x.abs().amax((1, 2, 3)) / 10
        expected = [said.min(), said.median(), said.max(), x.min(), x.max(), 3 * x.min(), 3 * x.max()]
        assert np.allclose([float(word) for word in line.split()[3:]], expected, atol=0.006)


def test_noised_images_are_drawn_at_one_brightness_and_schedules_shifted_by_2_ln_b(tmp_path, monkeypatch):
    drawn, charts = [], {}
    for lesson in (cosine_ddim, noise_pred):
        monkeypatch.setattr(lesson, "grid", lambda images, *rest, grid=fid.grid, **how:
                            drawn.append(images) or grid(images, *rest, **how))
    torch.manual_seed(0)
    x0 = 0.3 * (2.0 * torch.randint(2, (25, 1, 32, 32)) - 1)                 # of deviation 0.3
    cosine_ddim.show_noising(tmp_path, x0, cosine_ddim.abar, 0.3, 0)
    monkeypatch.setattr(noise_pred, "INPUT_SCALE", 0.3)
    noise_pred.show_question(tmp_path, x0)
    for images in drawn: assert torch.allclose(images.std((1, 2, 3)), torch.ones(25), atol=0.1)
    monkeypatch.setattr(cosine_ddim, "plot", lambda series, title, *rest, plot=fid.plot:
                        charts.update({title: series}) or plot(series, title, *rest))
    cosine_ddim.show_dials(tmp_path, x0[:1], ("cosine", None, None, None), 0.7, 0)
    scaled = charts["cosine, with images scaled by b"]
    assert [name for name, *_ in scaled] == ["b = 1", "b = 0.7", "b = 0.5", "b = 0.3"]      # 0.7 is what was set
    for name, t, shifted, _ in scaled:
        b, a = float(name.removeprefix("b = ")), cosine_ddim.abar(t)
        assert torch.allclose(shifted, (b ** 2 * a / (1 - a)).log(), atol=1e-3) and len(drawn) == 3


@pytest.mark.parametrize("lesson", [karras, cosine_ddim])
def test_the_true_images_beside_the_restored_ones_are_drawn_as_they_are(tmp_path, monkeypatch, lesson):
    drawn = {}
    monkeypatch.setattr(lesson, "grid", lambda images, *rest, title, grid=fid.grid, **how:
                        drawn.update({title: images}) or grid(images, *rest, title=title, **how))
    run(lesson.main, tmp_path, "--steps", "2", "--input-scale", "0.3")
    (rows,) = (images for title, images in drawn.items() if "restored in one step" in title)
    noised, _, true = rows.chunk(3)
    real, _ = fid.fashion_mnist(data="drawn", train=False, count=len(true))
    assert len(true) >= 16 and torch.allclose(true, real, atol=1e-5)
    assert torch.allclose(noised[-1].std(), torch.ones(()), atol=0.1)         # nearly pure noise, shown as it is
    assert torch.allclose(noised[0].mean(), real[0].mean(), atol=0.1)         # nearly clean


def test_karras_from_end_to_end(tmp_path, capsys, monkeypatch):
    run(karras.main, tmp_path, "--sampler", "lms", "--steps", "6")
    out, folder = capsys.readouterr().out, tmp_path / "karras"
    pictures = {"sigmas", "question", "loss-by-sigma", "one-step", "one-step-from-noise", "schedule",
                "samples-lms-6-steps"}
    assert {p.stem for p in folder.glob("*.png")} == pictures
    record = json.loads((folder / "results.json").read_text())[0]
    assert (record["what"], record["steps"], record["evaluations"], record["samples"]) == ("lms", 6, 6, 16)
    assert record["data"] == "drawn" and "drawn clothes, not Fashion-MNIST" in out and f"FID {record['fid']:.2f}" in out
    assert "epoch 1/1" in out and record["one_step_spread"] > 0
    clothes = fid.fashion_mnist(data="drawn", count=unet.SIZES["tiny"]["count"])[0]
    assert record["one_step_spread_of_best"] == pytest.approx(karras.spread_of_best(clothes / 2, 80) * 2, rel=1e-4)
    assert "16 answers differ by {one_step_spread:.3f} (standard deviation of a pixel), the best ones would by {"\
           "one_step_spread_of_best:.3f}".format(**record) in out

    before = drawn(folder)
    run(karras.main, tmp_path, "--sampler", "lms", "--steps", "6")            # again: same scores, and no training
    out = capsys.readouterr().out
    assert drawn(folder) == before
    again = json.loads((folder / "results.json").read_text())
    assert "epoch" not in out and len(again) == 1
    assert all(again[0][k] == record[k] for k in ("fid", "kid", "border", "solver_error", "classes"))

    with monkeypatch.context() as patch:                                     # with fresh noise there is no solver
        patch.delattr(karras, "sample_lms")                                  # error, and the exact end is not sought
        run(karras.main, tmp_path, "--sampler", "ancestral", "--steps", "2")
    last = json.loads((folder / "results.json").read_text())[-1]
    assert (last["what"], last["eta"], last["solver_error"]) == ("ancestral", 1, None)
    capsys.readouterr()

    run(karras.main, tmp_path, "--log-sigma", "--centre", "--sig-data", "0.5", "--steps", "3")
    assert "epoch 1/1" in capsys.readouterr().out and len(list(folder.glob("network-*.pt"))) == 2     # another one
    last = json.loads((folder / "results.json").read_text())[-1]
    assert (last["log_sigma"], last["centre"], last["sig_data"]) == (True, True, 0.5)
    assert (folder / "samples-lms-3-steps-sig-data-0.5-log-sigma-centre.png").exists()

    def asks_twice(denoise, x, sigs):                                        # a reader's own, of which nothing is known
        for sig, sig2 in karras.pairs(sigs):
            yield (x := (denoise(x, sig) + denoise(x, sig)) / 2)
    monkeypatch.setitem(karras.SAMPLERS, "asks_twice", asks_twice)
    run(karras.main, tmp_path, "--sampler", "asks_twice", "--steps", "4")
    last = json.loads((folder / "results.json").read_text())[-1]
    assert (last["what"], last["steps"], last["evaluations"]) == ("asks_twice", 4, 8)
    for slip, found in ((lambda denoise, x, sigs: x, "a tensor of shape (1, 32, 32)"),
                        (lambda denoise, x, sigs: iter([(x, x)]), "a tuple"), (lambda *how: None, "a NoneType"),
                        (lambda *how: (x for x in ()), "a generator")):
        monkeypatch.setitem(karras.SAMPLERS, "slip", slip)
        for wrong in ("--sampler", "slip"), ("--compare",):                  # said before anything is trained
            with pytest.raises(SystemExit): run(karras.main, tmp_path / "new", *wrong)
            assert f"sampler slip ends with {found}: does it yield x?" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_samplers_take_lists_and_keep_no_graph():
    model, noise = small_net(), torch.randn(2, 1, 32, 32)
    sigs, ts = karras.sigmas_karras(3), cosine_ddim.timesteps(3)
    denoise = functools.partial(karras.denoise, model)
    ways = [(sigs, lambda sigs: karras.sample(karras.sample_lms, denoise, noise, sigs)),
            (ts, lambda ts: list(cosine_ddim.sample(model, noise, ts, eta=0))[-1][1]),
            (ts, lambda ts: list(no_t.sample(lambda x: model(x, 0.0), None, noise, ts, eta=0, rescue="none"))[-1][1])]
    for levels, way in ways:
        end = way(levels)
        assert not end.requires_grad and torch.equal(way(levels.tolist()), end)


def test_only_fresh_noise_has_no_solver_error():
    assert karras.fresh_noise({"eta": 0.5}) and karras.fresh_noise({"s_churn": 5.0})
    assert not any(map(karras.fresh_noise, ({}, {"eta": 0.0}, {"order": 3})))


def test_the_exact_ends_are_exact(monkeypatch):
    monkeypatch.setattr(karras, "EXACT_STEPS", 100)                           # as it is in the script
    monkeypatch.setattr(karras.sample_lms, "__defaults__", (1,))             # a reader's change leaves the yardstick
    args = unet.argparse.Namespace(samples=100, seed=0, device=torch.device("cpu"), input_scale=0.5)
    s, last = 0.33, 0.01                                       # the path ends with one step of Euler, from 0.01 to 0
    ends = karras.exact_ends(args, lambda x, sig: x * s ** 2 / (s ** 2 + sig ** 2))
    noise = 80 * torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    known = noise * ((s ** 2 + last ** 2) / (s ** 2 + 80 ** 2)) ** 0.5 * s ** 2 / (s ** 2 + last ** 2)
    assert ends.shape == noise.shape and (ends * args.input_scale - known).square().mean().sqrt() < 1e-4


def test_cosine_ddim_from_end_to_end(tmp_path, capsys):
    run(cosine_ddim.main, tmp_path, "--steps", "5")
    out, folder = capsys.readouterr().out, tmp_path / "cosine_ddim"
    pictures = {"noised", "one-step", "schedules", "sizes", "samples-ddim-5-steps-eta-1"}
    assert {p.stem for p in folder.glob("*.png")} == pictures
    record = json.loads((folder / "results.json").read_text())[0]
    assert (record["what"], record["steps"], record["eta"], record["spacing"]) == ("ddim", 5, 1, "uniform")
    assert "drawn clothes, not Fashion-MNIST" in out and "lecture: 0.033" in out and "epoch 1/1" in out

    before = drawn(folder)
    run(cosine_ddim.main, tmp_path, "--steps", "5")                           # again: the same pictures
    assert drawn(folder) == before
    capsys.readouterr()

    run(karras.main, tmp_path, "--model", "cosine", "--steps", "3")           # the same network, and no training
    out = capsys.readouterr().out
    assert "epoch" not in out and "using the network trained before" in out
    other = json.loads((tmp_path / "karras" / "results.json").read_text())[0]
    assert (other["model"], other["network"]) == ("cosine", record["network"])

    run(cosine_ddim.main, tmp_path, *"--steps 4 --eta 0 --schedule sigmoid --start 0 --tau 0.3".split(),
        *"--input-scale 0.3 --normalise --spacing late --clip 1.5".split())
    assert "epoch 1/1" in capsys.readouterr().out and len(list(folder.glob("*.pt"))) == 2
    last = json.loads((folder / "results.json").read_text())[-1]
    assert (last["schedule"], last["input_scale"], last["normalise"]) == ("sigmoid start 0 tau 0.3", 0.3, True)
    assert drawn(folder)["schedules.png"] != before["schedules.png"]         # what was chosen is among them


def test_karras_trains_lesson_1_where_it_is_missing(tmp_path, capsys):
    run(karras.main, tmp_path, "--model", "cosine", "--steps", "2")
    out = capsys.readouterr().out
    assert "lesson 1's network" in out.split("epoch 1/1")[0]
    assert len(list((tmp_path / "cosine_ddim").glob("*.pt"))) == 1


def test_cosine_ddim_compare(tmp_path, capsys, monkeypatch):
    trials = [(4, 1.0, "uniform", None), (4, 0.0, "uniform", 1.0), (4, 1.0, "late", None)]
    monkeypatch.setattr(cosine_ddim, "COMPARED", trials)
    run(cosine_ddim.main, tmp_path, "--compare")
    records = json.loads((tmp_path / "cosine_ddim" / "results.json").read_text())
    assert [(r["eta"], r["spacing"]) for r in records] == [(1, "uniform"), (0, "uniform"), (1, "late")]
    assert len({r["fid"] for r in records}) == 3 and "x floor" in capsys.readouterr().out


def test_the_lectures_figures_stand_beside_the_settings_that_they_were_measured_with():
    ddim = dict(what="ddim", eta=1.0, spacing="uniform", clip=None, schedule="cosine", input_scale=0.5, normalise=False)
    assert set(cosine_ddim.LECTURE) == {cosine_ddim.label(ddim | {"steps": steps}) for steps in (100, 50)}
    no_time = dict(what="no t", steps=100, clip=4.0)                        # the lecture's 2, for images up to 0.5
    assert set(no_t.LECTURE) == {no_t.label(no_time | {"rescue": rescue, "eta": eta}) for rescue, eta in
                                 (("none", 1), ("every", 1), ("every", 0.5), ("every", 0))}
    usual = dict(churn=None, rho=7.0, model="karras", input_scale=0.5, sig_data=0.33)
    said = {karras.label(usual | {"what": name, "steps": steps, "eta": options.get("eta")})
            for name, steps, options in [*karras.COMPARED, ("heun", 100, {})]}
    assert set(karras.LECTURE) == said - {"euler, 20 steps", "dpmpp 2m, 20 steps"}
    for said in karras.LECTURE.values():
        score, multiple = map(float, re.fullmatch(r"(.*) \((.*) x\)", said).groups())
        assert multiple == pytest.approx(score / 0.50, abs=0.05)           # what the lecture's real images scored


def test_numbers_in_labels_are_short_and_rho_reaches_the_pictures(tmp_path):
    record = dict(what="lms", steps=20, eta=None, churn=None, model="karras", rho=3.0, input_scale=0.7,
                  sig_data=0.462)                                            # what main takes where nothing is said
    assert karras.label(record) == "lms, 20 steps, rho 3, input scale 0.7"
    assert karras.label(record | {"sig_data": 1 / 3}) == "lms, 20 steps, rho 3, input scale 0.7, sig data 0.333333"
    for show in (lambda rho: karras.show_schedule(tmp_path, 20, rho),
                 lambda rho: karras.show_paths(tmp_path, lambda x, sig: x / (1 + sig ** 2), rho, 0.5, "cpu", 0)):
        pictures = []
        for rho in (7.0, 2.0):
            show(rho)
            pictures.append(drawn(tmp_path))
        assert pictures[0] != pictures[1]
    heights = [fid.plot([("one", [1, 2], [1, 2], "line")], "", "", "", names_below=b).height for b in (False, True)]
    assert heights[0] == 400 < heights[1]


def test_pictures_show_the_noise_levels_that_stand_below_them(tmp_path, monkeypatch):
    shown, asked = [], []

    def in_place(denoise, x, sigs):                                          # as a reader may write it
        for sig, sig2 in karras.pairs(sigs):
            x += (sig2 - sig) * (x - denoise(x, sig)) / sig
            yield x
    monkeypatch.setitem(karras.SAMPLERS, "euler", in_place)
    monkeypatch.setattr(karras, "grid", lambda images, captions, *rest, title, grid=fid.grid:
                        shown.append((images, captions)) or grid(images, captions, *rest, title=title))
    karras.show_paths(tmp_path, lambda x, sig: 0 * x, 7.0, 0.5, torch.device("cpu"), 0)  # all paths are straight: x is
    (images, captions), = shown                                              # the first noise, times sigma
    noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    below = torch.tensor([float(caption) for caption in captions]).reshape(-1, 1, 1, 1)
    for i, name in enumerate(karras.SAMPLERS):
        ten = slice(10 * i, 10 * i + 10)
        expected = noise * below[ten] / below[ten].clamp(min=0.5)
        if name != "ancestral": assert torch.allclose(images[ten], expected, rtol=0.05, atol=0.01), name
    assert len(images) == 10 * len(karras.SAMPLERS)

    clothes, sig = fid.fashion_mnist(data="drawn", count=16)[0] * 0.5, torch.linspace(0.1, 4, 16)
    torch.manual_seed(0)
    karras.show_question(tmp_path, clothes, sig, {})
    torch.manual_seed(0)
    karras.noisify(clothes)                                                  # the batch that is told about
    (inputs, _), target = karras.noisify(clothes, sig=sig)
    images, captions = shown[-1]
    assert torch.equal(images, torch.cat([inputs, target]) / 2) and captions[0] == captions[16] == "0.10"

    karras.show_one_step(tmp_path, lambda x, sig: asked.append((x, sig)) or x, torch.zeros(16, 1, 32, 32),
                         torch.linspace(0.1, 4, 16), 0.5, 0)
    for x, sig in asked: assert torch.allclose(x.std((1, 2, 3)), torch.as_tensor(sig).expand(16), rtol=0.15)
    assert [torch.as_tensor(sig).numel() for _, sig in asked] == [16, 1] and asked[1][1] == 80


def test_the_readme_has_where_the_network_begins_to_matter():
    records = kept("karras-high-noise")
    assert {(r["what"], r["steps"], r["seed"], r["samples"], r["lr"]) for r in records} == {("lms", 20, 0, 2048, 4e-3)}
    known = {(r["epochs"], r["sig_data"],
              r["answer"] + (f" above sigma {r['above']}" if r.get("above") else "")): r for r in records}
    rows = table("lms, 20 steps: the answer")
    assert len(rows) == 7 and len(known) == len(records) == 16
    for name, *figures in rows:
        one, many = known[1, 0.33, name], known[16, 0.33, name]
        assert figures == [str(one["evaluations"])] + [
            shown for r in (one, many) for shown in (f"{r['fid']:.2f}", f"{r.get('same_garment', 1):.2f}")], name
        above = float(re.findall(r"\d+|$", name)[0] or 80)
        assert one["evaluations"] == many["evaluations"] == (karras.sigmas_karras(20)[:-1] <= above).sum()
    plain, long, changed = (known[how + ("as it is",)] for how in ((1, 0.33), (16, 0.33), (16, 0.66)))
    for r, folder in (plain, "first-command"), (long, "passes-16"), (changed, "passes-16-sig-data-0.66"):
        assert r["weights"] in [other["weights"] for other in kept(folder)]
    assert said_in_the_readme("too: {:.2f}, as it is {:.2f}.".format(
        known[16, 0.66, "best linear above sigma 5"]["fid"], changed["fid"]))
    cost = known[16, 0.33, "mean image above sigma 5"]["fid"] - long["fid"]
    assert said_in_the_readme(f"Above 5 it costs the better network {cost:.1f}, while")
    best = f"{plain['one_step_spread_of_best']:.3f}"
    assert said_in_the_readme(f"The best answers would hardly differ, by {best}: that is")
    assert said_in_the_readme(f"would hardly differ, by {best} (standard deviation of a pixel, images in -1..1); the "
                              f"small network's differ by {plain['one_step_spread']:.3f}, so")
    path = HERE / "results" / "lecture" / "karras" / "one-step-from-noise.png"
    picture = np.asarray(fid.Image.open(path).convert("L"))
    answers = [picture[24 + 68 * (i // 8):, 4 + 68 * (i % 8):][:64:2, :64:2] / 127.5 - 1 for i in range(16)]
    assert np.allclose([answer[:2].mean() for answer in answers], -1, atol=0.06)             # cut out right: a border
    spreads = [kept(f"passes-16-sig-data-0.66-seed-{seed}")[0]["one_step_spread"] for seed in (1, 2)]
    assert said_in_the_readme(
        f"differ by {plain['one_step_spread']:.3f} after one pass and by {long['one_step_spread']:.3f} after 16 (with "
        f"sig_data 0.66, which makes high noise count less, by {changed['one_step_spread']:.3f}, {spreads[0]:.3f} and "
        f"{spreads[1]:.3f}, three seeds), those "
        f"of the large one by {np.sqrt(np.var(answers, axis=0, ddof=1).mean()):.3f} (by its picture)")
    high = karras.stats.norm.sf((math.log(20) - karras.P_MEAN) / karras.P_STD)
    assert said_in_the_readme(f"In training {high:.2%} of sigmas are above 20: {60_000 * high:.0f} of the 60,000 in")


def test_the_readmes_lines_answer_high_noise_with_the_mean_image():
    line, lines = re.search(r"two lines, below\s+`(.*?)`\s+in\s+`karras\.main`:\n\n(.*?)\n\n",
                            (HERE / "results" / "README.md").read_text(), re.S).groups()
    assert f"        {line}\n" in inspect.getsource(karras.main)
    images, x = torch.randn(5, 1, 4, 4), torch.randn(3, 1, 4, 4)
    names = dict(images=images, denoiser=lambda x, sig: x / 2, args=argparse.Namespace(device="cpu"))
    exec(textwrap.dedent(lines), names)
    assert torch.equal(names["denoiser"](x, 20.0), x / 2)
    assert torch.equal(names["denoiser"](x, 20.1), images.mean(0).expand(3, 1, 4, 4))


def test_to_pure_noise_the_best_answers_are_nearly_the_same(tmp_path):
    clothes = fid.fashion_mnist(data="drawn", count=400)[0] * 0.5
    def best(x, sig):                                                        # where all data are these clothes
        weight = (-torch.cdist(x.flatten(1).double(), clothes.flatten(1).double()) ** 2 / (2 * sig ** 2)).softmax(1)
        return (weight @ clothes.flatten(1).double()).reshape(x.shape).float()
    torch.manual_seed(0)
    spread = best(80 * torch.randn(10_000, 1, 32, 32), 80.0).var(0).mean().sqrt().item()
    assert spread == pytest.approx(karras.spread_of_best(clothes, 80), rel=0.05) and spread < 0.03
    told = karras.show_one_step(tmp_path, lambda x, sig: best(x, 80.0), clothes[:16], torch.full((16,), 80.0), 0.5, 0)
    assert told == pytest.approx(2 * spread, rel=0.3)                        # of 16 answers, in -1..1


def test_solver_error_is_a_mean_that_one_image_can_carry_and_a_median_that_it_cannot():
    goal = torch.randn(5, 1, 4, 4)
    off = torch.tensor([0.01, 0.02, 0.03, 0.04, 2.0])[:, None, None, None]
    mean, median = karras.solver_error(goal + off, goal)
    assert mean == pytest.approx(math.sqrt((0.01 ** 2 + 0.02 ** 2 + 0.03 ** 2 + 0.04 ** 2 + 2 ** 2) / 5), rel=1e-5)
    assert median == pytest.approx(0.03, rel=1e-4) and karras.solver_error(goal, goal) == (0, 0)


def test_karras_compare(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(karras, "COMPARED", [("euler", 4, {}), ("ancestral", 4, {"eta": 0.5}), ("heun", 3, {}),
                                             ("lms", 4, {}), ("dpmpp_2m", 4, {})])
    run(karras.main, tmp_path, "--compare")
    records = json.loads((tmp_path / "karras" / "results.json").read_text())
    assert [r["what"] for r in records] == ["euler", "ancestral", "heun", "lms", "dpmpp_2m"]
    for key in ("solver_error", "solver_error_median"):
        assert [r[key] is None for r in records] == [False, True, False, False, False]
    assert (tmp_path / "karras" / "compare.png").exists() and (tmp_path / "karras" / "paths.png").exists()
    out = capsys.readouterr().out.splitlines()
    (header,) = (line for line in out if line.rstrip().endswith("solver error"))
    table = out[out.index(header) + 1:][:len(records)]
    assert [line.split()[-1] for line in table] == [
        "-" if r["solver_error"] is None else f"{r['solver_error_median']:.4f}" for r in records]
    assert sum("solver error of the median image" in line for line in out) == 4
    assert f"{karras.label(records[-1])}: {fid.describe(records[-1])}" in out[-1]


def test_paths_have_fresh_noise_that_is_new_and_the_rows_of_samplers_that_yield_every_step(tmp_path, monkeypatch):
    shown, drawn = [], karras.sample_euler_ancestral
    monkeypatch.setattr(karras, "SAMPLERS", {"jump": lambda denoise, x, sigs: iter([x]), "ancestral": drawn})
    monkeypatch.setattr(karras, "grid", lambda images, captions, columns, title: shown.append(
        (images, captions, title)) or fid.grid(images, captions, columns, title=title))
    karras.show_paths(tmp_path, lambda x, sig: 0 * x, 7.0, 0.5, torch.device("cpu"), 0)
    ((images, captions, title),) = shown
    assert len(images) == len(captions) == 10 and title.endswith("from above: ancestral")
    sigs = karras.sigmas_karras(20)[2::2]                    # where D is 0, x is all noise, and its deviation is sigma
    for x, sig in zip(images[:-1], sigs): assert x.std() * max(sig.item(), 0.5) == pytest.approx(sig.item(), rel=0.1)


def test_a_lesson_2_network_that_diverged_is_no_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise_pred, "guess", lambda model, x0, **how: (
        torch.full((len(x0),), math.inf), torch.zeros(len(x0)), x0))
    with pytest.raises(SystemExit) as stop: run(noise_pred.main, tmp_path)
    assert stop.value.code == 2 and "lower --lr" in capsys.readouterr().err
    assert not (tmp_path / "noise_pred" / "results.json").exists()


def test_the_comparison_draws_each_sampler_at_its_cost_and_the_median_error(tmp_path, monkeypatch):
    drawn, plot = {}, karras.plot
    monkeypatch.setattr(karras, "plot", lambda series, title, *rest, **how:
                        drawn.update({title: series}) or plot(series, title, *rest, **how))
    usual = dict(eta=None, churn=None, rho=7.0, model="karras", input_scale=0.5, sig_data=0.33, floor=1.0)
    karras.show_comparison(tmp_path, [
        usual | dict(what="heun", steps=20, evaluations=39, fid=5.0, border=0.1, solver_error=9.0,
                     solver_error_median=0.2),
        usual | dict(what="ancestral", steps=7, evaluations=7, fid=4.0, border=0.3, solver_error=None,
                     solver_error_median=None, eta=1.0)])
    points = {title: [(name, *xs, *ys) for name, xs, ys, kind in series if kind == "points"]
              for title, series in drawn.items()}
    assert points["FID"] == [("heun, 20 steps", 39, 5.0), ("ancestral, 7 steps, eta 1", 7, 4.0)]
    assert points["residual noise"] == [("heun, 20 steps", 39, 0.1), ("ancestral, 7 steps, eta 1", 7, 0.3)]
    (_, _, heun), (_, _, fresh) = points["solver error, median image"]
    assert heun == 0.2 and math.isnan(fresh)                                 # which plot leaves out
    assert ("real images", [7, 39], [1.0, 1.0], "line") in drawn["FID"]


@pytest.mark.parametrize("lesson, argv, message", [
    (karras, "--steps 0", "--steps: '0' is not a whole number from 1"), (karras, "--steps 2.5", "--steps"),
    (karras, "--samples 1", "--samples"), (karras, "--samples 256", "drawn at random from 256"),
    (karras, "--sampler magic", "magic"), (karras, "--churn 3", "--churn belongs to"),
    (karras, "--eta -1", "--eta"), (karras, "--eta 0.5", "--eta belongs to --sampler ancestral"),
    (karras, "--sig-data nan", "--sig-data"), (karras, "--input-scale 10", "--input-scale"),
    (cosine_ddim, "--input-scale 0.01", "--input-scale"),
    (karras, "--device cuda:99", "--device cuda:99"), (karras, "--device x", "--device"),
    (karras, "--size huge", "huge"), (karras, "--nonsense", "--nonsense"), (karras, "--epochs -1", "--epochs"),
    (karras, "--lr inf", "--lr"), (karras, "--out-dir /dev/null/x", "cannot write"),
    (karras, "--compare --steps 5", "--compare"), (karras, "--epochs 1" + 400 * "0", "--epochs"),
    (fid, "--lr 0.1", "belong to --retrain"), (fid, "--retrain --samples 9", "leave out --samples"),
    (fid, "--samples 1", "--samples"), (fid, "--steps 3", "--steps"), (fid, "--data-dir", "expected one argument"),
    (fid, "--device meta", "--device meta"), (noise_pred, "--batch-size 0", "--batch-size"),
    (noise_pred, "--batch-size 1", "whole number from 2"),
    (no_t, "--lr -1", "--lr"), (noise_pred, "--seed -1", "--seed"), (no_t, "--seed 1.5", "--seed"),
    (karras, "--rho 0", "--rho"), (karras, "--rho nan", "--rho"), (karras, "--churn nan", "--churn"),
    (karras, "--data none", "--data"), (noise_pred, "--out-dir /proc/x", "cannot write"),
    (cosine_ddim, "--compare --eta 0", "--compare"), (noise_pred, "--compare --target logit", "--compare"),
    (noise_pred, "--target sigma", "sigma"), (no_t, "--compare --eta 0", "--compare sets --eta"),
    (no_t, "--curve --rescue last", "--rescue"), (noise_pred, "--samples 9", "nothing is sampled"),
    (no_t, "--compare --trace", "not allowed with"), (no_t, "--trace --samples 9", "--trace follows one batch"),
    (no_t, "--rescue magic", "magic"), (no_t, "--ideal --epochs 3", "--ideal trains nothing"),
    (no_t, "--steps 1", "whole number from 2"),
    (karras, "--model cosine --sig-data 0.5", "belong to --model karras"),
    (cosine_ddim, "--steps 1", "--steps: '1' is not a whole number from 2"), (cosine_ddim, "--eta 1.5", "--eta"),
    (cosine_ddim, "--eta nan", "--eta"), (cosine_ddim, "--spacing odd", "odd"), (cosine_ddim, "--clip 0", "--clip"),
    (cosine_ddim, "--schedule linear --tau 1", "belong to"), (cosine_ddim, "--start 0.5 --end 0.5", "--start 0.5"),
    (cosine_ddim, "--tau 0", "--tau 0"), (cosine_ddim, "--end 1.5", "cut from 0 to 1")])
def test_bad_flags_end_with_one_line_and_status_2(tmp_path, capsys, lesson, argv, message):
    with pytest.raises(SystemExit) as stop: run(lesson.main, tmp_path, *argv.split())
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith(f"{lesson.__name__}.py: error: ") and message in said.err and said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ends_with_one_line(capsys, main, *argv):
    """What a script that ends with status 2 says: one line, on stderr."""
    with pytest.raises(SystemExit) as stop: main(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and ".py: error: " in err
    return err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which karras.py has been through, and the beginnings of another training."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(karras, "EXACT_STEPS", 2)
        run(karras.main, folder, "--steps", "2")
    network = next((folder / "karras").glob("network-*.pt"))
    network.with_suffix(".retrain").write_bytes(network.read_bytes())        # complete, but not a training's
    (folder / "fid.pt").write_bytes(fid.WEIGHTS.read_bytes())
    return folder


@pytest.mark.parametrize("victim", ["karras/network-*.pt", "karras/network-*.retrain", "fid/reals-*.pt", "fid.pt",
                                    "karras/results.json"])
def test_damage_is_named_with_its_remedy_and_nothing_is_touched(finished, victim, capsys, monkeypatch):
    path, folder = next(finished.glob(victim)), finished
    monkeypatch.setattr(fid, "WEIGHTS", folder / "fid.pt")
    monkeypatch.setattr(karras, "EXACT_STEPS", 2)
    monkeypatch.chdir(folder)
    good = path.read_bytes()
    flipped = bytearray(good)
    if path.suffix != ".json":                                               # a bit of a weight, not of the padding
        with zipfile.ZipFile(path) as archive:
            largest = archive.read(max(archive.infolist(), key=lambda part: part.file_size))
        flipped[good.index(largest) + len(largest) // 2] ^= 16
    torch.save({"settings": {}, "model": Exploit()}, folder / "exploit")
    torch.save([1, 2], folder / "foreign")
    bad = {"empty": b"", "truncated": good[:len(good) * 2 // 3], "text": b"hello", "pickle": pickle.dumps(Exploit()),
           **{name: (folder / name).read_bytes() for name in ("exploit", "foreign")}}
    if path.suffix != ".json": bad["flipped"] = bytes(flipped)
    if path.name == "results.json": bad["empty list of numbers"] = b"[1]"
    argv = ["--steps", "2"] + ["--retrain"] * (path.suffix == ".retrain")
    try:
        for what, content in bad.items():
            path.write_bytes(content)
            before = {p: sha(p) for p in folder.rglob("*") if p.is_file()}
            said = ends_with_one_line(capsys, run, karras.main, folder, *argv)
            assert str(path) in said and (said.endswith(": delete it\n") or "restore it" in said), (what, said)
            assert {p: sha(p) for p in folder.rglob("*") if p.is_file()} == before, what
    finally:
        path.write_bytes(good)
    assert not (folder / "exploited").exists()


def test_no_temporary_or_foreign_file_is_taken_for_a_checkpoint(tmp_path):
    path, recipe = tmp_path / "n.pt", dict(epochs=1, batch_size=8, lr=0.1)
    for name in ("n.pt.tmp", "n.part.tmp", "m.pt"): (tmp_path / name).write_bytes(b"half a file")
    unet.fit(model := Line(), noisy, torch.ones(32, 1, 4, 4), path=path, **recipe)
    assert model.w != 0 and torch.equal(torch.load(path, weights_only=True)["model"]["w"], model.w.data)


@not_windows
def test_a_full_disk_leaves_the_old_file(tmp_path):
    import resource
    path, limits = tmp_path / "n.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    unet.save_atomically({"settings": {}, "model": 1}, path)
    for content in ({"settings": {}, "model": torch.zeros(100_000)}, 100_000 * "x"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))       # no file larger than that
        try:
            with pytest.raises(unet.Problem, match="n.pt cannot be written"): unet.save_atomically(content, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert unet.load_checkpoint(path)["model"] == 1 and [p.name for p in tmp_path.iterdir()] == ["n.pt"]


KILLED = """
import os, random, select, signal, sys, time, torch, unet
class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1, 20_000))
    def forward(self, x):
        return self.w * x
def noisify(x):
    os.write(pipe[1], b".")
    time.sleep(0.004)
    return (x,), 2 * x + torch.randn_like(x)
@unet.script
def main(path):
    torch.manual_seed(0)
    unet.fit(Line(), noisify, torch.randn(64, 20_000), epochs=40, batch_size=8, lr=0.1, path=path)
def train(path, sign=None):
    if pid := os.fork():                                            # saves nine times out of ten imports of torch
        if sign:
            select.select(pipe[:1], [], [], 20)
            while sign == signal.SIGINT and not os.path.exists(folder + "killed.part"): time.sleep(0.001)
            time.sleep(random.uniform(0, 0.1))
            os.kill(pid, sign)
            while select.select(pipe[:1], [], [], 0)[0]: os.read(pipe[0], 1000)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try: main(path)
    except SystemExit as stop: os._exit(stop.code)
    os._exit(0)
signal.signal(signal.SIGINT, signal.default_int_handler)            # which a shell's & turns off
unet.SAVE_EVERY, pipe, folder = 0, os.pipe(), sys.argv[1] + "/"
torch.optim.Adam([torch.zeros(1)], fused=True)                      # has imports of its own
statuses = [train(folder + "killed.pt", signal.SIGINT)]
for _ in range(10):
    statuses.append(train(folder + "killed.pt", signal.SIGKILL))
    if os.path.exists(folder + "killed.part"): unet.load_checkpoint(unet.Path(folder + "killed.part"))
print(statuses, os.listdir(folder))
print([train(folder + name) for name in ("killed.pt", "whole.pt")])
"""


def test_a_script_that_was_edited_after_a_training_began_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(unet, "__file__", str(tmp_path / "unet.py"))
    for name in ("unet.py", "karras.py", "test_all.py"): (tmp_path / name).touch()
    model, path = Line(), tmp_path / "line.pt"
    train = lambda: unet.fit(model, lambda x: ((x,), x), torch.randn(8, 1, 4, 4), epochs=1, batch_size=4, lr=0.1,
                             path=path, amp=False)
    train()
    for name in ("unet.py", "karras.py", "test_all.py"): os.utime(tmp_path / name, (1, unet.STARTED - 60))
    capsys.readouterr(), train()
    assert capsys.readouterr().out == f"using the network trained before, {path}\n"
    for name in ("karras.py", "test_all.py"): os.utime(tmp_path / name, (1, unet.STARTED + 0.01))    # before training
    os.utime(path, (2**31, 2**31)), train()                 # of a copy the file is younger, but not the training
    assert "(karras.py changed since: if the change is in training, delete this file)" in capsys.readouterr().out


@not_windows
def test_ten_kills_in_a_row_at_random_moments_change_nothing(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    done = subprocess.run([sys.executable, tmp_path / "killed.py", tmp_path / "out"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE)}, timeout=120)
    assert f"{[130] + 10 * [-signal.SIGKILL.value]} ['killed.part" in done.stdout and "killed.pt'" not in done.stdout
    assert done.stdout.endswith("[0, 0]\n") and "continuing at step" in done.stdout
    assert "changed since" not in done.stdout
    assert re.search("stopped at step .* of 320; the same command continues from .*killed.part", done.stderr)
    killed, whole = (torch.load(tmp_path / "out" / name, weights_only=True)["model"]["w"]
                     for name in ("killed.pt", "whole.pt"))
    assert torch.equal(killed, whole)


@not_windows
def test_a_killed_script_resumes_to_the_same_weights(tmp_path, capsys):
    train = lambda folder: run(karras.main, tmp_path / folder, *"--epochs 2 --sampler ancestral --steps 2".split())
    train("whole")
    said = capsys.readouterr().out
    assert f"training on CPU, {torch.get_num_threads()} threads: 16 steps of 32 images" in said
    assert "continuing at step" not in said
    script = ("import test_all as t; t.unet.SAVE_EVERY = 0; "
              "t.run(t.karras.main, {!r}, '--epochs', '2', '--samples', '16')")           # whose floor is known
    shutil.copytree(tmp_path / "whole" / "fid", tmp_path / "killed" / "fid")             # only its training is wanted
    with subprocess.Popen([sys.executable, "-c", script.format(str(tmp_path / "killed"))], cwd=HERE,
                          stdout=subprocess.DEVNULL) as process:
        while not list((tmp_path / "killed").rglob("*.part")) and process.poll() is None: time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    train("killed")
    assert process.returncode == -signal.SIGKILL and "continuing at step" in capsys.readouterr().out
    whole, resumed = (torch.load(next(d.rglob("network-*.pt")), weights_only=True)["model"] for d in
                      (tmp_path / "whole" / "karras", tmp_path / "killed" / "karras"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_sampling_takes_one_batch_at_a_time():
    sizes = []
    images, _ = unet.generate(lambda noise: sizes.append(len(noise)) or noise, 1000, 0, torch.device("cpu"))
    assert sizes == 7 * [128] + [104] and len(images) == 1000


def test_unet_reports_its_speed(capsys, monkeypatch):
    unet.main(["--size", "tiny", "--device", "cpu"])
    out = capsys.readouterr().out
    assert f"{sum(p.numel() for p in unet.UNet((8, 16), 1, head_dim=16).parameters()):,} parameters" in out
    assert all(float(rate) > 0 for rate in re.findall(r"training (\d+) in float32.*one evaluation (\d+)", out)[0])

    monkeypatch.setattr(unet, "fit", lambda *args, amp, **more: {"seconds": 2.0 if amp else 4.0})    # 8 batches of 64
    monkeypatch.setattr(unet, "generate", lambda *args: (None, 0.5))
    unet.main(["--size", "tiny", "--device", "cpu"])
    assert re.search("training 128 in float32, 256 in .*; one evaluation 1024\n", capsys.readouterr().out)


def test_fid_says_what_a_score_means(tmp_path, capsys):
    run(fid.main, tmp_path)
    out = capsys.readouterr().out
    assert "the floor" in out and "pure noise" in out and "float32" in out
    scores = {r["what"]: r["fid"] for r in json.loads((tmp_path / "fid" / "results.json").read_text())}
    assert scores["real training images"] < scores["with noise of 0.1"] < scores["pure noise"]
    with pytest.raises(SystemExit) as stop: run(fid.main, tmp_path, "--retrain")
    assert stop.value.code == 2 and "Fashion-MNIST" in capsys.readouterr().err


def test_readme_and_help_agree_with_the_scripts(capsys):
    for script in (cosine_ddim, noise_pred, no_t, karras, fid, unet):
        with pytest.raises(SystemExit) as stop: script.main(["--help"])
        assert stop.value.code == 0 and "--size" in capsys.readouterr().out
    readme = (HERE / "README.md").read_text()
    assert "    pip install -r requirements.txt\n    python karras.py --sampler lms --steps 20\n" in readme
    assert "    pip install -r requirements.txt\n    pytest test_all.py\n" in readme
    size = lambda name: unet.UNet(*(unet.SIZES[name][k] for k in ("channels", "layers")),
                                  head_dim=unet.SIZES[name]["head_dim"])
    for said, network in (("0.7 million parameters", size("small")), ("15.9 million parameters", size("lecture")),
                          ("Lesson 2's network, 4.9 million", fid.resnet(1))):
        count = sum(p.numel() for p in network.parameters()) / 1e6
        assert f"{count:.1f} million" in said and said_in_the_readme(said)
    passes = [lesson.RECIPE["small"]["epochs"] for lesson in (cosine_ddim, no_t, karras)]
    assert passes == [2, 2, 1] and said_in_the_readme("Lesson 4's small network has half the training of the others")


def readmes():
    """The README, and that of results/, where side experiments and speed are."""
    return (HERE / "README.md").read_text() + "\n" + (HERE / "results" / "README.md").read_text()


def table(header):
    """The rows of the READMEs' table whose header begins so, as lists of cells."""
    readme = readmes()
    assert readme.count(f"\n| {header}") == 1, header
    lines = readme[readme.index(f"\n| {header}") + 1:].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def kept(folder, size="small"):
    """The records that the README's figures come from."""
    path = HERE / "results" / size / folder / "results.json"
    return json.loads(path.read_text()) if path.exists() or size == "small" else []


def test_everything_on_the_map_exists():
    seen = set()
    for moment, script, names, shown in table("the lecture's moment"):
        lesson = script.strip("`").removesuffix(".py")
        module, flags = sys.modules[lesson], (HERE / f"{lesson}.py").read_text()
        for name in re.findall("`([^`]+)`", names):
            assert f'"{name}"' in flags if name.startswith("--") else hasattr(module, name), (moment, name)
        for picture in re.findall(r"\S+\.png", shown):
            assert list((HERE / "results" / "small").glob(f"{lesson}*/{picture}")), (moment, picture)
        for test in re.findall("`(test_[^`]+)`", shown): assert test in globals(), (moment, test)
        seen.add(lesson)
    assert seen == {"cosine_ddim", "noise_pred", "no_t", "karras", "fid", "unet"}


def test_links_of_the_readmes_lead_somewhere_and_pictures_are_small():
    for readme in (HERE / "README.md", HERE / "results" / "README.md"):
        for name, _, section in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", readme.read_text()):
            target = readme.parent / name if name else readme
            assert target.exists(), name
            if section:
                titles = re.findall(r"^#+ (.*)", target.read_text(), re.M)
                assert section in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], section
    assert all(picture.stat().st_size < 300_000 for picture in (HERE / "results").rglob("*.png"))


LARGE_TOO = ["karras-sig-data-0.66", "cosine_ddim-seed-1", "karras-seed-1", "karras-sig-data-0.66-seed-1"]


def records_of(name, seed=0, size="small", one_pass=False):
    """Those that a row of the README stands for, which begins with "lesson 1: ddim, .." or the like: one, or none."""
    lesson, settings = name.split(": ", 1)
    folder, said = {"lesson 1": ("cosine_ddim", cosine_ddim.label), "lesson 3": ("no_t", no_t.label),
                    "lesson 4": ("karras", karras.label),
                    "lesson 1's network": ("karras", lambda r: karras.label(r).replace(", model cosine", ""))}[lesson]
    whats = {"cosine_ddim": ["ddim"], "no_t": ["no t"], "karras": karras.SAMPLERS}[folder]
    more = [r for other in LARGE_TOO for r in kept(other, size)] if size == "lecture" else []
    if one_pass: folder += "-one-pass"
    found = [r for r in kept(folder, size) + more if r["what"] in whats and (r["seed"], r["samples"]) == (seed, 2048)
             and r.get("batch_size") != 16 and said(r) == settings
             and (r.get("model") == "cosine") == ("network" in lesson)]
    assert len(found) < 2, name
    return found


def shown(record, digits):
    """A score as the README writes it: FID and, in brackets, how many floors that is."""
    return f"{record['fid']:.{digits}f} ({record['fid'] / record['floor']:.1f})"


def lectures(name):
    """What the lecture scored, as the README writes it, or nothing."""
    lesson, settings = name.split(": ", 1)
    said = {"lesson 1": cosine_ddim, "lesson 3": no_t, "lesson 4": karras}.get(lesson)
    return said.LECTURE.get(settings, "").replace(" x)", ")").replace("..", " to ") if said else ""


@pytest.mark.parametrize("lesson", ["lesson 1", "lesson 1's network", "lesson 4"])
def test_every_score_of_the_lessons_is_in_a_results_file(lesson):
    rows = table(f"{lesson} | " + ("small" if lesson == "lesson 1" else "evaluations"))
    assert len(rows) >= 4
    for name, *figures in rows:
        expected = []
        evaluations = re.search(r"(\d+) steps", name)[1] if lesson == "lesson 1" else figures.pop(0)
        for size, digits in (("small", 1), ("lecture", 2)):
            found, mark = records_of(f"{lesson}: {name}", size=size), ""
            if not found and size == "lecture":
                found, mark = records_of(f"{lesson}: {name}", seed=1, size=size), ", seed 1"
            fid_alone = size == "small" and "network" not in lesson
            expected.append("-" if not found else f"{found[0]['fid']:.1f}" if fid_alone else
                            shown(found[0], digits) + mark)
            if lesson != "lesson 4": expected.append(f"{found[0]['border']:.3f}" if found else "-")
            for r in found:
                assert (r["size"], r["data"], str(r["evaluations"])) == (size, "fashion", evaluations), name
                if mark:
                    assert r["device"] == r["trained_on"] == "NVIDIA H100 80GB HBM3", name
                elif size == "lecture":                                      # where, as the README says
                    half = "network" in lesson or name == "ddim, 20 steps, eta 1"
                    assert r["trained_on"] == "NVIDIA H200", name
                    assert r["device"] == ("CPU, 2 threads" if half else "NVIDIA H200"), name
        if lesson == "lesson 4":
            once = records_of(f"lesson 4: {name}", one_pass=True)
            expected.insert(0, f"{once[0]['fid']:.1f}" if once else "-")
            error = found[0]["solver_error_median"]
            expected.append("fresh noise" if error is None else f"{error:.4f}")
        if "network" not in lesson: expected.append(lectures(f"{lesson}: {name}"))
        assert figures == expected and set(expected) != {"-"}, name


def test_compare_makes_the_rows_of_the_readmes_tables():
    usual = dict(what="ddim", schedule="cosine", input_scale=0.5, normalise=False)
    ddim = {cosine_ddim.label(usual | dict(zip(("steps", "eta", "spacing", "clip"), trial)))
            for trial in cosine_ddim.COMPARED}
    assert {row[0] for row in table("lesson 1 | small")} - {"ddim, 20 steps, eta 1"} == ddim
    assert {row[0] for row in table("lesson 3 |")} == {f"eta {eta:g}, rescue {rescue}" for rescue, eta in no_t.COMPARED}
    usual = dict(churn=None, rho=7.0, model="karras", input_scale=0.5, sig_data=0.33)
    by_name = {karras.label(usual | {"what": name, "steps": steps, "eta": options.get("eta")})
               for name, steps, options in karras.COMPARED}
    assert {row[0] for row in table("lesson 4 | evaluations")} - by_name == {
        "ancestral, 50 steps, eta 1", "heun, 20 steps, churn 5"} and len(by_name) == len(karras.COMPARED)


def test_every_score_of_lesson_3_is_in_a_results_file():
    rows, clipped = table("lesson 3 |"), table("lesson 3, clip 1 |")
    assert len(rows) == 6 and len(clipped) == 4
    rows += [[f"{name}, clip 1", *figures, ""] for name, *figures in clipped]
    for name, *figures, lecture in rows:
        small, large = (records_of(f"lesson 3: no t, {steps} steps, {name}", size=size)[0]
                        for size, steps in (("small", 50), ("lecture", 100)))
        assert figures == [f"{small['fid']:.1f}", f"{small['border']:.3f}", shown(large, 2),
                           f"{large['border']:.3f}"], name
        assert lecture.removesuffix(", its eta unknown") == lectures(f"lesson 3: no t, 100 steps, {name}"), name
    fifty, with_t = (records_of(name, size="lecture")[0]["fid"] for name in
                     ("lesson 3: no t, 50 steps, eta 1, rescue every", "lesson 1: ddim, 100 steps, eta 1"))
    assert said_in_the_readme(f"In 50 steps with eta 1 none is, and the score is {fifty:.2f}.")
    (plain,) = records_of("lesson 3: no t, 100 steps, eta 1, rescue none", size="lecture")
    assert said_in_the_readme(f"large {plain['fid']:.2f}, with t {with_t:.2f}.")
    plain, rescued = (r for r in kept("no_t") if r["what"] == "curve")
    assert said_in_the_readme("still gains by FID in 20 steps, {:.1f} instead of {:.1f}.".format(
        *(r["fid_by_step"][-1] for r in (rescued, plain))))
    rises = [[i + 1 for i, step in enumerate(np.diff(r["kid_by_step"])) if step > 0] for r in (plain, rescued)]
    assert rises == [[], [19]] and said_in_the_readme("rises only at the rescue's last step (")
    for eta, lost in (1, 8), (0.5, 34), (0, 18):                           # the residual noise of so many white ones
        (r,) = records_of(f"lesson 3: no t, 100 steps, eta {eta:g}, rescue every", size="lecture")
        assert abs(r["border"] - 2 * math.sqrt(lost / 2048 * (1 - lost / 2048))) < 0.003
    assert said_in_the_readme("8 images of 2048") and said_in_the_readme("some 34 and 18 are lost there")
    for level, error in zip((0.001, 0.01), ("0.012", "0.013")):            # as far off as the small run's
        small, large = (dict(zip(r["levels"], r["errors"]))[level][0] for r in
                        (kept("noise_pred")[0], *kept("noise_pred", "lecture")))
        assert f"{large:.3f}" == error and abs(small - large) < 0.001
    seconds = lambda folder: sum(r["sample_seconds"] for rescue, eta in no_t.COMPARED for r in kept(folder) if [
        r.get(key) for key in ("steps", "rescue", "eta", "clip")] == [50, rescue, eta, 4])
    assert said_in_the_readme(f"to train both networks and {seconds('no_t') / 60:.0f} to sample.")
    assert said_in_the_readme(f"but the second, in {seconds('no_t-ideal') / 60:.0f} minutes on the new EPYC.")
    usual, silenced = (r["fid"] for r in kept("no_t-silenced", "lecture"))
    assert said_in_the_readme(f"1024 images score {silenced:.2f} instead of {usual:.2f}")
    first, second = re.findall(r"KID ([\d.]+)", (HERE / "results/lecture/no_t/curve-none.txt").read_text())[:2]
    assert said_in_the_readme(f"from {float(first):.2f} to {float(second):.2f}")


def test_the_readme_has_the_better_large_network():
    records = {karras.label(r).replace(", sig data 0.66", ""): r for r in kept("karras-sig-data-0.66", "lecture")}
    rows = table("the large network, `--sig-data 0.66 --lr 4e-3`")
    assert len(rows) == len(records) >= 7
    score = lambda found: f"{found[0]['fid']:.2f}" if found else "-"
    rate_alone = lambda name: [r for r in kept("karras-rate", "lecture") if karras.label(r) == name]
    assert {(r["lr"], r["sig_data"], r["seed"]) for r in kept("karras-rate", "lecture")} == {(0.004, 0.33, 0)}
    for name, *figures in rows:
        r, usual = records[name], records_of(f"lesson 4: {name}", size="lecture")
        assert (r["sig_data"], r["lr"], r["device"]) == (0.66, 0.004, "NVIDIA H200")
        assert all(other["lr"] == 0.01 for other in usual)
        error = r["solver_error_median"]
        assert figures == [str(r["evaluations"]), shown(r, 2), f"{r['kid']:.4f}",
                           "fresh noise" if error is None else f"{error:.4f}",
                           *map(score, (rate_alone(name), usual))], name
    assert {(r["sig_data"], r["lr"], r["seed"]) for r in kept("karras-sig-data-0.66-seed-1", "lecture")} == {
        (0.66, 0.004, 1)} and {(r["sig_data"], r["lr"], r["seed"]) for r in kept("karras-seed-1", "lecture")} == {
        (0.33, 0.01, 1)}
    usual, changed = ([records_of(f"lesson 4: dpmpp 2m, 20 steps{how}", seed, "lecture")[0]["fid"] for seed in (0, 1)]
                      for how in ("", ", sig data 0.66"))
    (rate,) = rate_alone("dpmpp 2m, 20 steps")
    noisy = [records_of("lesson 4: ancestral, 50 steps, eta 1", seed, "lecture")[0]["fid"] for seed in (0, 1)]
    (noisy_rate,) = rate_alone("ancestral, 50 steps, eta 1")
    assert said_in_the_readme(f"DPM++ in 20 steps by the changed network, {changed[0]:.2f} instead of {usual[0]:.2f}:")
    assert said_in_the_readme("eta 1 scores {:.2f} in 20, {:.2f} in 50 and {:.2f} in 100.".format(
        *(records[f"ancestral, {steps} steps, eta 1"]["fid"] for steps in (20, 50, 100))))
    assert said_in_the_readme("in 20 steps by {:.1f} and {:.1f} (from {:.2f} to {:.2f} and {:.2f}).".format(
        *(rate["fid"] - fid for fid in changed), rate["fid"], *changed))
    assert said_in_the_readme(
        "DPM++ {:.2f}, by the lecture's rate {:.2f} and {:.2f}; 50 ancestral steps {:.2f}, by the lecture's rate "
        "{:.2f} and {:.2f}.".format(rate["fid"], *usual, noisy_rate["fid"], *noisy))
    rates = kept("karras-rate")
    assert [(r["lr"], r["sig_data"], r["epochs"]) for r in rates] == [
        (lr, sig_data, 1) for lr in (0.01, 0.004) for sig_data in (0.33, 0.66)]
    assert said_in_the_readme("{:.1f} with neither, {:.1f} with sig_data alone, {:.1f} with the lower rate alone, "
                              "{:.1f} with both".format(*(r["fid"] for r in rates)))
    assert {(r["sig_data"], r["lr"], round(r["loss"], 2)) for r in kept("karras-collapsed", "lecture")} == {
        (0.66, 0.01, 0.79)}


def test_the_readme_has_two_seeds_of_the_large_networks():
    both = {"lesson 1: ddim, eta 1": ["lesson 1: ddim, {} steps, eta 1"] * 3} | {
        f"lesson 4, {name}": [f"lesson 4: {what}{how}" for what in (
            "dpmpp 2m, {} steps", "ancestral, {} steps, eta 1", "ancestral, {} steps, eta 1")]
        for name, how in (("the lecture's recipe", ""), ("sig data 0.66, lr 0.004", ", sig data 0.66"))}
    rate_alone = {karras.label(r): [r] for r in kept("karras-rate", "lecture")}
    rows = table("FID of the large networks: seed 0, seed 1 |")
    assert {name for name, *_ in rows} == {*both, "lesson 4, lr 0.004"} and len(rows) == 4
    for name, *figures in rows:
        for figure, steps, i in zip(figures, (20, 50, 100), range(3)):
            what = both.get(name, both["lesson 4, the lecture's recipe"])[i].format(steps)
            found = [records_of(what, seed, "lecture") for seed in (0, 1)] if name in both else [
                rate_alone[what.removeprefix("lesson 4: ")], []]
            if (name, steps) == ("lesson 4, the lecture's recipe", 100):
                found[0] = records_of("lesson 4: ancestral, 100 steps, eta 0.5", size="lecture")
                figure = figure.replace(" (eta 0.5)", "", 1)
            assert figure == ", ".join(f"{r[0]['fid']:.2f}" if r else "-" for r in found), (name, steps)
    folders = ("cosine_ddim", "karras", *LARGE_TOO)
    scores = {}
    for r in (r for folder in folders for r in kept(folder, "lecture") if r["samples"] == 2048):
        label = cosine_ddim.label(r) if r["what"] == "ddim" else karras.label(r)
        scores.setdefault(label, {}).setdefault(r["seed"], r["fid"])
    apart = sorted((abs(two[0] - two[1]), label) for label, two in scores.items() if len(two) == 2)
    assert len(apart) >= 13 and apart[-1][0] < 1 and said_in_the_readme("- 1 between two large networks,")
    assert [label for _, label in apart[-2:]] == ["ancestral, 50 steps, eta 1", "ddim, 20 steps, eta 1"]
    assert said_in_the_readme(f"largest is {apart[-1][0]:.2f} (DDIM in 20 steps, where") and said_in_the_readme(
        f"then {apart[-2][0]:.2f} (50 ancestral steps by the lecture's recipe).")


def test_the_overview_has_the_lessons_scores():
    rows = table("| small: FID")
    assert len(rows) >= 10
    for name, *figures, lecture in rows:
        name = name.removesuffix(" (large: and lr 0.004)")
        small, large = (name.replace("50 or 100", steps) for steps in ("50", "100"))
        assert lecture.removesuffix(", its eta unknown") == lectures(large), name
        found = records_of(small, one_pass="lesson 4" in name), records_of(large, size="lecture")
        assert figures == [shown(r[0], digits) if r else "-" for r, digits in zip(found, (1, 2))], name
    (ddim,), (lms,) = (records_of(name, size="lecture") for name in
                       ("lesson 1: ddim, 100 steps, eta 1", "lesson 4: lms, 20 steps"))
    (many,) = [r for r in kept("fid") if r["what"] == "how many" and r["samples"] == 10_000]
    assert said_in_the_readme(f"These score {ddim['fid']:.2f}; 2048 other real images score {ddim['floor']:.2f}, and "
                              f"not 0, because 2048 are few: 10,000 score {many['fid']:.2f}.)")
    halved = next(r for r in kept("half-range", "lecture")
                  if (r["range"], r["what"], r["seed"]) == (0.5, "lms, 20 steps", 0))
    assert said_in_the_readme(f"The large network scores {lms['fid']:.2f} (the lecture's 1.76 is on")
    assert said_in_the_readme(
        "In -0.5..0.5 the large network's LMS has {:.2f}, {:.1f} floors ({:.1f} in float32); the lecture's 1.76 is 3.5."
        .format(halved["fid"], halved["fid"] / halved["floor"], halved["fid_float32"] / halved["floor_float32"]))


def test_what_came_out_is_what_the_large_networks_scored():
    one = lambda name: records_of(name, size="lecture")[0]
    score = lambda name: f"{one(name)['fid']:.2f}"
    ddim = [score(f"lesson 1: ddim, {steps} steps, eta 1") for steps in (100, 50, 20)]
    assert said_in_the_readme("scores {} in 100 steps, {} in 50, {} in 20.".format(*ddim))
    plain, rescued, still, saved = (score(f"lesson 3: no t, 100 steps, eta {eta}, rescue {rescue}")
                                    for eta in (1, 0) for rescue in ("none", "every"))
    assert said_in_the_readme(f"({plain} instead of {ddim[0]})") and said_in_the_readme(
        f"with the large network: {rescued}, and without fresh noise {saved} instead of {still}.")
    again = lambda name: f"{records_of(name, 1, 'lecture')[0]['fid']:.2f}"
    ddim_too = [again(f"lesson 1: ddim, {steps} steps, eta 1") for steps in (100, 50, 20)]
    still = again("lesson 1: ddim, 50 steps, eta 0")
    assert said_in_the_readme(f"which scores {ddim_too[1]} with DDIM in 50 steps, and {still} with eta 0.")
    by_dpmpp, by_lms = (again(f"lesson 1's network: {how}, 20 steps") for how in ("dpmpp 2m", "lms"))
    assert float(by_lms) > float(ddim_too[2]) - 0.1 > float(by_dpmpp)                      # "LMS gains nothing"
    half, none = (again(f"lesson 1: ddim, 20 steps, eta {eta}") for eta in ("0.5", "0"))
    assert said_in_the_readme(f"scores {half} with eta 0.5 in 20 steps and {ddim_too[2]} with 1 ({none} with 0;")
    assert said_in_the_readme(f"a little ahead: {by_dpmpp}, where DDIM has {ddim_too[2]}, or {half} with eta 0.5 (seed "
                              "1),")
    in_20 = half
    half, half_too = (of("lesson 1: ddim, 50 steps, eta 0.5") for of in (score, again))
    assert said_in_the_readme(
        f"{half_too} and {ddim_too[1]} in 50. By seed 0, in 50 steps, it did not: {half} and {ddim[1]}.")
    assert said_in_the_readme(f"of those tried, is {by_dpmpp}, by lesson 4's DPM++.")
    assert said_in_the_readme(f"DDIM with eta 0.5 has {in_20} in 20, seed 1, and {half}, {half_too} in 50.")
    walked, walked_too = (of("lesson 1's network: ancestral, 50 steps, eta 1") for of in (score, again))
    assert float(walked) > float(ddim[1]) and float(walked_too) > float(ddim_too[1])       # "gain nothing", too
    folders = ("cosine_ddim", "karras", "karras-rate", *LARGE_TOO)
    made = [r for folder in folders for r in kept(folder, "lecture") if r["samples"] == 2048]
    counts = [[n for r in made if how(r) for n in r["classes"]] for how in (
        lambda r: (r["what"], r["steps"], r.get("model")) == ("lms", 20, "karras"),
        lambda r: (r["what"], r["steps"]) == ("ddim", 100), lambda r: r["steps"] == 20 and r.get("eta"))]
    assert said_in_the_readme(
        "between {} and {} of each (LMS in 20 steps) or {} and {} (DDIM in 100), where equal shares are 205. In 20 "
        "steps with fresh noise they are less even ({} to {}).".format(
            *(end(some) for some in counts for end in (min, max))))
    sigs = karras.sigmas_karras(100)[:-1]
    sig, sig2 = sigs[:-1], sigs[1:]
    new = (0.5 ** 2 * (sig ** 2 - sig2 ** 2) / sig ** 2).median()            # sigma_up^2 / sig2^2
    assert said_in_the_readme(f"in 100 steps about {new:.0%} of its variance")
    assert karras.sigmas_karras(20, rho=1)[-3:].tolist() == pytest.approx([4.22, 0.01, 0], abs=0.01)


def said_in_the_readme(sentence):
    return sentence in " ".join(readmes().split())


def test_the_readme_has_the_lectures_size(capsys):
    (half,), (full,) = kept("karras-half", "lecture"), records_of("lesson 4: lms, 20 steps", size="lecture")
    assert half["network"] == full["network"] and abs(half["fid"] - full["fid"]) < full["floor_sd"]
    assert said_in_the_readme(f"score {half['fid']:.2f} by LMS in 20 steps, where the H200 has {full['fid']:.2f}")
    (_, *reals), *rows = table("the classifier sees images in")
    assert len(rows) == 7
    for name, *figures in rows:
        full, halved = (next(r for r in kept("half-range", "lecture") if r["what"] == name.removeprefix("lesson 4: ")
                             and (r["range"], r["samples"], r["seed"]) == (scale, 2048, 0)) for scale in (1.0, 0.5))
        assert figures == [cell for r in (full, halved) for cell in
                           (f"{r['fid']:.2f}", f"{r['fid'] / r['floor']:.1f}", f"{r['kid']:.4f}")], name
        assert reals == [f"{full['floor']:.2f}", "1.0", "", f"{halved['floor']:.2f}", "1.0", ""]
    rows = table("made on an H100, in 8 bits | seed")
    made = [r for r in kept("half-range", "lecture") if "H100" in r["trained_on"]]
    assert 2 * len(rows) == len(made) == 46
    for name, seed, *figures in rows:
        full, halved = (next(r for r in made if (r["range"], str(r["seed"])) == (scale, seed)
                             and r["what"] == name.removeprefix("lesson 4: ").removeprefix("lesson 1: "))
                        for scale in (1.0, 0.5))
        assert figures == [cell for r in (full, halved) for cell in
                           (f"{r['fid']:.2f}", f"{r['fid'] / r['floor']:.1f}", f"{r['kid']:.4f}")], name
    known = {(r["what"], r["seed"], r["range"]): r["fid"] for r in made}
    by_dpmpp = [f"{known[name + ', 20 steps' + how, seed, scale]:.2f}" for scale in (1.0, 0.5) for name, how, seed in (
        ("lesson 1's network: dpmpp 2m", "", 1), ("dpmpp 2m", "", 1), ("dpmpp 2m", ", lr 0.004", 0),
        ("dpmpp 2m", ", sig data 0.66, lr 0.004", 1))]
    assert [sorted(half, reverse=True) for half in (by_dpmpp[:4], by_dpmpp[4:])] == [by_dpmpp[:4], by_dpmpp[4:]]
    assert said_in_the_readme("({}; halved {})".format(", ".join(by_dpmpp[:4]), ", ".join(by_dpmpp[4:])))
    noisy = [f"{known[f'ddim, 50 steps, {how}', 1, scale]:.2f}" for scale in (0.5, 1.0) for how in
             ("eta 1", "eta 0.5", "eta 1, late steps")]
    assert said_in_the_readme(
        "{} with eta 1, {} with 0.5, {} with late steps ({}, {} and {} on the first)".format(*noisy))
    pair = ("lesson 1's network: ancestral, 50 steps, eta 1", 1), ("ancestral, 50 steps, eta 1, lr 0.004", 0)
    ours, theirs, *halves = (known[what, seed, scale] for scale in (1.0, 0.5) for what, seed in pair)
    assert said_in_the_readme("by {:.1f} ({:.2f} to {:.2f}), which may be luck, and ties with it on the other ({:.2f} "
                              "to {:.2f})".format(theirs - ours, ours, theirs, *halves))
    lms = [known["lms, 20 steps", 1, scale] for scale in (1.0, 0.5)]
    assert said_in_the_readme(f"({lms[0]:.2f} to {noisy[3]}) and wins on the other ({lms[1]:.2f} to {noisy[0]}, though "
                              f"DDIM with eta 0.5 has {noisy[1]})")
    dpmpp = next(r for r in kept("half-range", "lecture") if r["range"] == 0.5 and r["what"].startswith("dpmpp"))
    ours, rounded = dpmpp["fid"] / dpmpp["floor"], dpmpp["fid_float32"] / dpmpp["floor_float32"]
    assert said_in_the_readme(f"DPM++ has {ours:.1f} in 20 evaluations ({rounded:.1f} in float32), and the lecture's "
                              f"best, Heun, {re.search('[(](.*) x', karras.LECTURE['heun, 50 steps'])[1]} in 99")
    few, many = (r for r in kept("karras", "lecture") if karras.label(r) == "heun, 20 steps")
    assert (few["samples"], many["samples"]) == (2048, 10_000) and said_in_the_readme(
        "Heun in 20 steps scores {:.2f} with 2048 images and {:.2f} with 10,000, which is {:.1f} and {:.1f} floors; "
        "FID less the floor is {:.2f} and {:.2f}".format(
            few["fid"], many["fid"], few["fid"] / few["floor"], many["fid"] / many["floor"],
            few["fid"] - few["floor"], many["fid"] - many["floor"]))
    steps = [r for r in kept("speed", "lecture") if "images_per_s" in r]
    assert sorted(row[1:] for row in table("a training step of 512")) == sorted(
        [f"{r['ms_per_step']:.1f}", f"{r['images_per_s']:,.0f}"] for r in steps)
    known = {r["what"]: r for r in kept("speed", "lecture")}
    asked = "an evaluation of 1024 images, "
    fused = known[asked + "compiled, group norm in bfloat16, explicit attention up to 64 pixels"]
    assert said_in_the_readme(f"takes {fused['ms']:.1f} ms instead of {known[asked + 'eager']['ms']:.1f}, and "
                              f"{fused['first_s']:.0f} s before the first")
    (plain,) = records_of("lesson 3: no t, 100 steps, eta 1, rescue none", size="lecture")
    (walked,) = records_of("lesson 4: ancestral, 100 steps, eta 1, sig data 0.66", size="lecture")
    assert said_in_the_readme(f"25 passes took {plain['train_seconds']:.0f} s")
    assert said_in_the_readme(f"100 evaluations of 2048 images take {walked['sample_seconds']:.1f} s")
    *rows, older = table("the first command |")
    *runs, by_dpmpp, by_euler = kept("first-command")
    assert [karras.label(r) for r in (by_dpmpp, by_euler)] == ["dpmpp 2m, 20 steps", "euler, 100 steps"]
    assert [(row[2], row[3], row[5]) for row in rows] == [
        (f"{r['train_seconds']:.0f} s", f"{r['sample_seconds']:.0f} s", f"{r['fid']:.1f}") for r in runs]
    assert all(r["precision"] in row[0] for row, r in zip(rows, runs) if not row[0].startswith("the same"))
    assert [r["epochs"] for r in runs] == 10 * [1] + 5 * [2]
    usual = [row[1] for row, r in zip(rows, runs) if r["epochs"] == 1 and r != runs[5]]  # by an older choice of format
    minutes = sorted(int(m) + int(s) / 60 for m, s in (re.findall("[0-9]+", total) for total in usual))
    assert said_in_the_readme(f"took between {minutes[0]:.0f} minutes (a new AMD EPYC) and {minutes[-1]:.0f} (an old "
                              "one)")
    by_lms = next(r for r in kept("karras-float32") if karras.label(r) == "lms, 20 steps" and r["samples"] == 2048)
    assert (older[2], older[5]) == (f"{by_lms['train_seconds']:.0f} s", f"{by_lms['fid']:.1f}")
    one, again, third, intel, repeated, slower, new, kin, today, amx, two, now, earlier, *_ = runs
    assert (intel["precision"], slower["precision"]) == ("float32", "bfloat16")
    assert intel["weights"] == repeated["weights"] != slower["weights"]
    assert intel["train_seconds"] < slower["train_seconds"] and intel["sample_seconds"] < slower["sample_seconds"]
    assert {r["weights"] for r in (again, third, by_dpmpp, by_euler)} == {one["weights"]}
    assert earlier["weights"] == records_of("lesson 4: lms, 20 steps")[0]["weights"] != now["weights"]
    by_passes = {r["epochs"]: r["weights"] for r in kept("passes") if r["what"] == "lms" and r["sig_data"] == 0.33}
    assert said_in_the_readme("gave the same one after one pass and after two") and by_passes[2] == now["weights"]
    assert new["weights"] == kin["weights"] == today["weights"] == by_passes[1]
    by_amx, in_float32 = kept("karras-one-pass-intel")[:3], kept("karras-one-pass-intel")[3:]
    assert amx == by_amx[0] and said_in_the_readme("two kinds of Intel, both in float32, the same after one pass")
    assert in_float32[0]["weights"] == intel["weights"]
    as_it_is = [[r for r in kept(folder) if (r["what"], r["epochs"], r["batch_size"], r["samples"]) == (
        "lms", 1, 32, 2048) and karras.label(r) == "lms, 20 steps" and r.get("recipe", "as it is") == "as it is"]
                for folder in ("karras-one-pass", "recipe")]
    rows = table("lesson 4, one pass: lms, 20 steps, FID of seed")
    for (name, *figures), found in zip(rows, [*as_it_is, in_float32, by_amx], strict=True):
        assert figures == [f"{r['fid']:.2f}" for r in found] and [r["seed"] for r in found] == [0, 1, 2]
        assert all(r["precision"] in name for r in found)
    assert said_in_the_readme(f"from {in_float32[0]['fid']:.1f} to {amx['fid']:.1f} with seed 0.")
    assert said_in_the_readme("trained in {:.0f} to {:.0f} s in bfloat16, in {:.0f} to {:.0f} s in float32".format(
        *(f(r["train_seconds"] for r in some) for some in (by_amx, in_float32) for f in (min, max))))
    assert said_in_the_readme(f"scores {now['fid']:.1f} instead of {earlier['fid']:.1f}")
    (default, *_), batches_of_16 = ([r for r in kept("karras-one-pass") if r["batch_size"] == n] for n in (32, 16))
    both = [(r, records_of(f"lesson 4: {karras.label(r)}")[0]) for r in kept("karras-one-pass")
            if r["weights"] == one["weights"] and r["rho"] == 7]
    passes = {(r["epochs"], karras.label(r)): r["fid"] for r in kept("passes") if r["what"] != "ddim"}
    lost = [once["fid"] - twice["fid"] for once, twice in both] + [
        fid - passes[2, name] for (epochs, name), fid in passes.items() if epochs == 1]
    assert len(both) == 9 and len(lost) == 12
    assert said_in_the_readme(f"lose about as much, {min(lost):.0f} to {max(lost):.0f}, and")
    once, twice = ([karras.label(r) for r in sorted(some, key=lambda r: r["fid"])
                    if not r["eta"] and not r["churn"] and r["samples"] == 2048]
                   for some in ([r for r, _ in both], kept("karras-float32")))
    assert once == twice and len(once) == 6
    assert said_in_the_readme("takes {:.0f} minutes to train and {:.0f} to sample".format(
        max(r["train_seconds"] for r, _ in both) / 60,
        sum(r["sample_seconds"] for r, _ in both if r["eta"] != 1 and not r["churn"]) / 60))
    assert default == one and {k: one[k] for k in karras.RECIPE["small"]} == karras.RECIPE["small"]
    fid.comparison([today], karras.label, karras.LECTURE, "out/karras")
    for line in capsys.readouterr().out.splitlines()[:3]: assert f"\n    {line}\n" in readmes()
    assert said_in_the_readme(f"a FID of {intel['fid']:.0f} to {amx['fid']:.0f}, near {two['fid']:.0f} with twice the "
                              "training")
    assert said_in_the_readme(f"scores {one['fid']:.1f} by LMS in 20 steps, where two passes on the same machine score "
                              f"{two['fid']:.1f}")
    for lesson, name in (cosine_ddim, "lesson 1: ddim, 50 steps, eta 1"), (no_t, "lesson 3: no t, 50 steps, eta 1, "
                                                                           "rescue none"):
        (r,) = records_of(name)
        assert {k: r[k] for k in lesson.RECIPE["small"]} == lesson.RECIPE["small"]
    plain, rescued, bounded, *_ = kept("no_t-one-pass")
    assert said_in_the_readme(f"without the rescue it scores {plain['fid']:.1f} and burns out or darkens many "
                              f"clothes (residual noise {plain['border']:.3f}), with it {rescued['fid']:.1f} and loses "
                              f"many images, with it and clip 1 {bounded['fid']:.1f} (")
    assert [(r["batch_size"], r["epochs"], r["lr"]) for r in batches_of_16] == [(16, 1, 4e-3), (16, 1, 2.5e-3)]
    assert said_in_the_readme("{1:.1f} with a peak rate of 2.5e-3, {0:.1f} with 4e-3".format(
        *(r["fid"] for r in batches_of_16)))
    trained, _, sampled, _ = (r["ratio"] for r in kept("speed"))
    assert said_in_the_readme(f"training is {trained:.2f} times and sampling {sampled:.2f} times as fast")
    cells = lambda r: [f"{r['images_per_s']:.1f}", f"{r['ratio']:.2f}" + (
        f" ({r['ratio_low']:.2f}, {r['ratio_high']:.2f})" if r["ratio_high"] > 1 else "")]
    records = kept("speed-cpu", "lecture")
    assert table("training on two cores |") == [
        [intel["what"].removeprefix("training, batch 64: "), *cells(intel), *cells(amd)]
        for intel, amd in zip(records[18:], records[3:6], strict=True)]
    by_amx, in_float32, _ = records[18:]
    assert said_in_the_readme(f"the median of {by_amx['rounds']} rounds on the Intel (model 167) and "
                              f"{records[3]['rounds']} on the EPYC (model 17)")
    assert said_in_the_readme("ratios are between {:.2f} and {:.2f}, in float32 between {:.2f} and {:.2f}.".format(
        *by_amx["ratio_quartiles"], *in_float32["ratio_quartiles"]))
    assert said_in_the_readme("(model 207) had {:.2f} and {:.2f}.".format(*(r["ratio"] for r in records[:2])))
    assert said_in_the_readme("float32 trains {} images/s, {} times diffusers'".format(*cells(records[6])))
    again, (rate, ratio) = records[8], cells(records[8])
    assert said_in_the_readme("in {} rounds, {} images/s, {}; half of them between {:.2f} and {:.2f})".format(
        again["rounds"], rate, ratio[:-1], *again["ratio_quartiles"]))
    here, _, bfloat16, *_, now, padded, _ = records[10:18]
    (rate, ratio), *others = map(cells, (here, now, padded, bfloat16))
    assert said_in_the_readme("float32 trains {} images/s in {} rounds, {}; half of them between {:.2f} and {:.2f})"
                              .format(rate, here["rounds"], ratio[:-1], *here["ratio_quartiles"]))
    assert said_in_the_readme(
        "is 1.06 times as fast there: {1} times diffusers', with padding {2}, in {0} rounds of both in turn. In "
        "bfloat16 it was {3} times diffusers'".format(now["rounds"], *(ratio for _, ratio in others)))
    assert f"{now['images_per_s'] / padded['images_per_s']:.2f}" == "1.06"
    assert {f"{r['ratio']:.1f}" for r in (records[4], again, here, now, in_float32)} == {"1.1", "1.2"}
    assert {f"{r['ratio']:.1f}" for r in (records[3], by_amx)} == {"1.7"} and said_in_the_readme(
        "trains 1.1 to 1.2 times as fast in float32 as diffusers' `UNet2DModel` as it comes, and 1.7 times in bfloat16")


def test_the_readme_has_the_speed_on_an_h100():
    known, asked = {r["what"]: r for r in kept("speed-h100", "lecture")}, "an evaluation of 1024 images, eager, "
    assert [row[1] for row in table("an eager evaluation of 1024")] == [f"{known[asked + how]['ms']:.1f}" for how in (
        "channels_last, group norm in float32, attention fused",
        "contiguous_format, group norm in float32, attention fused",
        "channels_last, group norm in bfloat16, attention fused",
        "contiguous_format, group norm in bfloat16, attention fused",
        "contiguous_format, group norm in bfloat16, attention plain <= 64")]
    sizes = {256: "256 pixels, 8 heads", 64: "64 pixels, 16 heads", 16: "16 pixels, 32 heads"}
    times = [known[f"attention among {sizes[pixels]} of 8 channels, 512 images, {kernel}_ATTENTION"]
             ["forward_and_backward_ms"] for pixels, kernel in (
                 (256, "CUDNN"), (256, "FLASH"), (64, "EFFICIENT"), (16, "EFFICIENT"), (64, "CUDNN"), (16, "CUDNN"))]
    assert said_in_the_readme(
        "{:.2f} ms forward and backward for 512 images, where FlashAttention takes {:.2f}. For 64 and 16 pixels the "
        "memory-efficient kernel is faster, {:.2f} and {:.2f} ms instead of {:.2f} and {:.2f}.".format(*times))
    *_, few, fewest, many, most = times                                    # among 64 pixels 5 times, among 16 6 times
    assert said_in_the_readme(f"a training step about {5 * (many - few) + 6 * (most - fewest):.1f} of its 37.6 ms")
    log = (HERE / "results/lecture/speed-h100/training.txt").read_text()
    rates = [int(rate) for rate in re.findall(r"  (\d+) images/s", log)]
    assert f"{512 / np.median(rates) * 1e3:.1f}" == "37.6" and said_in_the_readme("37.6 ms, 13,600 images/s.")
    (first, *_), (later, *_) = kept("karras-rate", "lecture"), kept("cosine_ddim-seed-1", "lecture")
    assert said_in_the_readme(
        f"25 passes take {later['train_seconds']:.0f} s, {later['first_step_seconds']:.0f} of them for compiling "
        f"again; the first time {first['train_seconds']:.0f} s, {first['first_step_seconds']:.0f} of them for "
        f"compiling. 100 evaluations of 2048 images take {later['sample_seconds']:.0f} s.")


def test_the_readme_has_what_more_passes_bring():
    records = kept("passes")
    assert {(r["seed"], r["samples"], r["lr"], r["batch_size"]) for r in records} == {(0, 2048, 4e-3, 32)}
    names = ["lms, 20 steps", "dpmpp 2m, 20 steps", "ancestral, 50 steps, eta 1", "ancestral, 100 steps, eta 1"]
    known = {(r["epochs"], cosine_ddim.label(r) if r["what"] == "ddim" else karras.label(r)): r for r in records}
    assert len(known) == len(records) == 23
    named = lambda records: {cosine_ddim.label(r) if r["what"] == "ddim" else karras.label(r): r for r in records}
    twice = named(kept("passes-16"))
    assert {(r["epochs"], r["seed"], r["samples"], r["lr"]) for r in twice.values()} == {(16, 0, 2048, 4e-3)}
    known |= {(16, name): r for name, r in twice.items()}
    twice_again, third = others = [named(kept(f"passes-16-seed-{seed}")) for seed in (1, 2)]
    for seed, more in enumerate(others, 1):
        assert {(r["epochs"], r["seed"], r["samples"], r["lr"]) for r in more.values()} == {(16, seed, 2048, 4e-3)}
        known |= {(16, f"{name}, seed {seed}"): r for name, r in more.items()}
    all_changed = [named(kept("passes-16-sig-data-0.66" + more)) for more in ("", "-seed-1", "-seed-2")]
    for seed, changed in enumerate(all_changed):
        assert {(r["epochs"], r["seed"], r["samples"], r["lr"]) for r in changed.values()} == {(16, seed, 2048, 4e-3)}
        known |= {(16, name + (f", seed {seed}" if seed else "")): r for name, r in changed.items()}
    rows = table("FID after so many passes")
    which = [(1, ""), (2, ""), (4, ""), (8, ""), (16, ""), (16, ", seed 1"), (16, ", seed 2"), (8, ", sig data 0.66"),
             *((16, ", sig data 0.66" + more) for more in ("", ", seed 1", ", seed 2")), (8, ", model cosine")]
    for row, (epochs, more) in zip(rows, which, strict=True):
        found = [known.get((epochs, name + more)) for name in names]
        assert row[0].startswith(str(epochs)) and row[1:] == [f"{r['fid']:.2f}" if r else "-" for r in found]
        sig_data = None if "cosine" in more else 0.66 if "0.66" in more else 0.33
        assert all(r["sig_data"] == sig_data for r in found if r)
    again = [named(kept(f"passes-seed-{seed}")) for seed in (1, 2)]
    for seed, others in enumerate(again, 1):
        assert {(r["seed"], r["epochs"], r["samples"], r["lr"]) for r in others.values()} == {(seed, 8, 2048, 4e-3)}
    (still,) = [r for r in kept("eta-below-1") if (r.get("epochs"), r["what"], r.get("eta"), r.get("answer")) == (
        8, "ddim", 0, "as it is")]
    seeds = {name: (known.get((8, name), still), *(others[name] for others in again)) for name in again[0]}
    rows = table("eight passes: FID of seed | 0 | 1 | 2 |")
    assert len(rows) == len(again[0]) == len(again[1]) == 10
    for name, *figures in rows:
        assert figures == [f"{r['fid']:.2f}" for r in seeds[name.split(": ")[1]]], name
    by_intel = named(kept("passes-intel"))
    assert {(r["seed"], r["epochs"], r["samples"], r["lr"]) for r in by_intel.values()} == {(0, 8, 2048, 4e-3)}
    assert said_in_the_readme("scores {:.2f} by LMS in 20 steps, {:.2f} by DPM++ and {:.2f} in 50 ancestral steps"
                              .format(*(by_intel[name]["fid"] for name in names[:3])))
    moved = max(abs(by_intel[name]["fid"] - seeds[name][0]["fid"]) for name in names[:3])
    once = [abs(intel - amd) for intel, amd in zip(*(
        [next(r["fid"] for r in kept(folder) if r["what"] == "lms" and r["seed"] == seed) for seed in (0, 1, 2)]
        for folder in ("karras-one-pass-intel", "recipe")))]               # the same two kinds of CPU, bfloat16
    assert said_in_the_readme(f"at most {moved:.1f} from the first column, where [after one pass](#how-much-is-luck) "
                              f"it was {once[0]:.1f}. But seeds 1 and 2 were only {once[1]:.1f} and {once[2]:.1f} "
                              "apart")
    few, fifty, many = (seeds[f"ddim, {steps} steps, eta 1"] for steps in (20, 50, 100))
    (lms, walked, long), (changed, changed_long) = (
        [seeds[names[i] + how] for i in which] for how, which in (("", (0, 2, 3)), (", sig data 0.66", (0, 3))))
    noisy, less = records_of(f"lesson 1's network: {names[0]}")[0], known[8, names[0] + ", model cosine"]
    (large,) = records_of("lesson 1: ddim, 100 steps, eta 1", size="lecture")
    fid_of = lambda record: record["fid"]
    by_seed = lambda ours, others: [fid_of(one) - fid_of(other) for one, other in zip(ours, others)]
    level, behind, ahead = by_seed(lms, few)
    assert abs(level) < 0.1 and behind > 0.5 and ahead < -0.5 and abs(level + behind + ahead) < 1
    assert all(lead < -0.5 for lead in by_seed(changed, few)) and all(lead > 1 for lead in by_seed(long, many))
    assert all(0 < lead < 0.8 for lead in by_seed(changed_long, many))
    assert [lead < 0 for lead in by_seed(changed, fifty)] == [False, False, True]
    assert all(-1 <= lead < -0.4 for lead in by_seed(walked, lms))
    walks = [[found[f"ddim, {steps} steps, eta 1"] for found in (twice, twice_again)] for steps in (20, 50, 100)]
    changed_seeds = [[found[name + ", sig data 0.66"] for found in all_changed] for name in names]
    new = [records[:2] for records in changed_seeds]                       # the seeds that lesson 1's network has, too
    assert all(lead < -1 for lead in by_seed(new[0], walks[0]))
    assert all(abs(lead) < 0.5 for lead in by_seed(new[2], walks[1]))
    assert all(abs(lead) < 0.2 for lead in by_seed(new[3], walks[2]))
    level, ahead = by_seed([found[names[0]] for found in (twice, twice_again)], walks[0])
    assert abs(level) < 0.2 and ahead < -1
    assert all(lead > 1 for lead in by_seed([found[names[3]] for found in (twice, twice_again)], walks[2]))
    for sentence, *shown in (
            ("by one seed only ({:.2f}, {:.2f} and {:.2f}; {:.2f}, {:.2f} and {:.2f})", *changed, *fifty),
            ("fresh noise in 50 steps still helps a little ({:.2f}, {:.2f} and {:.2f};", *walked),
            ("after eight passes, scores [{:.2f} to {:.2f}](", min(many, key=fid_of), max(many, key=fid_of)),
            ("scores {:.2f} by DDIM in 100 steps where the small ones have {:.2f}, {:.2f} and {:.2f}, the highest loss "
             "with the best score.", large, *many),
            ("and {:.0f} to {:.0f} with eight times", min(lms, key=fid_of), max(lms, key=fid_of)),
            ("after eight passes from {:.2f} to {:.2f} and from {:.2f} to {:.2f}, after 16 from {:.2f} to {:.2f}, "
             "from {:.2f} to {:.2f} and from {:.2f} to {:.2f}.", lms[1], changed[1], lms[2], changed[2],
             *(r for pair in zip((found[names[0]] for found in (twice, twice_again, third)), changed_seeds[0])
               for r in pair)),
            ("in 20 evaluations it is ahead of DDIM by both seeds ({:.2f} and {:.2f}; {:.2f} and {:.2f}), in 50 level",
             *new[0], *walks[0]),
            ("({:.2f} and {:.2f}; {:.2f} and {:.2f}), in 100 level ({:.2f} and {:.2f}; {:.2f} and {:.2f}).",
             *new[2], *walks[1], *new[3], *walks[2]),
            ("Seed 2, of which lesson 1's network was not trained for so long, has {:.2f}, {:.2f} and {:.2f}.",
             *(changed_seeds[i][2] for i in (0, 2, 3))),
            ("after 16 passes {:.2f} and {:.2f} (two seeds);", *walks[2]),
            ("then has {:.2f}, {:.2f} and {:.2f} in 20, and in 100 ancestral steps {:.2f}, {:.2f} and {:.2f} (three "
             "seeds), the best that we trained on a CPU, though by the first two seeds about level with lesson 1's.",
             *changed_seeds[0], *changed_seeds[3])):
        assert said_in_the_readme(sentence.format(*(r["fid"] for r in shown))), sentence
    gained = [1 - known[2 * n, name]["fid"] / known[n, name]["fid"] for n in (1, 2, 4) for name in names[:3]]
    assert said_in_the_readme(
        f"lowers the scores in the first three columns by {min(gained) * 100:.0f} to {max(gained):.0%}.")
    trio = (twice, twice_again, third)
    gained = [[1 - new[name]["fid"] / seeds[name][seed]["fid"] for name in names] for seed, new in enumerate(trio)]
    of_seed = [f"by {min(some) * 100:.0f} to {max(some):.0%} with seed {seed}" for seed, some in enumerate(gained)]
    assert said_in_the_readme(f"lowers all four {of_seed[0]}, {of_seed[2]}, and {of_seed[1]}, which after eight passes "
                              "was worst of the three in all columns.")
    assert all(seeds[name][1] is max(seeds[name], key=fid_of) for name in names)
    assert said_in_the_readme(f"than earlier doublings: by {np.mean(gained):.0%} on average.")
    assert [new[names[0]]["fid"] - new[names[2]]["fid"] > 0.5 for new in trio] == [True, False, False]
    shown = [fid_of(r) for pair in (*walks, few[:2], fifty[:2], many[:2]) for r in pair]
    assert said_in_the_readme(
        "scores {:.2f} and {:.2f} by DDIM in 20 steps, {:.2f} and {:.2f} in 50, {:.2f} and {:.2f} in 100; after eight "
        "{:.2f} and {:.2f}, {:.2f} and {:.2f}, {:.2f} and {:.2f}.".format(*shown))
    assert min(map(fid_of, (*many, *changed_long, *sum(walks + changed_seeds, [])))) == fid_of(changed_seeds[3][2])
    assert said_in_the_readme("{:.2f}, {:.2f} and {:.2f} instead of ".format(*(new[names[0]]["fid"] for new in trio)) +
                              f"{records_of('lesson 4: lms, 20 steps', size='lecture')[0]['fid']:.2f} by LMS")
    assert said_in_the_readme(f"16 took {twice[names[0]]['train_seconds'] / 60:.0f} on an older one")
    assert said_in_the_readme("Lesson 1's ends at {:.4f}, {:.4f} and {:.4f} (".format(*(r["loss"] for r in many)))
    assert max(many, key=lambda r: r["loss"]) is min(many, key=fid_of)
    assert said_in_the_readme(f"Our large one ends at {large['loss']:.4f} and")
    assert said_in_the_readme(f"{lms[0]['train_seconds'] / 60:.0f} minutes on two cores of a new AMD EPYC")
    assert said_in_the_readme("by LMS in 20 steps {:.1f} and residual noise {:.3f} instead of {:.1f} and {:.3f}".format(
        less["fid"], less["border"], noisy["fid"], noisy["border"]))
    gains = [records_of(f"lesson 4: {names[0]}{how}", one_pass=once)[0]["fid"] for once in (True, False)
             for how in ("", ", sig data 0.66")]
    assert said_in_the_readme("falls from {:.1f} to {:.1f}, from {:.1f} to {:.1f} and from {:.2f} to {:.2f}".format(
        *gains, lms[0]["fid"], changed[0]["fid"]))


def test_the_readme_has_why_the_small_networks_rescue_explodes():
    *records, short, short_followed, lesson2, strength, short_strength = kept("no_t-eight-passes")
    (denoiser,) = {r["weights"] for r in records}
    assert strength["weights"] == denoiser and {(r["epochs"], r["steps"], r["seed"]) for r in records} == {(8, 50, 0)}
    usual = records[0]["predictor"]                    # lesson 2's network by the small recipe, not by the lecture's
    tried = {(no_t.label(r), r["predictor"] == usual, r.get("abar_t") or r.get("answer")): r for r in records}
    assert len(tried) == len(records) == 20 and {r["predictor"] for r in records} == {usual, lesson2["weights"]}
    plain, every, still, saved = (
        [tried[f"no t, 50 steps, eta {eta}, rescue {rescue}", True, changed] for changed in (None, "follows")]
        for eta in (1, 0) for rescue in ("none", "every"))
    with_t, with_t_too = (next(r for r in kept(folder) if (r["what"], r["steps"], r["eta"]) == ("ddim", 50, 1))
                          for folder in ("passes", "passes-seed-1"))
    *others, strength_too = kept("no_t-eight-passes-seed-1")
    again = {(f"eta {r['eta']:g}, rescue {r['rescue']}", r.get("answer")): r for r in others}
    bright_too = again["eta 0, rescue every", "follows, its mean too"]
    assert {(r["epochs"], r["steps"], r["seed"], r["samples"], r["clip"]) for r in again.values()} == {
        (8, 50, 1, 2048, 4.0)} and len({r["predictor"] for r in others}) == 1 and len(again) == 10
    assert {r["weights"] for r in others} == {strength_too["weights"]}
    for header, known, count in (
            ("lesson 3, small, eight passes", lambda name, how: tried.get((f"no t, 50 steps, {name}", True, how)), 12),
            ("lesson 3, eight passes, seed 1", lambda name, how: again.get((name, how)), 5)):
        rows = table(header)
        assert len(rows) == count
        for name, *figures in rows:
            pair = [known(name, how) for how in (None, "follows")]
            assert figures == [figure for r in pair for figure in (
                (f"{r['fid']:.2f}", f"{r['kid']:.4f}", f"{r['border']:.3f}") if r else "---")], name
    plain_too, every_too, still_too, saved_too = ([again[f"eta {eta}, rescue {rescue}", changed] for changed in
                                                   (None, "follows")] for eta in (1, 0) for rescue in ("none", "every"))
    assert abs(again["eta 1, rescue late", None]["fid"] - plain_too[0]["fid"]) < 0.2       # "nearly level"
    before = [records_of(f"lesson 3: no t, 50 steps, eta 1, rescue {rescue}")[0] for rescue in ("none", "every")]
    other = tried["no t, 50 steps, eta 1, rescue every", False, None]
    predicted = tried["no t, 50 steps, eta 1, rescue every", True, "predicted"]
    for sentence, *shown in (
            ("hardly: in 50 steps {:.2f} and {:.2f} by two seeds, with t {:.2f} and {:.2f}.)", plain[0], plain_too[0],
             with_t, with_t_too),
            ("After eight passes it still explodes ({:.2f} and {:.2f}, two seeds;", every[0], every_too[0]),
            ("which bring plain DDIM from {:.1f} to {:.2f} and leave the explosion as it was, {:.2f} instead of "
             "{:.1f};", before[0], plain[0], every[0], before[1]),
            ("it scores {:.2f} instead of {:.2f}, by seed 1 {:.2f} instead of {:.2f}. With fresh noise plain DDIM "
             "leaves it nothing to gain ({:.2f} and {:.2f}, where by KID it loses a little; by seed 1 {:.2f} "
             "and {:.2f}), and is level with the network that is told t ({:.2f}, by seed 1 {:.2f},", saved[1], still[1],
             saved_too[1], still_too[1], every[1], plain[1], every_too[1], plain_too[1], with_t, with_t_too),
            ("and the score is {:.2f}.", other),
            ("these lines bring {:.2f} to {:.2f}, by seed 1 {:.2f} to {:.2f}.", *still, *still_too),
            ("scores {:.2f} after eight passes.", predicted)):
        assert said_in_the_readme(sentence.format(*(r["fid"] for r in shown))), sentence
    slopes = [at["slope"] for at in strength_too["by_time"] if at["t"] >= 0.8]
    _, one_lost, lost, none_lost = strength_too["lost"].values()
    assert [one_lost["lost"], none_lost["lost"]] == [1, 0] and none_lost["of"] == lost["of"] == one_lost["of"] == 1024
    assert said_in_the_readme(
        f"of 1024 one with eta 1 and {lost['lost']} without fresh noise. It is not the strength: the slope is "
        f"{min(slopes):.2f} to {max(slopes):.2f}. These {lost['lost']} had noise that was too bright, "
        f"{lost['mean_at_step_2_lost']:.3f} at the second step")
    assert said_in_the_readme(f"score is {bright_too['fid']:.2f} instead of {saved_too[1]['fid']:.2f} (residual noise "
                              f"{bright_too['border']:.3f} instead of {saved_too[1]['border']:.3f}).")
    assert [(r["epochs"], r["seed"], r["rescue"], r["eta"], r.get("answer"), r["weights"]) for r in
            (short, short_followed)] == [(2, 1, "every", 1, changed, short["weights"]) for changed in (None, "follows")]
    assert said_in_the_readme("scores {:.2f} instead of {:.2f}, and some images are still lost (residual noise {:.3f} "
                              "instead of {:.3f}; of 256 images {} instead of {})".format(
        *(r[key] for key in ("fid", "border") for r in (short_followed, short)),
        *(r["lost"] for r in reversed(short_strength["lost"].values()))))
    slopes, bright = [at["slope"] for at in short_strength["by_time"][:4]], [*short_strength["lost"].values()][1]
    assert short_strength["weights"] == short["weights"] and said_in_the_readme(
        f"slope is {min(slopes):.2f} to {max(slopes):.2f}. What the lines") and said_in_the_readme(
        f"(variance {bright['variance_at_step_2_lost']:.2f}) but too bright, {bright['mean_at_step_2_lost']:.3f} at")
    assert (lesson2["epochs"], lesson2["batch_size"], lesson2["lr"]) == (20, 512, 0.01)
    assert said_in_the_readme("squared error of the logit of {:.3f}, the large run's {:.3f} (by the".format(
        lesson2["test_loss"], kept("noise_pred", "lecture")[0]["test_loss"]))
    early = [at for at in strength["by_time"] if at["t"] >= 0.8]
    slopes = sorted(at["slope"] for at in early)
    assert said_in_the_readme(f"differs by {early[0]['rms_sd']:.1%} from image to image")
    assert said_in_the_readme(f"(a slope of {slopes[0]:.2f} to {slopes[-1]:.2f} from t = 0.98 to 0.8)")
    lost, followed, lost_too, followed_too = strength["lost"].values()
    assert said_in_the_readme(f"Of {lost['of']} images {lost['lost']} are lost")
    assert said_in_the_readme(f"{lost_too['lost']} of the {lost_too['of']} are lost")
    assert said_in_the_readme("a variance of {:.2f} on average, the others {:.2f}.".format(
        *(lost[f"variance_at_step_2_{which}"] for which in ("lost", "kept"))))
    assert followed["lost"] == followed_too["lost"] == 0
    missed = ((1 - slopes[0]) * early[0]["rms_sd"]) ** 2
    assert said_in_the_readme(
        f"costs about {missed:.4f} of squared error where t is high, and at most 1 / (2n) = {1 / 2048:.4f} anywhere, "
        f"while the mean over all t is {plain[0]['loss']:.4f}.") and every[1]["kid"] > plain[1]["kid"]


def test_the_readme_has_what_the_rescue_does_for_the_seed_that_failed():
    *records, seen, seen_too = kept("no_t-seed-2-rescue")
    known = {(r["epochs"], r["rescue"], r["clip"]): r for r in records}
    assert len(known) == len(records) == 6 and {(r["seed"], r["eta"], r["steps"]) for r in records} == {(2, 1, 50)}
    failed, longer = kept("no_t-seed-2")[0], kept("no_t-seed-2-four-passes")[0]
    assert all(r["weights"] == {2: failed, 4: longer}[r["epochs"]]["weights"] for r in records)
    late, every, late_too, every_too, bound, plain_bound = (known[how] for how in (
        (2, "late", 4), (2, "every", 4), (4, "late", 4), (4, "every", 4), (4, "every", 1), (4, "none", 1)))
    assert said_in_the_readme(
        f"it scores {late['fid']:.2f} from t = 0.7 on instead of {failed['fid']:.2f}, with more residual noise, "
        f"{late['border']:.3f} instead of {failed['border']:.3f}; at every step it scores {every['fid']:.2f}.")
    assert said_in_the_readme(
        f"({longer['fid']:.2f}), these score {late_too['fid']:.2f} and {every_too['fid']:.2f}. With clip 1 the rescue "
        f"gains there, as by other seeds: {bound['fid']:.2f} instead of {plain_bound['fid']:.2f}.")
    assert every["predictor"] == seen_too["weights"] and kept("no_t-one-pass")[1]["predictor"] == seen["weights"]

    def lower(key, *networks):                                               # alphabar, where noise is 1% stronger
        less = sorted(1 - math.exp(0.01 * at[key]) for r in networks for at in r["by_time"] if at["t"] >= 0.9)
        return f"{100 * less[0]:.0f} to {less[-1]:.0%}"
    assert said_in_the_readme(
        f"(from t = 0.98 to 0.9 by {lower('slope_of_log_alphabar', seen, seen_too)} where it is 1% stronger, two seeds "
        f"in `no_t-seed-2-rescue`; the ideal guess by {lower('ideal_slope', seen)})")


def test_the_readme_has_why_eta_below_1_leaves_noise():
    name = lambda r: cosine_ddim.label(r) if r["what"] == "ddim" else karras.label(r).replace(", model cosine", "")
    *small, two, eight, passed_on, left, left_8, followed, followed_8 = kept("eta-below-1")
    *large, of_large = kept("eta-below-1", "lecture")
    known = {(r["epochs"], r["answer"], name(r)): r for r in small + large}
    assert len(known) == len(small + large) and {r["samples"] for r in known.values()} == {2048}
    assert {(r["epochs"], r["seed"]) for r in known.values()} == {(2, 0), (8, 0), (25, 1)}
    assert all(len({r["weights"] for r in small if (r["epochs"], r["answer"] == "x_t passed on") == which}) == 1
               for which in ((2, False), (2, True), (8, False)))
    known |= {(8, "as it is", name(r)): r for r in kept("passes") if r["epochs"] == 8 and (
        r["what"] == "ddim" or r["model"] == "cosine")}                    # the same network: in both, LMS agrees
    (lms,) = [r for r in small if (r["epochs"], r["answer"], r["what"]) == (8, "as it is", "lms")]
    assert (lms["fid"], lms["weights"]) == (known[8, "as it is", "lms, 20 steps"]["fid"], known[
        8, "as it is", "dpmpp 2m, 20 steps"]["weights"])
    known |= {(25, "as it is", name(r)): r for r in kept("cosine_ddim-seed-1", "lecture")}
    rows = table("lesson 1's network: FID")
    columns = [(2, "as it is"), (2, "follows"), (2, "x_t passed on"), (8, "as it is"), (8, "follows"),
               (25, "as it is"), (25, "follows")]
    score = lambda epochs, answer, what: f"{known[epochs, answer, what]['fid']:.2f}" if (
        epochs, answer, what) in known else "-"
    for what, *figures in rows:
        assert figures == [score(*column, what) for column in columns], what
    assert len(rows) == 6 and sum("-" not in figures for _, *figures in rows) >= 2
    noise = [known[epochs, "as it is", "lms, 20 steps"]["border"] for epochs in (2, 8, 25)]
    assert noise == sorted(noise, reverse=True) and said_in_the_readme("order: {:.3f}, {:.3f}, {:.3f}.".format(*noise))
    slopes = [[f"{at['slope']:.2f}" for at in r["by_time"] if at["t"] >= 0.8]
              for r in (two, eight, of_large, passed_on)]
    assert set(slopes[0]) == {"0.21"} and said_in_the_readme("0.21% higher after two passes (a slope of 0.21), after "
                                                             f"eight {min(slopes[1])} to {max(slopes[1])}%, the large "
                                                             f"one's {min(slopes[2])} to {max(slopes[2])}%.")
    assert said_in_the_readme(f"The slope is {min(slopes[3])} to {max(slopes[3])} after two passes, for t from 0.8.")
    assert said_in_the_readme("a slope of {:.2f} at t = 0.98, with x_t passed on {:.2f};".format(
        *(r["by_time"][0]["brightness_slope"] for r in (two, passed_on)))) and two["by_time"][0]["t"] == 0.98
    own = {(r["epochs"], karras.label(r)): r["fid"] for r in kept("passes") if r["what"] != "ddim"}
    solvers = "lms, 20 steps", "dpmpp 2m, 20 steps"
    scores = [score(epochs, "follows", what) for epochs in (8, 25) for what in solvers]
    own_8 = [f"{own[8, what]:.2f}" for what in solvers]
    (lms_large, dpmpp_large), (lms_changed, dpmpp_changed) = (
        [f"{records_of(f'lesson 4: {what}{how}', 1, 'lecture')[0]['fid']:.2f}" for what in solvers]
        for how in ("", ", sig data 0.66"))
    assert said_in_the_readme("score {} and {}, by lesson 4's own network {} and {} (".format(*scores[:2], *own_8))
    assert said_in_the_readme(f"have {scores[2]} and {scores[3]}, lesson 4's own, also of seed 1, {lms_large} and "
                              f"{dpmpp_large}, and with sig_data 0.66 and a rate of 4e-3 {lms_changed} and "
                              f"{dpmpp_changed}.")
    assert said_in_the_readme(f"LMS has {score(2, 'x_t passed on', solvers[0])}, lesson 4's own network "
                              f"{own[2, solvers[0]]:.2f}.")
    as_it_is = score(25, "as it is", solvers[1])
    still = "ddim, 50 steps, eta 0"
    followed_large, still_large = (score(25, answer, still) for answer in ("follows", "as it is"))
    assert said_in_the_readme(
        f"the large network scores {followed_large} instead of {still_large} (seed 1; [the lines")
    assert said_in_the_readme(
        f"scores {scores[3]} instead of {as_it_is}, about level with the changed recipe ({dpmpp_changed}) and better "
        f"than the lecture's ({dpmpp_large}).")
    assert [(r["epochs"], r["answer"]) for r in (left, left_8, followed, followed_8)] == [
        (epochs, answer) for answer in ("as it is", "follows") for epochs in (2, 8)]
    assert said_in_the_readme(
        "leaves {:.2f} in that tenth of 512 images whose first noise is strongest, and {:.2f} in the weaker "
        "half".format(
            left["left_strongest_tenth"], left["left_weakest_half"]))
    assert said_in_the_readme("falls from {:.2f} to {:.2f}.".format(
        *(r["left_strongest_tenth"] for r in (left, followed))))
    assert said_in_the_readme("(with sig_data 0.66 {:.2f} and {:.2f})".format(
        *(own[8, f"{what}, sig data 0.66"] for what in solvers)))
    noisy = "ddim, 50 steps, eta 1"
    assert said_in_the_readme("eta 1 scores {} where the answer follows, {} as it is. ({} with x_t passed on".format(
        *(score(2, answer, noisy) for answer in ("follows", "as it is", "x_t passed on"))))


def test_the_readme_has_a_second_seed_without_fresh_noise():
    records = {(r["answer"], r["what"], r["eta"]): r for r in kept("eta-below-1-seed-1")}
    assert len(records) == 10 and {(r["seed"], r["epochs"]) for r in records.values()} == {(1, 2)}
    assert {r["steps"] for (_, what, _), r in records.items() if what == "ddim"} == {50}
    assert {r["steps"] for (_, what, _), r in records.items() if what != "ddim"} == {20}
    score = lambda what, eta: [f"{records[answer, what, eta]['fid']:.2f}" for answer in (
        "as it is", "follows", "x_t passed on")]
    still, lms, dpmpp = score("ddim", 0), score("lms", None), score("dpmpp_2m", None)
    assert said_in_the_readme("DDIM with eta 0 scores {}, where the answer follows {}, with x_t passed on {}, LMS {}, "
                              "{} and {}, DPM++ {}, {} and {}.".format(*still, *lms, *dpmpp))
    assert said_in_the_readme(f"on eta 1 has {records['x_t passed on', 'ddim', 1]['fid']:.2f}.")


def test_the_readme_has_what_an_ideal_denoiser_does():
    records = kept("no_t-ideal")
    *_, left, rescued, cause, strength = records
    ideal = {no_t.label(r): r for r in records if r["what"] == "ideal"}
    assert {(r["network"], r["seed"], r["samples"]) for r in ideal.values()} == {("ideal of 2048 images", 0, 2048)}
    score = lambda steps, eta, rescue: f"{ideal[f'ideal, {steps} steps, eta {eta}, rescue {rescue}']['fid']:.2f}"
    told = {r["eta"]: f"{r['fid']:.2f}" for r in records if r["what"] == "ideal, told t"}
    assert said_in_the_readme(f"needs it**: {score(50, 0, 'none')}, with the rescue {score(50, 0, 'every')}. (")
    assert sorted(table("ideal, 50 steps |")) == sorted(
        [name.removeprefix("ideal, 50 steps, "), f"{r['fid']:.2f}", f"{r['border']:.3f}"]
        for name, r in ideal.items() if r["steps"] == 50)
    assert said_in_the_readme(f"In 100 steps less is left: with eta 0 it scores {score(100, 0, 'none')}, with the "
                              f"rescue {score(100, 0, 'every')}. Told t, the ideal denoiser scores {told[0]}, "
                              f"{told[0.5]} and {told[1]} with eta")
    first, (drawn,) = next(iter(ideal.values())), [r for r in records if r["what"] == "ideal images, drawn"]
    assert drawn["network"] == first["network"]
    assert said_in_the_readme(f"drawn at random these score {drawn['fid']:.2f},")
    assert said_in_the_readme("Medians: {:.3f} as it is, {:.3f} with that strength. The worst tenth has {:.2f} and "
                              "{:.2f} or more.)".format(*(cause["by_answer"][i][key] for key in (
                                  "left_median", "left_highest_tenth") for i in (0, 5))))
    loss = lambda folder, what, size="small", epochs=2, seed=0: next(
        r["loss"] for r in kept(folder, size) if (r["what"], r["epochs"], r["seed"]) == (what, epochs, seed))
    costs = [loss("no_t", "no t") - loss("cosine_ddim", "ddim"),
             loss("no_t-eight-passes", "no t", epochs=8) - loss("passes", "ddim", epochs=8),
             loss("no_t-eight-passes-seed-1", "no t", epochs=8, seed=1) - loss("passes-seed-1", "ddim", epochs=8,
                                                                               seed=1),
             loss("no_t", "no t", "lecture", 25) - loss("cosine_ddim", "ddim", "lecture", 25)]
    of_seed_1 = [loss(folder, "no t", seed=1) - loss(of, "ddim", seed=1) for folder, of in (
        ("no_t-eight-passes", "eta-below-1-seed-1"), ("no_t-seed-1", "cosine_ddim"))]
    assert [f"{cost:.4f}" for cost in costs + of_seed_1] == ["0.0006", "0.0006", "0.0005", "0.0005", "0.0004",
                                                                "0.0000"]
    assert said_in_the_readme("small 0.0006, by seed 1 0.0004, after eight passes 0.0006, by seed 1 0.0005, large "
                              "0.0005, the lecture's 0.001. (Another pair of seed 1 is level,")
    assert (left["rescue"], rescued["left"], rescued["images"]) == ("none", 0, 512)
    assert said_in_the_readme("of 512 images the tenth with the strongest keeps {:.2f}, the weaker half "
                              "{:.2f}.)".format(left["left_strongest_tenth"], left["left_weakest_half"]))
    as_it_is, usual, weak, strong, told_strength, its_strength, _ = (at["left"] for at in cause["by_answer"])
    assert (cause["images"], cause["sampler"]) == (256, "ddim, 50 steps, eta 0")
    for sentence, figures in (("leaves residual noise of {:.3f} (root", [as_it_is]),
                              ("of one told t, {:.5f} is", [told_strength]),
                              ("scaled to its strength, leaves {:.3f}.", [its_strength]),
                              ("than usual, {:.3f} is left of it, 3% weaker {:.3f}.", [strong, weak]),
                              ("mean square of 1, {:.3f} is left even then:", [usual])):
        assert said_in_the_readme(sentence.format(*figures)), sentence
    small = {at["t"]: at["slope"] for r in kept("no_t-eight-passes") if "by_time" in r and r["epochs"] == 8
             for at in r["by_time"]}
    rows = table("t | ideal, told t: slope")
    assert said_in_the_readme(f"({strength['energy']:.1f} on average)")
    assert len(rows) == 7 and float(rows[-1][0]) == 0.3
    for at, row in zip(strength["by_time"], rows):
        assert row == [f"{at['t']:g}", f"{at['slope_told']:.2f}", f"{at['slope']:.2f}", f"{at['formula']:.2f}",
                       f"{small[at['t']]:.2f}", f"{at['loss'] - at['loss_told']:.5f}"]
        a = at["alphabar"]
        assert at["formula"] == pytest.approx(1 / (1 + 2048 * a / ((1 - a) * strength["energy"])), abs=1e-4)
    curves = [r["kid_by_step"] for r in records if r["what"] == "curve"]
    assert [len(curve) for curve in curves] == [20, 20]
    assert all(sorted(curve, reverse=True) == curve for curve in curves)
    assert said_in_the_readme("from {:.2f} to {:.3f} without the rescue, from {:.2f} to {:.3f} with it.".format(
        *(kid for curve in curves for kid in (curve[0], curve[-1]))))
    costs = [at["loss"] - at["loss_told"] for at in strength["by_time"]]
    assert said_in_the_readme(f"Not being told t costs {min(costs):.4f} to {max(costs):.4f} in the loss.** Where t "
                              f"is low that is this luck, 1 / (2n) = {1 / 2048:.4f}.")


def test_the_readme_has_lesson_3_with_x_t_passed_on():
    usual = [[r["fid"] for r in kept(folder) if no_t.label(r) == "no t, 50 steps, eta 1, rescue none"][0]
             for folder in ("no_t", "no_t-seed-1")]
    for seed, folder in (1, "no_t-x_t-passed-on-seed-1"), (0, "no_t-x_t-passed-on"):
        rescued, plain, rescued_still, plain_still = kept(folder)
        assert [(r["eta"], r["rescue"], r["clip"], r["epochs"], r["seed"], r["answer"], r["steps"]) for r in (
            rescued, plain, rescued_still, plain_still)] == [
            (eta, rescue, 4, 2, seed, "x_t passed on", 50) for eta in (1, 0) for rescue in ("every", "none")]
        assert len({r["weights"] for r in (rescued, plain, rescued_still, plain_still)}) == 1
        assert rescued["border"] < 2 / math.sqrt(2048)                     # that of one image all white
        if seed: assert said_in_the_readme(
            f"{rescued['fid']:.2f} with the rescue, plain {plain['fid']:.2f} (the usual network's {usual[1]:.1f}), and "
            f"without fresh noise {rescued_still['fid']:.2f} and {plain_still['fid']:.2f}.")
    assert said_in_the_readme(
        f"at every step it scores {rescued['fid']:.2f} (residual noise {rescued['border']:.3f}, no image all white), "
        f"without fresh noise {rescued_still['fid']:.2f}, where plain DDIM has {plain_still['fid']:.2f} "
        f"({plain_still['border']:.3f}): there")
    assert said_in_the_readme(
        f"(plain {plain['fid']:.2f}), and plain DDIM is worse than the usual network's {usual[0]:.1f}.")


def test_the_readme_has_how_far_rounding_moves_a_score():
    same = {}                                          # what one recipe and seed scored, by networks rounded otherwise
    for lesson, names in ((karras, ("first-command", "karras", "karras-one-pass", "karras-rate", "karras-float32",
                                    "karras-amx", "passes", "eta-below-1", "karras-one-pass-intel",
                                    "passes-intel")),
                          (cosine_ddim, ("cosine_ddim", "cosine_ddim-float32", "cosine_ddim-clip-3", "eta-below-1")),
                          (no_t, ("no_t", "no_t-clip-3", "no_t-both-predicted"))):
        what = {karras: set(karras.SAMPLERS), cosine_ddim: {"ddim"}, no_t: {"no t"}}[lesson]
        for r in (r for name in names for r in kept(name)):
            as_it_is = r.get("abar_t") != "predicted" and r.get("answer", "as it is") == "as it is"
            if r["what"] in what and (r["seed"], r["samples"]) == (0, 2048) and as_it_is:
                recipe = lesson.label(r), r["epochs"], r["lr"], r["batch_size"]
                same.setdefault(recipe, []).append(r["fid"])
    good, bad = (max(max(scores) - min(scores) for scores in same.values() if (max(scores) < 35) == is_good)
                 for is_good in (True, False))
    (exact,), (rounded,) = kept("cosine_ddim-float32"), records_of("lesson 1: ddim, 100 steps, eta 1")
    assert said_in_the_readme(f"Lesson 1 in 100 steps scores {exact['fid']:.2f} on an AMD in float32 "
                              f"(`cosine_ddim-float32`), {rounded['fid']:.2f} in bfloat16.")
    assert said_in_the_readme(f"rounding moves a score by up to {good:.1f}. (Scores above 35 are much less certain: "
                              f"rounding moves them by up to {bad:.0f}, another seed by more.)")
    assert said_in_the_readme(f"where a score is above 35: rounding alone moves those by up to {bad:.0f}.")
    assert good < 2.5 and said_in_the_readme("- 2.5 between two small ones (")
    first, another = (next(r["fid"] for r in kept(folder) if (r["what"], r["epochs"], r["answer"]) == (
        "lms", 2, "as it is")) for folder in ("eta-below-1", "eta-below-1-seed-1"))
    assert another - first > bad


def test_the_readme_has_other_shapes_of_the_small_network():
    usual = next(r for r in kept("first-command") if r["train_seconds"] == 291.1)
    records = [usual | {key: unet.SIZES["small"][key] for key in ("channels", "layers", "head_dim")}, *kept("shapes")]
    rows = table("one pass, shape of the small network")
    for r, (_, *figures) in zip(records, rows, strict=True):
        network = unet.UNet(r["channels"], r["layers"], head_dim=r["head_dim"])
        assert figures == [f"{sum(p.numel() for p in network.parameters()):,}", f"{r['train_seconds']:.0f} s",
                           f"{r['loss']:.4f}", f"{r['fid']:.2f}", f"{r['kid']:.4f}"]
        assert (r["what"], r["steps"], r["epochs"], r["seed"]) == ("lms", 20, 1, 0)
    assert min(records, key=lambda r: r["fid"]) is records[0]
    assert sum(r["loss"] < records[0]["loss"] for r in records) == 2


def test_the_readme_has_other_ways_of_training():
    records = {(r["recipe"], r["what"], r["epochs"], r["seed"]): r for r in kept("recipe")}
    rows = table("one pass, way of training: FID of seed")
    for name, *figures in rows:
        found = [records.pop((name, "lms", 1, seed), None) for seed in (0, 1, 2)]
        assert figures == ["-" if r is None else f"{r['fid']:.2f}" for r in found]
        assert all(r["steps"] == 20 and r["precision"] == "bfloat16" for r in found if r)
    gains = [float(a) - float(b) for a, b in zip(rows[0][1:], rows[3][1:])]
    assert rows[3][0] == "levels spread evenly" and f"{gains[2]:.2f}" == "0.05"        # nothing
    assert said_in_the_readme(f"It gains {gains[0]:.1f}, {gains[1]:.1f} and nothing;")
    assert said_in_the_readme(f"the one above 2.5 units, {gains[0]:.1f} by levels spread evenly with seed 0")
    assert all(float(cell) > float(rows[0][i]) - 2 for name, *cells in rows for i, cell in enumerate(cells, 1)
               if cell != "-" and (name, i) != ("levels spread evenly", 1))
    (usual,) = [r["fid"] for r in kept("passes") if (r["what"], r["epochs"]) == ("lms", 2)]
    (plain,) = [r["fid"] for r in kept("eta-below-1") if r["what"] == "ddim"
                and (r["steps"], r["eta"], r["clip"], r["epochs"], r["answer"]) == (50, 1, None, 2, "as it is")]
    evenly = "levels spread evenly"
    two, ddim = records.pop((evenly, "lms", 2, 0))["fid"], records.pop((evenly, "ddim", 2, 0))["fid"]
    assert said_in_the_readme(f"after two passes {two:.2f} is no better than the {usual:.2f} of LMS's earlier last "
                              f"step, and lesson 1 with its t so spread scores {ddim:.2f} in 50 steps, {plain:.2f} as "
                              "it is.")
    assert not records
    first = next(r for r in kept("first-command") if r["train_seconds"] == 291.1)
    assert kept("recipe")[0]["recipe"] == "as it is" and kept("recipe")[0]["weights"] == first["weights"]


def test_the_readme_has_what_the_last_step_of_lms_does():
    records = kept("karras-lms-end")
    (weights,) = {r["weights"] for r in records}
    assert weights in {r["weights"] for r in kept("first-command")}
    assert {r["precision"] for r in records} == {"bfloat16"}
    rows = table("LMS by the one-pass network: last step")
    for how, *figures in rows:
        found = [next(r for r in records if (r["last_step"], r["steps"]) == (how, steps)) for steps in (20, 50, 100)]
        assert figures == [cell for r in found for cell in (f"{r['fid']:.2f}", f"{r['border']:.4f}")]
    assert len(rows) == 2 and len(records) == 6
    sigs = karras.sigmas_karras(100)
    assert round((sigs[99] / (sigs[98] - sigs[99])).item()) == 5
    scores = {(r["last_step"], r["steps"]): r["fid"] for r in records}
    assert round(scores["like the others", 20] - scores["Euler's", 20], 1) == 0.1


def test_the_readme_has_three_seeds():
    rows = table("FID of seed")
    assert len(rows) >= 4
    for name, *figures in rows:
        name, once = name.replace(", one pass:", ":"), "one pass" in name
        assert figures == [f"{records_of(name, seed, one_pass=once)[0]['fid']:.1f}" for seed in (0, 1, 2)], name


def test_the_readme_has_lesson_3_with_another_seed():
    first, second = ({no_t.label(r).removeprefix("no t, 50 steps, "): r for r in kept(folder)
                      if r["what"] == "no t" and r["steps"] == 50} for folder in ("no_t", "no_t-seed-1"))
    assert {r["seed"] for r in first.values()} == {0} and {r["seed"] for r in second.values()} == {1}
    rows = table("lesson 3, 50 steps |")
    assert [name for name, *_ in rows] == list(second) and len(rows) == 10
    for name, *figures in rows:
        assert figures == [figure for r in (first[name], second[name]) for figure in
                           (f"{r['fid']:.1f}", f"{r['border']:.3f}")], name
    apart = max(abs(r["fid"] - second[name]["fid"]) for name, r in first.items() if name in second and r["fid"] < 30)
    assert said_in_the_readme(f"by up to {apart:.1f} in lesson 3")
    plain, late = (second[f"eta 1, rescue {rescue}"] for rescue in ("none", "late"))
    assert said_in_the_readme("gains little: {:.1f} instead of {:.1f}, with another seed {:.1f} instead of {:.1f}."
                              .format(*(r[f"eta 1, rescue {rescue}"]["fid"] for r in (first, second)
                                        for rescue in ("late", "none"))))
    assert said_in_the_readme("gains less: {:.1f} instead of {:.1f}, and by KID nothing ({:.3f} and {:.3f})".format(
        late["fid"], plain["fid"], late["kid"], plain["kid"]))


def brightness(folder):
    """The records of the three lines that let lesson 3's answer follow the noise's brightness: as it is, with these
    lines, and what was measured of the network (all of one network)."""
    records = kept(folder)
    (followed,) = [r for r in records if r.get("answer") == "brightness follows" and r["what"] == "no t"]
    (seen,) = [r for r in records if r["what"] == "brightness of the noise" and not r["told_t"]]
    plain = records[0]
    assert no_t.label(plain) == no_t.label(followed) == "no t, 50 steps, eta 1, rescue none" and "answer" not in plain
    assert len({(r["weights"], r["seed"], r["epochs"]) for r in (plain, followed, seen)}) == 1
    return plain, followed, seen


def test_the_readme_has_the_seed_of_lesson_3_that_failed():
    plain, followed, _ = brightness("no_t-seed-2")
    fourth, longer = kept("no_t-seed-3")[0], kept("no_t-seed-2-four-passes")[0]
    others = [records_of("lesson 3: no t, 50 steps, eta 1, rescue none")[0], kept("no_t-seed-1")[0]]
    assert all(no_t.label(r) == no_t.label(plain) for r in others) and (plain["seed"], plain["epochs"]) == (2, 2)
    assert said_in_the_readme("scores {:.2f}, where the others have {:.1f} and {:.1f}: many".format(
        *(r["fid"] for r in (plain, *others))))
    assert all(no_t.label(r) == no_t.label(plain) for r in (fourth, longer))
    assert [(r["seed"], r["epochs"]) for r in (fourth, longer)] == [(3, 2), (2, 4)]
    good = sorted(r["fid"] for r in (*others, fourth))
    assert said_in_the_readme("of four seeds three score {:.1f} to {:.1f}, one, with no higher loss, "
                              "{:.1f}.".format(good[0], good[-1], plain["fid"]))
    assert plain["loss"] < min(r["loss"] for r in (*others, fourth))
    assert said_in_the_readme("it scores {:.2f}, although its loss is the highest, {:.4f}. Nor does seed 2 after four "
                              "passes, {:.2f}, and".format(fourth["fid"], fourth["loss"], longer["fid"]))
    assert fourth["loss"] > max(r["loss"] for r in (plain, *others))
    assert said_in_the_readme(f"With `--epochs 4` the same seed scores {longer['fid']:.2f}.")
    assert said_in_the_readme(
        "(residual noise {:.3f}, KID {:.4f}; the classifier takes {} of 2048 for sandals). The loss does not show it: "
        "{:.4f} at the end, the others' {:.4f} and {:.4f}.".format(
            plain["border"], plain["kid"], plain["classes"][fid.CLASSES.index("Sandal")],
            *(r["loss"] for r in (plain, *others))))
    assert said_in_the_readme(f"a third changed bring the score to {followed['fid']:.2f}.")


def missed_brightness(network, steps=50):
    """Standard deviation, among images, of what is missed of the noise's brightness, in x_0_hat of every step with
    eta 1: from the slopes that were measured of the network, without sampling."""
    ts = cosine_ddim.timesteps(steps)[:-1].double()
    var = ((1 - cosine_ddim.abar(ts)) / cosine_ddim.abar(ts)).clamp(min=0)              # sigma squared
    slopes = np.interp(ts, *zip(*sorted((row["t"], row["brightness_slope"]) for row in network["by_time"])))
    missed, brightness = [], float(1 / cosine_ddim.abar(ts[0])) / 1024     # variance of the mean of x_t / sqrt(abar)
    for slope, now, then in zip(slopes, var, var[1:]):
        missed.append((1 - slope) * brightness ** 0.5)
        brightness = brightness * (1 - slope * (1 - then / now)) ** 2 + then * (1 - then / now) / 1024      # and fresh
    return missed


def test_missed_brightness_falls_as_the_readme_has_it():
    # One that sees a share of the noise's mean, and nothing else: a picture of zeros, sampled by ddim_step.
    torch.manual_seed(0)
    share, ts = 0.25, cosine_ddim.timesteps(50)
    find_noise = lambda x, t: share * x.mean((1, 2, 3), keepdim=True).expand_as(x) / (1 - cosine_ddim.abar(t)).sqrt()
    x = torch.randn(2000, 1, 32, 32)
    with torch.no_grad():
        spread = [x_0_hat.mean((1, 2, 3)).std() for x_0_hat, _ in itertools.islice(
            cosine_ddim.sample(find_noise, x, ts, eta=1.0), 40)]
    by_formula = missed_brightness({"by_time": [{"t": t, "brightness_slope": share} for t in (0, 1)]})[:40]
    assert np.allclose(spread, by_formula, rtol=0.08)
    falls = lambda slope: 32 ** (2 * slope)                                # from sigma 32 to 1
    assert said_in_the_readme(f"to a {round(falls(0.75), -1):.0f}th by a slope of 0.75, to a sixth by 0.25")
    assert round(falls(0.25)) == 6

    # And noise 1% stronger, of which the answer sees a share: relative to sigma what is missed falls in the same way.
    def strengths(x):
        of = lambda x, t: (x.square().mean() / (1 - cosine_ddim.abar(t))).sqrt()
        find_noise = lambda x, t: x / x.square().mean().sqrt() * (1 + share * (of(x, t) - 1))
        torch.manual_seed(1)                                               # the same fresh noise both times
        path = itertools.islice(cosine_ddim.sample(find_noise, x, ts, eta=1.0), 11)
        return torch.stack([of(x, t) for t, x in zip(ts, [x, *(x for _, x in path)])])
    var = ((1 - cosine_ddim.abar(ts)) / cosine_ddim.abar(ts))[:12]
    assert np.allclose((strengths(1.01 * x) - strengths(x))[1:] / 0.01,
                       (1 - share * (1 - var[1:] / var[:-1])).cumprod(0), rtol=0.05)
    assert said_in_the_readme("(Missed strength falls as sigma^(1 + 2 slope), because there")


def test_the_readme_has_why_a_small_network_burns_clothes_out():
    trials = [brightness(folder) for folder in ("no_t-float32", "no_t-seed-2", "no_t-one-pass")]
    (told,) = [r for r in kept("no_t-float32") if r.get("told_t")]
    (ideal,) = [r for r in kept("no_t-ideal") if r["what"] == "brightness of the noise, ideal"]
    ddim, ddim_followed = [r for r in kept("no_t-float32") if r["what"] == "ddim"]
    assert cosine_ddim.label(ddim) == cosine_ddim.label(ddim_followed) == "ddim, 50 steps, eta 1"
    assert {r["weights"] for r in (told, ddim, ddim_followed)} == {kept("cosine_ddim-float32")[0]["weights"]}
    assert "answer" not in ddim and ddim_followed["answer"] == "brightness follows"
    networks = [told] + [seen for _, _, seen in trials]
    at = lambda network, t: next(row for row in network["by_time"] if row["t"] == t)
    rows = table("lesson 3, 50 steps, eta 1, rescue none |")
    assert len(rows) == 13
    for name, ours, ideals, *figures in rows:
        figures, step = [ours, *figures], int(re.search(r"step (\d+)|$", name)[1] or 0)
        if name.startswith("slope"):
            t = float(name.split("=")[1])
            assert figures == [f"{at(network, t)['brightness_slope']:.2f}" for network in networks], name
            assert ideals == f"{at(ideal, t)['brightness_slope_not_told']:.2f}"
        elif name.endswith("computed"):
            assert figures == [f"{missed_brightness(network)[step - 1]:.2f}" for network in networks], name
        elif name.startswith("spread"):
            key = "brightness_sd_of_x_0_hat" + "_followed" * name.endswith("follows")
            assert figures == [f"{n[key][step - 1]:.2f}" if key in n else "-" for n in networks], name
        else:
            i = ["FID", "FID, brightness follows"].index(name)
            assert figures == [f"{trial[i]['fid']:.2f}" for trial in ((ddim, ddim_followed), *trials)], name
    assert said_in_the_readme(f"among real ones it is {told['brightness_sd_of_reals']:.2f}.")
    costs = [np.mean([row["loss_of_the_mean"] for row in network["by_time"]]) for network in networks]
    assert said_in_the_readme(
        "it costs seed 2 {2:.4f} on average, seed 0 {1:.4f}; the losses are {4:.4f} and {3:.4f}".format(
            *costs[:3], *(trial[0]["loss"] for trial in trials[:2])))
    strengths = [row["slope"] for r in kept("no_t-seed-2") if r["what"] == "strength of the noise"
                 for row in r["by_time"] if row["t"] >= 0.7]
    (strong,) = [r for r in kept("no_t-seed-2") if r.get("answer") == "follows"]
    assert said_in_the_readme(f"(a slope of {min(strengths):.2f} to {max(strengths):.2f} from t = 0.98 to 0.7): with "
                              f"the lines that let it follow, the score is {strong['fid']:.2f}.")
    assert said_in_the_readme("told t it has a slope of {:.2f} at t = 0.98, not told {:.2f}, probably".format(
        *(at(ideal, 0.98)[f"brightness_slope_{how}"] for how in ("told", "not_told"))))
    assert said_in_the_readme("{1:.2f} instead of {0:.2f}, and lesson 1's, which is told t, does not: {3:.2f} instead "
                              "of {2:.2f}.".format(*(r["fid"] for r in (*trials[0][:2], ddim, ddim_followed))))
    slope = lambda network: at(network, 0.98)["brightness_slope"]
    four, fourth = (kept(folder)[:2] for folder in ("no_t-seed-2-four-passes", "no_t-seed-3"))
    assert all(score["weights"] == seen["weights"] for score, seen in (four, fourth))
    seen = four[1]["brightness_sd_of_x_0_hat"][-1]
    assert f"{seen:.2f}" == f"{trials[0][2]['brightness_sd_of_x_0_hat'][-1]:.2f}"
    assert said_in_the_readme("seed 2 scores {:.2f} (`no_t-seed-2-four-passes`): at t = 0.98 its slope is {:.2f}, and "
                              "at the end images differ by {:.2f}, as with seed 0 after two.".format(
                                  four[0]["fid"], slope(four[1]), seen))
    (way,) = [r for r in kept("no_t-seed-2-four-passes") if r["what"] == "brightness of the noise, while training"]
    slopes = {row["step"]: row["brightness_slope"] for row in way["by_step"]}
    assert (way["t"], way["network"]) == (0.98, four[0]["network"]) and sorted(slopes.values()) == list(slopes.values())
    assert said_in_the_readme("of the {} steps of that training the slope is {:.2f} after 2479, {:.2f} after 3645, "
                              "{:.2f} after 5507 and {:.2f} after 7313.".format(
                                  way["steps_in_all"], *(slopes[step] for step in (2479, 3645, 5507, 7313))))
    assert said_in_the_readme("has {:.2f} at t = 0.98 after two passes, and scores {:.2f}.".format(
        slope(fourth[1]), fourth[0]["fid"]))
    untold = {r["fid"]: slope(seen) for r, *_, seen in (*trials, four, fourth)}
    assert len(untold) == 5 and all(score < 20 or score > 40 for score in untold)
    assert said_in_the_readme("those with {:.2f} or more did not fail, those with {:.2f} or less did.".format(
        min(untold[score] for score in untold if score < 20), max(untold[score] for score in untold if score > 40)))
    both = [r["fid"] for folder in ("no_t-float32", "no_t-seed-2") for r in kept(folder)
            if r.get("answer") == "both follow" and r["eta"] == 0]
    (as_it_is,) = [r["fid"] for r in kept("no_t-seed-2") if r.get("eta") == 0 and "answer" not in r]
    assert said_in_the_readme("{:.2f} by seed 0, {:.2f} by seed 2, which has {:.2f} as it is.".format(*both, as_it_is))
    # Until t = 0.8, as the three lines have it, the noise's mean varies more than the picture's does in x_t.
    picture, noise = (float(cosine_ddim.abar(0.8)) ** 0.5 * told["brightness_sd_of_reals"],
                      float(1 - cosine_ddim.abar(0.8)) ** 0.5 / 32)
    assert f"{picture:.3f}" == f"{noise:.3f}" == "0.030" and said_in_the_readme("each varies by 0.030 from image")


@pytest.mark.parametrize("start, lesson, names", [                     # answers of slope 0.4, by the names used there
    ("These lines print it", no_t,
     dict(x0=torch.zeros(2000, 1, 32, 32), model=lambda x, t: 0.4 * x.mean((1, 2, 3), keepdim=True).expand_as(x))),
    ("These lines print the slope", cosine_ddim,
     dict(images=torch.zeros(2000, 1, 32, 32),
          find_noise=lambda x, t: x * (0.4 + 0.6 / x.square().mean((1, 2, 3), keepdim=True).sqrt())))])
def test_the_readmes_lines_print_the_slopes_of_brightness_and_strength(capsys, start, lesson, names):
    line, function, lines = re.search(rf"{start}.*?below\s+`(.*?)`\s+in\s+`{lesson.__name__}\.(.*?)`.*?\n\n(.*?)\n\n",
                                      (HERE / "results" / "README.md").read_text(), re.S).groups()
    assert line.removesuffix("...") in inspect.getsource(getattr(lesson, function))
    torch.manual_seed(0)
    exec(textwrap.dedent(lines), vars(lesson) | names | dict(args=argparse.Namespace(device="cpu")))
    assert capsys.readouterr().out == "slope 0.40\n"


def test_the_readme_has_the_same_samplers_on_three_machines():
    _, float32, amx = machines = [
        {karras.label(r): r for r in kept(folder) if r["seed"] == 0 and r["samples"] == 2048}
        for folder in ("karras", "karras-float32", "karras-amx")]
    rows = table("one recipe, three machines")
    assert len(rows) >= 7
    for name, *figures in rows:
        assert [machine[name]["precision"] for machine in machines] == ["bfloat16", "float32", "bfloat16"]
        errors = [machine[name]["solver_error_median"] for machine in (float32, amx)]
        assert figures == [f"{machine[name]['fid']:.1f}" for machine in machines] + [
            "fresh noise" if error is None else f"{error:.4f}" for error in errors], name
    assert said_in_the_readme("50 steps of Heun are off by {:.4f} in the mean, and 20 steps by {:.4f}".format(
        *(float32[f"heun, {steps} steps"]["solver_error"] for steps in (50, 20))))


def test_the_readme_has_lesson_2s_errors():
    assert table("mean error of the guess") == [
        [f"asked for {r['what']}", *(f"{mean:.4f}" for mean, _ in r["errors"]), f"{r['mae']:.4f}"]
        for r in kept("noise_pred")]
    (logit, _), (longer,), (large,) = (kept(*where) for where in (
        ("noise_pred",), ("noise_pred-20-passes",), ("noise_pred", "lecture")))
    records = kept("noise_pred-draws")
    best, draws = records[:6], records[6:]
    assert [r["weights"] for r in draws] == 2 * [logit["weights"]] + 2 * [longer["weights"]]
    assert (longer["epochs"], longer["batch_size"], longer["lr"]) == (large["epochs"], large["batch_size"], large["lr"])
    assert table("squared error of the logit, twelve draws") == [
        [f"{r['network']}, {r['what']}", *(f"{value:.4f}" for value in (
            np.mean(r["test_losses"]), np.std(r["test_losses"], ddof=1), min(r["test_losses"]), max(r["test_losses"])))]
        for r in draws] and {len(r["test_losses"]) for r in draws} == {12}
    short_drawn, short_even, drawn, even = draws
    assert even["test_losses"][0] == pytest.approx(longer["test_loss"], rel=1e-4)         # seed 0 is the script's own
    assert short_even["test_losses"][0] == pytest.approx(logit["test_loss"], rel=1e-4)
    for r in (short_drawn, drawn): assert r["test_losses"][0] == max(r["test_losses"])
    assert said_in_the_readme(f"it called them {short_drawn['test_losses'][0]:.3f} and {drawn['test_losses'][0]:.3f}, "
                              f"the one trained on the H200 {large['test_loss']:.3f}")
    for said in ("{} on test images, and after the lecture's 20 passes {}.", "by seed 0 {} and {}."):
        assert said_in_the_readme(said.format(f"{logit['test_loss']:.3f}", f"{longer['test_loss']:.3f}"))
    docstring = " ".join(noise_pred.__doc__.split())
    assert f"(results/small/noise_pred): {logit['test_loss']:.3f}, and guesses" in docstring
    assert f"noise_pred-20-passes), {longer['test_loss']:.3f}. The lecture's 0.075 is within luck of that" in docstring
    assert np.mean(drawn["test_losses"]) - 0.075 < np.std(drawn["test_losses"], ddof=1)
    squared, reckoned = (np.mean([r[key] for r in best[:5]]) for key in ("squared_error", "posterior_variance"))
    below, both = (np.mean(losses[:5]) for losses in (even["shares_below_half"], even["test_losses"]))
    assert [(r["seed"], r["images"]) for r in best] == [*((seed, "test") for seed in range(5)), (0, "train")]
    assert said_in_the_readme(
        f"it adds {squared:.3f} to the loss (the mean of the first five even draws; by its own reckoning "
        f"{reckoned:.3f}), where the network of 20 passes adds {below:.3f} by the same draws. Above 0.5 the network "
        f"adds {both - below:.3f}, so that the sum is {reckoned:.3f} to {squared + both - below:.3f}. What is left to "
        f"learn is at most {both - squared:.3f}, by the same draws; 20 passes learn "
        f"{np.mean(short_even['test_losses']) - np.mean(even['test_losses']):.3f} more than two.")
    off = {level: squared for level, (_, squared) in zip(logit["levels"], logit["errors"])}
    assert said_in_the_readme(f"by {off[0.001]:.1f} (root mean square) at alphabar 0.001, by {off[0.5]:.2f} at 0.5")
    usual = torch.full((1, 1, 32, 32), (193.8 / 1024) ** 0.5)              # whose squares add up to what clothes' do
    for r in logit, large:
        mean = {level: mean for level, (mean, _) in zip(r["levels"], r["errors"])}
        assert 0.9 < mean[0.05] / noise_pred.best(0.05, usual) < 1 < mean[0.01] / noise_pred.best(0.01, usual)
        assert noise_pred.best(0.001, usual) / mean[0.001] == pytest.approx(0.3, abs=0.04)
    third = "a third of the network's error."
    assert said_in_the_readme(third) and third in " ".join(noise_pred.best.__doc__.split())


def test_the_readme_has_the_lectures_bound_and_normalising():
    free, bound, bound_still = kept("cosine_ddim-clip-3")
    assert [(r["eta"], r["clip"]) for r in (free, bound, bound_still)] == [(1, None), (1, 3), (0, 3)]
    assert free["weights"] == bound["weights"] == bound_still["weights"]
    assert said_in_the_readme(f"{bound['fid']:.1f} with it, {free['fid']:.1f} without. With eta 0 the score is "
                              f"{bound_still['fid']:.1f} with it")
    four, three, _ = kept("no_t-clip-3")
    assert [(r["rescue"], r["eta"], r["clip"]) for r in (four, three)] == [("none", 1, 4), ("none", 1, 3)]
    assert four["weights"] == three["weights"]
    assert said_in_the_readme(f"{three['fid']:.1f} instead of {four['fid']:.1f} (`no_t-clip-3`")
    *both, clock_half, predicted_half = kept("no_t-both-predicted")
    plain, clock, predicted, clock_1, predicted_1 = both
    assert [(r["rescue"], r["clip"], r["abar_t"]) for r in both] == [("none", 4, "clock")] + [
        ("every", clip, level) for clip in (4, 1) for level in ("clock", "predicted")]
    assert len({r["weights"] for r in both}) == 1 and {(r["steps"], r["eta"]) for r in both} == {(50, 1)}
    assert said_in_the_readme(f"scores {predicted['fid']:.1f} where it has {clock['fid']:.1f} as it stands, and plain "
                              f"DDIM {plain['fid']:.1f}, all by one network")
    assert said_in_the_readme(f"draws level with plain DDIM, {predicted['kid']:.3f} and {plain['kid']:.3f}.")
    assert said_in_the_readme(f"(residual noise {predicted['border']:.3f} instead of {clock['border']:.3f})")
    assert (clock_half["eta"], clock_half["abar_t"], predicted_half["abar_t"]) == (0.5, "clock", "predicted")
    assert said_in_the_readme(f"hardly helps ({predicted_half['fid']:.1f} instead of {clock_half['fid']:.1f})")
    assert said_in_the_readme(f"no difference ({predicted_1['fid']:.1f} and {clock_1['fid']:.1f})")
    half, one, plain = kept("dials-normalise")
    assert [(r["input_scale"], r["normalise"], r["epochs"]) for r in (half, one, plain)] == [
        (0.5, True, 1), (1, True, 1), (1, False, 1)]
    assert said_in_the_readme(f"{half['fid']:.1f} with b 0.5, and {one['fid']:.1f} with b 1 where the same version of "
                              f"the scripts scores {plain['fid']:.1f} without")
    (expected,) = kept("dials-normalise-expected")
    assert (expected["input_scale"], expected["normalise"], expected["epochs"]) == (0.5, True, 1)
    assert said_in_the_readme(f"which hides nothing, it scores {expected['fid']:.1f}")


def test_the_readme_has_the_dials():
    assert table("schedule, b") == [
        [f"{r['schedule']}, b {r['input_scale']:g}", f"{r['loss']:.4f}", f"{r['fid']:.1f}",
         f"{r['kid']:.4f}", f"{r['border']:.3f}"]
        for r in sorted(kept("dials"), key=lambda r: r["fid"])]


def test_the_readme_has_how_far_seeds_of_the_small_network_differ():
    scores, differ = {}, {}
    for path in sorted((HERE / "results" / "small").glob("*/results.json")):
        if path.parent.name == "no_t-seed-2": continue                     # that failed, and is told of apart
        for r in json.loads(path.read_text()):
            as_scripts_do = r.get("recipe", "as it is") == "as it is"
            if "weights" in r and r.get("samples") == 2048 and "fid" in r and as_scripts_do:
                how = tuple(str(r.get(name)) for name in (
                    "what", "steps", "eta", "rescue", "clip", "answer", "schedule", "input_scale", "normalise", "model",
                    "sig_data", "rho", "churn", "log_sigma", "centre", "epochs", "batch_size", "lr"))
                if path.parent.name == "karras-one-pass-intel": how += ("Intel", r["precision"])
                scores.setdefault(how, {}).setdefault(r["seed"], r["fid"])
    for how, by_seed in scores.items():
        if len(by_seed) > 1 and max(by_seed.values()) < 35:
            kind = "no noise" if how[2] == "0.0" else "lesson 3" if how[0] == "no t" else "lessons 1 and 4"
            differ.setdefault(kind, []).append(max(by_seed.values()) - min(by_seed.values()))
    assert len(differ["lessons 1 and 4"]) >= 18 and len(differ["lesson 3"]) >= 8 and len(differ["no noise"]) >= 5
    assert said_in_the_readme(
        "differ by up to {:.1f} in lessons 1 and 4 and by up to {:.1f} in lesson 3 (without fresh noise in lessons 1 "
        "and 3 by up to {:.0f}; all before rounding)".format(
            *(max(differ[kind]) for kind in ("lessons 1 and 4", "lesson 3", "no noise"))))


def test_the_readme_has_what_one_change_does():
    rows, scores = table("one change |"), {}
    assert len(rows) >= 12
    for command, *figures in rows:
        how = {flag.replace("-", "_"): float(value) if value else True
               for flag, value in re.findall("--([a-z-]+) ?([0-9.]*)", command)}
        how = {"seed": 0, "rho": 7, "input_scale": 0.5, "log_sigma": False, "centre": False} | how
        how.setdefault("sig_data", round(0.66 * how["input_scale"], 6))
        once, twice = ([r for r in kept(folder) if (r["what"], r["steps"], r["model"]) == ("lms", 20, "karras")
                        and (r.get("epochs", 2), r.get("batch_size", 32)) == (epochs, 32)
                        and all(r.get(key, False) == value for key, value in how.items())]
                       for folder, epochs in (("karras-one-pass", 1), ("karras", 2)))
        assert [figures] == [[f"{r['fid']:.1f}", f"{r['kid']:.4f}", f"{two['fid']:.1f}"] for r, two in
                             zip(once, twice, strict=True)], command
        scores[command.strip("`")] = once[0], twice[0]
    fids = [r["fid"] for command in ("--sig-data 0.66", "none") for r in scores[command]]
    assert said_in_the_readme("scores {:.1f} instead of {:.1f}, after two passes {:.1f} instead of {:.1f}.".format(
        *(fids[i] for i in (0, 2, 1, 3))))
    columns = list(zip(*(scores[command] for command in ("--rho 3", "--rho 5", "none"))))
    assert all([r["fid"] for r in column] == sorted(r["fid"] for r in column) for column in columns)
    assert said_in_the_readme(
        "From 3 to 7 solver error falls ({:.3f}, {:.3f}, {:.3f}), but FID gets worse, by about {:.0f} after one pass "
        "and {:.1f} after two.".format(*(r["solver_error_median"] for r in columns[0]),
                                   *(column[2]["fid"] - column[0]["fid"] for column in columns)))


def test_the_readme_has_why_cosine_is_ahead():
    scores = lambda name: ", ".join(f"{records_of(name, seed)[0]['fid']:.1f}" for seed in (0, 1, 2))
    first, noise, weight, cosine = (figures for _, figures in table("the small network, one change after another"))
    assert first == f"{records_of('lesson 4: lms, 20 steps')[0]['fid']:.1f}"
    assert noise == f"{records_of('lesson 4: ancestral, 50 steps, eta 1')[0]['fid']:.1f}"
    assert weight == scores("lesson 4: ancestral, 50 steps, eta 1, sig data 0.66") + " (three seeds)"
    assert cosine == scores("lesson 1's network: ancestral, 50 steps, eta 1")
    assert said_in_the_readme("(in 50 evaluations {:.1f} against {:.1f}, in 20 {:.1f} against {:.1f})".format(
        *(records_of(name)[0]["fid"] for name in (
            "lesson 1: ddim, 50 steps, eta 1", "lesson 4: ancestral, 50 steps, eta 1",
            "lesson 1: ddim, 20 steps, eta 1", "lesson 4: lms, 20 steps"))))


@pytest.mark.parametrize("lesson, folders, else_where", [
    (cosine_ddim, ["cosine_ddim", "dials"], {"0.033"}),
    (no_t, ["no_t", "no_t-seed-2", "no_t-seed-2-four-passes", "cosine_ddim"], {"0.7"}),
    (karras, ["karras", "karras-one-pass", "karras-sig-data-0.66", "cosine_ddim"], set()),
    (noise_pred, ["noise_pred", "noise_pred-20-passes"], {"0.07", "0.075"}),
    (fid, ["fid"], {"0.03", "0.1"})])
def test_every_figure_of_ours_in_an_opening_docstring_is_in_a_results_file(lesson, folders, else_where):
    """But for what else_where holds: the lecture's own figures, and settings of which no record speaks."""
    def numbers(value):
        if isinstance(value, (list, dict)):
            return [n for part in (value.values() if isinstance(value, dict) else value) for n in numbers(part)]
        return [value] if isinstance(value, (int, float)) else []
    marks = [("small", "What the small network does|Ours, after two passes|Ours is"),
             ("lecture", "What a network of the lecture's size does|The same network by the lecture's recipe")]
    for size, mark in marks:
        if size == "lecture" and not kept(folders[0], size): continue
        known = numbers([kept(folder, size) for folder in folders
                         if (HERE / "results" / size / folder).exists()])
        ours = re.split(mark, lesson.__doc__)[1].split("\n\n")[0]
        found = set(re.findall(r"(?<![\w.])\d+\.\d+", ours)) - else_where
        assert len(found) >= 3
        for figure in found:
            assert any(f"{n:.{len(figure.split('.')[1])}f}" == figure for n in known), figure


def test_the_readme_has_what_a_score_means():
    records = kept("fid")
    assert table("candidate") == [
        [r["what"], f"{r['fid']:.1f}", f"{r['fid'] / r['floor']:.1f}", f"{r['kid']:.4f}", f"{r['border']:.3f}"]
        for r in records if "kid" in r]
    assert table("how many real images, one draw each") == [
        [f"{r['samples']:,}", f"{r['fid']:.2f}"] for r in records if r["what"] == "how many"]
    assert said_in_the_readme("512 real images score {:.2f}, 10,000 of them {:.2f}".format(
        *(r["fid"] for r in records if r["what"] == "how many" and r["samples"] in (512, 10_000))))
    draws = [(f"{r['fid']:.2f}", f"{r['fid_float32']:.2f}") for r in records if "fid_float32" in r]
    assert all(one == other for one, other in draws)
    assert all(abs(r["fid"] - r["fid_float32"]) < 0.01 for r in (
        *records, *kept("fid-scipy-1.11"), *kept("half-range", "lecture"))
        if "fid_float32" in r and r.get("range", 1) == 1) and said_in_the_readme("differ by less than 0.01, also with")
    assert said_in_the_readme(f"three draws score {', '.join(one for one, _ in draws)} by both")
