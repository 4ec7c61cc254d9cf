"""Where two classes have the same text, a twin is not another class; predictions count by the first index."""

import json

import pandas as pd
import pytest
import torch
import toys
from command_line import run_command as vlmrob
from folders import encode, noise
from torch import nn

import robustbench_vlm
from robustbench_vlm.backends import distinct_classes
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.engine import tied_classes
from robustbench_vlm.engine.job import Model
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.evaluation.outcome import below_chance
from robustbench_vlm.models import context_length, prompts, text_bank, zoo
from robustbench_vlm.models.clip import PromptSizes
from robustbench_vlm.threat import Threat


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
            self.layers = nn.Sequential(*layers, nn.Linear(128, classes))

    def forward(self, images):
        return self.layers(images)


MODEL = Net().eval().requires_grad_(False)
IMAGES = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = MODEL(IMAGES).argmax(1)
ORDER = [0, 1, 2, 3, 4, 2, 0]  # the classes of the model with twins


def twice(images):
    return MODEL(images)[:, ORDER]


@pytest.mark.parametrize("loss", ["margin", "dlr", "ce"])
def test_a_model_with_twins_is_attacked_as_the_model_without(tmp_path, loss):
    card = chain(tmp_path, loss)
    once = robustbench_vlm.attack(MODEL, IMAGES, LABELS, "2/255", chain=card)
    found = robustbench_vlm.attack(twice, IMAGES, LABELS, "2/255", chain=card)
    assert once.robust == found.robust
    assert 0 < sum(once.verdicts.broken_by != "") < len(LABELS)
    said = {check.name: check.sentence for check in found.checks.checks}
    assert said["tied-classes"].endswith("attacked as one: 5 as 2, 6 as 0")
    assert "tied-classes" not in [check.name for check in once.checks.checks]
    keys = ["clean_margin", "adv_margin", "adv_prediction", "adv_sha256", "broken_by"]
    pd.testing.assert_frame_equal(once.verdicts[keys], found.verdicts[keys])


def test_targets_leave_the_twin_out(tmp_path):
    card = chain(tmp_path, "targeted-dlr", targets=4)
    once, found = (
        robustbench_vlm.attack(model, IMAGES, LABELS, "16/255", chain=card) for model in (MODEL, twice)
    )
    assert once.verdicts.target.tolist() == found.verdicts.target.tolist()


def test_an_image_of_the_later_twin_is_wrong_by_its_index(tmp_path):
    later = torch.where(LABELS == 2, 5, torch.where(LABELS == 0, 6, LABELS))
    card = chain(tmp_path, "ce")
    found = robustbench_vlm.attack(twice, IMAGES, later, "16/255", chain=card).verdicts
    assert found.clean_correct.tolist() == (later == LABELS).tolist()
    assert found.clean_prediction.tolist() == LABELS.tolist()
    assert (found.clean_margin[~found.clean_correct] <= 0).all()


def test_only_columns_that_move_together_are_twins():
    logits = MODEL(IMAGES)
    assert tied_classes.found_in(MODEL, IMAGES, logits, 8) is None
    assert tied_classes.found_in(twice, IMAGES, logits[:, ORDER], 8).first == (0, 1, 2, 3, 4, 2, 0)
    one_hot = nn.functional.one_hot(LABELS, 9).float()  # classes that are never predicted are no twins
    assert tied_classes.found_in(lambda x: one_hot[: len(x)], IMAGES, one_hot, 8) is None

    def by_chance(images):  # equal on the images, not on others
        logits = MODEL(images)
        return torch.cat([logits, logits[:, :1] + (images.mean() > 0.499)], 1)

    assert tied_classes.found_in(by_chance, IMAGES, logits[:, [0, 1, 2, 3, 4, 0]], 8) is None


def test_columns_that_rounding_alone_tells_apart_are_twins(tmp_path):
    head = nn.Linear(128, 10)
    head.weight.data, head.bias.data = (
        v.repeat(2, *[1] * (v.ndim - 1)) for v in MODEL.layers[-1].parameters()
    )
    doubled = nn.Sequential(*list(MODEL.layers)[:-1], head).eval().requires_grad_(False)
    logits = doubled(IMAGES)
    ulp = torch.finfo(torch.float32).eps * logits.abs().max()
    logits[:, 5:] += 4 * ulp * torch.tensor([1.0, -1.0] * 4)[:, None]  # as another kernel might round them
    assert tied_classes.found_in(doubled, IMAGES, logits, 8).first == (0, 1, 2, 3, 4) * 2
    card = chain(tmp_path, "margin")
    once, found = (
        robustbench_vlm.attack(model, IMAGES, LABELS, "2/255", chain=card) for model in (MODEL, doubled)
    )
    assert once.robust == found.robust
    assert once.verdicts.broken_by.tolist() == found.verdicts.broken_by.tolist()


def test_differences_that_are_only_small_beside_an_offset_are_no_rounding():
    offset = MODEL(IMAGES) + 2.0**20  # in steps of 1/8, below which the five logits differ by more
    offset = offset + torch.arange(5)
    assert tied_classes.found_in(lambda x: MODEL(x) + 2.0**20, IMAGES, offset, 8) is None


def test_names_that_occur_twice_are_attacked_as_once(tmp_path):
    encoder, card = robustbench_vlm.load_model("tiny"), chain(tmp_path, "margin")
    names = ["red circle", "blue square", "green circle", "white star", "a"]
    model = encoder.classifier(names)
    labels = model(IMAGES).argmax(1)
    once = robustbench_vlm.attack(model, IMAGES, labels, "1/255", chain=card)
    assert 0 < sum(once.verdicts.broken_by != "") < len(labels)
    for more in (names, names * 2, names[:1]):
        found = robustbench_vlm.attack(encoder.classifier(names + more), IMAGES, labels, "1/255", chain=card)
        assert found.robust == once.robust
        assert found.verdicts.clean_correct.all()
    with pytest.raises(InputError, match="model: all 2 classes have the same logits for every image"):
        robustbench_vlm.attack(encoder.classifier(["red", "red"]), IMAGES, labels * 0, "1/255", chain=card)


def test_a_model_for_one_shape_keeps_its_shape_where_classes_are_tied():
    tied = tied_classes.TiedClasses((0, 0, 2))
    model = Model(MODEL, MODEL.forward, fixed=True)
    job = Chain.named("fgsm").job(Threat("linf", "1/255"), 3)
    distinct, *_ = distinct_classes.attacked(tied, model, job, [], print)
    assert distinct.fixed
    assert distinct.known is model.known
    assert distinct.view is not distinct.canonical


def chain(folder, loss, targets=0):
    """A short chain of one APGD stage, as a TOML file."""
    stage = {"name": "apgd", "attack": "apgd", "loss": loss, "targets": targets}
    stage |= {"steps": 10, "rho": 0.75, "restarts": 1}
    table = {"name": "few", "title": "few", "rows": 8, "stage": [stage]}
    toys.write_include(folder, [], [AttackCard.model_validate(table)])
    return str(folder / "attacks/few.toml")


def dataset(tmp_path, names, template="a photo of a {c}"):
    """A dataset of four images a class in shards, and its cards."""
    for label in range(len(names)):
        folder = tmp_path / "data/wds_twins/test" / f"{label}"
        folder.mkdir(parents=True)
        for i in range(4):
            (folder / f"{i}.png").write_bytes(encode(noise(10 * label + i, 32)))
    facts = {"name": "twins", "title": "Twins", "folder": "wds_twins", "n_classes": len(names)}
    facts |= {"canvas": "native", "native_px": 32, "names": names, "templates": [template], "licence": "none"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in facts.items()]
    (tmp_path / "cards/datasets").mkdir(parents=True)
    (tmp_path / "cards/datasets/twins.toml").write_text(
        "\n".join([*lines, f"size = {{ test = {4 * len(names)} }}"])
    )
    chain(tmp_path / "cards", "margin")
    return ["--include", tmp_path / "cards"]


def evaluated(tmp_path, monkeypatch, names, *more):
    line = [*dataset(tmp_path, names), "eval", "--suite", "twins", "--attack", "few", "--model", "tiny"]
    places = ["--data-root", tmp_path / "data", "--out", tmp_path / "out", "--eps", "4", "--device", "cpu"]
    code = vlmrob(monkeypatch, *line, *places, *more)
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("twins/few*.json")]
    return code, cells


def test_an_evaluation_says_which_classes_are_tied(tmp_path, monkeypatch, capsys):
    code, cells = evaluated(tmp_path, monkeypatch, ["red circle", "blue square", "Red circle"])
    assert (code, len(cells)) == (0, 1)
    assert "tied-classes" in cells[0]["outcome"]["flags"]
    assert "tied_classes" in cells[0]["config"]
    said = capsys.readouterr().err
    assert "note: twins: classes with the same text: 2 'Red circle' is 0 'red circle'" in said
    assert "class folders are matched to class names by number" in said


def test_classes_without_twins_have_no_flag(tmp_path, monkeypatch):
    _, cells = evaluated(tmp_path, monkeypatch, ["red circle", "blue square", "green circle"])
    assert "tied-classes" not in cells[0]["outcome"]["flags"]
    assert "tied_classes" not in cells[0]["config"]


LONG = (
    "small round thing that is often found in a garden or on a table near the window of a house, and it is "
)


def test_sentences_that_are_cut_are_found_and_two_that_become_one_are_refused(tmp_path, monkeypatch, capsys):
    model = zoo.load("tiny").model
    space = len(model.tokenize(["a"])[0]) - 2
    for n, cut in ((space - 1, False), (space, False), (space + 1, True), (3 * space, True)):
        text = " ".join(["red"] * n)
        assert context_length.cut_sentences(model.tokenize, ["a dog", text]) == ([text] if cut else [])
    many = " ".join(["red"] * space)
    with pytest.raises(
        InputError, match=r"class sentences .*red red a' and .*red red b': equal up to the \d+ tokens"
    ):
        text_bank.text_bank(model, text_bank.render([f"{many} a", f"{many} b"], ["{c}"]))
    differ = text_bank.text_bank(model, text_bank.render([f"a {many} a", f"b {many} b"], ["{c}"]))
    assert not torch.equal(differ[0], differ[1])
    _, cells = evaluated(tmp_path, monkeypatch, [f"a {many}", f"blue {many}"])
    assert "sentences-cut" in cells[0]["outcome"]["flags"]
    assert "note: twins: 2 sentences are cut at the context length" in capsys.readouterr().err


def test_an_exact_fit_and_what_is_cut_to_it_are_refused():
    model = zoo.load("tiny").model
    fits = " ".join(["red"] * (len(model.tokenize(["a"])[0]) - 2))
    for names in ([fits, f"{fits} blue"], [f"{fits} blue", fits], [fits, "a", fits.upper(), f"{fits} blue"]):
        with pytest.raises(InputError, match=r"equal up to the \d+ tokens"):
            text_bank.text_bank(model, text_bank.render(names, ["{c}"]))
    twins = text_bank.text_bank(model, text_bank.render([fits, fits.upper()], ["{c}"]))
    assert torch.equal(twins[0], twins[1])  # the same words are tied, not refused


def test_nothing_is_cut_where_prompts_need_room():
    model = prompts.attach(zoo.load("tiny").model, PromptSizes(0, 2, 1))
    text = "antidisestablishmentarian"  # more letters than positions, and fewer tokens
    assert context_length.cut_sentences(model.tokenize, ["a dog", text]) == []
    assert text_bank.text_bank(model, [["a dog"], [text]]).shape == (2, 64)


@pytest.mark.parametrize(
    ("begin", "end", "padding"), [([8], [9], 0), ([], [1], 1), ([], [1], 0), ([], [], 0)]
)
def test_cuts_are_found_whatever_the_padding_is(begin, end, padding):
    def tokenize(sentences):  # 10 tokens; a word is its length + 10
        rows = [[10 + len(word) for word in text.split()][: 10 - len(begin + end)] for text in sentences]
        return torch.tensor([[*begin, *row, *end, *[padding] * 10][:10] for row in rows])

    space = 10 - len(begin + end)
    for n in range(1, 3 * space):
        text = " ".join(["red"] * n)
        assert context_length.cut_sentences(tokenize, [text]) == ([text] if n > space else []), n
    many = " ".join(["red"] * space)
    context_length.require_distinct(tokenize, [[many], ["red"], [f"a {many}"]])
    with pytest.raises(InputError, match="equal up to the 10 tokens"):
        context_length.require_distinct(tokenize, [[f"{many} blue"], ["a"], [f"{many} green"]])


@pytest.mark.parametrize(
    ("correct", "n", "classes", "flagged"),
    [
        *((0, 100, 1000, True), (0, 19, 1000, False), (1, 100, 1000, False), (0, 0, 3, False)),
        *((12, 100, 10, False), (5, 100, 10, False), (2, 100, 10, True), (8, 20, 2, False), (3, 20, 2, True)),
    ],
)
def test_accuracy_below_chance(correct, n, classes, flagged):
    assert below_chance(correct, n, classes) is flagged
