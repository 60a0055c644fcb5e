"""Lesson 4: Elucidating the design space of diffusion models (Karras et al. 2022, arXiv 2206.00364; notebook 23).

    python karras.py --sampler lms --steps 20       trains a network (once), samples 2048 clothes, scores and shows them
    python karras.py --compare                      every sampler from the same network and the same noise
    python karras.py --model cosine --sampler ancestral         lesson 1's network, sampled in this lesson's way

What the lecture found: ask the network a question that is equally hard at every noise level, feed it inputs of unit
variance, and walk from noise to picture in steps that shrink toward the end. Then a sampler of three lines scores a FID
of 1.98 in 100 evaluations (calls of the network), and one that reuses its last slopes (LMS) 1.76 in 20. On that scale
real images score 0.50: compare only multiples of it, and those roughly. (The lecture calls 1.98 better than the cosine
schedule's 3.2. But that is on another scale: README.md, "Karras or cosine".)

There is no alphabar here and no t: noise is measured by its standard deviation sigma alone. The clean image y (x0 in
the code) becomes x = y + sigma * noise, and sigma runs from 80 (nothing left to see) to 0. The lecture says that sigma
"is the same thing as alphabar used to be". It plays the same part, but runs the other way: once x_t is divided by
sqrt(abar), so that the picture has its full strength, sigma^2 = (1 - abar) / abar, and a small sigma is an alphabar
near 1.

What the small network does (one pass, seed 0, real images score 1.12; results/small/karras-one-pass): on our scale FID
hardly sees which solver is used: it measures the network. Without fresh noise all score 30.9 (LMS) to 32.1. Fresh noise
helps, 27.4 in 50 ancestral steps with eta 1, and so does --sig-data 0.66, twice the true value: 28.4.

What a network of the lecture's size does (25 passes on a GPU, seed 0; results/lecture/karras, karras-sig-data-0.66):
Euler scores 5.10 in 100 steps and 7.13 in 20; LMS 5.10 and DPM++ 4.91 in 20. So FID sees a solver that is coarse. With
--sig-data 0.66 --lr 4e-3 DPM++ scores 3.14 in 20 steps, and the ancestral sampler 2.31 in 100, with eta 1.
(Lesson 1's network has 2.59 in 100. LMS had another last step then: results/README.md, "LMS's last step, to 0".)
"""
import math

import numpy as np
import torch
from scipy import integrate, stats

import cosine_ddim
# From fid.py: the images, scores, pictures. From unet.py: the command line (flags, settle), a network, trained now or
# found again (train), and samples in batches (generate). You can read all of these later. What is done, and in which
# order, stands in learn and main, at the end.
from fid import ImageEval, beside, comparison, fashion_mnist, find_data, grid, plot, report
from unet import Problem, flags, generate, number, script, settle, step_seed, train

RECIPE = {"lecture": dict(epochs=25, batch_size=512, lr=1e-2),
          "small": dict(epochs=1, batch_size=32, lr=4e-3),
          "tiny": dict(epochs=1, batch_size=32, lr=1e-2)}


# ---------------------------------------------------------------------------------------------- sigmas to train on

P_MEAN, P_STD = -1.2, 1.2                                                  # of ln sigma, by their names in the paper


def draw_sigmas(n, device="cpu"):
    """(n,) noise levels to train on, with ln sigma normally distributed (table 1, "noise distribution").

    With next to no noise there is little to learn, and with next to no picture only what the mean picture looks like.
    Most is to be learnt in between, where most draws should fall (figure 5a, and our loss-by-sigma.png).
    """
    return (torch.randn(n, device=device) * P_STD + P_MEAN).exp()


# ---------------------------------------------------------------------------------------------- what to ask the network

def scalings(sig, sig_data=0.33):
    """c_skip, c_out, c_in of noise level sig (a number or a tensor) and data of standard deviation sig_data.

    Karras et al. 2022, table 1, derived in appendix B.6. The noised image x = y + sig * noise has the variance
    totvar = sig^2 + sig_data^2: variances of independent things add. Then
      c_in    makes the input's variance 1: it divides by the standard deviation.
      c_skip  is how much of x is passed on unchanged: the picture's share of x's variance, because no other number
              leaves a rest, y - c_skip * x, that varies less. Little noise: c_skip near 1, the network finds minus
              the noise. Much noise: c_skip near 0, it finds the picture. Always the part worth asking for.
      c_out   makes the target's variance 1: it is the standard deviation of that rest.
    """
    totvar = sig ** 2 + sig_data ** 2
    return sig_data ** 2 / totvar, sig * sig_data / totvar ** 0.5, 1 / totvar ** 0.5


def c_noise(sig, log_sigma):
    """What the network is told of the noise level sig (a tensor): in the lecture sig itself, in the paper ln(sig) / 4
    (table 1), which spreads low levels, where most draws fall, as widely as high ones."""
    return sig.log() / 4 if log_sigma else sig


def noisify(x0, sig_data=0.33, sig=None, log_sigma=False, centre=0.0):
    """Clean images x0 (N, 1, H, W) -> ((scaled noised images, c_noise (N,)), target): what goes in, and the answer.

    The network F(c_in * x; sig) is to make c_skip * x + c_out * F = y, so its target is F = (y - c_skip * x) / c_out
    (eq. 7 and 8). The squared error of F is that of the picture times 1 / c_out^2, so sig_data also sets a loss weight:
    half the true value weighs high noise up to 4 times more. With sig_data 1, F is minus the v of Salimans & Ho (2022).
    centre is subtracted from the images first. If it is their mean, inputs and targets have mean 0, which the lecture
    proposes but does not try.
    """
    if sig is None: sig = draw_sigmas(len(x0), x0.device)
    told = c_noise(sig, log_sigma)
    sig = sig[:, None, None, None]
    c_skip, c_out, c_in = scalings(sig, sig_data)
    x0 = x0 - centre
    noised = x0 + sig * torch.randn_like(x0)
    return (c_in * noised, told), (x0 - c_skip * noised) / c_out


def denoise(model, x, sig, sig_data=0.33, log_sigma=False, centre=0.0):
    """The network's estimate of the clean images in x (N, 1, H, W), whose noise has standard deviation sig: noisify's
    target solved for y. sig: a number, or (N,) for images at different levels. The rest is as in noisify."""
    sig = torch.as_tensor(sig, dtype=torch.float32, device=x.device)
    told = c_noise(sig, log_sigma)
    sig = sig.reshape(-1, 1, 1, 1)
    c_skip, c_out, c_in = scalings(sig, sig_data)
    x = x - centre
    return c_skip * x + c_out * model(c_in * x, told) + centre


@torch.no_grad()
def loss_by_sigma(model, x0, sigmas, how):
    """The mean squared error of the network's answers at each of the sigmas, on the images x0. how: noisify's keyword
    arguments, a dictionary."""
    torch.manual_seed(0)                                                   # the same noise for every network
    losses = []
    for sig in sigmas:
        inputs, target = noisify(x0, sig=torch.full((len(x0),), float(sig), device=x0.device), **how)
        losses.append(float((model(*inputs) - target).square().mean()))
    return losses


def loss_of_the_mean(x0, sigmas, sig_data=0.33):
    """The loss, at each of the sigmas (an array), of an estimate that knows only sig_data and the mean image of x0.

    The estimate c_skip x + (1 - c_skip) mean is off by (1 - c_skip) (y - mean) minus c_skip sigma noise. The two are
    independent, so their variances add; the loss weighs the sum by 1 / c_out^2.
    """
    around_mean = float((x0 - x0.mean(0)).square().mean())
    c_skip, c_out, _ = scalings(sigmas, sig_data)
    return ((1 - c_skip) ** 2 * around_mean + (c_skip * sigmas) ** 2) / c_out ** 2


# ---------------------------------------------------------------------------------------------- the way down

def sigmas_karras(n, sigma_min=0.01, sigma_max=80.0, rho=7.0):
    """n noise levels from sigma_max down to sigma_min, and a last 0: (n + 1,) float32. n = 1 gives [sigma_max, 0].

    Karras et al. 2022, eq. 5: evenly spaced in the rho-th root of sigma. rho 1 would be even steps; 7 takes large steps
    where all is noise and small ones at the end, where details are decided. Relative to sigma it is the other way
    round: the first of 20 steps takes off a quarter of it, the last before 0 more than half.
    """
    roots = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n, dtype=torch.float64)
    return torch.cat([roots ** rho, roots.new_zeros(1)]).float()


# ---------------------------------------------------------------------------------------------- samplers
# Each is a generator: from x, pure noise of standard deviation sigs[0], it yields x after every step. denoise(x, sig)
# is any estimate of the clean images: the function above with its network filled in, or any other. Without fresh noise
# all approximate the solution of one differential equation (eq. 1 with sigma(t) = t, and eq. 3):
#     dx / dsigma = (x - D(x; sigma)) / sigma,
# where D is denoise. The right side is the slope: how x changes with sigma. Samplers differ in how closely they follow
# the solution in few steps. (Euler and Heun are the paper's. Ancestral sampling in sigmas and LMS came to the lecture
# from K. Crowson's k-diffusion.)

def pairs(sigs):
    """[(sigma now, sigma next), ..], a pair of numbers for every step of sigs (n + 1,)."""
    sigs = torch.as_tensor(sigs).tolist()
    return list(zip(sigs, sigs[1:]))


def sample_euler(denoise, x, sigs):
    """Follow the slope at x all the way to the next sigma. One evaluation a step; steps half as long halve the error.

    The lecture's x + (sig2 - sig) * (x - D) / sig keeps sig2 / sig of the noise x - D. Written as below, a step to 0
    gives exactly D.
    """
    for sig, sig2 in pairs(sigs):
        denoised = denoise(x, sig)
        x = denoised + sig2 / sig * (x - denoised)
        yield x


def sample_euler_ancestral(denoise, x, sigs, eta=1.0):
    """Euler, but step further down than sig2, to sigma_down, and add fresh noise sigma_up to be back at sig2.

    Fresh noise forgives earlier errors. eta scales it: 0 is Euler, 1 is DDPM's way of sampling (Ho et al. 2020). The
    two parts are independent, so their variances add: sigma_down^2 + sigma_up^2 = sig2^2. With eta 1 sigma_up^2 is the
    variance that x at sig2 has if x at sig and the clean image are known (Ho et al., eq. 7, in sigmas).
    """
    for sig, sig2 in pairs(sigs):
        sigma_up = min(sig2, eta * (sig2 ** 2 * (sig ** 2 - sig2 ** 2) / sig ** 2) ** 0.5)
        sigma_down = (sig2 ** 2 - sigma_up ** 2) ** 0.5
        denoised = denoise(x, sig)
        x = denoised + sigma_down / sig * (x - denoised)
        if sigma_up > 0: x = x + sigma_up * torch.randn_like(x)
        yield x


def sample_heun(denoise, x, sigs, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """Take an Euler step, look at the slope there too, and redo the step with the mean of both (algorithm 1).

    Steps half as long quarter the error. A step costs two evaluations, but the last only one, as there is no slope at
    sigma 0: 20 steps are 39 evaluations (the lecture counts 40). s_churn > 0 adds noise before a step (algorithm 2),
    which then starts from a higher level, sigma_hat: higher by the share gamma (not lesson 1's), at most sqrt(2) - 1,
    which doubles the variance. s_tmin, s_tmax: at which levels; s_noise: the deviation of that noise, if not 1.
    """
    steps = pairs(sigs)
    for sig, sig2 in steps:
        gamma = min(s_churn / len(steps), math.sqrt(2) - 1) if s_tmin <= sig <= s_tmax else 0.0
        sigma_hat = sig * (1 + gamma)
        if gamma > 0: x = x + s_noise * (sigma_hat ** 2 - sig ** 2) ** 0.5 * torch.randn_like(x)
        denoised = denoise(x, sigma_hat)
        slope = (x - denoised) / sigma_hat
        there = denoised + sig2 / sigma_hat * (x - denoised)
        if sig2 > 0:
            slope2 = (there - denoise(there, sig2)) / sig2
            there = x + (sig2 - sigma_hat) * (slope + slope2) / 2
        x = there
        yield x


def lms_coefficients(sigs, i, order):
    """Weights of the last `order` slopes, newest first, for the step from sigs[i] to sigs[i + 1].

    Adams-Bashforth with uneven steps: take the polynomial through the slopes at sigs[i], sigs[i - 1], .. and integrate
    it over the step. Each slope's weight is the integral of its Lagrange polynomial.
    """
    def lagrange(j):
        others = [i - k for k in range(order) if k != j]
        return lambda s: math.prod((s - sigs[m]) / (sigs[i - j] - sigs[m]) for m in others)
    return [integrate.quad(lagrange(j), sigs[i], sigs[i + 1], epsrel=1e-6)[0] for j in range(order)]


def sample_lms(denoise, x, sigs, order=4):
    """A linear multistep method: the last slopes, already paid for, tell how the slope is changing.

    One evaluation a step; the first steps make do with the slopes there are. The step to 0 is Euler's. (In the lecture
    it is like the others. But it can be far longer than those before it, and a polynomial carried so far magnifies
    rounding: in 100 steps 78 times, which in bfloat16 shows in the pictures.)
    """
    slopes, sigs = [], torch.as_tensor(sigs).tolist()
    for i, sig in enumerate(sigs[:-1]):
        slopes = [(x - denoise(x, sig)) / sig] + slopes[:order - 1]
        if sigs[i + 1] == 0: slopes = slopes[:1]
        x = x + sum(c * slope for c, slope in zip(lms_coefficients(sigs, i, len(slopes)), slopes))
        yield x


def sample_dpmpp_2m(denoise, x, sigs):
    """DPM-Solver++(2M), where the lecture says people were heading (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    It remembers the last estimate instead of the last slope, and steps in ln sigma. The linear part of the equation is
    then solved exactly: only D, which changes slowly, is extrapolated. One evaluation a step.
    """
    previous = None
    for sig, sig2 in pairs(sigs):
        denoised = ahead = denoise(x, sig)
        if previous is not None and sig2 > 0:                              # the first step and the last are Euler's
            r = math.log(sig_before / sig) / math.log(sig / sig2)
            ahead = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * previous
        x = ahead + sig2 / sig * (x - ahead)
        previous, sig_before = denoised, sig
        yield x


# Enter your own here, or one of these with other settings: "lms_3": lambda *how: sample_lms(*how, order=3). (If yours
# adds noise, ignore its solver error. For --compare enter it in COMPARED, too.)
SAMPLERS = {"euler": sample_euler, "ancestral": sample_euler_ancestral, "heun": sample_heun, "lms": sample_lms,
            "dpmpp_2m": sample_dpmpp_2m}


@torch.no_grad()
def sample(sampler, denoise, noise, sigs, **options):
    """Run a sampler to its end from standard normal noise (N, 1, H, W): -> where it ends. sigs: a tensor or a list."""
    x = None
    for x in sampler(denoise, noise * float(sigs[0]), sigs, **options):
        pass
    return x


def evaluations(name, steps):
    """How often a sampler calls the network: its cost. Counted in a trial run, so it is right for yours too, unless the
    answers decide how often you ask."""
    asked, noise = [], torch.zeros(1, 1, 32, 32)

    def ask(x, sig):
        asked.append(sig)
        return x
    end = path = SAMPLERS[name](ask, noise, sigmas_karras(steps))
    for end in path if hasattr(path, "__iter__") else (): pass             # yours, without a yield, may return anything
    if getattr(end, "shape", None) != noise.shape:
        found = f"a tensor of shape {tuple(end.shape)}" if torch.is_tensor(end) else f"a {type(end).__name__}"
        raise Problem(f"sampler {name} ends with {found}: does it yield x?")
    return len(asked)


# ---------------------------------------------------------------------------------------------- other people's networks

def denoise_epsilon(model, x, sig):
    """denoise for a network that finds the noise in x_t at time t, such as lesson 1's. sig: a number.

    Karras et al. 2022, table 1, columns "VP" and "iDDPM + DDIM": older models fit the same formulas with c_skip 1,
    c_out -sig, c_in 1 / sqrt(sig^2 + 1), and are told the time whose alphabar is c_in^2. (x is x_t / sqrt(abar), whose
    noise has sig^2 = (1 - abar) / abar.) Any sampler here therefore takes them, without new training. But a
    c_out of -sig magnifies the network's errors where noise is high, and some samplers leave noise in the pictures: see
    the comment below cosine_ddim.ddim_step.
    """
    c_in = 1 / math.sqrt(sig ** 2 + 1)
    t = cosine_ddim.inv_abar(torch.tensor(c_in ** 2, dtype=torch.float64))
    return x - sig * model(c_in * x, t)


# ---------------------------------------------------------------------------------------------- the lesson

# The lecture's own FIDs, on a scale where images are in -0.5..0.5 and its real images scored 0.50; in brackets,
# multiples of that, of which only the order of magnitude can be compared with ours.
LECTURE = {"euler, 100 steps": "1.98 (4.0 x)", "ancestral, 100 steps, eta 0.5": "1.53 (3.1 x)",
           "heun, 100 steps": "0.95 (1.9 x)", "heun, 50 steps": "0.97 (1.9 x)", "heun, 20 steps": "1.23 (2.5 x)",
           "lms, 20 steps": "1.76 (3.5 x)"}

EXACT_STEPS = 100               # noise levels of LMS on the way to the ends that count as exact

# Sampler, steps, options. Results tell eta and s_churn apart; state eta for "ancestral" even if it is 1. For any other
# option enter a sampler in SAMPLERS, which gives it a name, or its result replaces the plain one's.
COMPARED = [("euler", 100, {}), ("euler", 20, {}), ("ancestral", 100, {"eta": 0.5}), ("heun", 50, {}), ("heun", 20, {}),
            ("lms", 20, {}), ("dpmpp_2m", 20, {})]


def show_scale(images, input_scale, seed):
    """1. Images at the lecture's scale, and the mystery of 0.33 and 0.66, solved.

    The lecture uses sig_data 0.33, says that 0.66 would be right, and finds 0.33 better. But 0.33 was right: the
    notebook (of 23 January 2023) defines images in -1..1 and then, before training, again in -0.5..0.5. A later
    version, with true -1..1 images and 0.66, is another experiment: the lecture's own, in those units, has sig_data
    0.66, ln sigma around -1.2 + ln 2, and sigma from 0.02 to 160.
    """
    print(f"images: standard deviation {images.std():.4f}, mean {images.mean():.4f} in [-1, 1]; "
          f"times --input-scale {input_scale:g} it is {input_scale * images.std():.4f}")
    print("     range  sig_data  sd of inputs  sd of targets")
    for scale in (0.5, 1.0):
        for sig_data in (0.33, 0.66):
            torch.manual_seed(seed)
            (inputs, _), target = noisify(images[:4096] * scale, sig_data)
            print(f"{-scale:4g}..{scale:<4g} {sig_data:9g} {inputs.std():13.3f} {target.std():14.3f}")
    print("The lecture's screen showed 1.03 and 1.04 for 0.33: its images were in -0.5..0.5, and 0.33 was right.")


def show_sigmas(folder, seed):
    """2. The noise levels that the network is trained on: on an even axis, cut off at 10, as in the lecture, and on a
    logarithmic one, where they are a bell."""
    torch.manual_seed(seed)
    sigmas, panels = draw_sigmas(100_000), []
    for log, limits in ((False, (0, 10)), (True, (-6, 4))):
        values = sigmas.log() if log else sigmas
        heights, edges = np.histogram(values, bins=80, range=limits, density=True)
        middles = (edges[1:] + edges[:-1]) / 2
        density, xs = stats.gaussian_kde(values[:5000])(middles), np.exp(middles) if log else middles
        if not log: peak = middles[density.argmax()]
        panels.append(plot([("histogram", xs, heights, "bars"), ("kernel density", xs, density, "line")],
                           "the noise levels of training", "sigma", "density of ln sigma" if log else "density",
                           log_x=log, size=(480, 400)))
    beside(panels).save(folder / "sigmas.png")
    print(f"sigma exceeds 1 in {(sigmas > 1).float().mean():.1%} of draws (the lecture says about a third; "
          f"{stats.norm.cdf(P_MEAN / P_STD):.1%} are expected), median {sigmas.median():.2f} (it says mostly 0.4 or "
          f"0.5); on an even axis they are densest at {math.exp(P_MEAN - P_STD ** 2):.3f}, which a kernel density "
          f"smears to about {peak:.1f}")


def show_question(folder, x0, sig, how):
    """3. What goes in and what should come out, from little noise to much."""
    (inputs, _), target = noisify(x0, **how)
    print(f"a batch of {len(x0)} inputs: mean {inputs.mean():.3f}, sd {inputs.std():.3f}; their targets: mean "
          f"{target.mean():.3f}, sd {target.std():.3f} (near 1 if sig_data is right); "
          + ("the images' mean was taken off" if "centre" in how else "nothing was done about the mean"))
    (inputs, _), target = noisify(x0[:len(sig)], sig=sig, **how)
    grid(torch.cat([inputs, target]) / 2, [f"{s:.2f}" for s in sig] * 2, 16,
         title="inputs (above) and targets (below) by sigma, halved to fit. Where there is little noise, find the "
         "noise; where there is much, find the clothes").save(folder / "question.png")


def show_loss(folder, model, x0, how):
    """4. The loss against sigma on test images, before training and after it, over the density of training.

    At high sigma training gains much by learning what the mean image looks like, as nothing was done about the mean.
    What the network knows beyond that is the distance to a third line, the loss of knowing the mean image alone.
    """
    sigmas = np.exp(np.linspace(math.log(0.004), math.log(60), 20))
    before = loss_by_sigma(lambda x, sig: torch.zeros_like(x), x0, sigmas, how)                # init_ddpm starts at 0
    after = loss_by_sigma(model, x0, sigmas, how)
    density = stats.norm(P_MEAN, P_STD).pdf(np.log(sigmas))
    chart = plot([("before training", sigmas, before, "line"), ("after", sigmas, after, "line"),
                  ("knowing the mean image", sigmas, loss_of_the_mean(x0, sigmas, how["sig_data"]), "line"),
                  ("where training looks (density, peak 1)", sigmas, density / density.max(), "line")],
                 "loss by noise level, on test images", "sigma", "mean squared error", log_x=True, names_below=True)
    chart.save(folder / "loss-by-sigma.png")


def spread_of_best(x0, sig):
    """How much the best answers to pure noises of deviation sig differ from each other: the standard deviation of a
    pixel. x0: (N, 1, H, W), N > 1, images.

    To first order in 1 / sig the best answer to x, sig times standard noise, is the mean image plus C x / sig^2, where
    C is the images' covariance. sig^2 has to be far above its largest eigenvalue, which is 20 for clothes in
    -0.5..0.5. (If images are Gaussian the best answer is exactly mean + C (C + sig^2)^-1 (x - mean).)
    """
    return float(torch.cov(x0.flatten(1).T).square().sum(1).mean().sqrt() / sig)


@torch.no_grad()
def show_one_step(folder, denoiser, x0, sig, input_scale, seed):
    """5. One step from many noise levels, and one from nothing but noise -> how much the answers to different noises
    differ: the standard deviation of a pixel, in -1..1."""
    x = x0 + sig[:, None, None, None] * torch.randn_like(x0)
    restored = denoiser(x, sig)
    brightness = (sig ** 2 + input_scale ** 2).sqrt()[:, None, None, None]
    grid(torch.cat([x / brightness, restored / input_scale, x0 / input_scale]), [f"{s:.2f}" for s in sig] * 3, 16,
         title="noised (shown at one brightness), restored in one step, and true, by sigma"
         ).save(folder / "one-step.png")
    # At sigma 80 any garment could be hidden. So the best answer is all of them laid over each other, nearly the same
    # to every noise. A shoe here and trousers there are the network's error, where next to no sigma is drawn to train.
    # It does little harm: results/README.md, "Where the network begins to matter".
    pure = 80 * torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(seed)).to(x0.device)
    answers = denoiser(pure, 80.0) / input_scale
    grid(answers, None, 8, title="one step from pure noise, sigma 80").save(folder / "one-step-from-noise.png")
    return float(answers.var(0).mean().sqrt())


def show_schedule(folder, steps, rho):
    """6. The schedule of sampling, for several rho."""
    lines = [(f"rho {r:g}", range(steps), sigmas_karras(steps, rho=r)[:-1].tolist(), "line")
             for r in sorted({1, 3, 5, 7, rho})]
    plot(lines, f"sigma at each of {steps} steps", "step", "sigma", log_y=True).save(folder / "schedule.png")


def label(record):
    """A sampler and its settings in words, those that are the lecture's left out."""
    usual = {"eta": None, "churn": None, "rho": 7, "input_scale": 0.5,
             "sig_data": round(0.66 * record["input_scale"], 6)}
    words = [record["what"], f"{record['steps']} steps"]
    words += [f"{key} {record[key]:g}" for key in usual if record[key] not in (usual[key], None)]
    if record["model"] != "karras": words.append(f"model {record['model']}")
    words += [key for key in ("log_sigma", "centre") if record.get(key)]
    return ", ".join(words).replace("_", " ")


def exact_ends(args, denoiser):
    """Where 64 paths end, nearly exactly -> (64, 1, 32, 32), or fewer with --samples: by LMS in many steps, which is
    closer to exact than Heun in as many, for half the evaluations. (Of order 4, also if you change its default.)"""
    sigs = sigmas_karras(EXACT_STEPS)
    walk = lambda noise: sample(sample_lms, denoiser, noise, sigs, order=4) / args.input_scale
    return generate(walk, min(64, args.samples), args.seed, args.device, amp=False)[0]


def solver_error(ends, exact):
    """How far a solver's ends (N, 1, H, W) are from the exact ones: root mean square over all, and of the median image.

    Here and there a path comes to a fork, to a shoe or to a bag, and a small error sends it the other way. One such
    image of 64 can make up most of the mean, which then says little of the solver. The median tells what is usual.
    """
    squares = (ends - exact).square().mean((1, 2, 3))
    return float(squares.mean().sqrt()), float(squares.sqrt().quantile(0.5))


def fresh_noise(options):
    """Whether a sampler with these options adds noise of its own on the way."""
    return options.get("eta") or options.get("s_churn")


def try_sampler(args, denoiser, origin, evaluate, exact, name, steps, options):
    """7. Sample with one sampler, score and draw the clothes -> the record of it, which is in results.json too.

    exact: what exact_ends returns; unused where options ask for fresh noise.
    """
    sigs = sigmas_karras(steps, rho=args.rho)
    walk = lambda noise: sample(SAMPLERS[name], denoiser, noise, sigs, **options) / args.input_scale
    asked = evaluations(name, steps)
    images, seconds = generate(walk, args.samples, args.seed, args.device)
    error = median = None
    if not fresh_noise(options):                                           # with it the ends are elsewhere by design
        ends, _ = generate(walk, len(exact), args.seed, args.device, amp=False)
        error, median = solver_error(ends, exact)
    record = {"what": name, "steps": steps, "evaluations": asked, "eta": options.get("eta"),
              "churn": options.get("s_churn"), "rho": args.rho, "model": args.model, "input_scale": args.input_scale,
              "sig_data": args.sig_data if args.model == "karras" else None,
              "log_sigma": args.log_sigma, "centre": args.centre, **evaluate.score(images),
              "solver_error": error, "solver_error_median": median, "sample_seconds": round(seconds, 1), **origin}
    report(label(record), record, images, args.folder)
    if error is not None: print(f"    solver error of the median image {median:.4f}, over all {error:.4f}")
    return record


@torch.no_grad()
def show_paths(folder, denoiser, rho, input_scale, device, seed):
    """8. One noise on its way to a garment, by each sampler in 20 steps, of which every other is drawn. (A sampler that
    does not yield x after every step is left out.)"""
    sigs, rows = sigmas_karras(20, rho=rho), {}
    noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(seed)).to(device) * sigs[0].item()
    shown = sigs[2::2].tolist()                                            # what is reached, not where a step begins
    for name in SAMPLERS:
        torch.manual_seed(step_seed(seed, 1))                              # another than noise's: fresh noise is new
        path = [x.clone() for x in SAMPLERS[name](denoiser, noise.clone(), sigs)][1::2]    # yours may work in place
        if len(path) == len(shown): rows[name] = [x / max(sig, input_scale) for x, sig in zip(path, shown)]
    grid(torch.cat(sum(rows.values(), [])), [f"{sig:.2g}" for sig in shown] * len(rows), len(shown),
         title="from noise to clothes, by sigma; from above: " + ", ".join(rows)).save(folder / "paths.png")


def show_comparison(folder, records):
    """9. What each sampler costs and what comes of it, as a picture."""
    asked = [r["evaluations"] for r in records]
    panels = []
    for key, title in (("solver_error_median", "solver error, median image"), ("fid", "FID"),
                       ("border", "residual noise")):
        series = [(label(r), [r["evaluations"]], [math.nan if r[key] is None else r[key]], "points") for r in records]
        if key == "fid": series.append(("real images", [min(asked), max(asked)], [records[0]["floor"]] * 2, "line"))
        panels.append(plot(series, title, "evaluations of the network", title, log_y=key.startswith("solver"),
                           size=(420, 360), names_below=True))
    beside(panels).save(folder / "compare.png")


def learn(args, images):
    """1 to 5: a network by this lesson's recipe, every stage shown -> denoise(x, sig), and the network's origin."""
    show_scale(images, args.input_scale, args.seed)
    x0 = images.mul_(args.input_scale)
    test = (fashion_mnist(args.data_dir, False, args.data, 128)[0] * args.input_scale).to(args.device)
    show_sigmas(args.folder, args.seed)
    evenly = stats.norm.ppf(np.linspace(0.01, 0.99, 16))                   # 16 sigmas, spread as training draws them
    sig = torch.tensor(np.exp(P_MEAN + P_STD * evenly), dtype=torch.float32, device=args.device)
    how = {"sig_data": args.sig_data}                  # the rest only if asked for: checkpoints are named by all of it
    if args.log_sigma: how["log_sigma"] = True
    if args.centre: how["centre"] = round(float(x0.mean()), 4)
    show_question(args.folder, test, sig, how)
    model, origin = train(args, "karras", RECIPE, lambda x0: noisify(x0, **how), x0, input_scale=args.input_scale,
                          **how)
    denoiser = lambda x, sig: denoise(model, x, sig, **how)
    print(f"loss of the last 100 steps {origin['loss']:.4f}, after {origin['train_seconds']:.0f} s of training on "
          f"{origin['trained_on']} (not to be set beside the lecture's other losses: their targets were others)")
    show_loss(args.folder, model, test, how)
    spread = show_one_step(args.folder, denoiser, test[:16], sig, args.input_scale, args.seed)
    best = spread_of_best(x0[:10_000], 80) / args.input_scale
    print(f"one step from pure noise: 16 answers differ by {spread:.3f} (standard deviation of a pixel), the best ones "
          f"would by {best:.3f}")
    return denoiser, origin | {"one_step_spread": spread, "one_step_spread_of_best": best}


@script
def main(argv=None):
    parser = flags("karras", "Karras et al. 2022 on Fashion-MNIST: train, sample, score and draw.")
    add = parser.add_argument
    add("--sampler", choices=SAMPLERS, help="how to walk from noise to clothes (default lms)")
    add("--steps", type=number(int, 1, 10_000), help="noise levels on the way (default 20)")
    add("--eta", type=number(float, 0, 1), help="fresh noise of the ancestral sampler, 0 to 1 (default 1)")
    add("--churn", type=number(float, 0), help="fresh noise of Heun's sampler, S_churn in the paper (default 0)")
    add("--rho", type=number(float, 1, 100), default=7.0, help="how the steps shrink (default 7)")
    add("--model", choices=("karras", "cosine"), default="karras", help="this lesson's network, or lesson 1's; "
        "--epochs, --batch-size, --lr and --retrain are for that network")
    add("--input-scale", type=number(float, 0.05, 5), help="b, 0.05 to 5: images in -b..b (default 0.5)")
    add("--sig-data", type=number(float, 0.001, 100), help="the images' assumed sd (default input scale x 0.66)")
    add("--log-sigma", action="store_true", help="tell the network ln(sigma) / 4, as in the paper, instead of sigma")
    add("--centre", action="store_true", help="take the images' mean off on the way in, and put it back")
    add("--compare", action="store_true", help="all samplers in one table, instead of --sampler")
    args = parser.parse_args(argv)
    if args.compare and (args.sampler or args.steps):
        parser.error("--compare has samplers and steps of its own, without --sampler and --steps")
    args.sampler, args.steps = args.sampler or "lms", args.steps or 20
    if args.eta is not None and (args.compare or args.sampler != "ancestral"):
        parser.error("--eta belongs to --sampler ancestral")
    if args.churn is not None and (args.compare or args.sampler != "heun"):
        parser.error("--churn belongs to --sampler heun")
    if args.model == "cosine" and (args.input_scale or args.sig_data or args.log_sigma or args.centre):
        parser.error("--input-scale, --sig-data, --log-sigma and --centre belong to --model karras")
    options = {}
    if args.sampler == "ancestral": options["eta"] = 1.0 if args.eta is None else args.eta
    if args.churn: options["s_churn"] = args.churn
    trials = COMPARED if args.compare else [(args.sampler, args.steps, options)]
    for name in SAMPLERS if args.compare else [args.sampler]: evaluations(name, 3)     # an error in yours? found now
    args.input_scale = args.input_scale or 0.5
    args.sig_data = args.sig_data or round(0.66 * args.input_scale, 6)
    settle(args)
    args.data = find_data(args.data, args.data_dir)
    evaluate = ImageEval(args.data, args.data_dir, args.samples, args.device, args.out_dir / "fid", args.count)
    images, _ = fashion_mnist(args.data_dir, True, args.data, args.count)

    if args.model == "karras":
        denoiser, origin = learn(args, images)
    else:
        print("lesson 1's network, which finds the noise:")
        model, origin = cosine_ddim.network(args, images.mul_(args.input_scale), input_scale=args.input_scale)
        denoiser = lambda x, sig: denoise_epsilon(model, x, sig)
    show_schedule(args.folder, args.steps, args.rho)
    exact = exact_ends(args, denoiser) if not all(fresh_noise(options) for *_, options in trials) else None
    records = [try_sampler(args, denoiser, origin, evaluate, exact, *trial) for trial in trials]
    if args.compare:
        show_paths(args.folder, denoiser, args.rho, args.input_scale, args.device, args.seed)
        show_comparison(args.folder, records)
    print("The lecture's real images scored 0.50 on the scale of its figures: of the multiples compare only the order\n"
          "of magnitude. Its LMS was called with order 3 and sigma_max 20; the order of 4 is its function's default.")
    comparison(records, label, LECTURE, args.folder)


if __name__ == "__main__":
    main()
