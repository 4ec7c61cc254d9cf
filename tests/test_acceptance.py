"""The ten acceptance tests of the attacks, and where each is held.

 1. Same start noise, same verdicts and last misclassified images as the reference: `parity/test_parity_apgd`,
    `parity/test_parity_square` (proposals, queries and best points), `parity/test_parity_fab`, and
    `parity/test_parity_chain` (what broke each image in the whole chain); full budgets: `make parity-full`.
    Without the reference: APGD and Square written down plainly here, FAB in `test_fab_plainly`.
 2. Rows in use, refills, permutations and shards: `test_engine_invariance` (four numbers of rows in three
    orders, about half of the images broken), `test_evaluate` (live rows, order on disk, more from fewer).
 3. Checkpoints, the first window counted from zero, at or below rho, the previous iterate kept on restart:
    `test_attack_parts` by hand, and the plain algorithm here.
 4. Projections against bisection in float64: `test_attack_parts`.
 5. Square: sides of windows in `test_attack_parts`; passing over and looking ahead here.
 6. Passes of an image that survives: here, with full budgets; against the reference's own count in
    `parity/test_parity_chain`.
 7. Few and many classes, the shipped chain: here; what stands in is written into the cell: `test_evaluate`.
 8. Kills and resumes: `test_kills` (SIGKILL at random moments), `test_engine_invariance` (nothing of another
    radius, norm, seed, shape, model, label or chain is taken over).
 9. Models that must trip a check: NaN in `test_attacks` and `test_evaluate`, zero and missing gradients in
    `test_attacks`, constant predictors in `test_evaluate`; the rest with the checks themselves.
10. Seeds of each side's own: `parity/test_parity_chain`; over three seeds at full budgets `make parity-full`.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction

import pytest
import torch
from attack_models import blobs, classifier, findings

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.square import Square, square
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.engine import canonical, losses, scheduler, trajectories
from robustbench_vlm.engine.interface import Rows
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.threat import Threat

ROWS = 16
THREATS = {"linf": Threat("linf", Fraction(4, 255)), "l2": Threat("l2", Fraction(1, 4))}
norms = pytest.mark.parametrize("norm", THREATS)


def data(n):
    return classifier(10), *blobs(n, 10, seed=4)


# --- 1 and 3 ----------------------------------------------------------------------------------------------


def seen(model, image, label, target, loss):
    """Logits, loss and gradient of one image, in the fixed shape."""
    x = image.expand(ROWS, *image.shape).clone().requires_grad_()
    logits = model(x)
    value = losses.LOSSES[loss](logits, label.expand(ROWS), target.expand(ROWS))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return logits[0].detach(), value[0].detach(), gradient[0]


def plainly(model, image, label, target, loss, start, threat, steps):
    """APGD on one image as a single loop: every point that it evaluates."""
    eps, linf = float(threat.eps), threat.norm == "linf"

    def ball(x):
        if linf:
            return torch.min(torch.max(x, image - eps), image + eps).clamp(0, 1)
        delta = x - image
        return (image + delta / (delta.norm() + 1e-12) * min(eps, float(delta.norm()))).clamp(0, 1)

    x = before = best = start
    _, value, gradient = seen(model, x, label, target, loss)
    best_value, best_gradient, at_check, last = value, gradient, value, torch.tensor(0.0)
    size, reduced, count, rises, points = 2 * eps, True, 0, 0, [x]
    window = max(int(0.22 * steps), 1)
    for i in range(steps):
        move, before = x - before, x
        aim = gradient.sign() if linf else gradient / (gradient.norm() + 1e-12)
        weight = 1.0 if i == 0 else 0.75
        x = ball(x + weight * (ball(x + size * aim) - x) + (1 - weight) * move)
        _, value, gradient = seen(model, x, label, target, loss)
        points.append(x)
        if value > best_value:
            best, best_value, best_gradient = x, value, gradient
        rises, count, last = rises + bool(value > last), count + 1, value
        if count == window:
            stale = not reduced and bool(at_check >= best_value)
            reduced, at_check = rises <= 0.75 * window or stale, best_value
            if reduced:
                size, x, gradient = size / 2, best, best_gradient
            window, count, rises = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)), 0, 0
    return points


@norms
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted-dlr"])
@pytest.mark.parametrize("steps", [19, 40])
def test_apgd_is_the_algorithm_written_down_plainly(norm, loss, steps):
    """19 steps: a first window of four, in which three rises are exactly at rho."""
    model, images, labels = data(ROWS)
    threat, targets = THREATS[norm], (labels + 1) % 10
    rows = Rows(images, labels, targets, Keyed(tuple(f"n{i}" for i in range(ROWS))), (0,) * ROWS, stop="last")
    attack = Apgd(loss, steps, 0.75, 1, 9 if loss == "targeted-dlr" else 0)
    state, iterates = attack.start(rows, threat), []
    for _ in range(steps + 1):
        state = attack.step(state, Oracle(model))
        iterates.append(state.x.clone())
    assert bool(state.done.all())
    halvings = (2 * float(threat.eps) / state.size).log2()
    assert halvings.min() < halvings.max(), "rows part ways"
    for i in range(8):
        points = plainly(model, images[i], labels[i], targets[i], loss, iterates[0][i], threat, steps)
        for number, (point, ours) in enumerate(zip(points, iterates, strict=True)):
            if norm == "linf":
                assert torch.equal(point, ours[i]), f"image {i}, evaluation {number}"
            else:
                assert torch.allclose(point, ours[i], atol=2e-4), f"image {i}, evaluation {number}"


def sizes_of(values, steps):
    """APGD on one row whose loss takes these values: the step after each evaluation, in radii."""
    image, label = torch.full((1, 3, 2, 2), 0.5), torch.tensor([0])
    attack, sizes = Apgd("margin", steps, 0.75, 1, 0), []
    state = attack.start(Rows(image, label, label - 1, Keyed(("n",)), (0,), "last"), THREATS["linf"])
    for value in values:

        def classify(x, value=value):
            score = x.flatten(1).sum(1) - x.detach().flatten(1).sum(1) + value
            return torch.stack([torch.zeros_like(score), score], dim=1)

        state = attack.step(state, Oracle(classify))
        sizes.append(round(float(state.size / float(THREATS["linf"].eps)), 3))
    return sizes


def test_the_first_checkpoint_never_halves_for_want_of_progress():
    """Ten steps: windows of 2, 1, 1, ... moves. Nothing comes near x_0, but every move is a rise (from 0)."""
    assert sizes_of([5, 1, 2, 3, 4, 4.5], 10) == [2, 2, 2, 2, 1, 1]
    # having halved for that reason, the next checkpoint does not, the one after does
    assert sizes_of([5, 1, 2, 3, 4, 4.5, 4.6, 4.7], 10) == [2, 2, 2, 2, 1, 1, 0.5, 0.5]


@norms
def test_the_last_misclassified_iterate_is_returned_and_a_success_is_kept(norm):
    """Rows whose model is wrong now and then: never, at first, in the middle, at last, twice."""
    steps = 9
    table = torch.zeros(5, steps + 1, dtype=torch.bool)
    table[1, 0] = table[2, 4] = table[3, steps] = table[4, 2] = table[4, 6] = True
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(5, dtype=torch.int64)
    rows = Rows(images, labels, labels - 1, Keyed(tuple("abcde")), (0,) * 5, "last")
    attack = Apgd("ce", steps, 0.75, 1, 0)
    state, last = attack.start(rows, THREATS[norm]), {}
    for number in range(steps + 1):

        def classify(x, wrong=table[:, number]):
            score = x.flatten(1).sum(1) - x.detach().flatten(1).sum(1) + torch.where(wrong, 1.0, -1.0)
            return torch.stack([torch.zeros_like(score), score], dim=1)

        state = attack.step(state, Oracle(classify))
        for row in range(5):
            if table[row, number] or not table[row, :number].any():
                last[row] = state.x[row].clone()
            assert torch.equal(state.adv[row], last[row])
        assert torch.equal(state.broken, table[:, : number + 1].any(1))
    assert state.first.tolist() == [-1, 0, 4, steps, 2]


@norms
@pytest.mark.parametrize(
    "attack", [Apgd("targeted-dlr", 3, 0.75, 1, 4), Fab(2, 4, 1, 0.1, 1.05, 0.9)], ids=["apgd-t", "fab-t"]
)
def test_targets_are_tried_in_the_order_of_the_clean_logits(norm, attack):
    """What was spent says which target broke the image: all before it ran to their end."""
    model, images, labels = data(150)
    logits, met = canonical.logits(model, images, ROWS), set()
    threat = {"linf": Threat("linf", Fraction(6, 255)), "l2": Threat("l2", Fraction(3, 10))}[norm]
    each = 2 * attack.steps if isinstance(attack, Fab) else attack.steps + 1
    for i, f in enumerate(findings(model, images, labels, attack, threat)):
        if not f.broken or f.forwards == 0:
            continue
        others = [k for k in logits[i].argsort(descending=True).tolist() if k != int(labels[i])]
        place = others.index(f.target)
        assert f.forwards == place * each + (2 if isinstance(attack, Fab) else 1) * (f.iteration + 1)
        met.add(place)
    assert met >= {0, 1}, "more than the most likely class breaks something"


def test_trajectories_come_target_by_target_each_with_noise_of_its_own_name():
    """An image that survives in a row of its own meets all of them in order."""
    model, images, labels = data(ROWS)
    labels, met = model(images).argmax(1), []

    class Told(Apgd):
        def start(self, rows, threat):
            met.extend(zip(rows.noise.names, rows.targets.tolist(), rows.restarts, strict=True))
            return super().start(rows, threat)

    tiny = Threat("linf", Fraction(1, 25500))
    attack = Told("targeted-dlr", 1, 0.75, 2, 3)
    findings(model, images[:1], labels[:1], attack, tiny, batch_size=1, keys=["a"], seed=7, stage="s")
    ranked = canonical.logits(model, images[:1], ROWS)[0].argsort(descending=True).tolist()[1:4]
    assert met == [(f"7/a/s/{target}/{r}", target, r) for target in ranked for r in (0, 1)]


@norms
def test_stages_that_share_rows_find_what_each_finds_alone(norm):
    """Each row with the loss of its own stage, whatever stands beside it."""
    model, images, labels = data(40)
    stages = [("ce", Apgd("ce", 3, 0.75, 1, 0)), ("t", Apgd("targeted-dlr", 3, 0.75, 1, 3))]
    keys, shared = [f"blobs/test/{i}" for i in range(40)], {}
    job = Job(stages, THREATS[norm], ROWS, 10)
    block = ImageBlock(images, labels, keys)
    scheduler.run(Model(model), job, [block], lambda f: shared.__setitem__((f.stage, f.key), f))
    left, met = list(range(40)), 0
    for name, attack in stages:
        alone = findings(model, images, labels, attack, THREATS[norm], stage=name, order=left)
        for f in alone:
            other = shared[name, f.key]
            assert torch.equal(f.adv, other.adv)
            assert {**vars(f), "adv": None} == {**vars(other), "adv": None}
        met += len(alone)
        left = [keys.index(f.key) for f in alone if not f.broken]
    assert met == len(shared) > 50


def test_fab_returns_the_image_itself_where_it_finds_nothing():
    """A point brought into the ball may be wrong by luck; the reference does not count it, nor do we."""
    model, images, labels = data(40)
    attack, ball = Fab(1, 1, 1, 0.1, 1.05, 0.9), THREATS["linf"]
    missed = [(i, f) for i, f in enumerate(findings(model, images, labels, attack, ball)) if not f.broken]
    assert missed
    assert all(torch.equal(f.adv, images[i]) for i, f in missed)


# --- 5 ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded(Square):
    """Square that writes down every best point of every image, by the number of its proposal."""

    log: dict = field(default_factory=dict, compare=False, hash=False)

    def step(self, state, oracle):
        ended = state.done | state.broken | state.nonfinite
        margins = state.best_margin.clone()
        after = super().step(state, oracle)
        for row in ((after.best_margin != margins) & ~ended).nonzero().flatten().tolist():
            image = after.images[row].numpy().tobytes()
            self.log.setdefault(image, {})[int(after.iteration[row]) - 1] = after.best[row].clone()
        return after


def one_by_one(model, image, label, name, threat, queries):
    """The best points of Square on one image, one proposal after the other; also how many changed nothing."""
    rows = Rows(image[None], label[None], label[None] - label - 1, Keyed((name,)), (0,))
    attack, eps = Square(queries, 0.8, 1), float(threat.eps)
    state = attack.start(rows, threat)
    sides = square.window_sides(queries, 0.8, *image.shape[1:], threat.norm)
    best, margin, found, idle = None, torch.inf, {}, 0
    for query in range(queries + 1):
        if query == 0:
            x = state.x[0]
        else:
            proposal, side = state.proposals[0, query], sides[query - 1]
            if threat.norm == "linf":
                top, left, *signs = proposal.tolist()
                x = best.clone()
                for channel, sign in enumerate(signs):
                    x[channel, top : top + side, left : left + side] += 2 * eps * sign
                x = torch.min(torch.max(x, image - eps), image + eps).clamp(0, 1)
            else:
                x = square.l2_proposal(
                    best[None], image[None], proposal[None].long(), torch.tensor([side]), eps
                )[0]
            idle += threat.norm == "linf" and torch.equal(x, best)
        now = float(losses.correct_margin(model(x.expand(ROWS, *x.shape))[:1], label[None]))
        if now < margin or now <= 0:
            best, margin, found[query] = x, now, x
        if now <= 0:
            break
    return found, idle, query + 1


@norms
def test_square_passing_over_and_looking_ahead_find_what_one_proposal_at_a_time_finds(norm):
    model, images, labels = data(12)
    threat, queries = Threat(norm, THREATS[norm].eps * 3), 150
    labels = model(images).argmax(1)
    plain = [
        one_by_one(model, images[i], labels[i], f"0/blobs/test/{i}/s/-1/0", threat, queries)
        for i in range(12)
    ]
    broken = sum(spent <= queries for _, _, spent in plain)
    assert 2 <= broken <= 10
    assert norm == "l2" or sum(idle for _, idle, _ in plain) > 0
    for live in (3, ROWS):  # 16 rows for 12 images: lookahead groups from the first query on
        attack = Recorded(queries, 0.8, 1)
        found = findings(model, images, labels, attack, threat, batch_size=live)
        for i, (points, idle, spent) in enumerate(plain):
            ours = attack.log[images[i].numpy().tobytes()]
            assert ours.keys() == points.keys()
            assert found[i].forwards == spent - idle
            for query, point in points.items():
                assert (
                    torch.equal(ours[query], point)
                    if norm == "linf"
                    else torch.allclose(ours[query], point, atol=1e-6)
                )


# --- 6 and 7 ----------------------------------------------------------------------------------------------


def shipped():
    """The stages of the packaged AutoAttack."""
    card = reader.read("attacks", "autoattack", AttackCard)
    return [(s.name, plugins.build("attacks", s.attack, s.fields, card.name)) for s in card.stage]


def test_an_image_that_survives_the_shipped_chain_costs_what_is_written_down():
    model, images, labels = data(ROWS)
    index = int((model(images).argmax(1) == labels).nonzero()[0])
    image, label = images[[index]], labels[[index]]
    tiny, spent = Threat("linf", Fraction(1, 25500)), {}
    for group in trajectories.groups(shipped()):
        scheduler.run(
            Model(model), Job(group, tiny, ROWS, 10), [ImageBlock(image, label, ["a"])],
            lambda f: spent.__setitem__(f.stage, (f.broken, f.forwards, f.backwards)),
        )  # fmt: skip
    _, idle, queries = one_by_one(model, image[0], label[0], "0/a/square/-1/0", tiny, 5000)
    assert queries == 5001
    assert idle > 50
    assert spent == {
        "apgd-ce": (False, 101, 101),
        "apgd-t": (False, 909, 909),
        "fab-t": (False, 1800, 900),
        "square": (False, 5001 - idle, 0),
    }


@pytest.mark.parametrize("n_classes", [2, 3, 4, 5, 8, 10, 1000])
def test_the_shipped_chain_runs_with_any_number_of_classes_and_omits_nothing(n_classes):
    """With fewer steps, at a radius where images survive to the end and at one where some break."""
    make = torch.Generator().manual_seed(0)
    head, images = torch.randn(48, n_classes, generator=make), torch.rand(12, 3, 4, 4, generator=make)

    def model(x):
        return (x - 0.5).flatten(1) @ head

    labels, said = model(images).argmax(1), []
    chain = []
    for name, attack in shipped():
        chain.append((name, replace(attack, **({"queries": 6} if name == "square" else {"steps": 3}))))
        said += [f"{name}: {text}" for text in attack.substitutions(n_classes)]
    order = [name for name, _ in chain]
    for eps, all_survive in ((Fraction(1, 2550000), True), (Fraction(1, 30), False)):
        left, entered = list(range(12)), dict.fromkeys(order, 0)
        for group in trajectories.groups(chain):
            found = []
            block = ImageBlock(images[left], labels[left], [str(i) for i in left])
            job = Job(group, Threat("linf", eps), ROWS, n_classes)
            scheduler.run(Model(model), job, [block], found.append)
            for f in found:
                entered[f.stage] += 1
                assert not f.error
                _, attack = chain[order.index(f.stage)]
                assert f.broken or (f.backwards == attack.cost(n_classes)[1])
            lost = {int(f.key) for f in found if f.broken}
            left = [i for i in left if i not in lost]
        assert (len(left) == 12) == all_survive
        assert not all_survive or set(entered.values()) == {12}
    targets = min(9, n_classes - 1)
    wanted = [] if n_classes >= 10 else [f"{name}: targets 9 -> {targets}" for name in ("apgd-t", "fab-t")]
    assert all(any(text.startswith(w) or w.split(": ")[1] in text for text in said) for w in wanted)
    assert bool(said) == (n_classes < 10)
    assert any("undefined" in text for text in said) == (n_classes < 4)


# --- 9 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("attack", [Apgd("ce", 3, 0.75, 1, 0), Fab(3, 2, 1, 0.1, 1.05, 0.9)])
def test_a_gradient_that_is_not_a_number_is_an_error_though_all_logits_are_fine(norm, attack):
    """The sign of NaN is no step: without a word such a model would be perfectly robust."""
    base, images, labels = data(6)

    def model(x):
        return base(x) + 0 * (x - x.detach()).abs().sqrt().flatten(1).sum(1, keepdim=True)

    labels = base(images).argmax(1)
    for f in findings(model, images, labels, attack, Threat(norm, Fraction(1, 25500))):
        assert "not finite" in f.error
        assert not f.broken
