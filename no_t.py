"""Lesson 3: a denoiser that is never told t, and how lesson 2's network rescues its sampler (notebook 22_noise-pred).

    python no_t.py                      trains both networks (once), samples 2048 clothes in 100 steps, rescued
    python no_t.py --rescue none        the same without the rescue: plain DDIM
    python no_t.py --compare            the rescue at every step, at none, at the last, at all but the last; three eta
    python no_t.py --curve              FID and KID of x_0_hat at every step on the way
    python no_t.py --trace              what goes on inside, as numbers

What the lecture found: if noise is so easy to see, a denoiser need not be told how much there is. Without t it trains
as well (0.034 against 0.033), but plain DDIM with it fails: FID 22.3, and some images stay noisy. Asking lesson 2's
network at every step how noisy x_t really is brings 3.88, where real images have 1.9 to 2.6.
"""
import argparse

import torch

import cosine_ddim
import noise_pred
from cosine_ddim import abar, ddim_step, timesteps
from fid import ImageEval, beside, comparison, describe, fashion_mnist, find_data, grid, plot, report, save_results
from unet import flags, generate, number, script, settle, train

RECIPE = cosine_ddim.RECIPE


# ---------------------------------------------------------------------------------------------- a network without t

def noisify(x0, t=None):
    """Lesson 1's noisify, but t stays here: -> ((x_t, zeros (N,)), noise). There is no way to cheat.

    The network is the same, with its input for t; it gets 0 every time, and can learn nothing from that.
    """
    (x_t, t), noise = cosine_ddim.noisify(x0, t)
    return (x_t, torch.zeros_like(t)), noise


# ---------------------------------------------------------------------------------------------- the rescue

BATCH = 256                     # images that are sampled together: the median is taken over them


def predict(tmodel, x_t):
    """How noisy lesson 2's network takes x_t (N, 1, 32, 32) to be: alphabar (N,). In float32, as it was trained."""
    with torch.autocast(x_t.device.type, enabled=False):
        return noise_pred.alphabar(tmodel(x_t.float()))


def near_median(a):
    """Predicted alphabars (N,) of one batch, each moved to within half and twice their median, as the lecture has it.

    All images of a batch are equally far on their way, so an answer far from the others' is a mistake.
    """
    return a.clamp(a.median() / 2, a.median() * 2)


RESCUES = {"every": lambda last: True, "none": lambda last: False, "last": lambda last: last,
           "but-last": lambda last: not last}


def sample(find_noise, predict, x, ts, eta=1.0, clip=2.0, rescue="every"):
    """Lesson 1's sample with a network that is not told t: yields (x_0_hat, x_t, what was predicted) after every step.

    find_noise(x_t), predict(x_t) -> alphabar (N,). Where the rescue is on, what is predicted takes the clock's place in
    the estimate of the clean image, and nowhere else: the noise that is there is removed, not what should be there.
    The last call, at t = 0, is idle in lesson 1: its alphabar is 1, and nothing is left to remove. With a predicted
    alphabar it removes what noise there is after all.
    """
    ts = ts.tolist()
    for t, t1 in zip(ts, ts[1:]):
        abar_hat = near_median(predict(x)) if RESCUES[rescue](t == 0) else None
        x_0_hat, x = ddim_step(x, find_noise(x), abar(t), abar(t1), eta, clip, abar_hat)
        yield x_0_hat, x, abar_hat


# ---------------------------------------------------------------------------------------------- the lesson

# The lecture's FIDs, of 100 steps, on a scale where its real images scored 1.9 to 2.6.
LECTURE = {("none", 1.0): "22.3 (9..12 x)", ("every", 1.0): "3.88 (1.5..2.0 x)", ("every", 0.5): "4.58 (1.8..2.4 x)",
           ("every", 0.0): "5.75 (2.2..3.0 x)"}

COMPARED = [("none", 1.0), ("none", 0.0), ("every", 1.0), ("every", 0.5), ("every", 0.0), ("last", 1.0),
            ("but-last", 1.0)]                                             # rescue, eta


def said(record):
    """A result's settings in words."""
    return f"{record['what']}, {record['steps']} steps, eta {record['eta']:g}, rescue {record['rescue']}"


def try_rescue(args, find_noise, predict, origin, evaluate, rescue, eta):
    """2 to 4. Sample, score and draw the clothes -> the record of it, which is in results.json too."""
    def sampler(noise):
        for _, x, _ in sample(find_noise, predict, noise, timesteps(args.steps), eta, rescue=rescue): pass
        return x / args.input_scale
    images, seconds = generate(sampler, args.samples, args.seed, args.device, batch=BATCH)
    images = images.clamp(-1, 1)
    record = {"what": "no t", "steps": args.steps, "evaluations": args.steps, "eta": eta, "rescue": rescue,
              **evaluate.score(images), "sample_seconds": round(seconds, 1), **origin}
    report(said(record), record, images, args.folder)
    return record


def show_curve(args, find_noise, predict, origin, evaluate):
    """5. FID and KID of the estimated clean images at every step: the lecture saw it get worse for a while."""
    curves, strips, records = [], [], []
    for rescue in ("none", "every"):
        def sampler(noise):
            path = sample(find_noise, predict, noise, timesteps(args.steps), args.eta, rescue=rescue)
            return torch.stack([x_0_hat.float().cpu() for x_0_hat, *_ in path], 1) / args.input_scale
        estimates, _ = generate(sampler, args.samples, args.seed, args.device, batch=BATCH)
        scores = [evaluate.score(estimates[:, i].clamp(-1, 1)) for i in range(args.steps)]
        curves.append((f"rescue {rescue}", scores))
        strips.append(estimates[:3].flatten(0, 1))
        records.append({"what": "curve", "steps": args.steps, "eta": args.eta, "rescue": rescue, "data": args.data,
                        "samples": args.samples, "floor": evaluate.floor, "floor_sd": evaluate.floor_sd,
                        **{f"{key}_by_step": [score[key] for score in scores] for key in ("fid", "kid", "border")},
                        **origin})
        for i, score in enumerate(scores):
            worse = i and score["kid"] > scores[i - 1]["kid"]
            print(f"rescue {rescue}, x_0_hat of step {i + 1}: {describe(score)}" + " (KID worse than before)" * worse)
    save_results(args.folder, records)
    steps, panels = range(1, args.steps + 1), []
    for key, title in (("fid", "FID"), ("kid", "KID"), ("border", "residual noise")):
        series = [(name, steps, [score[key] for score in scores], "line") for name, scores in curves]
        panels.append(plot(series, f"{title} of x_0_hat", "step", title, log_y=key == "fid", size=(420, 360)))
    beside(panels).save(args.folder / "curve.png")
    grid(torch.cat(strips), None, args.steps, 1, title="x_0_hat at every step: three garments without the rescue, and "
         "the same three with it").save(args.folder / "steps.png")


def show_trace(args, find_noise, predict):
    """6. What the lecture's debugging cell printed, for one batch."""
    print("step      t  alphabar: true   lowest   median  highest    x_t from      to   x_0_hat from      to")
    ts = timesteps(args.steps)

    def sampler(noise):
        x, path = noise, sample(find_noise, predict, noise, ts, args.eta, rescue=args.rescue)
        for i, (t, (x_0_hat, x_next, _)) in enumerate(zip(ts.tolist(), path)):
            told = predict(x)
            print(f"{i + 1:4d}  {t:5.3f}  {float(abar(t)):14.4f} {told.min():8.4f} {told.median():8.4f} "
                  f"{told.max():8.4f}  {x.min():10.2f} {x.max():7.2f}  {x_0_hat.min():13.2f} {x_0_hat.max():7.2f}")
            x = x_next
        return x
    generate(sampler, BATCH, args.seed, args.device, batch=BATCH)


@script
def main(argv=None):
    parser = flags("no_t", "A denoiser that is never told t, and how predicting alphabar rescues its sampler.")
    add = parser.add_argument
    add("--steps", type=number(int, 2, 1000), help="steps of DDIM (default 100; 20 with --curve and --trace)")
    add("--eta", type=number(float, 0, 1), help="fresh noise on the way, 0 to 1 (default 1)")
    add("--rescue", choices=RESCUES, help="at which steps alphabar is predicted (default every)")
    shows = parser.add_mutually_exclusive_group()
    shows.add_argument("--compare", action="store_true", help="all rescues, and three eta, in one table")
    shows.add_argument("--curve", action="store_true", help="FID and KID of x_0_hat at every step, plain and rescued")
    shows.add_argument("--trace", action="store_true", help="predicted and true alphabar at every step, as a table")
    args = parser.parse_args(argv)
    if args.compare and args.eta is not None: parser.error("--compare sets --eta itself")
    if (args.compare or args.curve) and args.rescue: parser.error("--compare and --curve set --rescue itself")
    args.eta, args.rescue = 1.0 if args.eta is None else args.eta, args.rescue or "every"
    args.steps, args.input_scale = args.steps or (20 if args.curve or args.trace else 100), 0.5
    settle(parser, args)
    args.data = find_data(args.data, args.data_dir)
    if not args.trace:
        evaluate = ImageEval(args.data, args.data_dir, args.samples, args.device, args.out_dir / "fid", args.images)
    x0 = fashion_mnist(args.data_dir, True, args.data, args.images)[0].mul_(args.input_scale)

    # Lesson 2's network, by lesson 2's recipe: --epochs, --batch-size, --lr and --retrain are about this lesson's.
    print("lesson 2's network, which predicts alphabar:")
    tmodel, _ = noise_pred.network(argparse.Namespace(**vars(args) | dict(epochs=None, batch_size=None, lr=None,
                                                                          retrain=False)), x0)
    print("the denoiser that is never told t:")
    model, origin = train(args, "no_t", RECIPE, noisify, x0, input_scale=args.input_scale)
    print(f"loss of the last 100 steps {origin['loss']:.4f}, after {origin['train_seconds']:.0f} s of training on "
          f"{origin['trained_on']} (lecture: 0.034, and 0.033 with t)")
    find_noise = lambda x_t: model(x_t, 0.0).float()
    told = lambda x_t: predict(tmodel, x_t)
    if args.trace: return show_trace(args, find_noise, told)

    if args.curve: return show_curve(args, find_noise, told, origin, evaluate)
    trials = COMPARED if args.compare else [(args.rescue, args.eta)]
    records = [try_rescue(args, find_noise, told, origin, evaluate, *trial) for trial in trials]
    comparison(records, said, lambda r: LECTURE.get((r["rescue"], r["eta"]), "-"))
    print("The lecture's figures are of 100 steps; its real images scored 1.9 to 2.6 on their scale.")
    last = records[-1]
    print(f"Pictures and results.json are in {args.folder}. {said(last)}: {describe(last)}")


if __name__ == "__main__":
    main()
