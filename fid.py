"""The images, the classifier whose features judge them, the scores FID and KID, and pictures of it all.

    python fid.py             what a score means: what real, slightly noisy, blurred and meaningless images get
    python fid.py --retrain   train the classifier anew on the real images and pin it in weights/fid.pt

FID (Frechet inception distance) says how far a set of samples is from the 10,000 test images, as a classifier's
features describe both. It needs a classifier (ours is pinned, so that figures can be compared), a number of images
(2048 by default: more give a lower FID) and a floor, which perfect samples would score on average: the score of as many
real training images.

Ours is a floor of 1.12 +- 0.13 (results/small/fid). Real images with noise of 0.03, which is hardly visible, score 1.9;
with noise of 0.1 they score 20, blurred by a pixel 24. Pure noise scores 334. Working in float64 or, like the lecture's
notebook, in float32 makes no difference with this classifier and images in -1..1, and a little if they are halved, as
in the lecture's lesson 4.
"""
import functools
import hashlib
import json
import time
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont

from unet import (Problem, checkpoint_path, chosen, device_name, first_line, fit, flags, load_checkpoint,
                  measured_on, progress, read_results, restore, save_atomically, script, settle, writable)

CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
WEIGHTS = Path(__file__).parent / "weights" / "fid.pt"
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()             # tells whether this file was changed


# ---------------------------------------------------------------------------------------------- the images

# The four files of Fashion-MNIST (Xiao, Rasul & Vollgraf 2017), unpacked, and their MD5. torchvision checks what it
# downloads, but not what it finds unpacked: a damaged file would be trained on without a word.
FILES = {"train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
         "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
         "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
         "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965"}


def find_data(data="auto", data_dir="data"):
    """Which images there are: "fashion" (downloaded if need be) or "drawn".

    Raises Problem where a file is damaged, which is left as it is, and where "fashion" cannot be had.
    """
    if data == "drawn": return data
    dataset, raw = torchvision.datasets.FashionMNIST, Path(data_dir) / "FashionMNIST" / "raw"
    unpacked = all((raw / name).exists() for name in FILES)                # packed ones are not needed then
    md5s = FILES if unpacked else {**FILES, **dict(dataset.resources)}
    damaged = lambda: [raw / name for name, md5 in md5s.items()
                       if (raw / name).exists() and hashlib.md5((raw / name).read_bytes()).hexdigest() != md5]
    for path in damaged():
        raise Problem(f"{path} is damaged: delete it, so that it is unpacked or downloaded again")
    try:
        dataset(data_dir, download=True)
    except (RuntimeError, OSError, HTTPException) as error:
        reason = first_line(error).rstrip(":")
        if data == "fashion": raise Problem(f"Fashion-MNIST is not in {data_dir} and cannot be downloaded ({reason})")
        print(f"Fashion-MNIST is not in {data_dir} and cannot be downloaded ({reason}): going on with drawn clothes.\n"
              "Their scores say whether everything works, and nothing about the lecture's figures.")
        return "drawn"
    finally:
        for path in [] if unpacked else damaged(): path.unlink()           # what this download left half done
    return "fashion"


def fashion_mnist(data_dir="data", train=True, data="auto", count=None):
    """-> images (N, 1, 32, 32) float32 in [-1, 1], labels (N,) int64: the first `count` of them, or all.

    28x28 pixels, padded by 2 with the background (-1), so that they can be halved three times and more.
    data: "fashion", "drawn", or "auto" for whichever can be had.
    """
    if find_data(data, data_dir) == "fashion":
        found = torchvision.datasets.FashionMNIST(data_dir, train=train)
        pixels, labels = found.data[:count], found.targets[:count]
    else:
        pixels, labels = draw_clothes(min(count or 60_000, 60_000 if train else 10_000), seed=0 if train else 1)
    images = torch.full((len(pixels), 1, 32, 32), -1.0)
    images[:, 0, 2:-2, 2:-2] = pixels.float().div_(127.5).sub_(1)
    return images, labels.long()


# ---------------------------------------------------------------------------------------------- the classifier

class ResBlock(nn.Module):
    """Two convolutions with batch norm; the shortcut averages where the size halves, then is a 1x1 convolution."""

    def __init__(self, n_in, n_out, stride, kernel):
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=kernel, padding=kernel // 2, bias=False)
        self.conv1, self.norm1 = conv(n_in, n_out), nn.BatchNorm2d(n_out)
        self.conv2, self.norm2 = conv(n_out, n_out, stride=stride), nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential(*[nn.AvgPool2d(2)] * (stride == 2), nn.Conv2d(n_in, n_out, 1))

    def forward(self, x):
        h = activation(self.norm1(self.conv1(x)))
        return activation(self.norm2(self.conv2(h)) + self.shortcut(x))


def activation(x):
    """Leaky ReLU, shifted down so that what comes out has a mean near 0 (the lecture's earlier lessons). To change it
    see resnet first."""
    return F.leaky_relu(x, 0.1) - 0.4


def resnet(outputs):
    """The lecture's residual network, (N, 1, 32, 32) -> (N, outputs). All but its last two modules give features.

    It is lesson 2's network, and with the weights in WEIGHTS the judge of every score, which a change here would spoil:
    to change lesson 2's, copy this function (ResBlock and activation, too, if need be) into noise_pred.py.
    """
    widths = (16, 32, 64, 128, 256, 512)
    blocks = [ResBlock(1, widths[0], 1, 5)] + [ResBlock(a, b, 2, 3) for a, b in zip(widths, widths[1:])]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.1), nn.Linear(widths[-1], outputs))
    for module in model.modules():
        if isinstance(module, nn.Conv2d): nn.init.kaiming_normal_(module.weight, a=0.1)
    return model


def load_classifier(device):
    """The pinned classifier, in float32 and ready to judge -> (model, its record). Raises Problem if it is damaged."""
    remedy = "restore it from git, or python fid.py --retrain"
    state = load_checkpoint(WEIGHTS, needs=("model", "accuracy"), remedy=remedy)
    model = resnet(10)
    restore(model, state["model"], WEIGHTS, remedy)
    return model.to(device, memory_format=torch.channels_last).eval(), state           # the faster layout


@torch.no_grad()
def run(model, images):
    """What the model says of many images, in float32: a score must not depend on the GPU."""
    device = next(model.parameters()).device
    batch = 64 if device.type == "cpu" else 1024                           # 64 stay in a CPU's cache
    return torch.cat([model(some.to(device)).cpu() for some in images.split(batch)])


def retrain(args):
    """Train the classifier on the real images and pin it in float16. Shifts and mirror images make the set larger."""
    if args.size == "tiny" or args.data == "drawn":
        raise Problem("--retrain takes the whole of the real Fashion-MNIST: no --size tiny, no drawn clothes")
    writable(WEIGHTS.parent)
    images, labels = fashion_mnist(args.data_dir, True, "fashion")
    test_images, test_labels = fashion_mnist(args.data_dir, False, "fashion")

    def augment(x, y):
        n = len(x)
        shift = torch.randint(-2, 3, (2, n, 1), device=x.device)           # up to 2 pixels: what wraps is background
        rows, columns = (torch.arange(32, device=x.device) + shift) % 32
        x = x[torch.arange(n, device=x.device)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]
        mirror = torch.rand(n, 1, 1, 1, device=x.device) < 0.5
        return (torch.where(mirror, x.flip(3), x),), y

    recipe = chosen(args, dict(epochs=8, batch_size=256, lr=1e-2))
    settings = dict(lesson="classifier", images=len(images), data="fashion", seed=args.seed, **recipe)
    torch.manual_seed(args.seed)
    model = resnet(10).to(args.device)
    record = fit(model, augment, images.to(args.device), labels=labels.to(args.device), **recipe,
                 loss=functools.partial(F.cross_entropy, label_smoothing=0.1), optimizer=torch.optim.AdamW,
                 seed=args.seed, path=checkpoint_path(args.folder, settings), settings=settings, retrain=True)
    half = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.load_state_dict(half)                                            # judged as it will be used
    accuracy = float((run(model, test_images).argmax(1) == test_labels).float().mean())
    if accuracy < 0.93: raise Problem(f"only {accuracy:.2%} of the test images right, 93% at least: not pinned")
    save_atomically({"settings": settings, "model": half, "accuracy": accuracy, "seconds": record["seconds"],
                     "device": record["device"], "torch": str(torch.__version__)}, WEIGHTS)
    print(f"{accuracy:.2%} of the test images right after {record['seconds']:.0f} s of training on {record['device']}, "
          f"seed {args.seed}: pinned as {WEIGHTS}")


# ---------------------------------------------------------------------------------------------- the scores

def statistics(features):
    """Mean (d,) and covariance (d, d) of (N, d) features, in float64."""
    features = np.asarray(features)
    return features.mean(0, dtype=np.float64), np.cov(features, rowvar=False, dtype=np.float64)


def frechet_distance(mu1, cov1, mu2, cov2):
    """FID: the squared Frechet distance of two Gaussians, |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Means (d,), covariances (d, d) -> float. Heusel et al. 2017, eq. 6. With symmetric roots S1, S2 of C1, C2, the trace
    of (C1 C2)^(1/2) is the sum of the singular values of S1 S2: real, at least 0, and accurate even with fewer samples
    than features, where a general matrix square root of C1 C2 turns complex.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(a, dtype=np.float64) for a in (mu1, cov1, mu2, cov2))

    def root(cov):
        values, vectors = np.linalg.eigh(cov)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T             # what is below 0 is round-off
    shared = np.linalg.svd(root(cov1) @ root(cov2), compute_uv=False).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * shared)


def kernel_distance(feats1, feats2, subsets=100, size=1000, device="cpu"):
    """KID: the unbiased squared maximum mean discrepancy under the kernel (x.y/d + 1)^3, averaged over subsets.

    (N, d), (M, d) features -> float: 0 on average for two draws of the same thing, so it can be a little below.
    Binkowski et al. 2018, section 4; each subset takes min(size, N, M) of each side, from a fixed generator. device:
    where to do it, in float64.
    """
    feats1, feats2 = (torch.as_tensor(f).to(device) for f in (feats1, feats2))
    n, d = min(size, len(feats1), len(feats2)), feats1.shape[1]
    random, total = np.random.default_rng(0), 0.0
    kernel = lambda a, b: (a @ b.T / d + 1) ** 3
    for _ in range(subsets):
        x = feats1[torch.from_numpy(random.choice(len(feats1), n, replace=False))].double()
        y = feats2[torch.from_numpy(random.choice(len(feats2), n, replace=False))].double()
        xx, yy = kernel(x, x), kernel(y, y)                                # an image is not compared with itself:
        same = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
        total += float(same - 2 * kernel(x, y).mean())
    return total / subsets


def residual_noise(images):
    """Standard deviation of the outermost 2 pixels of (N, 1, 32, 32) images, which are exactly -1 in every real one.

    As they are seen: clamped to [-1, 1].
    """
    border = torch.ones(images.shape[-2:], dtype=torch.bool)
    border[2:-2, 2:-2] = False
    return float(images[:, 0, border].clamp(-1, 1).std())


class ImageEval:
    """Scores images (N, 1, 32, 32) in [-1, 1] against the 10,000 test images, on the pinned classifier.

    samples: how many images will be scored, as the floor depends on it: 20 draws of that many real training images.
    It has to be 2 at least, and less than there are of them.
    count: how many real images to load, for tests; None is all. What takes long is kept in the folder `cache`, as long
    as this file is not changed.
    """

    def __init__(self, data="auto", data_dir="data", samples=2048, device="cpu", cache="out/fid", count=None):
        self.data, self.samples = find_data(data, data_dir), samples
        self.model, self.pinned = load_classifier(torch.device(device))
        settings = dict(lesson="fid", data=self.data, samples=samples, count=count,
                        classifier=hashlib.sha256(WEIGHTS.read_bytes()).hexdigest())
        self.classifier = settings["classifier"][:10]
        path = checkpoint_path(cache, settings, "reals")
        known = load_checkpoint(path, settings, needs=("real", "floor", "floor_sd")) if path.exists() else {}
        if known.get("code") != CODE:                                      # other code may see other images
            known = {"settings": settings, "code": CODE, **self.measure_reals(data_dir, samples, count)}
            save_atomically(known, path)
        self.real = known["real"]
        self.kid_device = device if torch.device(device).type == "cuda" else "cpu"         # MPS has no float64
        self.mean, self.cov = statistics(self.real)
        self.floor, self.floor_sd = known["floor"], known["floor_sd"]

    def measure_reals(self, data_dir, samples, count):
        images, _ = fashion_mnist(data_dir, False, self.data, count)
        real = self.features(images)
        progress(f"measuring what {samples} real images score, once ...", end=True)
        train, random = fashion_mnist(data_dir, True, self.data, count)[0], np.random.default_rng(0)
        if not 1 < samples < len(train):
            raise Problem(f"{samples} images cannot be compared with as many drawn from {len(train)} real ones")
        draws = [random.choice(len(train), samples, replace=False) for _ in range(20)]
        drawn, where = np.unique(draws, return_inverse=True)               # of 60,000 only half are drawn at all
        features, reference = self.features(train[torch.from_numpy(drawn)]), statistics(real)
        scores = [frechet_distance(*statistics(features[torch.from_numpy(draw)]), *reference)
                  for draw in where.reshape(20, samples)]
        # Large draws share images, so their scores differ too little: divide by the finite population correction.
        floor_sd = np.std(scores, ddof=1) / (1 - samples / len(train)) ** 0.5
        return {"real": real, "floor": float(np.mean(scores)), "floor_sd": float(floor_sd)}

    def features(self, images):
        """(N, 512): what the classifier sees, before it decides. Refuses what no score should be made of."""
        if images.ndim != 4 or images.shape[1:] != (1, 32, 32) or not images.is_floating_point():
            raise Problem("images to be scored are floats in [-1, 1], (N, 1, 32, 32), smaller ones padded with -1; not "
                          f"{images.dtype} {tuple(images.shape)}")
        if len(images) < 2: raise Problem("a score needs two images at least")
        if not images.isfinite().all(): raise Problem("images to be scored hold NaN or infinity")
        return torch.cat([run(self.model[:-2], some.float().clamp(-1, 1)) for some in images.split(1024)])

    def fid(self, images):
        return frechet_distance(*statistics(self.features(images)), self.mean, self.cov)

    def kid(self, images):
        return kernel_distance(self.features(images), self.real, device=self.kid_device)

    def score(self, images):
        """All that a result reports of its images: FID, KID, residual noise, how many of each garment, the floor."""
        if len(images) != self.samples:
            raise Problem(f"{len(images)} images have another floor than {self.samples}: "
                          f"ImageEval(samples={len(images)}) measures it")
        features = self.features(images)
        with torch.no_grad():
            seen = self.model[-1](features.to(next(self.model.parameters()).device)).argmax(1).cpu()
        return {"fid": frechet_distance(*statistics(features), self.mean, self.cov),
                "kid": kernel_distance(features, self.real, device=self.kid_device), "border": residual_noise(images),
                "classes": torch.bincount(seen, minlength=10).tolist(), "samples": len(images),
                "floor": self.floor, "floor_sd": self.floor_sd, "data": self.data, "classifier": self.classifier}


def stand_in(data):
    """What every line with a score adds where the images are not the real ones."""
    return "" if data == "fashion" else " (drawn clothes, not Fashion-MNIST)"


def describe(score):
    """A score in words, for the screen."""
    return (f"FID {score['fid']:.2f}, KID {score['kid']:.4f}, residual noise {score['border']:.4f}; {score['samples']} "
            f"real images score FID {score['floor']:.2f} +- {score['floor_sd']:.2f}{stand_in(score['data'])}")


def report(name, record, images, folder):
    """Say what a sampler's result is, put it into results.json, and draw the first of its images."""
    if record["seed"]: name += f", seed {record['seed']}"                  # 0 goes without saying
    print(f"{name}, {record['sample_seconds']:.0f} s: {describe(record)}\n    "
          + ", ".join(f"{n} {kind}" for n, kind in zip(record["classes"], CLASSES)))
    title = f"{name}, FID {record['fid']:.2f}{stand_in(record['data'])}"
    save_results(folder, [record])
    grid(images[:64], None, 16, title=title).save(folder / f"samples-{name.replace(',', '').replace(' ', '-')}.png")


def comparison(records, label, lecture, folder):
    """A script's last words: its results as a table, beside the lecture's figures, and the last of them in words.

    label(record) puts a result's settings in words; lecture has its figures, and their multiples, by such words.
    """
    rows = [("", "evaluations", "FID", "x floor", "lecture", "KID", "residual noise", "solver error")]
    for r in records:
        rows.append((label(r), str(r["evaluations"]), f"{r['fid']:.2f}", f"{r['fid'] / r['floor']:.1f}",
                     lecture.get(label(r), "-"), f"{r['kid']:.4f}", f"{r['border']:.4f}",
                     "-" if r.get("solver_error_median") is None else f"{r['solver_error_median']:.4f}"))
    if not any("solver_error_median" in r for r in records): rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    for name, *cells in rows: print(name.ljust(widths[0]) + "".join(map(str.rjust, cells, widths[1:])))
    print(f"Floor: {records[0]['samples']} real images score {records[0]['floor']:.2f} +- {records[0]['floor_sd']:.2f}"
          f"{stand_in(records[0]['data'])}.\nDifferences of less than twice the +- mean nothing, and two networks of "
          f"one recipe may differ by more.\nPictures and results.json are in {folder}. "
          f"{label(records[-1])}: {describe(records[-1])}")


# What tells one result from another; a new one replaces the one that agrees in all of these.
IDENTITY = ("what", "steps", "eta", "churn", "rho", "spacing", "clip", "rescue", "network", "weights", "predictor",
            "size", "samples", "seed", "data", "device", "classifier")


def save_results(folder, records):
    """Put the records into results.json, a list, where each replaces an earlier one of the same settings."""
    identity = lambda record: [record.get(key) for key in IDENTITY]
    new = [identity(record) for record in records]
    kept = [old for old in read_results(folder) if identity(old) not in new]
    save_atomically(json.dumps(kept + records, indent=1) + "\n", folder / "results.json")


# ---------------------------------------------------------------------------------------------- pictures

INK, PALE = (30, 30, 30), (215, 215, 215)
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207), (140, 86, 75),
           (120, 120, 120))


def grid(images, captions=None, columns=8, zoom=2, title=None):
    """(N, 1, H, W) images in [-1, 1], row by row, each over its caption -> a PIL image."""
    n, (height, width) = len(images), images.shape[-2:]
    font, foot, head = ImageFont.load_default(11), 15 if captions else 0, 20 if title else 0
    cell_w, cell_h = width * zoom + 4, height * zoom + 4 + foot
    wide = max(columns * cell_w + 4, int(font.getlength(title or "")) + 12)                  # a title is not cut off
    picture = Image.new("RGB", (wide, -(-n // columns) * cell_h + 4 + head), "white")
    draw = ImageDraw.Draw(picture)
    if title: draw.text((6, 4), title, INK, font)
    pixels = (images.detach().float().cpu().clamp(-1, 1)[:, 0] * 127.5 + 127.5).round().byte().numpy()
    for i in range(n):
        x, y = 4 + i % columns * cell_w, 4 + head + i // columns * cell_h
        picture.paste(Image.fromarray(pixels[i]).resize((width * zoom, height * zoom), Image.NEAREST), (x, y))
        if captions: draw.text((x + width * zoom // 2, y + height * zoom + 7), captions[i], INK, font, anchor="mm")
    return picture


def scaled(values, log):
    """Values as an axis has them, their log10 where it is logarithmic; NaN, which is not drawn, where there is none."""
    values = np.asarray(values, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        if log: values = np.log10(values)
    return np.where(np.isfinite(values), values, np.nan)


def ticks(low, high, log):
    """A few round numbers on an axis from low to high (see scaled) -> [(where, text)]."""
    if log:
        found = [m * 10.0 ** e for e in range(int(np.floor(low)), int(np.ceil(high)) + 1) for m in (1, 2, 5)]
        found = [v for v in found if low - 1e-3 <= np.log10(v) <= high + 1e-3]
        if len(found) > 9: found = [v for v in found if f"{v:e}".startswith("1.0")]
        if len(found) < 2: found = [v for v, _ in ticks(10.0 ** low, 10.0 ** high, False) if v > 0]
        return [(float(np.log10(v)), f"{v:g}") for v in found]
    step = 10.0 ** np.floor(np.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    found = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step + 0.0         # + 0.0: no -0
    return [(float(v), f"{v:g}") for v in found]


def plot(series, title, x_label, y_label, log_x=False, log_y=False, size=(640, 400), names_below=False):
    """A small chart -> a PIL image. series: (name, xs, ys, kind), kind one of "line", "points", "dots", "bars"."""
    left, right, top, bottom = 62, size[0] - 16, 30, size[1] - 46
    height = size[1] + names_below * (16 * len(series) + 8)
    font, picture = ImageFont.load_default(12), Image.new("RGB", (size[0], height), "white")
    draw = ImageDraw.Draw(picture)
    series = [(name, scaled(xs, log_x), scaled(ys, log_y), kind) for name, xs, ys, kind in series]
    limits = []
    for axis, log in ((1, log_x), (2, log_y)):
        values = np.concatenate([one[axis] for one in series])
        if not np.isfinite(values).any(): values = np.zeros(1)             # nothing to draw: an empty chart
        low, high = np.nanmin(values), np.nanmax(values)
        if axis == 2 and not log: low = min(low, 0.0)
        if low == high: low, high = low - 1, high + 1
        if axis == 2 or any(kind != "line" for *_, kind in series):        # some room around
            room = 0.05 * (high - low)
            if low != 0 or log: low -= room                                # a chart from 0 on stands on its axis
            high += room
        limits.append((low, high))
    to_x = lambda v: left + (v - limits[0][0]) / (limits[0][1] - limits[0][0]) * (right - left)
    to_y = lambda v: bottom - (v - limits[1][0]) / (limits[1][1] - limits[1][0]) * (bottom - top)
    for v, text in ticks(*limits[0], log_x):
        draw.line((to_x(v), top, to_x(v), bottom), PALE)
        draw.text((to_x(v), bottom + 10), text, INK, font, anchor="mm")
    for v, text in ticks(*limits[1], log_y):
        draw.line((left, to_y(v), right, to_y(v)), PALE)
        draw.text((left - 6, to_y(v)), text, INK, font, anchor="rm")
    for i, (name, *_) in enumerate(series):                                # first, so that it hides nothing
        x, y, anchor = (left, size[1] + 16 * i, "la") if names_below else (right - 8, top + 6 + 16 * i, "ra")
        draw.text((x, y), name, COLOURS[i % len(COLOURS)], font, anchor=anchor)
    for i, (name, xs, ys, kind) in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        points = [(to_x(x), to_y(y)) for x, y in zip(xs, ys) if np.isfinite([x, y]).all()]
        if kind == "line": draw.line(points, colour, 2)
        for x, y in points:
            if kind == "points":                                           # rings, so that those in one place show
                radius = 4 + 2 * (i % 3)
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=2)
            if kind == "dots": draw.point((x, y), colour)
            if kind == "bars":
                half = abs(points[1][0] - points[0][0]) / 2 if len(points) > 1 else 4
                draw.rectangle((x - half, y, x + half, bottom), tuple(c + (255 - c) // 2 for c in colour))
    draw.rectangle((left, top, right, bottom), outline=INK)
    draw.text((left, 14), title, INK, font, anchor="lm")
    draw.text(((left + right) / 2, size[1] - 14), x_label, INK, font, anchor="mm")
    label = Image.new("RGB", (bottom - top, 16), "white")
    ImageDraw.Draw(label).text(((bottom - top) / 2, 8), y_label, INK, font, anchor="mm")
    picture.paste(label.rotate(90, expand=True), (2, top))
    return picture


def beside(pictures):
    """Several pictures in a row -> one."""
    whole = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        whole.paste(picture, (sum(p.width for p in pictures[:i]), 0))
    return whole


# ---------------------------------------------------------------------------------------------- drawn stand-ins

@functools.cache
def draw_clothes(count, seed):
    """Stand-ins drawn with Pillow, random in shape and shade: -> pixels (count, 28, 28) uint8, labels (count,)."""
    labels, pixels = np.zeros(count, np.int64), np.zeros((count, 28, 28), np.uint8)
    for i in range(count):
        random = np.random.default_rng([seed, i])                          # so that the first few are always the same
        labels[i], picture = random.integers(10), Image.new("L", (56, 56))
        draw_garment(ImageDraw.Draw(picture), CLASSES[labels[i]], random)
        pixels[i] = np.asarray(picture.reduce(2))
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def draw_garment(draw, kind, random):
    """One garment on a canvas of 56x56 (points are given in 28ths of it)."""
    vary = random.uniform
    shade, dark = int(vary(110, 255)), int(vary(20, 90))
    shape = lambda *points, fill=shade: draw.polygon([(2 * x, 2 * y) for x, y in points], fill=fill)
    line = lambda *points, fill=shade, width=3: draw.line([(2 * x, 2 * y) for x, y in points], fill=fill, width=width)
    top, bottom, half, arm = vary(2, 5), vary(22, 26), vary(5, 7), vary(3, 4.5)
    if kind in ("T-shirt", "Pullover", "Coat", "Shirt"):
        long_sleeves = kind != "T-shirt"
        cuff = vary(18, 23) if long_sleeves else vary(9, 12)
        reach = half + (vary(3, 4.5) if long_sleeves else vary(4, 6))
        shape((14 - half, top), (14 + half, top), (14 + half, bottom), (14 - half, bottom))
        for side in (-1, 1):
            shape((14 + side * half * 0.8, top), (14 + side * half, top + 1), (14 + side * (reach + 1), cuff),
                  (14 + side * (reach + 1 - arm), cuff + 0.5), (14 + side * half * 0.8, top + arm * 2))
        shape((11.5, top - 1), (16.5, top - 1), (14, top + vary(1, 3)), fill=0)
        if kind == "Coat": line((14, top + 1), (14, bottom), fill=dark, width=2)
        if kind == "Shirt":
            for y in np.arange(top + 3, bottom, 3): draw.ellipse((27, 2 * y, 29, 2 * y + 2), fill=dark)
    elif kind == "Trouser":
        leg = vary(2, 3.2)
        for side in (-1, 1):
            shape((14, top), (14 + side * half * 0.8, top), (14 + side * (half * 0.8 + 0.5), bottom),
                  (14 + side * (half * 0.8 + 0.5 - leg), bottom), (14, vary(8, 11)))
    elif kind == "Dress":
        waist, hem = vary(2, 3.5), vary(4.5, 8)
        shape((14 - waist - 1, top), (14 + waist + 1, top), (14 + waist, 11), (14 + hem, bottom), (14 - hem, bottom),
              (14 - waist, 11))
    elif kind == "Bag":
        roof = vary(9, 13)
        draw.arc((2 * (14 - half), 2 * (roof - 6), 2 * (14 + half), 2 * (roof + 6)), 180, 360, fill=shade, width=3)
        shape((14 - half - 4, roof), (14 + half + 4, roof), (14 + half + 3, bottom), (14 - half - 3, bottom))
        line((14 - half - 3, roof + 3), (14 + half + 3, roof + 3), fill=dark, width=2)
    else:                                                       # shoes, all with the toe to the left
        floor, heel, height = vary(19, 22), vary(24, 26), vary(5, 7)
        shape((2, floor - 1), (heel, floor - 1), (heel, floor + 1.5), (2, floor + 1.5), fill=dark + 60)
        if kind == "Sandal":
            line((4, floor), (11, floor - height), (16, floor), width=3)
            line((16, floor), (heel - 2, floor - height - 1), (heel, floor), width=3)
        else:
            shape((2, floor - 1), (3, floor - 3), (12, floor - height), (heel, floor - height - 1), (heel, floor - 1))
            if kind == "Ankle boot":
                shape((13, floor - height), (heel, floor - height - 1), (heel + 0.5, vary(3, 7)), (13.5, vary(3, 7)))


# ---------------------------------------------------------------------------------------------- what a score means

def float32_distance(features1, features2):
    """FID as the lecture's notebook computes it: covariances, their product and its square root all in float32."""
    from scipy.linalg import sqrtm
    (mu1, cov1), (mu2, cov2) = ((f.mean(0), np.cov(f, rowvar=False, dtype=np.float32))
                                for f in (np.asarray(features1), np.asarray(features2)))
    root = sqrtm(cov1 @ cov2).real
    return float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(root))


@script
def main(argv=None):
    parser = flags("fid", "What a score means; with --retrain, train the classifier that judges.")
    args = parser.parse_args(argv)
    if args.retrain and args.samples: parser.error("--retrain samples nothing: leave out --samples")
    if not args.retrain and (args.epochs or args.batch_size or args.lr):
        parser.error("--epochs, --batch-size and --lr belong to --retrain")
    settle(args)
    if args.retrain: return retrain(args)
    evaluate = ImageEval(args.data, args.data_dir, args.samples, args.device, args.folder, args.count)
    n, random, note = args.samples, np.random.default_rng(args.seed), stand_in(evaluate.data)
    train, _ = fashion_mnist(args.data_dir, True, evaluate.data, args.count)
    some = lambda count: train[torch.from_numpy(random.choice(len(train), count, replace=False))]
    images, about = some(n), measured_on(args, amp=False)
    print(f"the classifier names {evaluate.pinned['accuracy']:.2%} of the real test images rightly")
    print(f"{n} real training images, 20 draws: FID {evaluate.floor:.2f} +- {evaluate.floor_sd:.2f}, the floor{note}")
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(args.seed))
    blurred = torchvision.transforms.functional.gaussian_blur(images, 5, 1.0)
    records, started = [], time.perf_counter()
    for what, candidate in (("real training images", images), ("with noise of 0.03", images + 0.03 * noise),
                            ("with noise of 0.1", images + 0.1 * noise), ("blurred by 1 pixel", blurred),
                            ("pure noise", noise)):
        records.append({"what": what, **evaluate.score(candidate), **about})
        print(f"{what:24s}{describe(records[-1])}")
    print(f"a score takes {(time.perf_counter() - started) / 5:.1f} s on {device_name(args.device)}")
    for count in sorted({n // 4, n // 2, n, min(2 * n, len(train)), min(10_000, len(train)), len(train)} - {0, 1}):
        value = evaluate.fid(some(count))
        records.append({"what": "how many", "samples": count, "fid": value, "data": evaluate.data, **about})
        print(f"{count:6d} real training images: FID {value:.2f}{note}")
    for i in range(3):
        features = evaluate.features(some(n))
        exact = frechet_distance(*statistics(features), evaluate.mean, evaluate.cov)
        rounded = float32_distance(features, evaluate.real)
        records.append({"what": f"precision, draw {i}", "samples": n, "fid": exact, "fid_float32": rounded,
                        "data": evaluate.data, **about})
        print(f"the same {n} real images: FID {exact:.2f} in float64, {rounded:.2f} by the notebook's float32{note}")
    save_results(args.folder, records)


if __name__ == "__main__":
    main()
