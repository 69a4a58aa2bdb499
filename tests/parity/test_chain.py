"""From a prompt to a video file, with tiny random models in the published formats.

Against diffusers' own pipelines with the same weights and noise, where it has them: embeddings,
latents in float32 and pixels. Needs the parity extra.
"""

import itertools
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import embeddings, generate, jobs, latents, pixels
from models.published import PUBLISHED
from models.text_encoders import ENCODERS, HAVE_NEGATIVE, encode
from scripts._mmdit_goldens import diffusers_mmdit, packed, unpacked
from scripts.make_goldens import diffusers_wan
from sdq.cli import main
from tests.models.mmdit import test_parity as mmdit
from tests.models.test_generate import CASES, LATENTS, LIKE, know_the_tiny
from tests.models.wan import test_parity as wan

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
torch = pytest.importorskip("torch", reason="needs the parity extra")
diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")

PROMPTS = ["a red  fox &amp; the snow", "Two ducks look at a boat"]
NEGATIVE = "cat"
SIZE = (32, 16, 9)
STEPS = {"wan": 4, "open-sora": 13, "hunyuanvideo": 4}  # Open-Sora's guidance rests at 11


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    know_the_tiny(monkeypatch)


@pytest.fixture(scope="module", params=CASES)
def chain(request, tmp_path_factory):
    """A model's name and the folder of its parts, "transformer" as an sdq checkpoint in 4 bits."""
    from tests.parity import tiny_pipelines

    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    tiny_pipelines.encoders(name, folder)
    tiny_pipelines.vae(name, folder)
    write = wan.checkpoint if name == "wan" else mmdit.checkpoint
    golden = wan.golden("t2v-norms-1") if name == "wan" else mmdit.golden(name)
    layout = "open-sora" if name == "open-sora" else "diffusers"
    source = write(CASES[name], layout, golden, folder / "transformer.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        know_the_tiny(patch)
        for how in ("quantize", "convert"):
            what = [how, str(source), "--model", f"tiny-{name}", "--out", str(folder / how)]
            assert main([*what, "--json"]) == 0
        embeddings.save(
            encode(f"tiny-{name}", PROMPTS, folder, negative=negative_of(name)),
            folder / "texts.safetensors",
        )
    return name, folder


def negative_of(name):
    return NEGATIVE if name in HAVE_NEGATIVE else ""


def test_from_prompt_to_video_file(chain, tmp_path):
    """All four commands, in 4 bits."""
    name, folder = chain
    model = ["--model", f"tiny-{name}"]
    texts, out, video = tmp_path / "texts.safetensors", tmp_path / "out", tmp_path / "video.mp4"
    encoding = ["encode", *model, "--encoders", str(folder), "--out", str(texts)]
    assert main([*encoding, "--prompt", PROMPTS[0], "--negative", negative_of(name)]) == 0
    sampling = ["sample", *model, "--checkpoint", str(folder / "quantize"), "--steps", "2"]
    sampling += ["--embeddings", str(texts), "--size", "32x16x9", "--out", str(out)]
    assert main(sampling) == 0
    (file,) = out.iterdir()
    assert main(["decode", str(file), "--vae", str(folder), "--out", str(video)]) == 0
    frames = frames_of(video)
    assert frames.shape == (9, 16, 32, 3) and frames.std() > 5


def test_what_is_not_read_is_told(chain):
    name, folder = chain
    notes = []
    encode(f"tiny-{name}", ["fox " * 600], folder, on_note=notes.append)
    assert [note.split(":")[0] for note in notes] == [one.name for one in ENCODERS[name]]
    assert all(" tokens of 'fox fox" in note for note in notes)


def frames_of(video):
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(video)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    read = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(read, np.uint8).reshape(-1, SIZE[1], SIZE[0], 3)


def test_embeddings_are_those_of_the_pipeline(chain):
    name, folder = chain
    found = embeddings.load(folder / "texts.safetensors")
    pipeline = pipeline_of(name, folder)
    with torch.no_grad():
        if name == "wan":
            text, negative = pipeline.encode_prompt(
                PROMPTS, 2 * [NEGATIVE], max_sequence_length=512
            )
            expected = {"text": text}
            np.testing.assert_allclose(found.negative["text"], negative[:1], atol=1e-5)
            lengths = [int((row != 0).any(-1).sum()) for row in text]
            assert lengths[0] != lengths[1] and max(lengths) < 512
        elif name == "open-sora":
            said = [f"{prompt}. 24 FPS. 4 motion score." for prompt in PROMPTS]
            expected = {
                "text": pipeline._get_t5_prompt_embeds(said, max_sequence_length=512),
                "pooled": pipeline._get_clip_prompt_embeds(said),
            }
            negative = pipeline._get_t5_prompt_embeds([NEGATIVE], max_sequence_length=512)
            np.testing.assert_allclose(found.negative["text"], negative, atol=1e-5)
        else:
            text, pooled, mask = pipeline.encode_prompt(PROMPTS)
            expected = {"text": text, "pooled": pooled, "text_lengths": mask.sum(1)}
            assert found.arrays["text_lengths"].dtype == np.int32
            assert 0 < mask.sum(1).min() < mask.sum(1).max() < 256
    assert set(found.arrays) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(found.arrays[key], value.numpy(), atol=1e-5, err_msg=key)
        assert np.abs(np.diff(found.arrays[key].astype(np.float32), axis=0)).max() > 0.01


def test_latents_and_pixels_are_those_of_the_pipeline(chain, tmp_path):
    """In float32, not quantised."""
    name, folder = chain
    job = jobs.Job(
        model=f"tiny-{name}",
        checkpoint=folder / "convert",
        embeddings=folder / "texts.safetensors",
        size=SIZE,
        out=tmp_path,
        steps=STEPS[name],
        dtype=jnp.float32,
    )
    with jax.default_matmul_precision("highest"):
        file = generate.run(job)[1]
    found, facts = latents.load(file)
    x = np.array(generate._noise(job, jobs.plan(job), 1))
    if name == "open-sora":
        expected = open_sora_latents(folder, x)
    else:
        pipeline = pipeline_of(name, folder)
        arguments = {
            "prompt": PROMPTS[1],
            "width": SIZE[0],
            "height": SIZE[1],
            "num_frames": SIZE[2],
            "num_inference_steps": STEPS[name],
            "latents": torch.from_numpy(x).movedim(-1, 1),
        }
        if name == "wan":
            arguments["negative_prompt"] = NEGATIVE
        expected = pipeline(**arguments, output_type="latent").frames.movedim(1, -1).numpy()
        frames = pipeline(**arguments, output_type="np").frames
        ours = pixels.decoded(expected, folder / "vae", PUBLISHED[LIKE[name]].vae)
        # Un-normalising rounds otherwise, which a VAE with random weights magnifies.
        np.testing.assert_allclose(ours.clip(0, 1), frames, atol=1e-4)
        assert frames.std() > 0.02 and frames.shape == (1, 9, 16, 32, 3)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert facts["prompt"] == PROMPTS[1]


def pipeline_of(name, folder):
    """diffusers' pipeline of these parts, its scheduler as published."""
    if name == "open-sora":  # not in diffusers; its encoders are FLUX's
        clip, t5 = folder / "openai/clip-vit-large-patch14", folder / "google/t5-v1_1-xxl"
        return diffusers.FluxPipeline(
            scheduler=None,
            vae=None,
            transformer=None,
            text_encoder=transformers.CLIPTextModel.from_pretrained(clip),
            tokenizer=transformers.CLIPTokenizer.from_pretrained(clip),
            text_encoder_2=transformers.T5EncoderModel.from_pretrained(t5),
            tokenizer_2=transformers.AutoTokenizer.from_pretrained(t5),
        )
    parts = {"tokenizer": transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")}
    if name == "wan":
        pipeline = diffusers.WanPipeline(
            **parts,
            text_encoder=transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
            vae=diffusers.AutoencoderKLWan.from_pretrained(folder / "vae"),
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=diffusers_wan(CASES[name]),
        )
    else:
        tokenizer_2 = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        pipeline = diffusers.HunyuanVideoPipeline(
            **parts,
            text_encoder=transformers.LlamaModel.from_pretrained(folder / "text_encoder"),
            text_encoder_2=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder_2"),
            tokenizer_2=tokenizer_2,
            vae=diffusers.AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae"),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=diffusers_mmdit(CASES[name]),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_sora_latents(folder, x):
    """The loop of Open-Sora 2.0 for text to video, around FLUX: three passes a step, Euler."""
    config, texts = CASES["open-sora"].config, embeddings.load(folder / "texts.safetensors")
    network, steps = diffusers_mmdit(CASES["open-sora"]), STEPS["open-sora"]
    frames, height, width = LATENTS
    alpha = (1 + 2 / 3840 * (height * width / 4 - 256)) * frames**0.5
    t = np.linspace(1, 0, steps + 1)
    t = alpha * t / (1 + (alpha - 1) * t)
    grid = np.indices(config.grid(LATENTS)).reshape(3, -1).T.copy()
    nothing = np.zeros((1, *LATENTS, config.cond_channels), np.float32)

    def predict(x, arrays, row, now):
        tokens = np.concatenate([packed(video, config.patch) for video in (x, nothing)], axis=-1)
        with torch.no_grad():
            (out,) = network(
                hidden_states=torch.from_numpy(tokens),
                timestep=torch.tensor([now], dtype=torch.float32),
                encoder_hidden_states=torch.from_numpy(arrays["text"][row : row + 1]),
                pooled_projections=torch.from_numpy(arrays["pooled"][row : row + 1]),
                img_ids=torch.from_numpy(grid),
                txt_ids=torch.zeros(512, 3),
                return_dict=False,
            )
        return unpacked(out.numpy(), config, LATENTS)

    for step, (now, then) in enumerate(itertools.pairwise(t)):
        cond, uncond = predict(x, texts.arrays, 1, now), predict(x, texts.negative, 0, now)
        uncond_2 = uncond  # its condition is zeros here too
        of_image, of_text = (scale if step < 10 or step % 2 == 0 else 1.0 for scale in (3.0, 7.5))
        v = uncond_2 + of_image * (uncond - uncond_2) + of_text * (cond - uncond)
        x = (x + (then - now) * v).astype(np.float32)
    return x
