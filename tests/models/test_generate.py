"""Published models from made-up embeddings to latents; tiny ones, through the command line."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdq
from models import embeddings, generate, jobs, latents
from models.common import recipes
from models.common.full_path import FullPath
from models.common.layers import Ops
from models.common.quantizer import InputQuantizer
from models.common.sampler import Sampler, guided, noise, sample, timesteps
from models.jobs import Job
from models.mmdit.config import SIZES as MMDIT_SIZES
from models.mmdit.modeling import MMDiT
from models.published import PUBLISHED, latent_size, published
from models.wan.config import SIZES as WAN_SIZES
from models.wan.modeling import Wan
from scripts._mmdit_goldens import MMDIT
from scripts.make_goldens import WAN
from sdq.cli import main
from tests.models.mmdit import test_parity as mmdit
from tests.models.wan import test_parity as wan

CASES = {"wan": WAN["t2v-norms-1"], **{name: MMDIT[name] for name in ("open-sora", "hunyuanvideo")}}
LIKE = {"wan": "wan2.1-t2v-1.3b", "open-sora": "open-sora-2.0", "hunyuanvideo": "hunyuanvideo"}
RECIPES = {"wan": "int4", "open-sora": "bf16", "hunyuanvideo": "int4"}  # quickly compiled
SIZE, LATENTS = "32x16x9", (3, 2, 4)
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of tiny models, named after their cases; "wan-low" is another Wan in "wan"."""
    root = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        know_the_tiny(patch)
        for name, case in CASES.items():
            write = wan.checkpoint if name == "wan" else mmdit.checkpoint
            golden = wan.golden("t2v-norms-1") if name == "wan" else mmdit.golden(name)
            layout = "open-sora" if name == "open-sora" else "diffusers"
            source = write(case, layout, golden, root / f"{name}.safetensors")
            how = (
                ["convert"] if RECIPES[name] == "bf16" else ["quantize", "--recipe", RECIPES[name]]
            )
            what = [str(source), "--model", f"tiny-{name}", "--out", str(root / name), "--json"]
            assert main([*how, *what]) == 0
            embeddings.save(made_up(name, case.config), root / f"{name}-texts.safetensors")
    return root


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    know_the_tiny(monkeypatch)


def know_the_tiny(patch):
    for name, case in CASES.items():
        sizes = WAN_SIZES if name == "wan" else MMDIT_SIZES
        patch.setitem(sizes, f"tiny-{name}", case.config)
        patch.setitem(PUBLISHED, f"tiny-{name}", PUBLISHED[LIKE[name]])


def made_up(name, config, prompts=("A red fox, running", "日本")):
    random = np.random.RandomState(2)

    def arrays(rows):
        found = {"text": random.standard_normal((rows, 7, config.text_width))}
        if name != "wan":
            found["pooled"] = random.standard_normal((rows, config.pooled_width))
        found = {key: value.astype(np.float32) for key, value in found.items()}
        if name == "hunyuanvideo":
            found["text_lengths"] = np.arange(5, 5 + rows, dtype=np.int32)
        return found

    return embeddings.Embeddings(
        prompts=prompts,
        arrays=arrays(len(prompts)),
        negative={} if name == "hunyuanvideo" else arrays(1),
        text=PUBLISHED[LIKE[name]].text,
    )


def command(folder, name, out, *more):
    return [
        *("sample", "--model", f"tiny-{name}", "--checkpoint", str(folder / name)),
        *("--embeddings", str(folder / f"{name}-texts.safetensors"), "--size", SIZE),
        *("--steps", str(STEPS), "--out", str(out), *more),
    ]


def whole(folder, name, number):
    """The same in one scan."""
    config, known = CASES[name].config, PUBLISHED[LIKE[name]]
    sampler = Sampler(steps=STEPS, shift=known.shift(LATENTS), solver=known.solver)
    texts = embeddings.load(folder / f"{name}-texts.safetensors")
    inputs_of = () if RECIPES[name] == "bf16" else recipes.named(RECIPES[name]).inputs
    model = (Wan if name == "wan" else MMDiT)(config, Ops(quantizer=InputQuantizer(inputs_of)))
    params, ts = sdq.load(folder / name), jnp.asarray(timesteps(sampler))
    extra = {}
    if name == "hunyuanvideo":
        extra["guidance"] = jnp.full(1, known.guidance, jnp.float32)
    if name == "open-sora":
        extra["cond"] = jnp.zeros((1, *LATENTS, config.cond_channels))

    def inputs(arrays, row):
        return {**{key: jnp.asarray(x[row : row + 1]) for key, x in arrays.items()}, **extra}

    def predict(x, sigma, step, state, condition):
        t = jnp.broadcast_to(ts[step], len(x))
        return model.apply({"params": params}, x, t, **condition), state

    condition, scale = inputs(texts.arrays, number), 1 if name == "hunyuanvideo" else known.guidance
    negative = inputs(texts.negative, 0) if texts.negative else None
    velocity = guided(predict, condition, negative, scale)
    key = jax.random.fold_in(jax.random.key(0), number)
    x = noise(key, (1, *LATENTS, config.out_channels))
    return np.asarray(jax.jit(lambda x: sample(velocity, x, sampler)[0])(x))


@pytest.mark.parametrize("name", CASES)
def test_the_latents_of_one_scan(folder, tmp_path, capsys, name):
    assert main(command(folder, name, tmp_path)) == 0
    shown = capsys.readouterr()
    files = [tmp_path / f"{stem}.safetensors" for stem in ("1-a-red-fox-running", "2")]
    assert shown.out.split() == [str(file) for file in files]
    assert re.search(rf"{RECIPES[name]}; products: plain, since kernels: needs", shown.err)
    for number, file in enumerate(files):
        found, facts = latents.load(file)
        assert found.shape == (1, *LATENTS, CASES[name].config.out_channels)
        assert facts["size"] == [32, 16, 9] and facts["seed"] == 0 and facts["steps"] == STEPS
        assert facts["prompt"] == ("A red fox, running", "日本")[number]
    assert np.abs(latents.load(files[0])[0] - found).max() > 0.1
    # The same program but for the scan around it; bf16 inside.
    expected = whole(folder, name, number=1)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_attention_of_the_recipe_sees_no_padding(folder, tmp_path):
    job = Job(
        model="tiny-hunyuanvideo",
        checkpoint=folder / "hunyuanvideo",
        embeddings=folder / "hunyuanvideo-texts.safetensors",
        size=(32, 16, 9),
        out=tmp_path,
    )
    plan = dataclasses.replace(jobs.plan(job), recipe=recipes.named("plain_full_path"))
    assert generate._loaded(plan)[0].attention == FullPath()
    arrays = {key: x[:1] for key, x in embeddings.load(job.embeddings).arrays.items()}
    inputs = generate._inputs(arrays, plan)
    assert "text_lengths" not in inputs
    np.testing.assert_array_equal(inputs["text"], arrays["text"][:, :5])
    kept = generate._inputs(arrays, jobs.plan(job))
    assert kept["text"].shape[1] == 7 and kept["text_lengths"] == 5


def test_interrupted_it_goes_on_to_the_same_bits(folder, tmp_path, capsys, monkeypatch):
    calls, original = [], generate._advance

    def stop_at(last):
        def advance(*args, **kwargs):
            calls.append(1)
            if len(calls) == last:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(generate, "_advance", advance)

    out = tmp_path / "interrupted"
    assert main(command(folder, "wan", tmp_path / "whole")) == 0
    stop_at(STEPS + 2)  # the second step of the second prompt
    assert main(command(folder, "wan", out)) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert (out / generate.UNFINISHED).exists() and len(list(out.iterdir())) == 2
    assert main(command(folder, "wan", out, "--seed", "1")) == 2
    assert "seed was 0, now 1; give another folder" in capsys.readouterr().err
    calls.clear()
    stop_at(100)
    assert main(command(folder, "wan", out)) == 0
    assert len(calls) == STEPS - 1
    assert not (out / generate.UNFINISHED).exists()
    for file in (tmp_path / "whole").iterdir():
        np.testing.assert_array_equal(latents.load(out / file.name)[0], latents.load(file)[0])
    calls.clear()
    assert main(command(folder, "wan", out)) == 0 and not calls


def test_what_is_left_of_another_sampling_is_not_gone_on_with(
    folder, tmp_path, monkeypatch, capsys
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(latents, "save", stop)  # after the last step of the first prompt
        during.setattr(generate, "SAVE_EVERY", 0.0)
        assert main(command(folder, "wan", tmp_path)) == 130
    assert [file.name for file in tmp_path.iterdir()] == [generate.UNFINISHED]
    assert main(command(folder, "wan", tmp_path, "--steps", "4")) == 2
    assert "of another sampling: steps was 3, now 4; remove it" in capsys.readouterr().err
    left = (tmp_path / generate.UNFINISHED).read_bytes()
    assert main(command(folder, "wan", tmp_path)) == 0
    # Killed between writing latents and removing this:
    (tmp_path / generate.UNFINISHED).write_bytes(left)
    (tmp_path / "2.safetensors").unlink()
    assert main(command(folder, "wan", tmp_path)) == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_saved_while_it_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "SAVE_EVERY", 0.0)
    saved, original = [], latents.save_unfinished
    monkeypatch.setattr(
        latents,
        "save_unfinished",
        lambda between, done, **where: saved.append(done) or original(between, done, **where),
    )
    assert main(command(folder, "wan", tmp_path)) == 0
    assert saved == [1, 2, 1, 2]


def test_two_experts(folder, tmp_path, monkeypatch):
    """Each in its range of noise, with its guidance: equal ones are one."""
    two = dataclasses.replace(PUBLISHED["tiny-wan"], boundary=0.7, guidance_low=3.0)
    monkeypatch.setitem(PUBLISHED, "tiny-wan", two)
    sampler = Sampler(steps=STEPS, shift=3.0, solver="unipc")
    assert two.is_high(sampler) == [True, True, False]
    assert two.scales(sampler, 4.0, 3.0) == [4.0, 4.0, 3.0]
    both = ["--low-noise", str(folder / "wan"), "--guidance", "5"]
    assert main(command(folder, "wan", tmp_path, *both)) == 0
    found, facts = latents.load(tmp_path / "2.safetensors")
    assert facts["guidance_low"] == 5 and len(facts["checkpoint"]) == 2
    expected = whole(folder, "wan", 1)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_guidance_rests_in_open_sora():
    sampler = Sampler(steps=14, solver="euler")
    scales = PUBLISHED["open-sora-2.0"].scales(sampler, 7.5, 7.5)
    assert scales == [7.5] * 11 + [1.0, 7.5, 1.0]


def test_defaults_are_the_published_ones():
    assert latent_size("wan2.1-t2v-14b", (832, 480, 81)) == (21, 60, 104)
    assert published("wan2.1-t2v-14b").shift((21, 60, 104)) == 3
    assert published("wan2.1-t2v-14b").shift((21, 90, 160)) == 5
    assert latent_size("wan2.2-ti2v-5b", (1280, 704, 121)) == (31, 44, 80)
    # 256px: 24 x 42 tokens of 16 x 16 pixels a frame, 33 frames.
    assert published("open-sora-2.0").shift((33, 24, 42)) == pytest.approx(5.7326, abs=1e-3)
    with pytest.raises(ValueError, match="makes videos of an image; of text do wan"):
        published("wan2.1-i2v-14b")


@pytest.mark.parametrize(
    "change, message",
    [
        (["--model", "tiny-wann"], "unknown model 'tiny-wann'; there is shapes, wan2.1"),
        (["--size", "30x16x9"], "not 30x16x9, but 32x16x9"),
        (["--size", "32x16x10"], "not 32x16x10, but 32x16x9"),
        (["--prompt", "a fox"], "--prompt: of the bundled model"),
        (["--recipe", "plain"], "--recipe: of the bundled model"),
        (["--model", "shapes"], "--embeddings: of published models"),
        (["--steps", "0"], "steps: expected a whole number from 1 up"),
        (["--guidance", "nan"], "guidance: expected a finite number, got nan"),
        (["--solver", "heun"], "solver: expected one of euler, unipc"),
        (["--low-noise", "x"], "low_noise: tiny-wan is one network"),
        (["--model", "tiny-open-sora"], "holds 'tiny-wan', not 'tiny-open-sora'"),
        (["--checkpoint", "nowhere"], "so .*nowhere is no sdq checkpoint"),
        (["--embeddings", "nowhere"], "nowhere: no such file"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(folder, tmp_path, capsys, change, message):
    assert main([*command(folder, "wan", tmp_path / "out"), *change]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and re.search(message, error[0])
    assert not (tmp_path / "out").exists()


def test_size_is_three_numbers(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(command(folder, "wan", tmp_path, "--size", "832x480"))
    assert "expected WIDTHxHEIGHTxFRAMES, got '832x480'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda e: dataclasses.replace(e, text="open-sora"), "of the encoders of open-sora"),
        (lambda e: dataclasses.replace(e, negative={}), "guidance needs a negative prompt"),
        (
            lambda e: dataclasses.replace(e, arrays={"text": e.arrays["text"][..., 1:]}),
            "text has 15 channels, tiny-wan reads 16",
        ),
        (
            lambda e: dataclasses.replace(e, arrays={"text": e.arrays["text"] * np.inf}),
            "text: holds NaN or Inf",
        ),
        (
            lambda e: dataclasses.replace(e, arrays={"text": e.arrays["text"][:1]}),
            "text: 1 rows for 2 prompts",
        ),
    ],
)
def test_embeddings_that_do_not_fit(folder, tmp_path, capsys, change, message):
    file = tmp_path / "texts.safetensors"
    embeddings.save(change(made_up("wan", CASES["wan"].config)), file)
    assert main(command(folder, "wan", tmp_path / "out", "--embeddings", str(file))) == 2
    assert message in capsys.readouterr().err


def test_other_files_are_no_embeddings(folder, tmp_path, capsys):
    assert main(command(folder, "wan", tmp_path, "--embeddings", str(folder / "wan.safetensors")))
    assert "no embeddings that `sdq encode` wrote" in capsys.readouterr().err


def test_a_step_without_numbers_is_named(folder, tmp_path, capsys):
    params = sdq.load(folder / "wan")
    params["head"]["bias"] = params["head"]["bias"].at[0].set(jnp.nan)
    sdq.save(tmp_path / "nan", params, metadata={"model": "tiny-wan", "recipe": "int4"})
    more = ["--checkpoint", str(tmp_path / "nan")]
    assert main(command(folder, "wan", tmp_path / "out", *more)) == 2
    assert "step 1 of 3: the velocity holds NaN or Inf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_latents_tell_their_facts(folder, tmp_path):
    with pytest.raises(ValueError, match="no latents that `sdq sample` wrote"):
        latents.load(folder / "wan.safetensors")
    latents.save(jnp.zeros((1, 1, 2, 2, 4)), {"model": "x"}, tmp_path / "x.safetensors")
    assert json.dumps(latents.facts_of(tmp_path / "x.safetensors")) == '{"model": "x"}'
