"""Lesson 2: how noisy is this image? Predicting alphabar from the image alone (notebook 22_noise-pred).

    python noise_pred.py                        trains a network (once) and shows how well it guesses
    python noise_pred.py --target alphabar      the same without the logit, which the lecture found not to work well
    python noise_pred.py --compare              both, on one scale

Every denoiser so far was told t. Looking at noised images one wonders why: it is plain to see how noisy each is. So ask
a network. What the lecture found: trained on the logit of alphabar its squared error is 0.075, where always answering
the same gives 3.5. A network can tell; lesson 3 builds on that. Our own figures are still to come.
"""
import functools
import math

import torch
import torch.nn.functional as F

from fid import beside, fashion_mnist, find_data, grid, plot, resnet, run, save_results, stand_in
from unet import flags, script, settle, train

RECIPE = {"lecture": dict(epochs=20, batch_size=512, lr=1e-2),
          "small": dict(epochs=2, batch_size=64, lr=4e-3),
          "tiny": dict(epochs=1, batch_size=32, lr=1e-2)}


# ---------------------------------------------------------------------------------------------- the question

def noisify(x0, al_t=None, target="logit"):
    """Clean images x0 (N, 1, H, W) -> ((x_t,), target (N,)): a noised image, and how much of it is image.

    alphabar is drawn evenly from (0, 1) where al_t (N,) is not given, 1e-5 away from both ends, so that its logit,
    ln(alphabar / (1 - alphabar)), is finite. The logit is what the network is asked for: from 0.99 to 0.999 is as far
    as from 0.01 to 0.001 there, all numbers are possible answers, and they are centred at 0. target "alphabar" asks
    for alphabar itself.
    """
    if al_t is None: al_t = torch.rand(len(x0), device=x0.device).clamp(1e-5, 1 - 1e-5)
    wide = al_t[:, None, None, None]
    x_t = wide.sqrt() * x0 + (1 - wide).sqrt() * torch.randn_like(x0)
    return (x_t,), al_t.logit() if target == "logit" else al_t


def alphabar(answer, target="logit"):
    """The network's answers (N, 1) or (N,) as alphabar (N,), in the range that noisify draws from."""
    return (answer.sigmoid() if target == "logit" else answer).flatten().clamp(1e-5, 1 - 1e-5)


def flat_mse(pred, target):
    """Mean squared error of tensors with equally many numbers, whatever their shapes.

    The network answers (N, 1), the target is (N,): their plain difference would be (N, N), everything against
    everything, and its mean square a number that looks like a loss.
    """
    return F.mse_loss(pred.flatten(), target.flatten())


# ---------------------------------------------------------------------------------------------- the lesson

LEVELS = (0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999)


class Constant(torch.nn.Module):
    """A network with nothing to learn: it always answers the same."""

    def __init__(self, answer):
        super().__init__()
        self.answer = torch.nn.Parameter(torch.tensor([[float(answer)]]), requires_grad=False)

    def forward(self, x):
        return self.answer.expand(len(x), 1)


def guess(model, x0, al_t=None, target="logit", seed=0):
    """-> the network's answers (N,) to noised images x0 (N, 1, H, W), the right ones (N,), and the noised images."""
    torch.manual_seed(seed)
    (x_t,), truth = noisify(x0, al_t, target)
    return run(model, x_t).flatten(), truth, x_t


def show_question(folder, x0, input_scale):
    """1. Noised images and what is asked of them: 0 is as much noise as image, 3 little noise, -3 much."""
    (x_t,), truth = noisify(x0)
    brightness = (truth.sigmoid() * input_scale ** 2 + 1 - truth.sigmoid()).sqrt()[:, None, None, None]
    grid(x_t / brightness, [f"{logit:.2f}" for logit in truth], 13,
         title="noised images and the logit of alphabar").save(folder / "question.png")


def show_baselines(x0):
    """2 and 3. What counts as good: the loss of a constant answer, twice; and the trap of shapes that do not match."""
    (_,), batch = noisify(x0[:512])
    for answer, expected in ((0.0, math.pi ** 2 / 3), (0.5, math.pi ** 2 / 3 + 0.25)):
        told, truth, _ = guess(Constant(answer), x0)
        print(f"always answering {answer:g}: loss {flat_mse(told, truth):.2f} in a pass over {len(x0)} test images, "
              f"{F.mse_loss(torch.full_like(batch, answer), batch):.2f} on a batch, {expected:.2f} expected"
              + " (the lecture's 3.5)" * (answer == 0.5))
    column = batch[:, None]                                                # the right answer, as a network shapes it
    print(f"the right answer as (N, 1) against (N,): {(column - batch).square().mean():.2f} where (N, N) differences "
          f"are averaged, {flat_mse(column, batch):.2f} flattened")


def show_guesses(folder, model, x0, target, input_scale):
    """5. Predicted beside actual alphabar: sixteen images, and all test images as dots."""
    answer, truth, x_t = guess(model, x0, target=target)
    told, actual = alphabar(answer, target), alphabar(truth, target)
    grid(x_t[:16] / 2, [f"{a:.2f} is {b:.2f}" for a, b in zip(told[:16], actual[:16])], 8, 3,
         title="predicted and actual alphabar").save(folder / f"guesses-{target}.png")
    off, middles = (told - actual).abs(), (torch.arange(20) + 0.5) / 20
    by_level = [off[(actual - middle).abs() < 0.025].mean() for middle in middles]
    beside([plot([("test images", actual, told, "dots"), ("right", [0, 1], [0, 1], "line")], f"asked for: {target}",
                 "actual alphabar", "predicted alphabar", size=(480, 480)),
            plot([("network", middles, by_level, "line"), ("best unbiased guess", middles,
                  [best(middle, x0) for middle in middles.tolist()], "line")], "mean error by noise level",
                 "actual alphabar", "mean absolute error", size=(480, 480))]).save(folder / f"scatter-{target}.png")
    return {"mae": float((told - actual).abs().mean()), "logit_mse": flat_mse(told.logit(), actual.logit()).item()}


def best(level, x0):
    """The mean absolute error of the best unbiased guess of alphabar by one who knows the image: what can be hoped for.

    In each of its n pixels x_t is Gaussian, with mean sqrt(a) x0 and variance 1 - a. That tells of a (its Fisher
    information) n / (2 (1 - a)^2) + |x0|^2 / (4 a (1 - a)), and the variance of a guess is one over that at best
    (Cramer-Rao). Near 0 one can do better, knowing that alphabar is not below 0.
    """
    told = x0[0].numel() / (2 * (1 - level) ** 2) + float(x0.square().sum((1, 2, 3)).mean()) / (4 * level * (1 - level))
    return math.sqrt(2 / (math.pi * told))


def errors(model, x0, target):
    """The mean absolute error of alphabar, and the root mean squared error of its logit, at each of the LEVELS."""
    rows = []
    for level in LEVELS:
        told = alphabar(guess(model, x0, torch.full((len(x0),), level), target)[0], target)
        off = told.logit() - math.log(level / (1 - level))
        rows.append([float((told - level).abs().mean()), float(off.square().mean().sqrt())])
    return rows


def network(args, x0, target="logit"):
    """4. This lesson's network for images x0 in -b..b, trained if it was not before -> what train returns.

    The lecture's residual network with a single output, in float32: this is regression to several decimals.
    """
    return train(args, "noise_pred", RECIPE, functools.partial(noisify, target=target), x0, loss=flat_mse, amp=False,
                 build=lambda: resnet(1), target=target)


@script
def main(argv=None):
    parser = flags("noise_pred", "Predict from an image alone how noisy it is.")
    parser.add_argument("--target", choices=("logit", "alphabar"), help="what the network is asked for (default logit)")
    parser.add_argument("--compare", action="store_true", help="both targets, on one scale")
    args = parser.parse_args(argv)
    if args.compare and args.target: parser.error("--compare trains both targets, without --target")
    settle(parser, args)
    args.data = find_data(args.data, args.data_dir)
    x0 = fashion_mnist(args.data_dir, True, args.data, args.images)[0].mul_(0.5)
    test = fashion_mnist(args.data_dir, False, args.data, args.images)[0].mul_(0.5)
    torch.manual_seed(args.seed)
    show_question(args.folder, test[:25], 0.5)
    show_baselines(test)
    table = {}
    for target in ("logit", "alphabar") if args.compare else (args.target or "logit",):
        model, origin = network(args, x0, target)
        answer, truth, _ = guess(model, test, target=target)
        record = {"what": target, "test_loss": flat_mse(answer, truth).item(), "levels": LEVELS,
                  **show_guesses(args.folder, model, test, target, 0.5), "errors": errors(model, test[:1000], target),
                  "data": args.data, **origin}
        save_results(args.folder, [record])
        table[target] = record
        print(f"asked for {target}: loss {origin['loss']:.4f} over the last 100 steps of training, "
              f"{record['test_loss']:.4f} on the test images{' (lecture: 0.075)' * (target == 'logit')}; squared error "
              f"of the logit {record['logit_mse']:.3f}, mean error of alphabar {record['mae']:.4f}; "
              f"{origin['train_seconds']:.0f} s of training on {origin['trained_on']}{stand_in(args.data)}")
    print("error at alphabar of          " + "".join(f"{level:8g}" for level in LEVELS))
    for target, record in table.items():
        for row, name in ((0, "mean, of alphabar"), (1, "root mean sq., logit")):
            print(f"{target:9}{name:21}" + "".join(f"{error[row]:8.4f}" for error in record["errors"]))
    print("the best unbiased guess, mean " + "".join(f"{best(level, test):8.4f}" for level in LEVELS))


if __name__ == "__main__":
    main()
