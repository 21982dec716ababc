"""A folder of captioned images becomes a cache that trains: what is stored, what is skipped, what is refused."""

import importlib.util
import io
import json
import os
import pathlib
import shlex
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reflow.data import digits, latents
from reflow.data.cache import CachedDataset
from reflow.data.encode import Encoder
from reflow.data.pictures import fit
from reflow.data.prepare import Preparation
from reflow.data.sources import open_source
from reflow.data.stream import StreamDataset
from reflow.errors import UserError
from reflow.models import registry
from reflow.models.family import head_of


@pytest.fixture(scope="module")
def base():
    return registry.family("digits").load()


def scans(folder, count=24):
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = digits.images()
    for i in range(count):
        Image.fromarray(((pixels[i, 0].numpy() + 1) * 127.5).round().astype(np.uint8)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(digits.caption(int(labels[i])) + "\n")
    return folder


def prepared(base, folder, out, **options):
    settings = {"sizes": [(16, 16)], "shard_size": 8, "batch_size": 4, **options}
    return Preparation(base, open_source(folder), out, **settings).run()


def test_the_cache_equals_direct_encoding(base, tmp_path):
    manifest = prepared(base, scans(tmp_path / "data"), tmp_path / "out")
    data, items = CachedDataset(tmp_path / "out", base), torch.tensor([23, 0, 7, 8])
    assert len(data) == manifest["counts"]["images"] == 24 and manifest["counts"]["captions"] == 10
    assert data.shape == base.latent_shape(16)
    pixels = [np.asarray(Image.open(tmp_path / "data" / f"{i:03d}.png"), np.float32) for i in items.tolist()]
    want = base.encode_images(torch.from_numpy(np.stack(pixels))[:, None] / 127.5 - 1)
    torch.testing.assert_close(data.latent(items), want, rtol=1e-5, atol=1e-5)
    assert data.words(items) == digits.prompts(digits.images()[1][items])
    text = base.encode_prompts(digits.prompts(digits.images()[1][items]))
    got = data.conditioning(items, torch.tensor([False, True, False, False]))
    null = base.null_conditioning(4)
    want = null.where(torch.tensor([False, True, False, False]), text)
    torch.testing.assert_close(got.encoder_hidden_states, want.encoder_hidden_states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.text_embeds, want.text_embeds, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.time_ids, text.time_ids)
    torch.testing.assert_close(data.null.encoder_hidden_states, null.encoder_hidden_states[:1])


def test_a_killed_preparation_goes_on_and_redoes_no_finished_batch(base, tmp_path, monkeypatch):
    data, images, text = scans(tmp_path / "data"), Encoder.latents, Encoder.text
    seen = []

    def counting(what, real):
        def encode(self, values, *numbers):
            if len(seen) == 6:
                raise KeyboardInterrupt  # nothing tidies up behind it: only what is on disk is left
            seen.append((what, numbers or list(values)))
            return real(self, values, *numbers)

        return encode

    monkeypatch.setattr(Encoder, "latents", counting("image", images))
    monkeypatch.setattr(Encoder, "text", counting("text", text))
    with pytest.raises(KeyboardInterrupt):
        prepared(base, data, tmp_path / "out")
    with pytest.raises(UserError, match="not finished"):
        CachedDataset(tmp_path / "out", base)
    assert [what for what, _ in seen] == ["text"] * 3 + ["image"] * 3  # killed in the middle of the second shard
    journal = tmp_path / "out" / ".latents-00001.journal"
    whole, before = journal.read_bytes(), list(seen)
    journal.write_bytes(whole + whole[-500:-100])  # and in the middle of writing a batch
    seen.clear()
    monkeypatch.setattr(Encoder, "latents", counting("image", images))
    prepared(base, data, tmp_path / "out")
    assert not [entry for entry in seen if entry in before] and len(before + seen) == 3 + 24 // 4
    prepared_whole = tmp_path / "whole"
    monkeypatch.undo()
    prepared(base, data, prepared_whole)
    for shard in sorted(prepared_whole.glob("*.arrow")):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
    assert sorted(p.name for p in prepared_whole.iterdir()) == sorted(p.name for p in (tmp_path / "out").iterdir())


def test_modes_sizes_and_crops():
    wide = Image.new("RGB", (40, 20), "red")
    pixels, ids = fit(wide, (10, 10), 3)
    assert pixels.shape == (3, 10, 10) and ids == [20, 40, 0, 5, 10, 10]
    assert pixels[:, 5, 5].tolist() == [255, 0, 0]
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (fit(clear, (8, 8), 3)[0] == 255).all()  # transparency is white
    assert (fit(clear.convert("LA"), (8, 8), 1)[0] == 255).all()
    assert (fit(clear.convert("PA"), (8, 8), 3)[0] == 255).all()
    for mode in ("P", "CMYK", "YCbCr", "HSV", "RGBX"):
        assert (
            np.abs(
                fit(Image.new("RGB", (8, 8), "blue").convert(mode), (8, 8), 3)[0][:, 0, 0].astype(int) - [0, 0, 255]
            ).max()
            <= 2
        )
    deep = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    assert (fit(deep, (8, 8), 1)[0] == 255).all() and (fit(Image.new("1", (8, 8), 1), (8, 8), 3)[0] == 255).all()
    half = np.full((8, 8), 65535, np.uint16)
    half[:, :4] = 1000
    deep = Image.fromarray(half // 2)
    deep.info["transparency"] = 500  # as PNG's tRNS tells one level of 16-bit grey
    for channels in (1, 3):
        assert (fit(deep, (8, 8), channels)[0][:, 0] == [255] * 4 + [127] * 4).all()
    for wrong in (Image.new("F", (8, 8)), Image.new("RGB", (0, 8))):
        with pytest.raises(ValueError):
            fit(wrong, (8, 8), 3)


def test_unreadable_images_are_listed_and_too_many_are_an_error(base, tmp_path):
    folder = scans(tmp_path / "data")
    (folder / "003.png").write_bytes(b"")
    (folder / "004.png").write_bytes((folder / "005.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"2 of 24 images .* --max-bad-share 0\.05 .*003\.png"):
        prepared(base, folder, tmp_path / "out")
    (tmp_path / "out" / "skipped.jsonl").write_text('{"file": "of an earlier run"}\n')
    manifest = prepared(base, folder, tmp_path / "out", max_bad_share=0.1)
    listed = [json.loads(line)["file"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert listed == ["003.png", "004.png"] and manifest["counts"]["skipped"] == 2
    assert len(CachedDataset(tmp_path / "out", base)) == 22


def test_captions_missing_empty_long_and_from_a_table(base, tmp_path):
    folder = scans(tmp_path / "data", 4)
    (folder / "000.txt").unlink()
    with pytest.raises(UserError, match=r"1 of 4 images of .*data have no caption, the first is 000\.png"):
        open_source(folder)
    assert open_source(folder, caption="").caption(0) == "" and open_source(folder, caption="x ").caption(0) == "x"
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "000.png", "text": "' + "long " * 2000 + '"}\n{"file_name": "001.png", "text": ""}\n'
    )
    assert [len(open_source(folder).caption(number)) for number in (0, 1)] == [9999, 0]
    manifest = prepared(base, folder, tmp_path / "out")
    assert manifest["counts"]["empty_captions"] == manifest["counts"]["cut_captions"] == 1
    cut = base.encode_prompts(["long " * 500]).encoder_hidden_states
    torch.testing.assert_close(
        CachedDataset(tmp_path / "out", base).conditioning(torch.tensor([0])).encoder_hidden_states, cut
    )
    assert torch.isfinite(
        CachedDataset(tmp_path / "out", base).conditioning(torch.arange(4)).encoder_hidden_states
    ).all()
    (folder / "metadata.jsonl").write_text('{"file_name": "000.png"}\n')
    with pytest.raises(UserError, match="metadata.jsonl, line 1"):
        open_source(folder)


def test_another_vae_other_images_and_a_cut_shard_are_refused(base, tmp_path):
    folder, out = scans(tmp_path / "data", 8), tmp_path / "out"
    prepared(base, folder, out)
    other = registry.family("digits").load()
    with torch.no_grad():
        next(other.vae.parameters()).add_(0.01)
    for use in (lambda: CachedDataset(out, other), lambda: prepared(other, folder, out)):
        with pytest.raises(UserError, match="differ in VAE"):
            use()
    (folder / "008.png").write_bytes((folder / "007.png").read_bytes())
    (folder / "008.txt").write_text("one more")
    with pytest.raises(UserError, match="other settings"):
        prepared(base, folder, out)
    (folder / "008.png").unlink()
    (folder / "008.txt").unlink()
    before = (folder / "000.png").read_bytes(), (folder / "000.png").stat()
    (folder / "000.png").write_bytes(before[0][::-1])  # an edit that keeps the size
    with pytest.raises(UserError, match="other settings or images"):
        prepared(base, folder, out)
    (folder / "000.png").write_bytes(before[0])
    os.utime(folder / "000.png", ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
    shard = out / "latents-00000.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="latents-00000.arrow"):
        CachedDataset(out, base)
    prepared(base, folder, out)
    assert shard.read_bytes() == whole


def test_a_cache_names_the_model_that_it_was_made_for(base, tmp_path, capsys):
    """VAE and text encoders of a fine-tune are often the base's own: only the UNet tells that another model is trained."""
    shutil.copytree(base.path, tmp_path / "mine")
    weights = next((tmp_path / "mine" / "unet").glob("*.safetensors"))
    state = load_file(weights)
    name = next(key for key, tensor in state.items() if tensor.dim() > 1)
    state[name][0] += 0.01
    save_file(state, weights)
    mine, folder, out = registry.family("digits").load(tmp_path / "mine"), scans(tmp_path / "data", 4), tmp_path / "out"
    prepared(mine, folder, out)
    with pytest.raises(UserError, match=f"made with the base {tmp_path / 'mine'}, and this run trains the UNet of .*another model.*model.base="):
        CachedDataset(out, base)
    with pytest.raises(UserError, match=r"out holds a cache that was made with the base .*mine.*data.other_unet=true"):
        prepared(base, folder, out)
    assert len(CachedDataset(out, mine)) == len(CachedDataset(out, base, other_unet=True)) == 4
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["fingerprint"]["unet"]  # as earlier versions wrote it
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert len(CachedDataset(out, mine)) == 4 and capsys.readouterr().err == ""
    assert len(CachedDataset(out, base)) == 4 and "does not say which UNet" in capsys.readouterr().err


def test_the_manifest_says_what_was_left_out(base, tmp_path):
    folder = scans(tmp_path / "data", 2)
    for name in ("a.heic", "b.heic"):
        (folder / name).write_bytes(b"x")
    manifest = prepared(base, folder, tmp_path / "out")
    assert manifest["left_out"] == {".heic is no image format that is read": {"count": 2, "first": "a.heic"}}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["left_out"] == manifest["left_out"]


def test_the_hint_of_prepare_names_the_base_that_it_was_given():
    from reflow.cli import build_parser
    from reflow.commands.prepare import hint
    from reflow.recipes import reading

    def told(*words):
        given = build_parser("prepare").parse_args(["prepare", "--family", "digits", "--data", "d", *words])
        overrides = [word for word in shlex.split(hint(given)) if word != "--set"]
        return reading.load("sdxl-proreflow", overrides)

    recipe = told("--base", "my base", "--out", "the cache")
    assert (recipe.model.base, recipe.data.source, recipe.data.path) == ("my base", "cache", "the cache")
    recipe = told("--base", "mine.safetensors", "--out", "c", "--tokenizer", "t", "--base-prediction-type", "v_prediction")
    assert (recipe.model.base, recipe.model.tokenizer, recipe.model.prediction_type) == ("mine.safetensors", "t", "v_prediction")
    assert told("--out", "c").model.base == reading.load("sdxl-proreflow").model.base  # "builtin" is the digits recipes' own


def test_a_vae_that_gives_nan_is_named_with_the_file(base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        type(base), "encode_images", lambda self, pixels: torch.full((len(pixels), 2, 4, 4), float("nan"))
    )
    with pytest.raises(UserError, match=r"000\.png"):
        prepared(base, scans(tmp_path / "data", 2), tmp_path / "out")


def test_training_runs_from_the_cache(base, tmp_path):
    from reflow.cli import COMMANDS
    from reflow.training import run

    place = pathlib.Path(__file__).parents[1] / "training" / "tiny.py"
    spec = importlib.util.spec_from_file_location("tiny_for_prepare", place)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    assert "prepare" in COMMANDS
    prepared(base, scans(tmp_path / "data"), tmp_path / "out")
    recipe = tiny.recipe(
        tmp_path, "data.source=cache", f"data.path={tmp_path / 'out'}", "stages.0.samples=32", "stages.1.samples=32"
    )
    assert run.train(recipe, tmp_path / "run") == 0
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses and all(np.isfinite(losses))


def test_null_rows_keep_each_images_own_time_ids(base, tmp_path):
    folder = scans(tmp_path / "data", 2)
    Image.new("L", (40, 20), "white").save(folder / "001.png")
    prepared(base, folder, tmp_path / "out")
    cached, scan = CachedDataset(tmp_path / "out", base), latents.encode_digits(base)
    for data, sizes in (
        (cached, [[16, 16, 0, 0, 16, 16], [20, 40, 0, 8, 16, 16]]),
        (scan, [[16, 16, 0, 0, 16, 16]] * 2),
    ):
        rows = data.null_rows(torch.arange(2))
        assert rows.time_ids.tolist() == sizes and torch.equal(
            rows.time_ids, data.conditioning(torch.arange(2)).time_ids
        )
        assert torch.equal(rows.encoder_hidden_states, data.null.encoder_hidden_states.expand(2, -1, -1))


def test_a_family_without_pooled_text_and_captions_in_half_precision(tmp_path):
    helper = pathlib.Path(__file__).parents[1] / "helpers" / "tiny_pipelines.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines_for_prepare", helper)
    tiny_pipelines = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_pipelines)
    tiny_pipelines.sd15().save_pretrained(tmp_path / "sd15")
    small = registry.family("sd15").load(tmp_path / "sd15")
    (tmp_path / "data").mkdir()
    for n in range(3):
        Image.new("RGB", (80, 64), (60 * n, 200, 10)).save(tmp_path / "data" / f"{n}.png")
        (tmp_path / "data" / f"{n}.txt").write_text("abc"[n])
    prepared(small, tmp_path / "data", tmp_path / "out", sizes=[(64, 64)], text="fp16")
    data, items = CachedDataset(tmp_path / "out", small), torch.tensor([2, 0])
    rows, want = data.conditioning(items, torch.tensor([False, True])), small.encode_prompts(["c", ""])
    assert rows.text_embeds is rows.time_ids is data.null_rows(items).time_ids is None
    torch.testing.assert_close(rows.encoder_hidden_states, want.encoder_hidden_states, rtol=2e-3, atol=2e-3)
    assert torch.equal(rows.encoder_hidden_states[0].half().float(), rows.encoder_hidden_states[0])
    streamed = StreamDataset(open_source(tmp_path / "data"), small, [(64, 64)])
    torch.testing.assert_close(streamed.latent(items), data.latent(items), rtol=1e-4, atol=1e-4)
    assert streamed.conditioning(items).time_ids is None


def test_sizes_from_headers_know_how_a_picture_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "b.png").write_bytes(b"")
    source = open_source(tmp_path, caption="")
    assert source.sizes(range(2)).tolist() == [[40, 20], [-1, -1]] and source.image(0).size == (20, 40)


def test_the_command_prepares_tars_by_aspect_ratio_and_says_what_it_did(tmp_path, monkeypatch, capsys):
    from reflow.cli import build_parser
    from reflow.commands import prepare

    monkeypatch.setenv("REFLOW_CACHE", str(tmp_path / "index"))
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for n in range(6):
            stored = io.BytesIO()
            Image.new("L", ((20, 20), (60, 20))[n % 2], 40 * n).save(stored, "PNG")
            words = b"a zero " * (100 if n == 1 else 1) if n else b""
            for name, content in ((f"{n}.png", b"" if n == 5 else stored.getvalue()), (f"{n}.txt", words)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
    command = ["prepare", "--family", "digits", "--data", str(tmp_path / "a.tar"), "--out", str(tmp_path / "out"), "--buckets",
               "16x16", "32x8", "--workers", "1", "--text-dtype", "fp16"]  # fmt: skip
    parser = build_parser("prepare")
    with pytest.raises(UserError, match="1 of 6 images cannot be used"):
        prepare.run(parser.parse_args(command))
    assert prepare.run(parser.parse_args([*command, "--max-bad-share", "0.2"])) == 0
    said = capsys.readouterr().out
    for words in ("5 images and 3 distinct captions", "1 skipped (skipped.jsonl", "1 with an empty caption",
                  "1 captions longer than the tokenizer takes", "32x8: 2; 16x16: 3", "--set data.source=cache"):  # fmt: skip
        assert words in said, said
    assert "5.png" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_an_endless_caption_is_tokenised_as_far_as_it_is_read(base, tmp_path, monkeypatch):
    folder = scans(tmp_path / "data", 2)
    text = "a handwritten   three " * 50_000
    (folder / "000.txt").write_text(text)
    longest, kinds = [], {type(t) for t in base.tokenizers}
    for kind in kinds:
        call = kind.__call__

        def heard(self, words, *args, call=call, **kwargs):
            longest.extend(map(len, [words] if isinstance(words, str) else words))
            return call(self, words, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", heard)
    manifest = prepared(base, folder, tmp_path / "out")
    assert manifest["counts"]["cut_captions"] == 1 and max(longest) <= 100 * max(t.model_max_length for t in base.tokenizers)
    monkeypatch.undo()
    want = base.tokenizers[0](text, truncation=True, max_length=base.tokenizers[0].model_max_length).input_ids
    head = base.tokenizers[0](head_of(text, base.tokenizers[0].model_max_length), truncation=True, max_length=base.tokenizers[0].model_max_length)
    assert head.input_ids == want and head_of("short  text", 77) == "short  text"
