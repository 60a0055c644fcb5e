"""Lesson 1: a cosine schedule in continuous time, and DDIM (notebook 22; Song et al. 2021, arXiv 2010.02502).

    python cosine_ddim.py                            trains a network (once), samples 2048 clothes in 100 steps
    python cosine_ddim.py --steps 50 --eta 0         fewer steps, and no fresh noise on the way
    python cosine_ddim.py --compare                  steps, eta and the spacing of steps in one table
    python cosine_ddim.py --schedule sigmoid         another noise schedule, trained under another name

What the lecture found: nothing needs a thousand numbered timesteps. Let t run from 0, the plain image, to 1, all noise,
and make alphabar a function of it; any number of steps is then a list of floats. 100 steps scored a FID (fid.py;
lower is better) of 3.29 and 3.10, where real images score 1.9 to 2.6. The other topic is noise schedules (Chen 2023,
arXiv 2301.10972). Two dials set how fast the image drowns in noise: the schedule itself, and b, the number that images
are multiplied by.

What the small network does (two passes, seed 0, real images score 1.12; results/small/cosine_ddim and dials):
- The loss comes to 0.0383 (the lecture's to 0.033). 50 steps of DDIM do as well as 100: 11.0 and 10.9.
- Eta below 1, which did not work for the lecture, leaves noise in the pictures: 37.6 at 0.5, 70.9 at 0. The reason
  is given below ddim_step.
- The dials, one pass each: linear, cosine and sigmoid lie between 18.4 and 20.2, b = 0.3 at 22.9, b = 1 at 49.8.

What a network of the lecture's size does (25 passes on an H200, seed 0; results/lecture/cosine_ddim):
- The loss comes to 0.0327. 100 steps of DDIM score 2.59, 50 steps 3.11.
- Eta below 1 is far less trouble: 3.47 at 0.5, 5.31 at 0.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

# From fid.py: the images, scores, pictures. From unet.py: the command line (flags, settle), a network, trained now or
# found again (train), and samples in batches (generate). You can read all of these later.
from fid import ImageEval, beside, comparison, fashion_mnist, find_data, grid, plot, report
from unet import Problem, flags, generate, number, script, settle, train

RECIPE = {"lecture": dict(epochs=25, batch_size=512, lr=4e-3),
          "small": dict(epochs=2, batch_size=32, lr=4e-3),
          "tiny": dict(epochs=1, batch_size=32, lr=4e-3)}


# ---------------------------------------------------------------------------------------------- time without steps
# x_t = sqrt(abar) x0 + sqrt(1 - abar) noise: alphabar is the square of the image's weight. It used to be looked up in
# a list of T = 1000 entries. T, n_steps and the list are gone, and a time is a float.

def abar(t):
    """alphabar at t in [0, 1], a number or a tensor: 1 at t = 0, 0 at t = 1 (Nichol & Dhariwal 2021, eq. 17, s = 0)."""
    t = torch.as_tensor(t)                                                 # so any formula below takes plain numbers
    return (t * (math.pi / 2)).cos() ** 2


def inv_abar(a):
    """The t in [0, 1] whose alphabar is a. This is abar solved for t (root, inverse cosine, times 2 / pi): change both
    or neither. Nothing here needs it, but lesson 4 does, to ask this lesson's network (denoise_epsilon)."""
    return torch.as_tensor(a).clamp(0, 1).sqrt().acos() * (2 / math.pi)


def per_image(a, x):
    """a, a number or one for each image of x, in a shape that multiplies images."""
    return torch.as_tensor(a, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)


def noisify(x0, t=None, abar=abar):
    """Clean images x0 (N, 1, H, W) -> ((x_t, t (N,)), noise): what goes in, and the noise that is to be found in it.

    t: (N,) in [0, 1]; if not given, drawn uniformly from [0, 0.999). abar: the noise schedule, usually the above.
    """
    t = torch.rand(len(x0), device=x0.device) * 0.999 if t is None else t
    noise = torch.randn_like(x0)
    abar_t = per_image(abar(t), x0)
    return (abar_t.sqrt() * x0 + (1 - abar_t).sqrt() * noise, t), noise


def denoise(x_t, noise, t, abar=abar):
    """noisify undone in one step: the clean images (N, 1, H, W) in x_t at times t, if `noise` is the noise in it."""
    abar_t = per_image(abar(t), x_t)
    return (x_t - (1 - abar_t).sqrt() * noise) / abar_t.sqrt()


# ---------------------------------------------------------------------------------------------- sampling

def timesteps(steps, spacing="uniform"):
    """(steps + 1,) times from 1 - 1/steps down to 0, and 0 once more: each step goes from one to the next.

    "uniform" is the lecture's: 1 - 1/steps, .., 1/steps, 0. "late" is a trick from earlier in the course,
    which the lecture recalls: on a fine grid take every 10th time in the first tenth of the way, every 9th in the next,
    .., all in the last.
    """
    if spacing not in ("uniform", "late"): raise ValueError(f"spacing {spacing!r} is neither uniform nor late")
    if steps < 2: raise Problem(f"{steps} steps are too few: the last of them, at t = 0, removes no noise")
    done = np.linspace(0, 1, steps)                                        # how much of the way down is done
    if spacing == "late":
        taken = np.cumsum([0] + [1 / stride for stride in range(10, 0, -1)])       # steps, by the end of each tenth
        done = np.interp(done, taken / taken[-1], np.linspace(0, 1, 11))
    return torch.from_numpy(np.append((1 - 1 / steps) * (1 - done), 0)).float()


def ddim_step(x_t, noise, abar_t, abar_t1, eta=1.0, clip=None, abar_hat=None):
    """One step of DDIM, from alphabar abar_t to the higher abar_t1, given the noise that was found in x_t (N, 1, H, W).

    Song et al. 2021, eq. 12 (their alpha is our alphabar): estimate the clean image, then add noise again, but less:
    partly the noise that was found, partly fresh noise of deviation sig (eq. 16). The two are independent, so their
    variances add, to 1 - abar_t1. eta in [0, 1] scales sig: with 0 nothing is random, and the step is Euler's in other
    symbols; 1 is DDPM's way, and ancestral Euler (karras.py).

    clip: bound on the estimate's values. abar_t, abar_t1: numbers, or (N,). abar_hat (N,): used instead of abar_t
    in the estimate only, for an x_t that is more or less noisy than planned (lesson 3).
    -> x_0_hat, x_t1. At abar_t 1, where eq. 16 is 0/0, there is no noise to add: x_t1 is x_0_hat, which is x_t itself
    unless clip or abar_hat changes it.
    """
    abar_t, abar_t1 = per_image(abar_t, x_t), per_image(abar_t1, x_t)
    abar_hat = abar_t if abar_hat is None else per_image(abar_hat, x_t)
    x_0_hat = (x_t - (1 - abar_hat).sqrt() * noise) / abar_hat.sqrt()
    if clip is not None: x_0_hat = x_0_hat.clamp(-clip, clip)
    variance = (1 - abar_t1) * (1 - abar_t / abar_t1) / (1 - abar_t).clamp(min=1e-20)
    sig = eta * variance.clamp(min=0).sqrt()
    x_t1 = abar_t1.sqrt() * x_0_hat + (1 - abar_t1 - sig ** 2).clamp(min=0).sqrt() * noise
    if eta > 0: x_t1 = x_t1 + sig * torch.randn_like(x_t)
    return x_0_hat, x_t1


# The lecture had trouble with eta below 1 (little fresh noise, or none) and linked it to small images, in which noise
# destroys more. But on the same images our small network has far more trouble than one of the lecture's size. Divide
# x_t by sqrt(abar): the picture is at full strength, under noise of deviation sigma = sqrt((1 - abar) / abar). (That is
# lesson 4's sigma, all the noise there is; sig, in ddim_step, is what one step adds.) Early on sigma is large, and
# x_0_hat is off by the network's error times sigma: some noise is left in it, and the next x_t is noisier than its time
# says. With eta 0 each later step removes only what the time says, so the excess stays while sigma falls, until it is
# all that is left. With eta 1 each step replaces some old noise by fresh noise. Variances of independent noises add, so
# the excess counts for less each time, and falls as fast as sigma, or faster.
# Why the network misses some, and what mends most of it: results/README.md, "Why eta below 1 leaves noise".

@torch.no_grad()
def sample(find_noise, x, ts, eta=1.0, clip=None, abar=abar):
    """From standard normal x (N, 1, H, W) along the times ts: yields (x_0_hat, x_t) after every step.

    ts: a tensor or a list, below 1: at 1 no image is left in x_t, so that x_0_hat would be nothing but the network's
    error, divided by sqrt(abar), which is nearly 0. find_noise(x_t, t): any estimate of the noise in x_t at time t. The
    last call, at t = 0, removes no noise; it is the lecture's, and lesson 3 has a use for it. Raises ValueError for
    times from 1 up.
    """
    ts = torch.as_tensor(ts).tolist()
    if max(ts) >= 1: raise ValueError(f"time {max(ts):g}: sampling has to begin below 1, at 0.99, say")
    for t, t1 in zip(ts, ts[1:]):
        x_0_hat, x = ddim_step(x, find_noise(x, t), abar(t), abar(t1), eta, clip)
        yield x_0_hat, x


# ---------------------------------------------------------------------------------------------- the schedule's dials
# "On the importance of noise scheduling for diffusion models" (Chen 2023), to which the lecture comes after lesson 3:
# skip it on a first reading. Dial one is the schedule, gamma(t) in the paper: our alphabar. Dial two is b, a number to
# scale the images with: less image in the same noise.

# Of each family a curve of u, and the usual start and end. noise_schedule stretches the piece from start to end so that
# it runs from 1 to 0, whether the curve falls or rises.
SCHEDULES = {"linear": (lambda u, tau: 1 - u, 0.0, 1.0),
             "cosine": (lambda u, tau: (u * (math.pi / 2)).cos().clamp(min=0) ** (2 * tau), 0.0, 1.0),
             "sigmoid": (lambda u, tau: (u / tau).sigmoid(), -3.0, 3.0)}


def noise_schedule(name="cosine", start=None, end=None, tau=None):
    """-> gamma(t), from 1 at t = 0 to 0 at t = 1, cut off at 1e-9 (Chen 2023, section 2.1).

    name: one of SCHEDULES; cosine with no parameters is abar as it stands above. Otherwise the piece of the curve from
    start to end is stretched to run from 1 to 0. tau (default 1) bends the curve of cosine and sigmoid; linear has no
    parameters. Sampling begins with pure noise at t = 1 - 1/steps. Where gamma is not near 0 at that time (in 50 steps
    it is 0.001 for cosine, 0.02 for linear, 0.25 for cosine with tau 0.2) the network looks for an image that is not
    there. Raises Problem for parameters that make no schedule.
    """
    if (name, start, end, tau) == ("cosine", None, None, None): return lambda t: abar(t).clamp(1e-9, 1)
    curve, *ends = SCHEDULES[name]
    if name == "linear" and any(parameter is not None for parameter in (start, end, tau)):
        raise Problem("--start, --end and --tau belong to --schedule cosine or sigmoid")
    start, end, tau = (usual if given is None else given for given, usual in zip((start, end, tau), (*ends, 1.0)))
    if tau <= 0: raise Problem(f"--tau {tau:g}: it has to be above 0")
    if start >= end: raise Problem(f"--start {start:g} has to be below --end {end:g}")
    if name == "cosine" and (start < 0 or end > 1):
        raise Problem(f"--start {start:g}, --end {end:g}: cosine is cut from 0 to 1")
    first, last = (float(curve(torch.tensor(u), tau)) for u in (start, end))
    asked = f"--start {start:g}, --end {end:g}, --tau {tau:g}"
    if abs(first - last) < 1e-4: raise Problem(f"{asked}: that piece of the curve is flat")     # to float32
    gamma = lambda t: ((last - curve(start + torch.as_tensor(t) * (end - start), tau)) / (last - first)).clamp(1e-9, 1)
    if (abs(gamma(torch.linspace(0, 1, 1001)) - 0.5) < 0.499).sum() < 20:  # from 0.001 to 0.999 for under 2% of times
        raise Problem(f"{asked}: nearly all of the time there would be no noise, or nothing else")
    return gamma


def unit_variance(x_t):
    """Each image divided by its standard deviation, for --normalise: so that b changes only the share of noise."""
    return x_t / x_t.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)


def log_snr(a):
    """The logarithm of the signal-to-noise ratio abar / (1 - abar). Scaling images by b shifts it by 2 ln b."""
    return torch.as_tensor(a).logit()


def pooled(x0, k, t, abar=abar):
    """Images (N, 1, H, W) noised at k times the size, at times t (N,), and average-pooled by k: (N, 1, H, W).

    Pooling leaves the image as it was and averages k * k independent numbers in each pixel's noise: log-SNR rises by
    2 ln k. So a larger image needs more noise to be an equally hard question. Scaling by b shifts log-SNR by 2 ln b, so
    b / k makes up for images k times as large, if a larger image has no more detail.
    """
    (x_t, _), _ = noisify(F.interpolate(x0, scale_factor=k, mode="nearest"), t, abar)
    return F.avg_pool2d(x_t, k)


# ---------------------------------------------------------------------------------------------- the lesson

# The lecture's own FIDs with eta 1, on a scale where its real images scored 1.9 to 2.6; in brackets, multiples of that.
LECTURE = {"ddim, 100 steps, eta 1": "3.29, 3.10 (1.2..1.7 x)", "ddim, 50 steps, eta 1": "4.40 (1.7..2.3 x)"}

# steps, eta, spacing, and a bound on the estimate in units of b: 1 is the range of the images. The lecture's notebook
# of this lesson bounds it at 3; here None means no bound.
COMPARED = [(100, 1.0, "uniform", None), (50, 1.0, "uniform", None), (50, 0.5, "uniform", None),
            (50, 0.0, "uniform", None), (50, 0.0, "uniform", 1.0), (50, 1.0, "late", None)]


def at_one_brightness(x_t, t, abar, input_scale):
    """Noised images as pictures show them: clean ones in -1..1, pure noise with a deviation of 1, as it is."""
    return x_t / per_image((abar(t) * input_scale ** 2 + 1 - abar(t)).sqrt(), x_t)


def show_noising(folder, x0, abar, input_scale, seed):
    """1. One garment after another, noised more and more."""
    torch.manual_seed(seed)
    t = torch.linspace(0.05, 0.95, len(x0), device=x0.device)
    (x_t, _), _ = noisify(x0, t, abar)
    grid(at_one_brightness(x_t, t, abar, input_scale), [f"{time:.2f}" for time in t], 13,
         title="x_t by t, shown at one brightness").save(folder / "noised.png")


def network(args, x0, dials=("cosine", None, None, None), input_scale=0.5, normalise=False):
    """2. This lesson's network for images x0 in -b..b, trained or loaded -> the network, and its origin.

    dials: what noise_schedule is called with.
    """
    abar = noise_schedule(*dials)

    def question(x0):
        (x_t, t), noise = noisify(x0, abar=abar)
        return (unit_variance(x_t) if normalise else x_t, t), noise
    return train(args, "cosine_ddim", RECIPE, question, x0, schedule=dials, input_scale=input_scale,
                 normalise=normalise)


@torch.no_grad()
def show_one_step(folder, find_noise, x0, abar, input_scale, seed):
    """3. Images at many times, restored in one step."""
    torch.manual_seed(seed)
    t = torch.linspace(0.05, 0.95, len(x0), device=x0.device)
    (x_t, _), _ = noisify(x0, t, abar)
    restored = denoise(x_t, find_noise(x_t, t), t, abar)
    shown = [at_one_brightness(x_t, t, abar, input_scale), restored / input_scale, x0 / input_scale]
    grid(torch.cat(shown), [f"{time:.2f}" for time in t] * 3, len(x0), title="noised (shown at one brightness), "
         "restored in one step, and true, by t").save(folder / "one-step.png")


def schedule_label(dials):
    """A noise schedule's name, with those parameters that are given."""
    return " ".join([dials[0]] + [f"{name} {value:g}" for name, value in zip(("start", "end", "tau"), dials[1:])
                                  if value is not None])


def label(record):
    """A result's settings in words, those that are usual here left out."""
    words = [record["what"], f"{record['steps']} steps", f"eta {record['eta']:g}"]
    if record["spacing"] == "late": words.append("late steps")
    if record["clip"] is not None: words.append(f"clip {record['clip']:g}")
    if record["schedule"] != "cosine": words.append(record["schedule"])
    if record["input_scale"] != 0.5: words.append(f"b {record['input_scale']:g}")
    if record["normalise"]: words.append("normalised")
    return ", ".join(words)


def try_ddim(args, find_noise, origin, evaluate, abar, steps, eta, spacing, clip):
    """4. Sample, score and draw the clothes -> the record of it, which is in results.json too."""
    def sampler(noise):
        bound = None if clip is None else clip * args.input_scale
        for _, x in sample(find_noise, noise, timesteps(steps, spacing), eta, bound, abar): pass
        return x / args.input_scale
    images, seconds = generate(sampler, args.samples, args.seed, args.device)
    record = {"what": "ddim", "steps": steps, "evaluations": steps, "eta": eta, "spacing": spacing, "clip": clip,
              "schedule": schedule_label(args.dials), "input_scale": args.input_scale, "normalise": args.normalise,
              **evaluate.score(images), "sample_seconds": round(seconds, 1), **origin}
    report(label(record), record, images, args.folder)
    return record


def show_dials(folder, image, dials, input_scale, seed):
    """5. Both dials of the noise schedule, also as they were set, and why a larger image wants another setting."""
    t = torch.linspace(0.001, 0.999, 200)
    families = [("linear",), ("cosine",), ("cosine", 0.2), ("cosine", None, None, 2), ("sigmoid",), ("sigmoid", 0),
                ("sigmoid", None, None, 0.5), dials]
    curves = {schedule_label(family): noise_schedule(*family)(t) for family in families}.items()
    shifted = [(f"b = {b:g}", t, log_snr(abar(t)) + 2 * math.log(b), "line")
               for b in sorted({1, 0.5, 0.3, input_scale}, reverse=True)]
    beside([plot([(name, t, gamma, "line") for name, gamma in curves], "noise schedules", "t", "alphabar"),
            plot([(name, t, log_snr(gamma), "line") for name, gamma in curves], "the same", "t", "log SNR"),
            plot(shifted, "cosine, with images scaled by b", "t", "log SNR")]).save(folder / "schedules.png")
    torch.manual_seed(seed)
    times = torch.tensor([0.2, 0.4, 0.6, 0.8, 0.9])
    noised = torch.cat([pooled(image.cpu().expand(len(times), -1, -1, -1), k, times) for k in (1, 2, 4)])
    grid(noised, [f"{32 * k} px, t {time:.1f}" for k in (1, 2, 4) for time in times], len(times), zoom=3,
         title="noised at 32, 64 and 128 pixels a side, then pooled to 32").save(folder / "sizes.png")


@script
def main(argv=None):
    parser = flags("cosine_ddim", "A cosine schedule in continuous time, DDIM, and the dials of noise schedules.")
    add = parser.add_argument
    add("--steps", type=number(int, 2, 1000), help="steps of DDIM (default 100)")
    add("--eta", type=number(float, 0, 1), help="fresh noise on the way, 0 to 1 (default 1)")
    add("--spacing", choices=("uniform", "late"), help="where the steps are (default uniform)")
    add("--clip", type=number(float, 0.01, 1000), help="bound on x_0_hat, in units of the images' range (default none)")
    add("--schedule", choices=SCHEDULES, default="cosine", help="alphabar(t) (default cosine)")
    add("--start", type=number(float, -1000, 1000), help="where the schedule's curve begins (cosine 0, sigmoid -3)")
    add("--end", type=number(float, -1000, 1000), help="where it ends (cosine 1, sigmoid 3)")
    add("--tau", type=number(float, 0, 1000), help="how it bends (default 1)")
    add("--input-scale", type=number(float, 0.05, 5), default=0.5, help="b, 0.05 to 5: images in -b..b (default 0.5)")
    add("--normalise", action="store_true", help="divide the network's input by its standard deviation")
    add("--compare", action="store_true", help="several steps, eta and spacings in one table")
    args = parser.parse_args(argv)
    if args.compare and (args.steps, args.eta, args.spacing, args.clip) != (None,) * 4:
        parser.error("--compare sets these itself: --steps, --eta, --spacing, --clip")
    trial = (args.steps or 100, 1.0 if args.eta is None else args.eta, args.spacing or "uniform", args.clip)
    args.dials = (args.schedule, args.start, args.end, args.tau)
    gamma = noise_schedule(*args.dials)                                    # abar, unless a dial is turned
    settle(args)
    args.data = find_data(args.data, args.data_dir)
    evaluate = ImageEval(args.data, args.data_dir, args.samples, args.device, args.out_dir / "fid", args.count)

    images, _ = fashion_mnist(args.data_dir, True, args.data, args.count)
    test = (fashion_mnist(args.data_dir, False, args.data, 25)[0] * args.input_scale).to(args.device)
    show_noising(args.folder, test, gamma, args.input_scale, args.seed)
    model, origin = network(args, images.mul_(args.input_scale), args.dials, args.input_scale, args.normalise)
    print(f"loss of the last 100 steps {origin['loss']:.4f}, after {origin['train_seconds']:.0f} s of training on "
          f"{origin['trained_on']} (lecture: 0.033, cosine and b 0.5, after 25 epochs of its network)")

    find_noise = lambda x_t, t: model(unit_variance(x_t) if args.normalise else x_t, t)
    show_one_step(args.folder, find_noise, test[:19], gamma, args.input_scale, args.seed)
    trials = COMPARED if args.compare else [trial]
    records = [try_ddim(args, find_noise, origin, evaluate, gamma, *trial) for trial in trials]
    show_dials(args.folder, test[:1] / args.input_scale, args.dials, args.input_scale, args.seed)
    print("The lecture's figures are on a scale where its real images scored 1.9 to 2.6.")
    comparison(records, label, LECTURE, args.folder)


if __name__ == "__main__":
    main()
