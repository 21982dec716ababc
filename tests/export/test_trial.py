"""Every export is tried through the base's own pipeline class: what the trial finds, and the faults of other versions that it must see."""

import functools
import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux import pipeline_flux, pipeline_flux_img2img
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3, pipeline_stable_diffusion_3_img2img
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler as Euler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tiny_flows
import tiny_pipelines
from reflow.errors import UserError
from reflow.export import export_folder
from reflow.export.stand_in import stand_ins
from reflow.export.trial import TOLERANCE, Trial, base_of, choose
from reflow.flow import Windows
from reflow.models import FlowBase, family
from reflow.sampling import FlowWindowScheduler, PiecewiseFlowScheduler, scheduler_for

BUILT_IN = ("digits", "digits-flow")
IMAGE = {"sd3", "digits-flow", "flux", "qwen-image", "z-image", "sd15", "sdxl", "digits"}  # whose image to image diffusers has
EVEN_SIGMAS = {"flux", "qwen-image", "z-image"}  # whose pipelines pass them
UNEVEN = Windows((1.0, 0.7, 0.3, 0.0))


def named(name, folder):
    """The base of a family, of which nothing is loaded."""
    if name in BUILT_IN:
        return family(name).load(parts=())
    made = getattr(tiny_pipelines if name in ("sd15", "sdxl") else tiny_flows, name.replace("-", "_"))()
    made.save_pretrained(folder / name)
    return family(name).load(folder / name, parts=())


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def get(name):
        if name not in made:
            made[name] = named(name, folder)
        return made[name]

    return get


def stock_of(name, windows):
    """Which scheduler of diffusers is exact, as far as is known of the pinned version."""
    if name in ("sd15", "sdxl", "digits"):
        return DDIMScheduler if isinstance(windows, int) and 1000 % windows == 0 else None
    even = windows == 1 or windows == Windows.shifted(4, 1.0) or (isinstance(windows, int) and name in EVEN_SIGMAS)
    return FlowMatchEulerDiscreteScheduler if even else None


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("name", ["sd3", "digits-flow", "flux", "sana", "qwen-image", "z-image", "sd15", "sdxl", "digits"])
def test_every_family_is_tried_through_its_pipelines(bases, name, guidance):
    base = bases(name)
    flow = base.prediction_type == "velocity"
    before = torch.get_rng_state()
    for windows in (1, 3, 4, UNEVEN, *([Windows.shifted(4, 1.0)] if flow else [])):
        ours = scheduler_for(base, windows)
        choice = choose(base, ours, guidance=guidance)
        wanted = stock_of(name, windows)
        assert type(choice.scheduler) is (wanted or (FlowWindowScheduler if flow else PiecewiseFlowScheduler)), choice.reason
        assert choice.stock == (wanted is not None)
        pipelines = {base.family.pipelines[0]} | ({base.family.pipelines[0].replace("Pipeline", "Img2ImgPipeline")} if name in IMAGE else set())
        assert choice.found.keys() == pipelines and all(error < TOLERANCE / 10 for error in choice.found.values()), choice.found
        assert all(pipeline in choice.reason for pipeline in pipelines) and f"diffusers {diffusers.__version__}" in choice.reason
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name,windows,steps,stock", [("flux", 4, 8, True), ("flux", 4, 6, False), ("sd3", 4, 8, False), ("sd3", 1, 8, False), ("digits", 2, 4, False)])
def test_more_steps_than_windows(bases, name, windows, steps, stock):
    choice = choose(bases(name), scheduler_for(bases(name), windows), steps)
    assert choice.stock == stock and f"{steps} steps" in choice.reason and all(error < TOLERANCE for error in choice.found.values())


def test_guidance_that_a_network_is_told_is_tried(bases, tmp_path):
    tiny_flows.flux(guidance=False).save_pretrained(tmp_path / "schnell")
    for base, told in ((bases("flux"), True), (family("flux").load(tmp_path / "schnell", parts=()), False)):
        trial = Trial(base, scheduler_for(base, 4), 4, 1.0)
        assert (trial.rows.guidance is not None) == told
        assert max(trial.found(FlowMatchEulerDiscreteScheduler(shift=trial.scheduler.config.shift)).values()) < TOLERANCE


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "z-image", "sdxl"])
def test_the_stand_in_answers_all_that_it_is_told(bases, name):
    """A change of a thousandth of any of it changes the answer by more than the tolerance."""
    from reflow.models.conditioning import denoise

    base = bases(name)
    network, _ = stand_ins(base)
    trial = Trial(base, scheduler_for(base, 4), 4, 1.0)
    z, t = torch.randn(1, *base.latent_shape(base.cell * 4), generator=torch.Generator().manual_seed(0)), torch.tensor([400.0])
    whole = denoise(network, z, t, trial.rows)
    rows = {key: row for key, row in trial.rows.rows.items() if not key.endswith("mask")}
    changed = [denoise(network, z * 1.001, t, trial.rows), denoise(network, z, t * 1.001, trial.rows)]
    changed += [denoise(network, z, t, trial.rows.with_rows(**{key: row * 1.001})) for key, row in rows.items() if key != "time_ids"]
    assert len(changed) > 2 and all((one - whole).norm() > 5 * TOLERANCE * whole.norm() for one in changed)
    linear = denoise(network, 2 * z, t, trial.rows) - 2 * whole
    assert linear.norm() > 0.1 * whole.norm()


def calling(monkeypatch, sigmas, *modules):
    """Pipelines' modules as another version's may be, which pass even sigmas, or a number of steps alone."""

    def retrieve(scheduler, steps, device, **given):
        scheduler.set_timesteps(**{"sigmas": [1 - i / steps for i in range(steps)]} if sigmas else {"num_inference_steps": steps}, device=device)
        return scheduler.timesteps, steps

    for module in modules:
        monkeypatch.setattr(module, "retrieve_timesteps", retrieve)


def test_a_pipeline_that_passes_a_number_of_steps_alone_gets_another_scheduler(bases, monkeypatch):
    calling(monkeypatch, False, pipeline_flux, pipeline_flux_img2img)
    shifted = choose(bases("flux"), FlowWindowScheduler(shift=3.0, num_time_windows=4))
    assert type(shifted.scheduler) is FlowWindowScheduler and shifted.found["FluxPipeline"] < TOLERANCE
    assert shifted.reason.startswith("4 steps of Flux") and "with diffusers' own FlowMatchEulerDiscreteScheduler end 0." in shifted.reason
    even = choose(bases("flux"), FlowWindowScheduler(shift=1.0, num_time_windows=4))
    assert type(even.scheduler) is FlowMatchEulerDiscreteScheduler and even.scheduler.config.shift_terminal == 0.25


def test_a_pipeline_that_passes_even_sigmas_gets_diffusers_own(bases, monkeypatch):
    base = bases("sd3")
    calling(monkeypatch, True, pipeline_stable_diffusion_3)
    choice = choose(base, scheduler_for(base, 4))
    # Image to image still calls as it did, so the student's own scheduler is the one that serves both.
    assert not choice.stock and "StableDiffusion3Img2ImgPipeline with diffusers' own" in choice.reason
    calling(monkeypatch, True, pipeline_stable_diffusion_3_img2img)
    choice = choose(base, scheduler_for(base, 4))
    assert choice.stock and choice.scheduler.config.shift == 3.0 and max(choice.found.values()) < TOLERANCE


def test_a_scheduler_of_diffusers_that_shifts_twice_is_not_exported(bases, monkeypatch):
    plain = Euler.set_timesteps

    def twice(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        plain(self, num_inference_steps, device, sigmas, mu)
        shift = self.config.shift
        self.sigmas = shift * self.sigmas / (1 + (shift - 1) * self.sigmas)
        self.timesteps = self.sigmas[:-1] * 1000

    assert choose(bases("z-image"), scheduler_for(bases("z-image"), 4)).stock
    monkeypatch.setattr(Euler, "set_timesteps", twice)
    choice = choose(bases("z-image"), scheduler_for(bases("z-image"), 4))
    assert type(choice.scheduler) is FlowWindowScheduler and max(choice.found.values()) < TOLERANCE
    assert choice.reason.startswith("4 steps of ZImagePipeline with diffusers' own FlowMatchEulerDiscreteScheduler end 0.")


def test_a_scheduler_of_diffusers_that_noises_otherwise_is_not_exported(bases, monkeypatch):
    """It samples from text exactly, and starts from an image at another noise level."""
    plain = Euler.scale_noise

    def other(self, sample, timestep, noise):
        return plain(self, sample, timestep, noise if type(self) is not Euler else 0.9 * noise)

    monkeypatch.setattr(Euler, "scale_noise", other)
    choice = choose(bases("qwen-image"), scheduler_for(bases("qwen-image"), 4))
    assert not choice.stock and max(choice.found.values()) < TOLERANCE
    assert choice.reason.startswith("4 steps of QwenImageImg2ImgPipeline with diffusers' own FlowMatchEulerDiscreteScheduler end 0.")


def later(plain):
    """Image to image that begins one step after the right one."""

    def get_timesteps(self, steps, strength, device):
        timesteps, left = plain(self, steps, strength, device)
        if left == steps:
            return timesteps, left
        self.scheduler.set_begin_index(steps - left + 1)
        return timesteps[1:], left - 1

    return get_timesteps


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_image_to_image_that_no_scheduler_mends_is_said(bases, monkeypatch, name, tmp_path):
    kind = getattr(diffusers, bases(name).family.pipelines[0].replace("Pipeline", "Img2ImgPipeline"))
    monkeypatch.setattr(kind, "get_timesteps", later(kind.get_timesteps))
    choice = choose(bases(name), scheduler_for(bases(name), 4))
    assert choice.stock == (name in EVEN_SIGMAS) and choice.found[bases(name).family.pipelines[0]] < TOLERANCE
    assert choice.found[kind.__name__] > 1e-2
    assert ("with diffusers' own FlowMatchEulerDiscreteScheduler end 0." in choice.reason) != choice.stock
    assert f"image to image does not start where the student's does: 4 steps of {kind.__name__} end 0." in choice.reason


def as_called(monkeypatch, name, change):
    """A pipeline's class as another version's may be: what it tells its network is changed."""
    kind = getattr(diffusers, name)

    class Other(kind):
        @functools.wraps(kind.__call__)
        def __call__(self, *args, **given):
            part = self.transformer if hasattr(self, "transformer") else self.unet
            plain = type(part).forward
            part.forward = lambda *told, **named: plain(part, *told, **change(named))
            try:
                return super().__call__(*args, **given)
            finally:
                del part.forward

    monkeypatch.setattr(diffusers, name, Other)


@pytest.mark.parametrize(
    "name,change",
    [
        ("sd3", lambda told: told | {"timestep": told["timestep"] / 1000}),
        ("sana", lambda told: told | {"timestep": told["timestep"] * 1.001}),
        ("flux", lambda told: told | {"timestep": told["timestep"] * 1000}),
        ("flux", lambda told: told | {"guidance": told["guidance"] * 1000}),
        ("qwen-image", lambda told: told | {"timestep": 1 - told["timestep"]}),
        ("sdxl", lambda told: told | {"added_cond_kwargs": {key: 0.9 * row for key, row in told["added_cond_kwargs"].items()}}),
    ],
)
def test_a_pipeline_that_tells_its_network_something_else_is_refused(bases, monkeypatch, name, change):
    base = bases(name)
    pipeline = base.family.pipelines[0]
    as_called(monkeypatch, pipeline, change)
    with pytest.raises(UserError, match=rf"^{pipeline} of diffusers {diffusers.__version__} does not sample this student as it was trained: .* 4 "
                       r"steps with \w+Scheduler end [\d.e-]+ of the result away .* constraints.txt .* `reflow sample`\.$"):  # fmt: skip
        choose(base, scheduler_for(base, 4))


@pytest.mark.parametrize("name,argument", [("z-image", "guidance_scale"), ("qwen-image", "true_cfg_scale"), ("flux", "true_cfg_scale"), ("sd3", "guidance_scale")])
def test_a_pipeline_that_guides_by_another_scale_is_refused_where_it_guides(bases, monkeypatch, name, argument):
    base = bases(name)
    right = base.pipeline_call(3.0)
    monkeypatch.setattr(type(base), "pipeline_call", lambda self, scale: right | {argument: right[argument] * 1.01})
    with pytest.raises(UserError, match=f"^{base.family.pipelines[0]} .* does not sample this student"):
        choose(base, scheduler_for(base, 4), guidance=3.0)


def test_a_pipeline_that_cannot_be_tried_gets_what_is_right_however_it_is_called(bases, monkeypatch):
    """Another version's may read of its parts what the stand-ins have not."""

    def broken(self, *args, **given):
        return self.transformer.never_heard_of

    monkeypatch.setattr(diffusers.FluxPipeline, "__call__", broken)
    base = bases("flux")
    for windows, stock in ((1, True), (Windows.shifted(4, 1.0), True), (Windows.shifted(4, 3.0), False)):
        choice = choose(base, scheduler_for(base, windows))
        assert choice.stock == stock and choice.found == {}
        assert "it was not tried through a pipeline (AttributeError: " in choice.reason and "never_heard_of" in choice.reason
        if stock:
            steps = windows if isinstance(windows, int) else len(windows)
            even = [1 - i / steps for i in range(steps)]
            for passed in ({"num_inference_steps": steps}, {"sigmas": even}):
                choice.scheduler.set_timesteps(**passed)
                assert choice.scheduler.sigmas.tolist() == [*even, 0.0]


def test_a_family_that_cannot_stand_in_is_exported_without_a_trial(bases, monkeypatch):
    """Someone's own may not say the shapes of its rows."""
    base = bases("sd3")
    monkeypatch.setattr(type(base), "example_rows", FlowBase.example_rows)
    choice = choose(base, scheduler_for(base, 4))
    assert not choice.stock and choice.reason.endswith("it was not tried through a pipeline (NotImplementedError: NotImplementedError)")


def test_a_result_that_is_no_number_is_wrong(bases, monkeypatch):
    as_called(monkeypatch, "StableDiffusion3Img2ImgPipeline", lambda told: told | {"timestep": told["timestep"] * float("nan")})
    choice = choose(bases("sd3"), scheduler_for(bases("sd3"), 4))
    assert choice.found["StableDiffusion3Pipeline"] < TOLERANCE and choice.found["StableDiffusion3Img2ImgPipeline"] == float("inf")
    assert "image to image does not start where the student's does: 4 steps of StableDiffusion3Img2ImgPipeline end inf of the result" in choice.reason


def test_a_class_that_no_family_takes_is_exported_without_a_trial(tmp_path):
    pipe = tiny_pipelines.sd15()
    pipe.save_pretrained(tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionInpaintPipeline"}))
    assert base_of(tmp_path / "base") == "no family here takes a StableDiffusionInpaintPipeline"
    export = export_folder(tmp_path / "base", pipe.unet.state_dict(), tmp_path / "out", windows=4)
    assert export.stock and export.found == {} and "it was not tried through a pipeline (" in export.reason
    assert export.reason[1:-1] in (tmp_path / "out" / "README.md").read_text()


def test_an_export_says_what_its_trial_found(tmp_path):
    for name, ours in (("digits", False), ("digits-flow", True)):
        base = family(name).load(parts=("unet",))
        network_time = "flow" if ours else None
        export = export_folder(base, base.unet.state_dict(), tmp_path / name, windows=4, network_time=network_time, guidance=2.0)
        assert export.stock != ours and len(export.found) == 2 and max(export.found.values()) < TOLERANCE
        assert export.reason[1:-1] in (tmp_path / name / "README.md").read_text()
        again = export_folder(base.path, base.unet.state_dict(), tmp_path / f"{name}-again", windows=4, network_time=network_time, guidance=2.0)
        assert again.scheduler == export.scheduler and again.found.keys() == export.found.keys()


def test_a_student_that_the_pipeline_would_sample_otherwise_is_not_written(monkeypatch, tmp_path):
    as_called(monkeypatch, "StableDiffusionXLPipeline", lambda told: told | {"encoder_hidden_states": 2 * told["encoder_hidden_states"]})
    base = family("digits").load(parts=("unet",))
    with pytest.raises(UserError, match="StableDiffusionXLPipeline of diffusers .* does not sample this student as it was trained"):
        export_folder(base, base.unet.state_dict(), tmp_path / "out", windows=4)
    assert not list(tmp_path.iterdir())
