"""Protocols as data, and what they take from a folder of COCO's shape."""

import json

import pytest
import torch
from PIL import Image

from reflow.errors import UserError
from reflow.evaluation.comparison import asked, protocol


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Seven images, of which one has no caption; captions of an image out of order, as COCO's are."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "annotations").mkdir()
    (folder / "val2017").mkdir()
    numbers = [42, 7, 99, 3, 58, 21, 70]
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in numbers]
    notes = [{"id": 1000 - 10 * n + k, "image_id": n, "caption": f" caption {k} of\n{n} "} for n in numbers[:-1] for k in (2, 0, 1)]
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": notes}))
    for n in numbers:
        Image.new("RGB", (40 + n, 60), (n, 2 * n, 255 - n)).save(folder / "val2017" / f"{n:012d}.jpg")
    return folder


def of(name="coco2017-5k", **changes):
    found = protocol.load(name)
    captions = found.captions.model_copy(update={k: v for k, v in changes.items() if k in ("choice", "order", "count", "seed")})
    images = found.images.model_copy(update={k: v for k, v in changes.items() if k in ("all", "folder")})
    return found.model_copy(update={"captions": captions, "images": images, "limit": changes.get("limit", 0)})


def test_what_ships_says_what_changes_the_number():
    assert protocol.names() == ["coco2014-10k", "coco2014-30k", "coco2017-5k", "geneval", "paired", "prompts"]
    for name in protocol.names():
        found = protocol.load(name)
        assert found.name == name and found.about and found.source
        assert found.captions.count == {"coco2014-10k": 10_000, "coco2014-30k": 30_000, "coco2017-5k": 5_000}.get(name, 0)


def test_every_key_that_changes_a_number_changes_the_digest():
    whole = protocol.load("coco2014-30k")
    told = whole.model_dump(mode="json")
    changes = {("captions", "count"): 7, ("captions", "choice"): "first", ("captions", "order"): "file", ("captions", "seed"): 3,
               ("images", "size"): 128, ("images", "resize"): "area", ("images", "all"): False, ("samples", "seed"): 9,
               ("samples", "per_prompt"): 2, ("limit",): 5}  # fmt: skip
    digests = {whole.digest}
    for place, value in changes.items():
        changed = json.loads(json.dumps(told))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        digests.add(protocol.Protocol.model_validate_json(json.dumps(changed)).digest)
    assert len(digests) == 1 + len(changes)
    assert protocol.Protocol.model_validate_json(json.dumps({**told, "about": "other words"})).digest == whole.digest


def test_a_limited_or_changed_protocol_is_never_called_by_its_name_alone():
    whole = protocol.load("coco2017-5k")
    assert whole.changed(limit=100).title == "coco2017-5k, first 100"
    assert whole.changed(per_prompt=2).title == "coco2017-5k (changed)" and whole.changed(per_prompt=1).title == "coco2017-5k"
    assert whole.changed(limit=None, per_prompt=None) is whole
    assert protocol.load("prompts").changed(per_prompt=2).title == "prompts"


def test_protocols_of_ones_own(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text((protocol.FOLDER / "coco2017-5k.toml").read_text().replace("count = 5000", "count = 3"))
    assert protocol.load(str(mine)).captions.count == 3 and protocol.load(str(mine)).name == "mine"
    mine.write_text(mine.read_text().replace("count = 3", "cuont = 3"))
    with pytest.raises(UserError, match=r"key captions\.cuont: extra inputs are not permitted"):
        protocol.load(str(mine))
    mine.write_text("captions = [")
    with pytest.raises(UserError, match="no TOML file"):
        protocol.load(str(mine))
    with pytest.raises(UserError, match=r"did you mean coco2017-5k\?"):
        protocol.load("coco2017")
    with pytest.raises(UserError, match="there is no such file"):
        protocol.load(str(tmp_path / "none.toml"))


def test_captions_in_the_protocols_order(coco):
    found = asked.read(of(count=6), coco)
    assert found.prompts == tuple(f"caption 0 of {n}" for n in (3, 7, 21, 42, 58, 99))  # by image, the caption of the lowest id
    assert [path.name for path in found.images] == [f"{n:012d}.jpg" for n in (3, 7, 21, 42, 58, 99)]
    in_file = asked.read(of(count=6, order="file"), coco)
    assert [path.name[-6:-4] for path in in_file.images] == ["42", "07", "99", "03", "58", "21"]
    drawn = asked.read(of(count=4, choice="seeded", order="seeded"), coco)
    assert drawn == asked.read(of(count=4, choice="seeded", order="seeded"), coco)
    assert all(path.stem.endswith(prompt.rsplit(" ")[-1]) for prompt, path in zip(drawn.prompts, drawn.images))
    other = asked.read(of(count=4, choice="seeded", order="seeded", seed=1), coco)
    assert drawn.digest != other.digest and len(drawn.prompts) == 4
    assert asked.read(of(limit=2), coco).prompts == found.prompts[:2]
    assert len(asked.read(of(count=2, all=True), coco).images) == 7


def test_what_is_missing_is_a_sentence(coco, tmp_path):
    with pytest.raises(UserError, match="captions of 6 images, and the protocol coco2017-5k takes 5000.*--limit 6"):
        asked.read(of(), coco)
    with pytest.raises(UserError, match="needs COCO"):
        asked.read(of(), None)
    with pytest.raises(UserError, match="has no annotations/captions_val2014.json"):
        asked.read(protocol.load("coco2014-10k"), coco)
    with pytest.raises(UserError, match="real images of the protocol coco2017-5k are not there, the first is"):
        asked.read(of(count=6, folder="elsewhere"), coco)
    (tmp_path / "annotations").mkdir()
    for content in ("{", '{"images": [{}]}', "[]", '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": "x"}]}'):
        (tmp_path / "annotations" / "captions_val2017.json").write_text(content)
        with pytest.raises(UserError, match="no captions file of COCO"):
            asked.read(of(), tmp_path)
    with pytest.raises(UserError, match="needs prompts"):
        asked.read(protocol.load("prompts"), None)
    with pytest.raises(UserError, match="there is no such file"):
        asked.read(protocol.load("prompts"), tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no UTF-8 text"):
        asked.read(protocol.load("prompts"), tmp_path / "bytes.txt")


def test_prompts_of_a_text_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  two dogs \r\n")
    assert asked.read(protocol.load("prompts"), tmp_path / "prompts.txt").prompts == ("a cat", "two dogs")
    assert asked.read(protocol.load("paired"), None, ("own",)).prompts == ("own",)


def test_what_a_detector_must_find(tmp_path):
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"},
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}], "prompt": "a photo of two dogs"},
    ]
    file = tmp_path / "metadata.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    found = asked.read(protocol.load("geneval"), file)
    assert found.prompts == ("a photo of a bench", "a photo of two dogs")
    assert found.objects == ((("bench", 1, None),), (("dog", 2, 3),))
    file.write_text(json.dumps({"tag": "counting"}))
    with pytest.raises(UserError, match="line 1, is no line of GenEval's metadata"):
        asked.read(protocol.load("geneval"), file)
    file.write_text(json.dumps(lines[1]))
    with pytest.raises(UserError, match="has no prompt of the tags"):
        asked.read(protocol.load("geneval"), file)


def test_the_centre_is_cut_out_of_the_shorter_side_resized():
    wide = Image.new("RGB", (90, 30))
    wide.paste((255, 0, 0), (30, 0, 60, 30))
    for resize in asked.FILTERS:
        assert torch.equal(asked.cut(wide, 30, resize), torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 30, 30))
    small = asked.cut(wide.resize((450, 150)), 50, "area")
    assert small.shape == (3, 50, 50) and (small[:, 5:-5, 5:-5] == torch.tensor([255, 0, 0])[:, None, None]).all()
    ramp = Image.linear_gradient("L").convert("RGB")  # 256 rows, black to white
    halved = asked.cut(ramp, 128, "area")[0, :, 0].double()
    assert (halved - (2 * torch.arange(128) + 0.5)).abs().max() <= 0.5


def test_a_damaged_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"The image .*a\.png cannot be read"):
        list(asked.pictures([tmp_path / "a.png"], 8, "lanczos"))
