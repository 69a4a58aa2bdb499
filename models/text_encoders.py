"""Prompts to embeddings through transformers' encoders; needs the extra `encode`.

What is done to a prompt is what each model's own pipeline does. Encoders come from local folders,
one after the other; nothing is downloaded.
"""

import dataclasses
import gc
import html
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from models.common.progress import step_bar
from models.embeddings import Embeddings
from models.published import published

# Where an encoder and its tokenizer may lie: as in diffusers' pipelines, or as Open-Sora 2.0 came.
PLACES = (
    ("text_encoder", "tokenizer"),
    ("text_encoder_2", "tokenizer_2"),
    ("google/t5-v1_1-xxl", "google/t5-v1_1-xxl"),
    ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14"),
)

HUNYUAN_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following "
    "aspects: 1. The main content and theme of the video.2. The color, shape, size, texture, "
    "quantity, text, and spatial relationships of the objects.3. Actions, events, behaviors "
    "temporal relationships, physical movement changes of the objects.4. background environment, "
    "light, style and atmosphere.5. camera angles, movements, and transitions used in the video:"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
HUNYUAN_CROP = 95  # tokens of the template before the prompt, the beginning of the text included
HUNYUAN_LAYER = -3  # of the hidden states: two layers are skipped
OPEN_SORA_FPS, OPEN_SORA_MOTION = 24, 4  # what prompts say by default


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """A network that reads text, and what a model takes of it.

    Attributes:
      name: for messages.
      class_name: in transformers.
      kinds: `model_type`s of its config.
      tokens: to which texts are cut or padded.
      outputs: `(hidden states or output of the network, attention mask [1, tokens])` -> arrays by
        the argument of the model, a row.
      reads_mask: whether the network is told which tokens are padding.
      prefix: tokens before the first of `tokens`.
      prepare: what becomes of a text first.
    """

    name: str
    class_name: str
    kinds: tuple[str, ...]
    tokens: int
    outputs: Callable[[Any, Any], dict[str, Any]]
    reads_mask: bool = False
    prefix: int = 0
    prepare: Callable[[str], str] = str


def encode(
    model: str,
    prompts: Sequence[str],
    folder: str | os.PathLike,
    *,
    negative: str = "",
    on_note: Callable[[str], None] = lambda note: None,
) -> Embeddings:
    """What a model reads of prompts, and of a text that guidance leads away from.

    Args:
      model: one of `published.PUBLISHED`.
      prompts: any number but none.
      folder: holds the encoders and tokenizers (PLACES).
      negative: text for those models that have one.
      on_note: called with what is not read of a text that is too long.
    Raises:
      FileNotFoundError: an encoder or its tokenizer is not there.
      ValueError: an unknown model, no prompt, a negative one for a model that reads none, numbers
        that are not finite.
      ImportError: the extra is not installed.
    """
    text = published(model).text
    if not prompts:
        raise ValueError("prompt: none given")
    guided = text in HAVE_NEGATIVE
    if negative and not guided:
        raise ValueError(f"negative: {model} reads none; its guidance is a number that it is told")
    folder = pathlib.Path(folder)
    places = [(encoder, *_place(folder, encoder)) for encoder in ENCODERS[text]]
    _import_extra()
    texts = [*prompts, *([negative] if guided else [])]
    arrays: dict[str, list[np.ndarray]] = {}
    with step_bar("encode", len(places) * len(texts)) as one_done:
        for encoder, network, tokenizer in places:
            for row in _rows(encoder, network, tokenizer, _said(text, prompts, texts), on_note):
                for name, value in row.items():
                    arrays.setdefault(name, []).append(value)
                one_done(None)
    stacked = {name: np.concatenate(rows) for name, rows in arrays.items()}
    for name, array in stacked.items():
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"{name}: the encoder gives NaN or Inf; are its weights whole?")
    return Embeddings(
        prompts=list(prompts),
        arrays={name: array[: len(prompts)] for name, array in stacked.items()},
        negative={name: array[-1:] for name, array in stacked.items()} if guided else {},
        text=text,
        negative_prompt=negative if guided else "",
    )


def _said(text: str, prompts: Sequence[str], texts: Sequence[str]) -> list[str]:
    """What the encoders are told; negative texts stay as they are."""
    if text != "open-sora":
        return list(texts)
    return [*map(_with_motion, prompts), *texts[len(prompts) :]]


def _rows(
    encoder: Encoder,
    network: pathlib.Path,
    tokenizer: pathlib.Path,
    texts: Sequence[str],
    on_note: Callable[[str], None],
) -> Iterator[dict[str, np.ndarray]]:
    """Arrays `[1, ...]` of each text."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenize = transformers.AutoTokenizer.from_pretrained(tokenizer)
    cls = getattr(transformers, encoder.class_name)
    # In the numbers that are stored: large encoders are published in 16 bits.
    run = cls.from_pretrained(network, dtype="auto").to(device).eval()
    most = encoder.prefix + encoder.tokens
    for text in texts:
        prepared = encoder.prepare(text)
        if (wanted := len(tokenize(prepared, verbose=False).input_ids)) > most:
            on_note(f"{encoder.name}: reads {most} of {wanted} tokens of {text[:40]!r}...")
        tokens = tokenize(
            prepared,
            max_length=most,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(device)
        mask = tokens.attention_mask
        with torch.no_grad():
            found = run(
                input_ids=tokens.input_ids,
                attention_mask=mask if encoder.reads_mask else None,
                output_hidden_states=True,
            )
        yield {name: _numpy(value) for name, value in encoder.outputs(found, mask).items()}
    del run
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _numpy(value: Any) -> np.ndarray:
    """A tensor in its own dtype; numpy itself knows no bfloat16."""
    value = value.detach().cpu()
    if str(value.dtype) == "torch.bfloat16":
        return value.float().numpy().astype(ml_dtypes.bfloat16)
    return value.numpy()


def _place(folder: pathlib.Path, encoder: Encoder) -> tuple[pathlib.Path, pathlib.Path]:
    """Folders of an encoder and of its tokenizer, known by the kind that its config tells."""
    seen = []
    for network, tokenizer in PLACES:
        config = folder / network / "config.json"
        if not config.is_file():
            continue
        kind = json.loads(config.read_text()).get("model_type")
        if kind not in encoder.kinds:
            seen.append(f"{network} is {kind}")
            continue
        if not (folder / tokenizer).is_dir():
            raise FileNotFoundError(f"{folder / tokenizer}: no tokenizer of {folder / network}")
        return folder / network, folder / tokenizer
    known = ", ".join(network for network, _ in PLACES)
    raise FileNotFoundError(
        f"{folder}: no {encoder.name} in any of {known}" + "".join(f"; {one}" for one in seen)
    )


def _import_extra() -> None:
    try:
        import ftfy  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f'sdq encode needs pip install "sdq[encode]" ({error})') from error


def _cleaned(text: str) -> str:
    """Mended, unescaped, one space between words: what Wan's pipeline does first."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def _with_motion(text: str) -> str:
    """A sentence with frames a second and how much moves: what Open-Sora's pipeline says."""
    text = text.strip()
    text += "" if text.endswith(".") else "."
    if not re.search(r"\d+ FPS\.$", text):
        text += f" {OPEN_SORA_FPS} FPS."
    return f"{text} {OPEN_SORA_MOTION} motion score."


def _in_template(text: str) -> str:
    return HUNYUAN_TEMPLATE.format(text)


def _zeros_behind(found: Any, mask: Any) -> dict[str, Any]:
    state = found.last_hidden_state
    return {"text": state.masked_fill(mask[..., None] == 0, 0)}


def _after_template(found: Any, mask: Any) -> dict[str, Any]:
    """The prompt's tokens; how many there are instead of a mask."""
    mask = mask[:, HUNYUAN_CROP:]
    if (mask[:, 1:] > mask[:, :-1]).any() or not mask[:, 0].all():
        raise ValueError("tokenizer: expected padding on the right")
    state = found.hidden_states[HUNYUAN_LAYER][:, HUNYUAN_CROP:]
    return {"text": state, "text_lengths": mask.sum(1).int()}


_CLIP = Encoder(
    name="CLIP text encoder",
    class_name="CLIPTextModel",
    kinds=("clip", "clip_text_model"),
    tokens=77,
    outputs=lambda found, mask: {"pooled": found.pooler_output},
)
ENCODERS = {
    "wan": (
        Encoder(
            name="UMT5 encoder",
            class_name="UMT5EncoderModel",
            kinds=("umt5",),
            tokens=512,
            outputs=_zeros_behind,
            reads_mask=True,
            prepare=_cleaned,
        ),
    ),
    "open-sora": (
        Encoder(
            name="T5 encoder",
            class_name="T5EncoderModel",
            kinds=("t5",),
            tokens=512,
            outputs=lambda found, mask: {"text": found.last_hidden_state},
        ),
        _CLIP,
    ),
    "hunyuanvideo": (
        Encoder(
            name="LLaMA",
            class_name="LlamaModel",
            kinds=("llama",),
            tokens=256,
            outputs=_after_template,
            reads_mask=True,
            prefix=HUNYUAN_CROP,
            prepare=_in_template,
        ),
        _CLIP,
    ),
}
HAVE_NEGATIVE = ("wan", "open-sora")
