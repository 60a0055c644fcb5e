"""The network that lessons 1, 3 and 4 share, and how every network here is fitted.

The lecture changes what the network is asked (which input, which target), and neither the network nor the training
loop. So both live here, once, and a lesson holds nothing but what its part of the lecture changed. (Lesson 2 wants a
single number of an image, and takes the residual network of fid.py.)

    python unet.py        parameters, GFLOP an image, and images a second for training and sampling on this machine

Reading order: the network, how it starts, how it is fitted and asked for samples. Two parts can be skipped: in the
middle what makes it fast, at the end the checkpoints, flags and errors that every script shares.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------- the network
# A U-Net (Ronneberger et al. 2015) as denoising diffusion uses it (Ho et al. 2020): down to small pictures with many
# channels, up again, and at every level the way up sees what the way down saw. Names and shapes are those of the
# lecture's network, diffusers' UNet2DModel, so that weights can be exchanged with it in both directions.

def timestep_embedding(t, dim, max_period=10_000):
    """Sinusoids of the time t at dim/2 frequencies from 1 down toward 1/max_period (Vaswani et al. 2017, section 3.5).

    t: (N,) floats -> (N, dim): cosines first, then sines. A network reads a number more easily as a pattern of waves.
    (Made for the places of words in a sentence, taken over by Ho et al. 2020 for t up to 1000. Lesson 1 passes 0 to 1,
    where the fastest turns by one radian only; lesson 3 always 0; lesson 4 sigma.)
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added back; between them the time's embedding is added."""

    def __init__(self, n_in, n_out, n_emb, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(n_emb, n_out)
        self.norm2 = nn.GroupNorm(groups, n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else None

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention among all pixels of the picture: the one place where far corners speak to each other directly."""

    def __init__(self, n, groups, head_dim):
        super().__init__()
        if n % head_dim: raise ValueError(f"{n} channels cannot be split into heads of {head_dim}")
        self.heads = n // head_dim
        self.group_norm = nn.GroupNorm(groups, n)
        self.to_q, self.to_k, self.to_v = nn.Linear(n, n), nn.Linear(n, n), nn.Linear(n, n)
        self.to_out = nn.ModuleList([nn.Linear(n, n)])

    def forward(self, x):
        n, c, height, width = x.shape
        pixels = self.group_norm(x).permute(0, 2, 3, 1).reshape(n, height * width, c)
        q, k, v = (f(pixels).view(n, height * width, self.heads, -1).transpose(1, 2)
                   for f in (self.to_q, self.to_k, self.to_v))
        out = attend(q, k, v)                                              # softmax(q k' / sqrt(head_dim)) v
        out = out.transpose(1, 2).reshape(n, height * width, c)
        return x + self.to_out[0](out).reshape(n, height, width, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """self.conv(F.interpolate(x, scale_factor=2)), computed as one transposed convolution.

    Its 4x4 kernel is the 3x3 one laid over itself at the four places that a doubled pixel takes. The result is the same
    for less than half of the multiplications.
    """

    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, padding=1)

    def forward(self, x):
        w = self.conv.weight.transpose(0, 1).flip(2, 3)                    # as a transposed convolution counts them
        w = sum(F.pad(w, (left, 1 - left, top, 1 - top)) for left in (0, 1) for top in (0, 1))
        return F.conv_transpose2d(x, w, self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """The blocks that work at one picture size. widths: the channels that each block receives."""

    def __init__(self, widths, n, n_emb, groups, head_dim, attentions, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(w, n, n_emb, groups) for w in widths])
        self.attentions = nn.ModuleList([Attention(n, groups, head_dim) for _ in range(attentions)])
        self.downsamplers = nn.ModuleList([Downsample(n)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(n)] if up else [])

    def block(self, i, x, emb):
        x = self.resnets[i](x, emb)
        return self.attentions[i](x) if i < len(self.attentions) else x


class UNet(nn.Module):
    """The lecture's network: 15,890,753 parameters with the defaults. (Scripts build what SIZES says, further down.)

    channels: the width of each level, from full size down; every one a multiple of groups and, but for the first
    level, which has no attention, of head_dim. layers: residual blocks at each level on the way down; up has one more.
    forward(x, t): x (N, 1, H, W), H and W multiples of 2^(levels - 1); t a number or (N,) floats, whatever the lesson
    calls time -> (N, 1, H, W), in float32 even where mixed precision computes in bfloat16.
    """

    def __init__(self, channels=(32, 64, 128, 256), layers=2, groups=8, head_dim=8):
        super().__init__()
        n, n_emb, last = channels[0], 4 * channels[0], len(channels) - 1
        self.conv_in = nn.Conv2d(1, n, 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(n, n_emb), "linear_2": nn.Linear(n_emb, n_emb)})
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [n]                                     # the channels of everything that the way up will see again
        for i, width in enumerate(channels):
            self.down_blocks.append(Level([n] + [width] * (layers - 1), width, n_emb, groups, head_dim,
                                          attentions=layers if i > 0 else 0, down=i < last))
            skips += [width] * (layers + (i < last))
            n = width
        self.mid_block = Level([n, n], n, n_emb, groups, head_dim, attentions=1)
        for i, width in reversed(list(enumerate(channels))):
            widths = [w + skips.pop() for w in [n] + [width] * layers]
            self.up_blocks.append(Level(widths, width, n_emb, groups, head_dim,
                                        attentions=layers + 1 if i > 0 else 0, up=i > 0))
            n = width
        self.conv_norm_out = nn.GroupNorm(groups, n)
        self.conv_out = nn.Conv2d(n, 1, 3, padding=1)

    def forward(self, x, t):
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        emb = timestep_embedding(t, self.conv_in.out_channels)
        emb = F.silu(self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](emb))))
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                skips.append(x := level.block(i, x, emb))
            for down in level.downsamplers:
                skips.append(x := down(x))
        x = self.mid_block.block(1, self.mid_block.block(0, x, emb), emb)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, torch.cat([x, skips.pop()], dim=1), emb)
            for up in level.upsamplers:
                x = up(x)
        return self.conv_out(F.silu(self.conv_norm_out(x))).float()


def init_ddpm(model):
    """Start the network as the constant 0, its residual blocks on the way down and up as nothing but shortcuts (not
    its attention, which starts at random); -> the model.

    A fresh network then answers 0 instead of random numbers, and each block grows from doing nothing. Downsampling
    starts orthogonal, so that no channel repeats another. (Lecture; zero last layers: Ho et al. 2020's own code.)
    """
    for level in [*model.down_blocks, *model.up_blocks]:
        for block in level.resnets:
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
        for down in level.downsamplers:
            nn.init.orthogonal_(down.conv.weight)
    nn.init.zeros_(model.conv_out.weight)
    nn.init.zeros_(model.conv_out.bias)
    return model


# ---------------------------------------------------------------------------------------------- making it fast
# Number formats, attention, compiling: what is best depends on the machine. You can skip this at first.

torch.backends.cudnn.allow_tf32 = False                    # float32 is float32 on every GPU, not shorter TF32


@functools.cache
def processor():
    """What Linux says of the CPU, its vendor and its abilities; elsewhere nothing."""
    cpu = Path("/proc/cpuinfo")
    return cpu.read_text() if cpu.exists() else ""


@functools.cache
def has_matrix_units(device):
    """Whether a torch.device multiplies matrices in bfloat16 much faster: recent CUDA GPUs and some x86 CPUs do."""
    if device.type == "cuda": return torch.cuda.get_device_capability(device) >= (8, 0)
    # The one Intel without AMX that was measured took 1.3 to 1.5 times as long in bfloat16. AMD's are faster in it.
    return device.type == "cpu" and ("amx_bf16" in processor()
                                     or "avx512_bf16" in processor() and "AuthenticAMD" in processor())


def mixed_precision(device, amp=True):
    """Matrix products in bfloat16 where there are units for it; weights, and sums in a loss, stay float32."""
    units = amp and has_matrix_units(device)
    return torch.autocast(device.type, torch.bfloat16) if units else contextlib.nullcontext()


def attend(q, k, v):
    """softmax(q k' / sqrt(d)) v for (.., pixels, d) each (Vaswani et al. 2017, eq. 1), by torch's fused kernels where
    they are fastest."""
    if q.device.type != "cpu": return F.scaled_dot_product_attention(q, k, v)
    pixels, d = q.shape[-2:]
    # On a CPU the fused kernels' backward pass is slow in bfloat16. So where pixels are few for the width of a head,
    # the formula is used as it stands (it stores pixels squared numbers a head); elsewhere the kernels, in float32.
    if q.dtype == torch.bfloat16 and pixels <= 8 * d:
        return (q * d ** -0.5 @ k.transpose(-2, -1)).softmax(-1).to(q.dtype) @ v
    with torch.autocast("cpu", enabled=False):
        q, k, v = q.float(), k.float(), v.float()
        if pixels > 64 and "AuthenticAMD" in processor():
            # On AMD heads of 8 channels are slower than of 16, so zeros are appended, which change no product.
            q, k, v = (F.pad(a, (0, -d % 16)) for a in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=d ** -0.5)[..., :d]


def compiled(model, device):
    """The model as a faster callable on a CUDA GPU with a compiler at hand, else the model itself.

    Many operations become few kernels (programs of the GPU), and CUDA graphs ("reduce-overhead") start all of them
    at once: without them the GPU waits for the processor half of the time. On two CPU cores compiling took 40 to 160 s
    and made a step shorter by a sixth at best: in a pass over the images less than it cost.
    """
    if device.type != "cuda" or not any(map(shutil.which, ("cc", "gcc", "clang"))): return model
    torch._dynamo.config.suppress_errors = True                # what cannot be compiled after all runs as it is
    return torch.compile(model, mode="reduce-overhead")


# ---------------------------------------------------------------------------------------------- fitting it

def step_seed(seed, step):
    """Each step has a seed of its own, so a run that is broken off and continued draws the same noise as an unbroken
    one, and a checkpoint holds no random state. (Not seed + step: seeds 0 and 1 would share nearly all of it.)"""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


STARTED = time.time()    # when the code that runs was read: an edit made after that is not in it


def edited_since(began):
    """A warning that names the scripts edited after the one that trained was started, at the time `began`; or ""."""
    names = [file.name for file in sorted(Path(__file__).parent.glob("*.py"))
             if file.stat().st_mtime > began and not file.name.startswith("test_")]
    return f" ({', '.join(names)} changed since: if the change is in training, delete this file)" if names else ""


SAVE_EVERY = 30          # seconds between two checkpoints


# Without what makes it fast, safe and talkative, fit is no more than this:
#
#     for epoch in range(epochs):
#         for pick in torch.randperm(len(images)).split(batch_size):
#             inputs, target = noisify(images[pick])
#             loss(model(*inputs), target).backward()
#             optim.step(), schedule.step(), optim.zero_grad()

def fit(model, noisify, images, *, epochs, batch_size, lr, labels=None, loss=F.mse_loss, path=None, settings=None,
        optimizer=functools.partial(torch.optim.Adam, eps=1e-5), amp=True, seed=0, retrain=False):
    """The one training loop: Adam under a one-cycle rate (Smith 2018), everything resident on the model's device.

    noisify(x0) -> (inputs, target), or noisify(x0, labels) where labels are given; inputs is a tuple: model(*inputs).
    optimizer: torch.optim.Adam or AdamW, the rest of its settings filled in.
    images: (N, 1, H, W), taken in batches of batch_size; an epoch's incomplete last batch is left out. amp: bfloat16
    where the device gains by it (see mixed_precision), compiled on a GPU; without amp plain float32, not compiled.
    path: where the finished network is kept and found again; an unfinished one is beside it, as .part (.retrain with
    retrain=True). settings: what a checkpoint must match to be used, a dictionary of plain values.
    -> {"losses": (steps,), "seconds": of training and compiling, "first_step": seconds of the first step, compiling
    included, "device": its name}; the model is left in evaluation mode. Raises Problem where a checkpoint is damaged or
    belongs to other settings, and where the loss is not finite.
    """
    device, path = next(model.parameters()).device, path and Path(path)
    # Channels last is the faster layout, except on CPUs in bfloat16, where group norm is slow in it.
    channels_first = amp and device.type == "cpu" and has_matrix_units(device)
    model.to(memory_format=torch.contiguous_format if channels_first else torch.channels_last)
    settings = json.loads(json.dumps(settings or {}))                      # plain values only: tuples become lists
    if path and path.exists() and not retrain:
        state = load_checkpoint(path, settings, needs=("model", "losses", "seconds", "began", "device"))
        restore(model.eval(), state["model"], path, "if you changed the network take another --out-dir, else delete it")
        print(f"using the network trained before, {path}" + edited_since(state["began"]))
        return {key: state.get(key) for key in ("losses", "seconds", "first_step", "device")}

    batch_size = min(batch_size, len(images))
    per_epoch = len(images) // batch_size
    total = epochs * per_epoch
    if total < 2: raise Problem(f"one step of {batch_size} images is no training: lower --batch-size or raise --epochs")
    optim = optimizer(model.parameters(), lr=lr, fused=device.type in ("cpu", "cuda"))
    # The rate climbs for the first 30% of the steps, then falls to next to nothing; Adam's first beta goes the other
    # way, from 0.95 to 0.85 and back.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, max_lr=lr, total_steps=total)
    losses, step, seconds_before, first_step, began = torch.zeros(total), 0, 0.0, None, STARTED
    part = path and path.with_suffix(".retrain" if retrain else ".part")
    if part and part.exists():
        losses, step, seconds_before, first_step, began = resume(part, settings, model, optim, schedule)
        print(f"continuing at step {step} of {total}, from {part}" + edited_since(began))
    elif path:
        print(f"training on {device_name(device)}: {total} steps of {batch_size} images")
    losses, resumed_at, started = losses.to(device), step, time.perf_counter()

    def check_losses():
        bad = (~losses[:step].isfinite()).nonzero()
        if len(bad):
            raise Problem(f"the loss was {losses[bad[0, 0]]} at step {int(bad[0, 0]) + 1} of {total}: "
                          "a lower --lr usually cures that")

    run = compiled(model, device) if amp else model                        # without amp that costs more than it gains
    if run is not model: progress("compiling the network for this GPU, a minute or so ...", end=True)
    last_shown = last_saved = time.perf_counter()
    model.train()
    try:
        while step < total:
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == resumed_at:
                order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(images))).to(device)
                from_step, from_time = step, time.perf_counter()           # speed is by epoch, as the first compiles
            torch.manual_seed(step_seed(seed, step))
            pick = order[i * batch_size:(i + 1) * batch_size]
            # The lecture's loop: the question and its answer, the network's answer, the loss, its gradient, one step.
            inputs, target = noisify(images[pick]) if labels is None else noisify(images[pick], labels[pick])
            with mixed_precision(device, amp):
                output = run(*inputs)
            error = loss(output.float(), target)
            optim.zero_grad()
            error.backward()
            optim.step()
            schedule.step()
            losses[step] = error.detach()
            step += 1
            if step == 1:
                check_losses()                                             # waits for a GPU, so the time is real
                first_step = time.perf_counter() - started
            now = time.perf_counter()
            if now - last_shown > 1 or i + 1 == per_epoch:                 # seldom, as it waits for a GPU
                check_losses()
                last_shown = now = time.perf_counter()
                rate = (step - from_step) * batch_size / (now - from_time)
                loss_so_far = losses[step - i - 1:step].mean()             # of this epoch
                progress(f"epoch {epoch + 1}/{epochs}  step {step}/{total}  loss {loss_so_far:.4f}  {rate:.0f} images/s"
                         f"  {(total - step) * batch_size / rate:.0f} s left", end=i + 1 == per_epoch)
            if part and now - last_saved > SAVE_EVERY:
                check_losses()
                save_atomically({"settings": settings, "step": step, "losses": losses.cpu(),
                                 "seconds": seconds_before + now - started, "first_step": first_step, "began": began,
                                 "model": model.state_dict(), "optimizer": optim.state_dict(),
                                 "schedule": schedule.state_dict()}, part)
                last_saved = time.perf_counter()
    except KeyboardInterrupt:
        onward = f"continues from {part}" if part and part.exists() else "starts again"
        raise KeyboardInterrupt(f"stopped at step {step} of {total}; the same command {onward}") from None
    model.eval()
    record = {"losses": losses.cpu(), "seconds": seconds_before + time.perf_counter() - started,
              "first_step": first_step, "device": device_name(device)}
    if path:
        save_atomically({"settings": settings, "model": model.state_dict(), "began": began, **record}, path)
        for left in (path.with_suffix(".part"), path.with_suffix(".retrain"), *path.parent.glob(f"{path.stem}.*.tmp")):
            left.unlink(missing_ok=True)                                   # .tmp: killed as it was written
    return record


def chosen(args, recipe):
    """The recipe, where the flags of the same names do not say otherwise."""
    return {name: value if getattr(args, name) is None else getattr(args, name) for name, value in recipe.items()}


def train(args, lesson, recipes, noisify, images, *, build=None, loss=F.mse_loss, amp=True, **settings):
    """A lesson's trained network: built, started and fitted, or found again in the lesson's folder.

    recipes: {size: {"epochs": .., "batch_size": .., "lr": ..}}. build(): another network than the size's UNet.
    settings: what else the network depends on, such as its lesson's scales.
    -> the network, and its origin, for the record of every result (loss: the mean of the last 100 steps).
    """
    if args.size not in recipes: raise Problem(f"--size {args.size} has no recipe: add one to RECIPE in {lesson}.py")
    recipe = chosen(args, recipes[args.size])
    settings |= recipe | {"lesson": lesson, "images": len(images), "data": args.data, "seed": args.seed}
    torch.manual_seed(args.seed)
    if build:
        model = build()
    else:
        settings |= {name: getattr(args, name) for name in ("channels", "layers", "head_dim")}
        model = init_ddpm(UNet(args.channels, args.layers, head_dim=args.head_dim))
    model.to(args.device)
    path = checkpoint_path(args.out_dir / lesson, settings)
    record = fit(model, noisify, images.to(args.device), loss=loss, path=path, settings=settings, seed=args.seed,
                 retrain=args.retrain, amp=amp, **recipe)
    weights = hashlib.sha256(b"".join(p.cpu().numpy().tobytes() for p in model.state_dict().values())).hexdigest()[:10]
    return model, {"network": path.stem, "weights": weights, **recipe, "loss": float(record["losses"][-100:].mean()),
                   "train_seconds": round(record["seconds"], 1),
                   "first_step_seconds": record["first_step"] and round(record["first_step"], 1),
                   "trained_on": record["device"], **measured_on(args, amp)}


@torch.no_grad()
def generate(sampler, n, seed, device, batch=None, amp=True):
    """-> n samples (n, ..), usually images, made by sampler(noise) of noise (batch, 1, 32, 32); and the seconds.

    The noise is drawn on the CPU from the seed: the same on every device, and whether or not training ran just before.
    What a sampler draws on the way comes from torch's own generator, seeded here too.
    """
    batch = batch or (128 if device.type == "cpu" else 1024)               # 128 stay in a CPU's cache
    torch.manual_seed(step_seed(seed, 1))                                  # not seed: that gives the starting noise
    generator, out, started = torch.Generator().manual_seed(seed), None, time.perf_counter()
    for start in range(0, n, batch):
        noise = torch.randn(min(batch, n - start), 1, 32, 32, generator=generator)
        with mixed_precision(device, amp):
            images = sampler(noise.to(device))
        if out is None: out = torch.empty(n, *images.shape[1:])
        out[start:start + len(noise)] = images                             # in place: never two copies
        progress(f"sampled {start + len(noise)} of {n}")
    progress("")
    return out, time.perf_counter() - started


# ---------------------------------------------------------------------------------------------- checkpoints
# What keeps a training safe from kills, full disks and mistaken files. A reader of the lecture can skip it.

def checkpoint_path(folder, settings, what="network"):
    """Other settings, other name: two experiments in one folder never meet."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Path(folder) / f"{what}-{digest[:10]}.pt"


def resume(part, settings, model, optim, schedule):
    """Put model, optimiser and schedule where a training was broken off -> its losses, step, seconds, first_step, and
    when the script was started."""
    state = load_checkpoint(part, settings,
                            needs=("model", "losses", "seconds", "began", "step", "optimizer", "schedule"))
    restore(model, state["model"], part)
    optim.load_state_dict(state["optimizer"])
    for weight, moments in optim.state.items():                            # another device may lay them out otherwise
        moments |= {name: torch.empty_like(weight).copy_(moment) for name, moment in moments.items()
                    if torch.is_tensor(moment) and moment.shape == weight.shape}
    schedule.load_state_dict(state["schedule"])
    return state["losses"], state["step"], state["seconds"], state.get("first_step"), state["began"]


def save_atomically(content, path):
    """Write beside the file, then rename: whoever looks, at whatever moment, sees a whole file, the old or the new.

    content: text, or what torch.save can save. Two scripts that write the same file do not meet in the temporary one.
    Raises Problem where it cannot be written, as on a full disk; the old file is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(content) if isinstance(content, str) else torch.save(content, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise Problem(f"{path} cannot be written ({first_line(error)})")
    except RuntimeError as error:                                          # torch's
        raise Problem(f"{path} cannot be written, perhaps because the disk is full ({first_line(error)})")
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, settings=None, needs=("model",), remedy="delete it"):
    """What save_atomically wrote; raises Problem for a file that is damaged, foreign or of other settings.

    torch.load takes flipped bits for weights, so the archive's checksums are asked first, and weights_only=True
    refuses a pickle that would run code.
    """
    if not path.exists(): raise Problem(f"{path} is missing: {remedy}")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip(): raise zipfile.BadZipFile(f"{damaged} fails its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict): raise TypeError("no dictionary")
        found = dict(state["settings"])
        if missing := [name for name in needs if name not in state]: raise KeyError(f"no {missing[0]} in it")
    except PermissionError: raise                                          # it may be sound
    except Exception as error:                                             # a damaged file may raise anything
        raise Problem(f"{path} is damaged or not a checkpoint of ours ({first_line(error)}): {remedy}")
    if settings is not None and found != settings:
        differing = sorted(k for k in found.keys() | settings.keys() if found.get(k) != settings.get(k))
        raise Problem(f"{path} was made with other settings ("
                      + ", ".join(f"{k} {found.get(k)}, not {settings.get(k)}" for k in differing) + f"): {remedy}")
    return state


def restore(model, weights, path, remedy="delete it"):
    """Put the weights into the model, or raise a Problem that names the file."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]                        # torch lists every weight
        raise Problem(f"{path} does not fit this network ({reason}): {remedy}")


# ---------------------------------------------------------------------------------------------- what scripts share

class Problem(ValueError):
    """Something that the person at the keyboard can mend: a script says it in one line and ends with status 2."""


def first_line(error):
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def progress(text, end=False):
    """A line that updates in place on a terminal; elsewhere only the lines with end=True are printed."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="\n" if end else "", flush=True)
    elif end:
        print(text, flush=True)


def script(main):
    """Wrap a script's main: Ctrl-C and what the person at the keyboard can mend end it with one line and a status, not
    with a traceback."""
    @functools.wraps(main)
    def wrapped(argv=None):
        name = Path(sys.modules[main.__module__].__file__).name
        if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(line_buffering=True)     # into files too
        try:
            return main(argv)
        except (Problem, OSError, torch.cuda.OutOfMemoryError) as error:
            if isinstance(error, OSError): error = f"{error.filename or 'a file'}: {error.strerror or error}"
            if isinstance(error, torch.cuda.OutOfMemoryError):
                error = "too little memory on the GPU: --size small needs less, or a lower --batch-size"
            progress("")                                                   # instead of the progress line
            print(f"{name}: error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as stop:
            print(f"\n{name}: {str(stop) or 'stopped; the same command goes on from what is saved'}", file=sys.stderr)
            sys.exit(130)
    return wrapped


# Each size is the lecture's network or a narrower one, how many real images are loaded (count; None: all), and how many
# are sampled. Each lesson has a recipe for each size: epochs, batch size and peak learning rate.
SIZES = {
    "lecture": dict(channels=(32, 64, 128, 256), layers=2, head_dim=8, count=None, samples=2048),
    "small": dict(channels=(16, 32, 64), layers=1, head_dim=32, count=None, samples=2048),
    "tiny": dict(channels=(8, 16), layers=1, head_dim=16, count=256, samples=64),
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high, and a message that says so."""
    what = f"{'a whole number' if kind is int else 'a number'} from {low}"
    if high < math.inf: what += f" to {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value < math.inf): raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value
    return parse


def flags(lesson, description):
    """The parser that every script starts from; a lesson adds what is its own."""
    parser = Parser(prog=f"{lesson}.py", description=description)
    parser.set_defaults(lesson=lesson)
    add = parser.add_argument
    add("--size", choices=SIZES, help="set of defaults: lecture (usual with CUDA), small (elsewhere), tiny (a test)")
    add("--epochs", type=number(int, 1, 100_000), help="passes over the training images")
    add("--batch-size", type=number(int, 2, 60_000), help="images in a training step, 2 at least")
    add("--lr", type=number(float, 1e-9, 1e3), help="peak learning rate")
    add("--samples", type=number(int, 2, 59_999), help="images to sample and score (lesson 2 samples none)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, training and sampling (default 0)")
    add("--device", default="auto", help="cuda, mps, cpu (default: the first of them that is there)")
    add("--data", choices=("auto", "fashion", "drawn"), default="auto",
        help="Fashion-MNIST, or drawn stand-ins; auto: the first, or the second where it cannot be had")
    add("--data-dir", default="data", help="folder of the data set (default data)")
    add("--out-dir", default="out", help="folder for checkpoints, pictures and results.json (default out)")
    add("--retrain", action="store_true", help="train anew; the old network stays until the new one is complete")
    return parser


def settle(args):
    """Fill in what the size settles; check the device, and make sure of the folder. A script calls it after its own
    checks of the flags. device becomes a torch.device, out_dir a Path, and folder is the lesson's own folder in it."""
    args.device = pick_device(args.device)
    args.size = args.size or ("lecture" if args.device.type == "cuda" else "small")
    for name, value in SIZES[args.size].items():
        if getattr(args, name, None) is None: setattr(args, name, value)
    if args.samples >= (args.count or 60_000):
        raise Problem(f"--samples {args.samples}: a score is compared with those of as many real images, drawn "
                      f"at random from {args.count or 60_000}")
    args.out_dir = Path(args.out_dir)
    args.folder = args.out_dir / args.lesson
    writable(args.folder)
    read_results(args.folder)                                              # damaged? better found now


def writable(folder):
    """Make sure that the folder is there and can be written to; raises Problem where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"probe-{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Problem(f"cannot write to the folder {folder} ({error.strerror})")


def read_results(folder):
    """The records in a folder's results.json, a list of dictionaries; raises Problem where the file is not that."""
    path = folder / "results.json"
    try:
        records = json.loads(path.read_text()) if path.exists() else []
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError("no list of records")
    except ValueError as error:
        raise Problem(f"{path} is not a list of results ({first_line(error)}): delete it")
    return records


def pick_device(name):
    """auto -> CUDA, else MPS, else CPU; anything else as torch names it, if it is there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto": name = next(kind for kind, is_there in there.items() if is_there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Problem(f"--device {name!r}: cuda, mps or cpu")
    if not there.get(device.type) or device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Problem(f"--device {name}: there is no such device here")
    return device


def device_name(device):
    """The device's name in results."""
    if device.type == "cuda": return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def precision(device, amp=True):
    """In which numbers the network's matrices are multiplied."""
    return "bfloat16" if amp and has_matrix_units(device) else "float32"


def measured_on(args, amp=True):
    """What every result says of where it was measured."""
    return {"size": args.size, "seed": args.seed, "device": device_name(args.device),
            "precision": precision(args.device, amp), "torch": str(torch.__version__)}


@script
def main(argv=None):
    from torch.utils.flop_counter import FlopCounterMode
    parser = Parser(prog="unet.py", description="The network's size, and its speed on this machine.")
    parser.add_argument("--size", choices=SIZES, default="lecture", help="which network (default lecture)")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu (default: the first of them that is there)")
    args = parser.parse_args(argv)
    device, size = pick_device(args.device), SIZES[args.size]
    model = init_ddpm(UNet(size["channels"], size["layers"], head_dim=size["head_dim"])).to(device)
    batch, times = (64, 1) if device.type == "cpu" else (512, 20)           # what keeps it busy
    images = torch.randn(times * 8 * batch, 1, 32, 32, device=device)
    parameters = sum(p.numel() for p in model.parameters())
    with torch.device("meta"), FlopCounterMode(display=False) as counter:   # the same count on every device
        UNet(size["channels"], size["layers"], head_dim=size["head_dim"])(torch.zeros(1, 1, 32, 32), 0.5)
    print(f"{args.size}: {parameters:,} parameters, {counter.get_total_flops() / 1e9:.2f} GFLOP an image forward")
    training = lambda n, amp: n / fit(model, lambda x: ((x, 0.5), x), images[:n], epochs=1, batch_size=batch, lr=1e-3,
                                      amp=amp)["seconds"]
    ask = lambda noise: [model(noise, 0.5) for _ in range(times)][-1]
    asking = lambda n: n * times / generate(ask, n, 0, device)[1]
    for n in (3 * batch, 8 * batch):                                       # the first to warm up, and to compile
        rates = training(times * n, False), training(times * n, True), asking(n)
    print("images/s on {}: training {:.0f} in float32, {:.0f} in {}; one evaluation {:.0f}".format(
        device_name(device), rates[0], rates[1], precision(device), rates[2]))


if __name__ == "__main__":
    main()
