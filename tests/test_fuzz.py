"""Whatever bytes a card, a shard or an image has: it is read, or refused in one line.

A short run each time; the long one (`-m slow`) goes on with fresh examples for `FUZZ_SECONDS`, ten minutes.
"""

import os
import random
import tarfile
import time
import tomllib

import pytest
from folders import encode, noise, one_shard, samples, tar_bytes
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from robustbench_vlm.cards import reader
from robustbench_vlm.data import pixels
from robustbench_vlm.data.shards import index_shards
from robustbench_vlm.errors import InputError

SECONDS = float(os.environ.get("FUZZ_SECONDS", "600"))
FORMS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
TEXTS = {
    kind: [(reader.home() / folder / f"{name}.toml").read_text() for name in reader.names(kind)]
    for kind, (folder, _) in reader.FOLDERS.items()
}
SPLICE = (
    "[[stage]]",
    "'''",
    '"""',
    "=",
    "@prompts/x",
    "@../x",
    "nan",
    "1e999",
    "-1",
    "\0",
    "[",
    "{",
    "\n",
    "{c}",
)
IMAGES = [encode(noise(1, 20), kind) for kind in ("png", "jpeg", "webp", "gif", "bmp")]


def one_line(call):
    """Call it; an error must be ours, and one line of bearable length."""
    try:
        call()
    except InputError as error:
        text = str(error)
        assert "\n" not in text
        assert "\x1b" not in text
        assert len(text) < 2000
        return text
    return ""


def damaged(content, edits):
    found = bytearray(content)
    for where, value, kind in edits:
        at = where % max(len(found), 1)
        if kind == 0 and found:
            found[at] = value
        elif kind == 1:
            found[at:at] = bytes([value]) * (1 + value % 7)
        elif kind == 2:
            del found[at : at + value * 5]
        else:
            del found[at:]
    return bytes(found)


edit = st.tuples(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from([0, 0, 0, 0, 1, 2, 3]))
edits = st.lists(edit, min_size=1, max_size=12)


def archive(seed, form):
    dice = random.Random(seed)
    members = []
    for key, image, extension, label in samples(dice.randrange(1, 4)):
        members += [(f"{key}.{extension}", image), (f"{key}.cls", str(label).encode())]
        if dice.random() < 0.5:
            members.append((f"{key}.key", f"folder/{key}.{extension}".encode()))
    dice.shuffle(members)
    return tar_bytes(members, FORMS[form])


def shards(folder, seed, form, edits):
    place = one_shard(folder, damaged(archive(seed, form), edits))

    def read():
        for sample in index_shards(place, 3).samples:
            assert 0 <= sample.label < 3
            assert sample.name.isprintable()
            sample.read()

    one_line(read)


def cuts(folder, seed, form, data):
    whole = archive(seed, form)
    count = len(index_shards(one_shard(folder, whole), 3).samples)
    with tarfile.open(folder / "0.tar") as tar:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in tar.getmembers()) + 1024
    cut = data.draw(st.integers(0, len(whole)))
    text = one_line(lambda: index_shards(one_shard(folder, whole[:cut]), 3))
    assert bool(text) == (cut < end), (cut, end)
    if cut >= end:
        assert len(index_shards(folder, 3).samples) == count


def images(folder, image, edits):
    one_line(lambda: pixels.model(damaged(image, edits), 16, "shard, key"))


def card_texts(folder, kind, which, edits, splice):
    text = TEXTS[kind][which % len(TEXTS[kind])]
    at = edits[0][0] % len(text)
    content = damaged((text[:at] + splice + text[at:]).encode(), edits[1:])
    path = folder / "card.toml"
    path.write_bytes(content)
    one_line(lambda: reader.read(kind, str(path), reader.FOLDERS[kind][1]))


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["@x", "4/255"]),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=3)),
)


def card_tables(folder, kind, which, key, value):
    table = tomllib.loads(TEXTS[kind][which % len(TEXTS[kind])])
    table[list(table)[key % len(table)]] = value
    one_line(lambda: reader.parse(table, reader.FOLDERS[kind][1], "card"))


PROPERTIES = {
    shards: given(seed=st.integers(0, 50), form=st.integers(0, 2), edits=edits),
    cuts: given(seed=st.integers(0, 50), form=st.integers(0, 2), data=st.data()),
    images: given(image=st.sampled_from(IMAGES), edits=edits),
    card_texts: given(
        kind=st.sampled_from(sorted(TEXTS)),
        which=st.integers(0, 99),
        edits=edits,
        splice=st.sampled_from(SPLICE),
    ),
    card_tables: given(
        kind=st.sampled_from(sorted(TEXTS)), which=st.integers(0, 99), key=st.integers(0, 99), value=values
    ),
}
CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


@pytest.mark.parametrize("property_", PROPERTIES, ids=lambda f: f.__name__)
def test_a_short_run(property_, tmp_path):
    options = settings(max_examples=60, deadline=None, suppress_health_check=CHECKS)
    options(PROPERTIES[property_](property_))(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_long_run(tmp_path):
    """Fresh examples of every property in turn until the time is over."""
    fresh = {"deadline": None, "database": None, "suppress_health_check": CHECKS}
    until, rounds = time.monotonic() + SECONDS, 0
    while time.monotonic() < until:
        for property_, drawn in PROPERTIES.items():
            options = settings(max_examples=500, phases=[Phase.generate, Phase.shrink], **fresh)
            options(drawn(property_))(tmp_path)
        rounds += 1
    assert rounds
    (tmp_path / "examples.txt").write_text(f"{rounds * 500 * len(PROPERTIES)}\n")
