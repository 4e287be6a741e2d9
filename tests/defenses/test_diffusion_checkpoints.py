"""Diffusion checkpoints trained elsewhere: how they are read, reported and refused; settings that cannot be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.errors import BenchError
from tests.helpers import hubserver
from tests.helpers.commands import TINY, Bench, defense
from tests.helpers.diffusion_models import FIVE, build, saved, unet


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub whose someone/ddpm is the flat checkpoint and someone/pipeline the same as a pipeline."""
    flat, nested = saved(tmp_path / "flat"), tmp_path / "nested"
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(nested)
    files = {
        ("model", repo, str(f.relative_to(root))): f.read_bytes()
        for repo, root in (("someone/ddpm", flat), ("someone/pipeline", nested))
        for f in root.rglob("*.*")
        if f.is_file()
    }
    with hubserver.HubServer(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server


def test_an_external_checkpoint_is_loaded_and_reported(bench: Bench, tmp_path: Path, hub: Any) -> None:
    votes = []
    for source in (str(tmp_path / "flat"), str(tmp_path / "nested"), "someone/ddpm", f"someone/ddpm@{'a' * 40}"):
        ran = bench(
            *("run", "--defense", "diffusion", "--dataset", TINY, "--out", tmp_path / "runs", "--json"),
            *("--examples", 2, "--set", f"unet={source}"),
        )
        assert ran.code == 0, ran.err
        (info,) = json.loads(ran.out)
        assert info["cost"]["trained_elsewhere"] == sum(p.numel() for p in unet().parameters())
        assert info["cost"]["trained_here"] == info["cost"]["train_seconds"] == 0
        assert info["defense"]["trained_elsewhere"] == [source]
        commit = {"someone/ddpm": hubserver.COMMIT, f"someone/ddpm@{'a' * 40}": "a" * 40}.get(source)
        assert info["defense"]["commits"] == ({source: commit} if commit else {})
        assert info["defense"]["access"] == "QUERY"
        weights = "unet/" * ("nested" in source) + "diffusion_pytorch_model.safetensors"
        file = (tmp_path / "nested" if "nested" in source else tmp_path / "flat") / weights
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        assert info["identity"]["defense"]["parts"][f"{weights} {sha256[:8]}"] == sha256
        rows = (Path(info["path"]) / "certificates.jsonl").read_text().splitlines()
        votes.append([{**json.loads(row), "seconds": 0} for row in rows])
    assert all(v == votes[0] for v in votes)
    made = build("unet=someone/pipeline")
    for key, value in unet().state_dict().items():
        assert torch.equal(made.unet.state_dict()[key], value), key


def test_a_cached_checkpoint_needs_no_network(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {source: build(f"unet={source}").unet.state_dict() for source in ("someone/ddpm", "someone/pipeline")}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source, state in before.items():
        again = build(f"unet={source}").unet.state_dict()
        assert all(torch.equal(again[k], v) for k, v in state.items())
    with pytest.raises(BenchError, match=r"no copy of config.json of hub model 'someone/other' and no network"):
        build("unet=someone/other")


def test_attention_layers_under_their_old_names(tmp_path: Path) -> None:
    file = saved(tmp_path) / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        state = {k.replace(f".{new}.", f".{old}."): v for k, v in state.items()}
    assert not any("to_" in k for k in state)
    save_file(state, file)
    made = build(f"unet={tmp_path}")
    assert all(torch.equal(made.unet.state_dict()[k], v) for k, v in unet().state_dict().items())


@pytest.mark.parametrize("layout", [{"max_shard_size": "5KB"}, {"variant": "fp16"}])
def test_shards_and_rounded_variants_are_read(tmp_path: Path, layout: dict[str, str]) -> None:
    whole = build(f"unet={saved(tmp_path / 'whole')}").unet.state_dict()
    torch.manual_seed(0)
    other = saved(tmp_path / "other")
    (other / "diffusion_pytorch_model.safetensors").unlink()
    model = unet()
    model.load_state_dict(whole)
    model.save_pretrained(other, **layout)
    assert not (other / "diffusion_pytorch_model.safetensors").exists()
    found = build(f"unet={other}").unet.state_dict()
    for key, value in whole.items():
        assert torch.allclose(found[key], value, atol=1e-3 if "variant" in layout else 0), key


def test_a_variant_that_may_hold_other_weights_is_named(tmp_path: Path) -> None:
    unet().save_pretrained(saved(tmp_path), variant="non_ema")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BenchError, match=r"it has diffusion_pytorch_model.non_ema.safetensors: save the right one"):
        build(f"unet={tmp_path}")


def pickled(folder: Path) -> None:
    unet().save_pretrained(saved(folder), safe_serialization=False)
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def no_json(folder: Path) -> None:
    (saved(folder) / "config.json").write_text("<html>")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: saved(f, sample_size=40), "1x40x40 images, the data are 1x8x8, a size more than 4 times another"),
        (lambda f: saved(f, sample_size=16, **FIVE), "its down-samplings need sides that 16 divides"),
        (lambda f: saved(f, in_channels=3, out_channels=3), "is for 3x8x8 images, the data are 1x8x8"),
        (lambda f: saved(f, num_class_embeds=10), "give an unconditional UNet2DModel"),
        (lambda f: saved(f, diffusers.FlowMatchEulerDiscreteScheduler()), "FlowMatchEulerDiscreteScheduler"),
        (lambda f: saved(f, diffusers.EDMEulerScheduler()), "EDMEulerScheduler .* or CMStochasticIterativeScheduler"),
        (pickled, r"a pickled \.bin is refused"),
        (no_json, "config.json is not JSON"),
        (lambda f: unet().save_pretrained(f), "neither scheduler_config.json nor scheduler/scheduler_config.json"),
        (lambda f: (saved(f), unet(block_out_channels=(8, 16)).save_config(f)), "does not fit its config.json"),
    ],
    ids=[
        "resolution",
        "down-samplings",
        "channels",
        "labels",
        "scheduler",
        "scheduler of sigmas",
        "pickle",
        "json",
        "no scheduler",
        "weights",
    ],
)
def test_checkpoints_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path)
    with pytest.raises(BenchError, match=message) as e:
        build(f"unet={tmp_path}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["steps=0"], "steps=0: must be 1 to"),
        (["steps=4000"], "steps=4000: must be 1 to"),
        (["width=12"], "width=12 must be a multiple of 8"),
        (["steps=2", "reverse_runs=0"], "reverse_runs=0 must be at least 1"),
        (["reverse_runs=2"], "runs of one step are all equal; set steps above 1"),
        (["local_copies=5"], "local_copies=5 and local_sigma=0: local smoothing needs both above 0"),
        (["local_sigma=.1"], "local smoothing needs both above 0"),
        (["local_copies=-1", "local_sigma=.1"], "local smoothing needs both above 0"),
        (["local_copies=2", "local_sigma=-.1"], "local smoothing needs both above 0"),
        (["local_vote=majority"], "there is no local smoothing; set local_copies"),
        (["timestep_scale=0.25"], "leave it out for one trained here"),
        ([f"classifier={defense('own_loss')}"], "has its own training"),
        (["classifier=unheard-of"], "unheard-of"),
    ],
)
def test_invalid_settings_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(BenchError, match=message) as e:
        build(*settings)
    assert "\n" not in str(e.value)


def test_noise_beyond_the_schedule_is_refused_in_training_and_certification(bench: Bench, tmp_path: Path) -> None:
    # The last step keeps .9^3 of the image: noise of .305.
    unet_ = f"unet={saved(tmp_path, diffusers.DDPMScheduler(num_train_timesteps=3, trained_betas=[0.1] * 3))}"
    build(unet_, "timestep_scale=1", sigma=0.3)
    with pytest.raises(BenchError, match=r"sigma 0.31 is above the schedule's last step, 0.305"):
        build(unet_, "timestep_scale=1", sigma=0.31)
    args = ("run", "--defense", "diffusion", "--dataset", TINY, "--out", tmp_path / "runs", "--set", unet_)
    ran = bench(*args, "--set", "timestep_scale=1", "--sigma", 0.5, "--train-sigma", 0.25)
    assert (ran.code, ran.err.splitlines()[-1].count("sigma 0.5 is above the schedule's last step")) == (2, 1)
