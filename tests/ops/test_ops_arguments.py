"""A wrong argument is an error that names it and says what was expected; nothing is accepted and misread."""

import pytest
import torch

from reflow_kernels import aligned_v_loss, cfg_combine, guided_step, window_chord


@pytest.fixture
def rows(device):
    return torch.randn(2, 3, 4, device=device)


def loss(output, target, **arguments):
    return aligned_v_loss(output, target, **{"direction_weight": 1.0, **arguments})


CASES = {
    "output no tensor": (lambda x: loss([1.0], x), TypeError, "model_output is a list; expected a tensor"),
    "output integers": (lambda x: loss(x.long(), x), TypeError, "model_output has dtype torch.int64; expected float16"),
    "output scalar": (lambda x: loss(x.sum(), x), ValueError, "model_output is a scalar tensor"),
    "target shape": (lambda x: loss(x, x[:1]), ValueError, r"target has shape \[1, 3, 4\]; expected \[2, 3, 4\]"),
    "target device": (lambda x: loss(x, x.to("meta")), ValueError, "target is on meta; expected"),
    "sample alone": (lambda x: loss(x, x, sample=x), ValueError, "give all three or none"),
    "coefficient alone": (lambda x: loss(x, x, output_coef=1.0), ValueError, "give all three or none"),
    "sample shape": (
        lambda x: loss(x, x, sample=x[:, :1], sample_coef=1.0, output_coef=1.0),
        ValueError,
        r"sample has shape \[2, 1, 4\]",
    ),
    "weight shape": (
        lambda x: loss(x, x, weight=x.new_ones(3)),
        ValueError,
        r"weight has shape \[3\]; expected a float or a tensor \[2\]",
    ),
    "weight text": (
        lambda x: loss(x, x, weight="1"),
        TypeError,
        r"weight is a str; expected a float or a tensor \[2\]",
    ),
    "direction dtype": (
        lambda x: loss(x, x, direction_weight=torch.ones(2, dtype=torch.int32, device=x.device)),
        TypeError,
        "direction_weight has dtype torch.int32",
    ),
    "direction device": (
        lambda x: loss(x, x, direction_weight=torch.ones(2, device="meta")),
        ValueError,
        "direction_weight is on meta",
    ),
    "eps": (lambda x: loss(x, x, eps=0.0), ValueError, "eps is 0.0; expected a positive float"),
    "target grad": (
        lambda x: loss(x, x.clone().requires_grad_()),
        ValueError,
        "target requires a gradient, but only model_output gets one",
    ),
    "weight grad": (
        lambda x: loss(x, x, weight=torch.ones(2, device=x.device, requires_grad=True)),
        ValueError,
        "weight requires a grad",
    ),
    "backend": (lambda x: loss(x, x, backend="cuda"), ValueError, "backend is 'cuda'; expected one of"),
    "half state": (
        lambda x: guided_step(x.half(), x, 1.0, 1.0),
        TypeError,
        r"state has dtype torch.float16; expected float32 or float64.*\.float",
    ),
    "guided rows": (
        lambda x: guided_step(x, x, 1.0, 1.0, guidance_scale=2.0),
        ValueError,
        r"model_output has shape .*\[4, 3, 4\], twice",
    ),
    "unguided rows": (
        lambda x: guided_step(x, torch.cat([x, x]), 1.0, 1.0),
        ValueError,
        r"model_output has shape \[4, 3, 4\]; expected \[2",
    ),
    "step grad": (
        lambda x: guided_step(x, x.clone().requires_grad_(), 1.0, 1.0),
        ValueError,
        "model_output requires a gradient",
    ),
    "input dtype": (
        lambda x: guided_step(x, x, 1.0, 1.0, input_dtype=torch.int8),
        TypeError,
        "input_dtype is torch.int8; expected None or",
    ),
    "out shape": (lambda x: guided_step(x, x, 1.0, 1.0, out=x[:1].clone()), ValueError, "out has shape"),
    "out dtype": (
        lambda x: guided_step(x, x, 1.0, 1.0, out=x.double()),
        TypeError,
        "out has dtype torch.float64; expected torch.float32",
    ),
    "out overlaps": (
        lambda x: guided_step(x, x, 1.0, 1.0, out=x[:1].expand(2, 3, 4)),
        ValueError,
        "out has strides .* do not overlap",
    ),
    "out sparse": (
        lambda x: guided_step(x, x, 1.0, 1.0, out=x.new_empty(2, 3, 8)[..., ::2]),
        ValueError,
        "out has strides .* dense",
    ),
    "input_out dtype": (
        lambda x: guided_step(x, x, 1.0, 1.0, input_dtype=torch.float16, input_out=x.clone()),
        TypeError,
        "input_out has dtype torch.float32; expected torch.float16, input_dtype",
    ),
    "mixed buffers": (
        lambda x: guided_step(x, x, 1.0, 1.0, out=x.clone(), input_out=x.new_empty(2, 4, 3).mT),
        ValueError,
        "input_out has strides .* expected the sample order of out",
    ),
    "chord dtype": (
        lambda x: window_chord(x, x.double(), 0.5, -1.0),
        TypeError,
        "z_end has dtype torch.float64; expected torch.float32",
    ),
    "chord half": (lambda x: window_chord(x.half(), x.half(), 0.5, -1.0), TypeError, "z_start has dtype torch.float16"),
    "chord time": (lambda x: window_chord(x, x, 0.5, 0.25), ValueError, "dt is 0.25; expected t_end - t_start"),
    "tau shape": (
        lambda x: window_chord(x, x, x.new_ones(4, 3), -1.0),
        ValueError,
        r"tau has shape \[4, 3\]; expected \[2\] or \[M, 2\]",
    ),
    "chord grad": (
        lambda x: window_chord(x, x.clone().requires_grad_(), 0.5, -1.0),
        ValueError,
        "z_end requires a grad",
    ),
    "odd rows": (
        lambda x: cfg_combine(torch.cat([x, x[:1]]), 2.0),
        ValueError,
        r"model_output has 3 rows; expected an even number",
    ),
    "scale shape": (
        lambda x: cfg_combine(x, x.new_ones(2)),
        ValueError,
        r"guidance_scale has shape \[2\]; expected a float or a tensor \[1\]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_error_names_the_argument(rows, name):
    call, kind, sentence = CASES[name]
    with pytest.raises(kind, match=sentence):
        call(rows)


def test_arguments_that_require_a_gradient_pass_under_no_grad(rows):
    target = rows.clone().requires_grad_()
    with torch.no_grad():
        loss(rows, target)
        guided_step(target, target, 1.0, 1.0)
        window_chord(target, target, 0.5, -1.0)
        cfg_combine(target, 2.0)


def test_zero_dimensional_samples(rows, device):
    vector = torch.tensor([1.0, -2.0], device=device)
    assert torch.equal(loss(vector, 2 * vector).mse, vector.square())
    assert torch.equal(guided_step(vector, vector, 2.0, 1.0)[0], 3 * vector)
    assert torch.equal(cfg_combine(vector, 0.0, rescale=0.5), vector[:1])
