"""Lesson 2: how noisy is this image? Predicting alphabar from the image alone (notebook 22_noise-pred).

    python noise_pred.py                        trains a network (once) and shows how well it guesses
    python noise_pred.py --target alphabar      the same without the logit, which the lecture found not to work well
    python noise_pred.py --compare              both, on one scale

Every denoiser so far was told t. Looking at noised images one wonders why: it is plain to see how noisy each is. So ask
a network. What the lecture found: one that is asked for the logit of alphabar has a squared error of 0.075, where
always answering 0.5 gives 3.5. It can tell; lesson 3 builds on that.

Ours, after two passes on a CPU, seed 0 (results/small/noise_pred): 0.092, and guesses of alphabar are off by 0.020 on
average. Asked for alphabar itself, which did not work well in the lecture, a network does as well from 0.2 to 0.8, and
worse near 0 and 1: at 0.999 it is off by 0.0048, the other by 0.0004. By the lecture's recipe, 20 passes in batches of
512, also on a CPU (results/small/noise_pred-20-passes), 0.081. The lecture's 0.075 is within luck of that, and about
0.07 is the least possible (results/README.md, "Lesson 2").

The same network by the lecture's recipe on an H200, seed 0 (results/lecture/noise_pred): guesses are off by 0.018 on
average, at alphabar 0.5 by 0.0190, an eighth more than the limit for an unbiased guess that even knows the clean image
(see best).
"""
import functools
import math

import torch
import torch.nn.functional as F

from fid import beside, fashion_mnist, find_data, grid, plot, resnet, run, save_results, stand_in
from unet import Problem, flags, script, settle, train

RECIPE = {"lecture": dict(epochs=20, batch_size=512, lr=1e-2),
          "small": dict(epochs=2, batch_size=64, lr=4e-3),
          "tiny": dict(epochs=1, batch_size=32, lr=1e-2)}


# ---------------------------------------------------------------------------------------------- the question

def noisify(x0, al_t=None, target="logit"):
    """Clean images x0 (N, 1, H, W) -> ((x_t,), target (N,)): a noised image, and how much of it is image.

    If al_t (N,) is not given, alphabar is drawn uniformly from (0, 1), at least 1e-5 from both ends, so that its logit,
    ln(alphabar / (1 - alphabar)), is finite. The network is asked for the logit: on its scale 0.99 to 0.999 is as far
    as 0.01 to 0.001, any number is a possible answer, and answers are centred at 0. target "alphabar" asks for alphabar
    itself.
    """
    if al_t is None: al_t = torch.rand(len(x0), device=x0.device).clamp(1e-5, 1 - 1e-5)
    a = al_t[:, None, None, None]
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * torch.randn_like(x0)
    return (x_t,), al_t.logit() if target == "logit" else al_t


def alphabar(pred, target="logit"):
    """The network's answers (N, 1) or (N,) as alphabar (N,), in the range that noisify draws from."""
    return (pred.sigmoid() if target == "logit" else pred).flatten().clamp(1e-5, 1 - 1e-5)


def flat_mse(pred, target):
    """Mean squared error of tensors with equally many numbers, whatever their shapes.

    The network answers (N, 1), the target is (N,): their plain difference would be (N, N), everything against
    everything, and its mean square a number that looks like a loss.
    """
    return F.mse_loss(pred.flatten(), target.flatten())


# ---------------------------------------------------------------------------------------------- the lesson

INPUT_SCALE = 0.5               # images in -0.5..0.5, as in all lessons

LEVELS = (0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999)


def guess(model, x0, al_t=None, target="logit"):
    """Noise the images x0 (N, 1, H, W) -> the network's answers (N,), the right ones (N,), and the noised images.

    Without al_t (N,) alphabar is spread evenly: one in each of N equal parts of (0, 1). If each were drawn on its own,
    as in training, the loss would hang on how many happen to fall close to 0, where the logit is least known.
    """
    torch.manual_seed(0)                                                   # the same noise for every network
    n = len(x0)
    if al_t is None: al_t = ((torch.randperm(n) + torch.rand(n)) / n).clamp(1e-5, 1 - 1e-5)
    (x_t,), actual = noisify(x0, al_t, target)
    return run(model, x_t).flatten(), actual, x_t


def show_question(folder, x0):
    """1. Noised images and what is asked of them: 0 is an alphabar of 0.5, 3 little noise, -3 much.

    To show them all they are divided by sqrt(alphabar b^2 + 1 - alphabar): pure noise stays as it is, and a clean image
    is back in -1..1. The network sees them undivided, so for it that is one more hint.
    """
    (x_t,), logit = noisify(x0)
    brightness = (logit.sigmoid() * INPUT_SCALE ** 2 + 1 - logit.sigmoid()).sqrt()[:, None, None, None]
    grid(x_t / brightness, [f"{number:.2f}" for number in logit], 13,
         title="noised images, shown at one brightness, and the logit of alphabar").save(folder / "question.png")


def show_baselines(x0):
    """2. What counts as good: the loss of a constant answer, twice; and the trap of shapes that do not match.

    If alphabar is drawn uniformly, its logit has mean 0 and variance pi^2 / 3 = 3.29, the loss of a constant 0. The
    lecture's 3.5 belongs to its other constant, 0.5, which costs 0.25 more.
    """
    _, actual = noisify(x0)
    batch = actual[:512]
    for answer, expected in ((0.0, math.pi ** 2 / 3), (0.5, math.pi ** 2 / 3 + 0.25)):
        on_all, on_batch = (F.mse_loss(torch.full_like(logit, answer), logit) for logit in (actual, batch))
        print(f"always answering {answer:g}: loss {on_all:.2f} over {len(actual)} test images, {on_batch:.2f} on a "
              f"batch, {expected:.2f} expected" + (" (the lecture's 3.5)" if answer == 0.5 else ""))
    column = batch[:, None]                                                # the right answer, as a network shapes it
    print(f"the right answer as (N, 1) against (N,): {(column - batch).square().mean():.2f} where (N, N) differences "
          f"are averaged, {flat_mse(column, batch):.2f} flattened")


def network(args, x0, target="logit"):
    """3. This lesson's network for images x0 in -b..b, trained or loaded -> the network, and its origin.

    The lecture's residual network with a single output, in float32: this is regression to several decimals.
    """
    return train(args, "noise_pred", RECIPE, functools.partial(noisify, target=target), x0, loss=flat_mse, amp=False,
                 build=lambda: resnet(1), target=target, input_scale=INPUT_SCALE)


def show_guesses(folder, x0, x_t, pred, actual, target):
    """4. Predicted beside actual alphabar (N,): sixteen images, all of them as dots, and the error by noise level."""
    # Halved, so that most of the noise fits in -1..1, which is what a picture can show.
    grid(x_t[:16] / 2, [f"said {a:.2f}, is {b:.2f}" for a, b in zip(pred[:16], actual[:16])], 8, 3,
         title="predicted and actual alphabar").save(folder / f"guesses-{target}.png")
    off, middles = (pred - actual).abs(), (torch.arange(20) + 0.5) / 20
    by_level = [off[(actual - middle).abs() < 0.025].mean() for middle in middles]
    beside([plot([("test images", actual, pred, "dots"), ("right", [0, 1], [0, 1], "line")], f"asked for: {target}",
                 "actual alphabar", "predicted alphabar", size=(480, 480)),
            plot([("network", middles, by_level, "line"), ("unbiased, and the image known", middles,
                  [best(middle, x0) for middle in middles.tolist()], "line")], "mean error by noise level",
                 "actual alphabar", "mean absolute error", size=(480, 480))]).save(folder / f"scatter-{target}.png")


def best(level, x0):
    """The least mean absolute error of an unbiased guess of alphabar by someone who knows the image (the Cramer-Rao
    bound, with errors taken as normally distributed).

    At alphabar a each of the n pixels of x_t is Gaussian, with mean sqrt(a) x0 and variance 1 - a. Their Fisher
    information about a is n / (2 (1 - a)^2) + |x0|^2 / (4 a (1 - a)), and no unbiased guess has a variance below its
    inverse. The network does not know the image. Around 0.05 it still errs a little less, probably because it may be
    biased: it knows that alphabar is not below 0. Nearer to 0 knowing the image is worth more: at 0.001 this limit is
    about a third of the network's error.
    """
    information = x0[0].numel() / (2 * (1 - level) ** 2) + x0.square().sum((1, 2, 3)) / (4 * level * (1 - level))
    return float((2 / (math.pi * information)).sqrt().mean())


def errors(model, x0, target):
    """5. The mean absolute error of alphabar, and the root mean squared error of its logit, at each of the LEVELS."""
    rows = []
    for level in LEVELS:
        pred = alphabar(guess(model, x0, torch.full((len(x0),), level), target)[0], target)
        off = pred.logit() - math.log(level / (1 - level))
        rows.append([float((pred - level).abs().mean()), float(off.square().mean().sqrt())])
    return rows


def try_target(args, x0, test, target):
    """6. Train a network on the images x0, and see how well it guesses -> the record of it, also in results.json."""
    model, origin = network(args, x0, target)
    said, right, _ = guess(model, x0[:10_000], target=target)
    train_loss = flat_mse(said, right).item()
    said, right, x_t = guess(model, test, target=target)
    test_loss = flat_mse(said, right).item()
    if not math.isfinite(test_loss): raise Problem("the network's answers are infinite: try a lower --lr")
    pred, actual = alphabar(said, target), alphabar(right, target)
    show_guesses(args.folder, test, x_t, pred, actual, target)
    record = {"what": target, "train_loss": train_loss, "test_loss": test_loss,
              "mae": float((pred - actual).abs().mean()), "logit_mse": flat_mse(pred.logit(), actual.logit()).item(),
              "levels": LEVELS, "errors": errors(model, test[:1000], target), "data": args.data, **origin}
    save_results(args.folder, [record])
    lecture = " (lecture: 0.075)" if target == "logit" else ""
    print(f"asked for {target}: mean squared error of that {train_loss:.4f} on images of the training set, "
          f"{test_loss:.4f} on the test images{lecture}; mean error of alphabar {record['mae']:.4f}; "
          f"{origin['train_seconds']:.0f} s of training on {origin['trained_on']}{stand_in(args.data)}")
    return record


@script
def main(argv=None):
    parser = flags("noise_pred", "Predict from an image alone how noisy it is.")
    parser.add_argument("--target", choices=("logit", "alphabar"), help="what the network is asked for (default logit)")
    parser.add_argument("--compare", action="store_true", help="both targets, on one scale")
    args = parser.parse_args(argv)
    if args.compare and args.target: parser.error("--compare trains both targets, without --target")
    if args.compare and args.retrain: parser.error("--retrain takes one --target at a time, without --compare")
    if args.samples: parser.error("--samples: nothing is sampled in this lesson")
    settle(args)
    args.data = find_data(args.data, args.data_dir)
    x0 = fashion_mnist(args.data_dir, True, args.data, args.count)[0].mul_(INPUT_SCALE)
    test = fashion_mnist(args.data_dir, False, args.data, args.count)[0].mul_(INPUT_SCALE)
    torch.manual_seed(args.seed)
    show_question(args.folder, test[:25])
    show_baselines(test)
    records = [try_target(args, x0, test, target)
               for target in (("logit", "alphabar") if args.compare else (args.target or "logit",))]
    print("error at alphabar of          " + "".join(f"{level:8g}" for level in LEVELS))
    for record in records:
        for row, name in ((0, "mean, of alphabar"), (1, "root mean sq., logit")):
            print(f"{record['what']:9}{name:21}" + "".join(f"{error[row]:8.4f}" for error in record["errors"]))
    print("unbiased, image known: mean   " + "".join(f"{best(level, test):8.4f}" for level in LEVELS))


if __name__ == "__main__":
    main()
