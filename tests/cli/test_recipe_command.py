"""`reflow recipe` and `reflow train --dry-run`: what is printed, and that it can be used as it is."""

import tomllib

import pytest

import tiny
from reflow.errors import UserError
from reflow.recipes import reading
from reflow.training import plan, run


@pytest.mark.parametrize("flag", [(), ("--resolved",)], ids=["as it stands", "resolved"])
@pytest.mark.parametrize("name", reading.available())
def test_a_printed_recipe_is_the_recipe(reflow, name, flag, tmp_path, capsys):
    assert reflow("recipe", name, *flag) == 0
    file = tmp_path / "printed.toml"
    file.write_text(capsys.readouterr().out)
    assert reading.load(str(file)) == reading.load(name)
    assert ("# " in file.read_text()) is not bool(flag)


def test_a_printed_recipe_keeps_its_comments_and_a_resolved_one_takes_overrides(reflow, tmp_path, capsys):
    text = "# mine\nname = 'x'  # free\n[[stages]]\nwindows = 2\nsolver_steps = 2\nsamples = 500\n"
    (tmp_path / "x.toml").write_text(text)
    assert reflow("recipe", tmp_path / "x.toml") == 0
    assert capsys.readouterr().out == text
    odd = 'a "\\ \t\r\n\x7f\x01 \u2028é'
    (tmp_path / "odd.toml").write_text(text + f"[validate]\nprompts = {reading.toml_value([odd])}\n", newline="")
    assert reflow("recipe", tmp_path / "odd.toml", "--resolved", "--set", "train.seed=9") == 0
    told = tomllib.loads(capsys.readouterr().out)
    assert told["train"]["seed"] == 9 and told["validate"]["prompts"] == [odd]
    assert reflow("recipe") == 0
    assert capsys.readouterr().out.split() == reading.available()


@pytest.mark.parametrize("argv, words", [
    (("recipe", "digit"), "did you mean 'digits'"),
    (("recipe", "digits", "--set", "train.seed=1"), "add --resolved"),
    (("recipe", "--resolved"), "Name the recipe"),
    (("recipe", "latin.toml"), "latin.toml cannot be read .* UTF-8"),
    (("train", "--recipe", "digits", "--resolved"), "add --dry-run"),
])  # fmt: skip
def test_what_cannot_be_printed_is_a_sentence(reflow, argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.toml").write_bytes('name = "é"\n'.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        reflow(*argv)


def test_a_dry_run_is_the_plan_and_the_recipe_only_when_asked(reflow, capsys):
    assert reflow("train", "--recipe", "digits-quick", "--dry-run") == 0
    told = capsys.readouterr().out
    assert told.startswith("network: 396,964 parameters") and "[train]" not in told and "--resolved" in told
    # So small a network has numbers too.
    assert "19 MFLOP a network row" in told and " 0.000" not in told and "e-0" not in told
    assert reflow("train", "--recipe", "digits-quick", "--dry-run", "--resolved") == 0
    again = capsys.readouterr().out
    head, _, rest = again.partition("\nname = ")
    assert head.strip() == told.rpartition("\n--resolved")[0].strip()
    assert reading.parse(tomllib.loads("name = " + rest), "test") == reading.load("digits-quick")


def test_the_planned_room_on_the_disk_is_what_a_run_takes(tmp_path):
    recipe, run_dir = tiny.short(tmp_path, "stages.0.pairs=200", "checkpoint.every=16"), tmp_path / "run"
    assert run.train(recipe, run_dir) == 0
    base, _ = plan.find_base(recipe)
    latent = plan.latent_of(recipe, base)
    planned = plan.disk(recipe, plan.counts_of(recipe, base, latent), latent)
    one = planned[f"{recipe.checkpoint.keep + 1} checkpoints"] / (recipe.checkpoint.keep + 1)

    def taken(pattern):
        return [sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size for path in run_dir.glob(pattern)]

    assert taken("checkpoints/stage-*") == pytest.approx([one] * recipe.checkpoint.keep, rel=0.05)
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in run_dir.glob("stage-*/unet_ema.safetensors"))
    assert sum(taken("stage-*/unet_ema.safetensors")) - headers == pytest.approx(planned["stage weights"], rel=0.02)
    assert sum(taken("stage-*/pairs/*")) == pytest.approx(planned["stored pairs"], rel=0.02)


@pytest.mark.parametrize("value, text", [(0, "0"), (200, "0.195 KiB"), (3 * 2**20, "3 MiB"), (2**30, "1 GiB"), (2**40, "1.02e+03 GiB")])
def test_sizes_come_in_a_unit_that_shows_them(value, text):
    assert plan.bytes_of(value) == text
