"""The format of `diffusers`, both ways, against diffusers itself."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minddpm import checkpoint
from minddpm.config import Config, ModelConfig
from minddpm.published import from_diffusers, their_names, to_diffusers
from minddpm.samplers import ancestral

SMALL = dict(
    sample_size=8,
    block_out_channels=(128, 128),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
CIFAR = dict(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    layers_per_block=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)


def theirs(**config):
    """A random network of the published kind: no branch that answers 0, no norm that is 1."""
    torch.manual_seed(0)
    fixed = dict(attention_head_dim=None, norm_eps=1e-6, downsample_padding=0)
    net = UNet2DModel(**fixed, flip_sin_to_cos=False, freq_shift=1, **config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.rand_like(p).sub(0.5) * p.std(correction=0).clamp(0.1)
    return net


def scheduler(**options):
    return DDPMScheduler(variance_type=options.pop("variance_type", "fixed_large"), **options)


@pytest.fixture(scope="module")
def network():
    return theirs(**SMALL)


@pytest.fixture
def folder(network, tmp_path):
    network.save_pretrained(tmp_path / "unet")
    scheduler().save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text("{}")
    return tmp_path


def assert_same(net, other):
    x, t = torch.randn(4, *net.shape), torch.tensor([1, 2, 500, 1000])
    with torch.no_grad():
        expected = other(x, t - 1).sample
        assert expected.std() > 0.1
        assert_close(net(x, t), expected, rtol=1e-5, atol=1e-5)


def test_narrow_network_keeps_its_32_groups(tmp_path):
    """Ours would have 16 of them in layers of 64 channels."""
    network = theirs(**SMALL | dict(block_out_channels=(64, 64)))
    network.save_pretrained(tmp_path)
    scheduler().save_pretrained(tmp_path)
    assert_same(from_diffusers(tmp_path).net, network)


def test_network_of_the_published_size_is_read_whole_and_computes_the_same(tmp_path):
    """google/ddpm-cifar10-32 keeps its files side by side: no unet/, no scheduler/."""
    network = theirs(**CIFAR)
    network.save_pretrained(tmp_path)
    scheduler().save_pretrained(tmp_path)
    denoiser = from_diffusers(tmp_path)
    assert sum(p.numel() for p in denoiser.net.parameters()) == 35_746_307
    assert (denoiser.predicts, denoiser.variance, denoiser.schedule.T) == ("eps", "large", 1000)
    assert sorted(their_names(denoiser.net).values()) == sorted(network.state_dict())
    assert_same(denoiser.net, network)


def test_folder_is_loaded_by_name_with_the_noise_it_was_trained_on(folder, network):
    denoiser = checkpoint.load(folder)
    assert_same(denoiser.net, network)
    alpha_bar = scheduler().alphas_cumprod.double()
    assert_close(denoiser.schedule.alpha_bar[1:], alpha_bar, rtol=1e-5, atol=0)
    assert not any(p.requires_grad for p in denoiser.parameters()) and not denoiser.training


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(prediction_type="v_prediction", variance_type="fixed_small"), ("v", "small")),
        (dict(prediction_type="sample", variance_type="fixed_small_log"), ("x0", "small")),
        (dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=300), ("eps", "large")),
        (dict(beta_start=0.001, beta_end=0.03, num_train_timesteps=300), ("eps", "large")),
    ],
)
def test_every_kind_of_noise_is_read(folder, options, expected):
    other = scheduler(**options)
    other.save_pretrained(folder / "scheduler")
    denoiser = from_diffusers(folder)
    assert (denoiser.predicts, denoiser.variance) == expected
    alpha_bar = other.alphas_cumprod.double()
    assert_close(denoiser.schedule.alpha_bar[1:], alpha_bar, rtol=1e-4, atol=1e-9)


def test_old_names_and_pickled_weights_are_read(folder, network):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(path)
    for now, then in old.items():
        state = {k.replace(f".{now}.", f".{then}."): x for k, x in state.items()}
    assert any("proj_attn" in k for k in state)
    torch.save(state, path.with_suffix(".bin"))
    path.unlink()
    assert_same(from_diffusers(folder).net, network)


def test_what_is_not_ours_is_refused_in_one_line(folder):
    path = folder / "unet" / "config.json"
    good = json.loads(path.read_text())
    for change, message in [
        (dict(norm_num_groups=16), "norm_num_groups = 16, not 32"),
        (dict(attn_norm_num_groups=16), "attn_norm_num_groups = 16, not None"),
        (dict(sample_size=[8, 8]), "cannot be used: unsupported operand"),
        (dict(block_out_channels=[]), "cannot be used: list index out of range"),
        (dict(flip_sin_to_cos=True, freq_shift=0), "flip_sin_to_cos = True.*; freq_shift = 0"),
        (dict(block_out_channels=[128, 256]), "cannot be used: Error.* in loading|cannot be used"),
        (dict(layers_per_block=2), "cannot be used"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message) as caught:
            from_diffusers(folder)
        assert "\n" not in str(caught.value)
    for text in ("[1]", "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json holds no JSON object"):
            from_diffusers(folder)
    path.write_text(json.dumps(good))
    changes = (
        dict(rescale_betas_zero_snr=True),
        dict(trained_betas=[0.1, 0.2]),
        dict(clip_sample=False),
        dict(thresholding=True),
    )
    for change in changes:
        scheduler(**change).save_pretrained(folder / "scheduler")
        with pytest.raises(ValueError, match=f"not DDPM's: {next(iter(change))} = "):
            from_diffusers(folder)
    scheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    with pytest.raises(ValueError, match="expected linear betas .* got 'scaled_linear'"):
        from_diffusers(folder)


def test_damaged_or_missing_weights_are_refused_in_one_line(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    save_file(load_file(path) | {"more.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="no place for more.weight"):
        from_diffusers(folder)
    path.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="is not complete"):
        from_diffusers(folder)
    path.unlink()
    with pytest.raises(ValueError, match="no diffusion_pytorch_model"):
        from_diffusers(folder)
    with pytest.raises(ValueError, match=r"holds no unet/config\.json"):
        from_diffusers(folder / "scheduler")


def test_repository_is_downloaded_from_the_hub(folder, network, monkeypatch):
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(checkpoint.load("google/ddpm-cifar10-32").net, network)
    assert asked[0][0] == "google/ddpm-cifar10-32" and len(asked) == 1

    def fail(repository, allow_patterns):
        raise OSError("no route\nto the host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="no 'google/none' here.*: no route$"):
        checkpoint.load("google/none")


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(multipliers=(1, 1), blocks=1, attention=(4,)),
        ModelConfig(
            multipliers=(1, 2), blocks=1, attention=(8,), schedule="cosine", T=60, predicts="v",
            variance="small",
        ),
    ],
)  # fmt: skip
def test_our_network_runs_in_their_pipeline(model, tmp_path):
    torch.manual_seed(0)
    config = Config(model=model)
    denoiser = checkpoint.build(config, 3, 8)
    with torch.no_grad():
        for p in denoiser.parameters():
            p += 0.02 * torch.randn_like(p)
    weights = {f"ema.{k}": x for k, x in denoiser.net.state_dict().items()}
    checkpoint.save(tmp_path / "ours.safetensors", weights, config, shape=[3, 8, 8])
    checkpoint.export(tmp_path / "ours.safetensors", tmp_path / "theirs")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "theirs")
    assert_same(denoiser.eval().net, pipeline.unet)
    again = checkpoint.load(tmp_path / "theirs")
    ours = denoiser.schedule.alpha_bar
    assert_close(pipeline.scheduler.alphas_cumprod.double(), ours[1:], rtol=1e-4, atol=1e-9)
    assert_close(again.schedule.alpha_bar, ours, rtol=1e-10, atol=1e-15)
    assert (again.predicts, again.variance) == (model.predicts, model.variance)
    for name, x in denoiser.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], x)

    # One step of their chain is one step of ours, on the same noise.
    pipeline.scheduler.set_timesteps(model.T)
    xt, t = torch.randn(2, 3, 8, 8), model.T // 2
    with torch.no_grad():
        guess = pipeline.unet(xt, t - 1).sample
        step = pipeline.scheduler.step(guess, t - 1, xt, generator=torch.Generator().manual_seed(3))
        ours, _ = ancestral(denoiser, xt, t, t - 1, generator=torch.Generator().manual_seed(3))
    assert_close(ours, step.prev_sample, rtol=1e-4, atol=1e-4)


def test_a_network_with_classes_goes_there_and_back(tmp_path):
    torch.manual_seed(0)
    model = ModelConfig(multipliers=(1, 1), blocks=1, attention=(4,), classes=3)
    net = checkpoint.build(Config(model=model), 3, 8).net.eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.02 * torch.randn_like(p)
    to_diffusers(net, model, tmp_path / "theirs")
    other = UNet2DModel.from_pretrained(tmp_path / "theirs" / "unet")
    x, t, labels = torch.randn(3, 3, 8, 8), torch.tensor([1, 500, 1000]), torch.tensor([0, 2, 3])
    again = from_diffusers(tmp_path / "theirs").net
    assert again.classes == 3
    with torch.no_grad():
        expected = other(x, t - 1, labels).sample
        assert_close(net(x, t, labels), expected, rtol=1e-5, atol=1e-5)
        assert_close(again(x, t, labels), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(net(x, t), expected, rtol=1e-3, atol=1e-3)


def test_export_that_cannot_be_is_refused(tmp_path):
    narrow = Config(model=ModelConfig(width=64, multipliers=(1,), blocks=1, attention=()))
    net = checkpoint.build(narrow, 3, 8).net
    with pytest.raises(ValueError, match="one of width 64 has several"):
        to_diffusers(net, narrow.model, tmp_path / "new")
    wide = replace(narrow.model, width=128)
    with pytest.raises(ValueError, match="exists: choose another folder"):
        to_diffusers(checkpoint.build(Config(model=wide), 3, 8).net, wide, tmp_path)
    for flow in (replace(wide, schedule="straight"), replace(wide, predicts="velocity")):
        with pytest.raises(ValueError, match=r"no velocity: export to a \.safetensors file"):
            to_diffusers(net, flow, tmp_path / "new")
    with pytest.raises(ValueError, match=r"a \.safetensors file or a folder, got 'a\.pt'"):
        checkpoint.export("digits", "a.pt")
