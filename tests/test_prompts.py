"""Learned prompts: what they do to both towers, that they alone are trained, and that a folder keeps them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812 - the customary name
from worlds import INNER, tilted

from robustbench_vlm.cards import reader
from robustbench_vlm.data import loader
from robustbench_vlm.errors import CardError, InputError, WeightsError
from robustbench_vlm.models import checkpoint_card, openclip, prompts, zoo
from robustbench_vlm.models.clip import PromptSizes
from robustbench_vlm.models.text_bank import text_bank
from robustbench_vlm.training import loop
from robustbench_vlm.training.prepare import prepare
from robustbench_vlm.training.state import resumed
from robustbench_vlm.training.step import train_step

CPU = torch.device("cpu")
SIZES = {"image": 3, "text": 2, "depth": 2}
PROMPTS = {**SIZES, "init": "a photo"}
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SENTENCES = ["a red square", "a blue picture of something"]


def prompted(depth=2, **changes):
    sizes = PromptSizes(**(SIZES | {"depth": depth} | changes))
    model = prompts.attach(tilted("vlmrob-tiny", 1), sizes, "a photo")
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in (model.visual, model.language):
            for value in prompts.state(part).values():
                value += 0.1 * torch.randn(value.shape, generator=noise)
    return model


def image_by_hand(model, plain):
    """The image tower layer by layer, on the weights of a model without prompts."""
    visual, rows = plain.visual, list(prompts.state(model.visual).values())
    x = visual._embeds((X - plain.mean) / plain.std)
    patches = x.shape[1]
    x = torch.cat([x, rows[0].expand(len(x), -1, -1)], 1)
    for index, block in enumerate(visual.transformer.resblocks):
        if 0 < index < len(rows):
            x = torch.cat([x[:, :patches], rows[index].expand(len(x), -1, -1)], 1)
        x = block(x)
    return visual.ln_post(x)[:, 0] @ visual.proj


def text_by_hand(model, plain):
    """The text tower layer by layer: start token, prompts, sentence."""
    net, rows = plain.language.net, list(prompts.state(model.language).values())
    rows = sorted(rows, key=lambda row: row is not model.language.net.token_embedding.prompt)
    tokens = plain.tokenize(SENTENCES)
    x, n = net.token_embedding(tokens), rows[0].shape[0]
    x = torch.cat([x[:, :1], rows[0].expand(len(x), -1, -1), x[:, 1:-n]], 1) + net.positional_embedding
    for index, block in enumerate(net.transformer.resblocks):
        if 0 < index < len(rows):
            x = torch.cat([x[:, :1], rows[index].expand(len(x), -1, -1), x[:, 1 + n :]], 1)
        x = block(x, attn_mask=net.attn_mask)
    end = tokens.argmax(1) + n
    return F.normalize(net.ln_final(x)[torch.arange(len(x)), end] @ net.text_projection, dim=-1)


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_prompts_enter_where_they_are_meant_to(depth):
    model, plain = prompted(depth), tilted("vlmrob-tiny", 1)
    with torch.no_grad():
        torch.testing.assert_close(model(X), image_by_hand(model, plain))
        torch.testing.assert_close(model.text(SENTENCES), text_by_hand(model, plain))
        assert not torch.allclose(model(X), plain(X), atol=1e-3)
        assert not torch.allclose(model.text(SENTENCES), plain.text(SENTENCES), atol=1e-3)
    layers = len(plain.visual.transformer.resblocks)
    assert len(prompts.state(model.visual)) == min(depth, layers)


def test_prompts_alone_require_gradients_and_get_them():
    model = prompted()
    asked = {n for n, p in model.named_parameters() if p.requires_grad}
    assert asked == {n for n, _ in model.named_parameters() if n.endswith(".prompt")}
    tokens = model.tokenize(SENTENCES)
    (F.normalize(model(X), dim=-1) @ prompts.bank(model, tokens).T)[:, 0].sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == (name in asked), name


def test_text_prompts_start_from_words_and_the_rest_from_noise():
    model = tilted("vlmrob-tiny", 1)
    words = model.tokenize(["a photo"])[0, 1:3]
    model = prompts.attach(model, PromptSizes(2, 4, 2), "a photo")
    table = model.language.net.token_embedding
    assert torch.equal(table.prompt[:2], table.weight[words])
    assert table.prompt[2:].std().item() == pytest.approx(prompts.SPREAD, rel=0.3)
    again = tilted("vlmrob-tiny", 1)
    torch.rand(3)
    again = prompts.attach(again, PromptSizes(2, 4, 2), "a photo")
    assert torch.equal(again.language.net.token_embedding.prompt, table.prompt)


def test_one_tower_can_be_left_alone():
    plain = tilted("vlmrob-tiny", 1)
    with torch.no_grad():
        image = prompted(text=0)
        assert torch.equal(image.text(SENTENCES), plain.text(SENTENCES))
        text = prompted(image=0)
        assert torch.equal(text(X), plain(X))


def test_patch_tokens_come_without_the_prompts():
    model = prompted()
    with torch.no_grad():
        rows = model.tokens(X)
        assert rows.shape == (2, 17, 64)
        torch.testing.assert_close(rows[:, 0], model(X))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    reader.include([world.cards])
    folder = tmp_path_factory.mktemp("apd")
    optim = {"lr": 1e-2, "steps": 3, "batch_size": 8}
    recipe = world.recipe(
        "apd", "clean", prompts=PROMPTS, optim=optim, probe={"every": 3, "n": 8, "steps": 1}
    )
    loop.run(recipe, folder, world.data, CPU, lambda line: None)
    reader.include([])
    return folder


def test_training_changes_the_prompts_alone_and_the_folder_keeps_both_towers(world, trained):
    before = load_file(f"{world.student}/image.safetensors")
    after = load_file(trained / "image.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name in after if name not in before} == {
        f"transformer.resblocks.{i}.prompt" for i in range(2)
    }
    loaded, start = zoo.load(str(trained)), zoo.load(world.student)
    assert loaded.card.prompts.model_dump() == {"image": 3, "text": 2, "depth": 2}
    assert loaded.card.text_from == world.student
    assert loaded.card.text_sha256 != start.card.text_sha256
    own = dict(start.model.language.named_parameters())
    for name, value in loaded.model.language.named_parameters():
        assert name.endswith(".prompt") or torch.equal(value, own[name])
    groups = [[sentence] for sentence in SENTENCES]
    assert not torch.allclose(text_bank(loaded.model, groups), text_bank(start.model, groups), atol=1e-4)
    assert not loaded.model.untrained_words(["a photo of a red square"])


def test_a_saved_step_has_the_prompts_of_that_step(world, tmp_path):
    reader.include([world.cards])
    optim = {"lr": 1e-2, "steps": 2, "batch_size": 8}
    recipe = world.recipe("tecoa", prompts=PROMPTS, optim=optim, checkpoint_every=1)
    loop.run(recipe, tmp_path, world.data, CPU, lambda line: None)
    reader.include([])
    path = tmp_path / "checkpoints" / "step_0000001.safetensors"
    saved, last, middle = load_file(path), zoo.load(str(tmp_path)), zoo.load(str(path))
    learned = prompts.state(middle.model.language)
    assert learned.keys() == prompts.state(last.model.language).keys()
    for name, value in learned.items():
        assert torch.equal(value, saved[f"prompts.student.text.{name}"])
    assert middle.card.text_sha256 != last.card.text_sha256


def test_the_teacher_of_apd_learns_along(toy, tmp_path):
    recipe = toy.recipe("apd", "clean", prompts=PROMPTS)
    setup = prepare(recipe, toy.data, CPU)
    state = resumed(setup, tmp_path)
    names = setup.parameters()
    roles = {name.split(".")[1] for name in names if name.startswith("prompts.")}
    assert roles == {"student", "clean"}
    before = {name: value.detach().clone() for name, value in names.items()}
    bank = setup.current_roles().text["student"].detach().clone()
    train_step(setup, state, next(loader.batches(setup.split, 8, 3, 0, 1, 32)))
    assert all(not torch.equal(before[name], value) for name, value in setup.parameters().items())
    assert not torch.equal(setup.current_roles().text["student"], bank)


def test_a_folder_whose_prompts_were_changed_is_refused(trained, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in trained.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    rows = load_file(copy / "prompts.safetensors")
    name = sorted(rows)[0]
    save_file({**rows, name: rows[name] + 1}, copy / "prompts.safetensors")
    with pytest.raises(WeightsError, match="text fingerprint is"):
        zoo.load(str(copy))
    save_file({**rows, name: rows[name][:1].clone()}, copy / "prompts.safetensors")
    with pytest.raises(WeightsError, match=r"prompt '.*' has shape \(1, "):
        zoo.load(str(copy))
    save_file({k: v for k, v in rows.items() if k != name}, copy / "prompts.safetensors")
    with pytest.raises(WeightsError, match="in one of file and card only"):
        zoo.load(str(copy))


def test_what_cannot_have_prompts_is_refused_in_one_line(toy, trained):
    model = prompted()
    with pytest.raises(WeightsError, match="has prompts already"):
        prompts.attach(model, PromptSizes(1, 1, 1))
    with pytest.raises(WeightsError, match="leaves no space for 2 prompt tokens"):
        model.tokenize(["a very long sentence " * 10])
    residual = openclip.build("RN50")
    with pytest.raises(WeightsError, match="RN50 has no class token") as error:
        prompts.attach(residual, PromptSizes(1, 0, 1))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="has learned prompts"):
        prepare(toy.recipe("tecoa", student=str(trained)), toy.data, CPU)


REFUSED = {
    "two ways": (("tecoa",), {"prompts": PROMPTS, "lora": {"r": 2}}, "two ways to train"),
    "no token": (("tecoa",), {"prompts": {"image": 0, "text": 0}}, "without a token"),
    "apd without": (("apd", "clean"), {}, "no \\[prompts\\] table"),
    "text unused": (("fare", "anchor"), {"prompts": PROMPTS}, "prompts.text = 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_with_prompts_that_make_no_sense_is_one_line(toy, case):
    (defense, *roles), changes, expected = REFUSED[case]
    with pytest.raises(CardError, match=expected) as error:
        prepare(toy.recipe(defense, *roles, inner=INNER, **changes), toy.data, CPU)
    assert "\n" not in str(error.value)


def test_any_defense_can_train_prompts(toy, tmp_path):
    recipe = toy.recipe("tecoa", prompts=PROMPTS, optim={"lr": 1e-2, "steps": 1, "batch_size": 8})
    loop.run(recipe, tmp_path, toy.data, CPU, lambda line: None)
    assert checkpoint_card.read_card(tmp_path).prompts.text == 2
    assert len(recipe.fingerprint) == 64
    assert recipe.fingerprint != toy.recipe("tecoa").fingerprint
