"""Tiny random encoders, tokenizers and VAEs in the published formats, built on the spot."""

import torch
import transformers
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from models.text_encoders import HUNYUAN_TEMPLATE

WORDS = ["a", "red", "fox", "runs", "over", "the", "snow", "and", "cat", "looks", "at", "FPS"]
CORPUS = [HUNYUAN_TEMPLATE, *WORDS, "Two ducks & a boat.", "24 4 . , 日本"]


def t5_tokenizer():
    """Unigrams: words and all letters."""
    letters = sorted({letter for text in CORPUS for letter in text})
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS), *letters]
    pieces = list(dict.fromkeys(pieces))
    vocabulary = [(piece, -float(n + 1) / len(piece)) for n, piece in enumerate(pieces)]
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, unk_token="<unk>")


def clip_tokenizer():
    """Bytes, each also at the end of a word, and two merges."""
    letters = list(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "fo", "fox</w>"]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={piece: n for n, piece in enumerate(pieces)},
        merges=[("f", "o"), ("fo", "x</w>")],
        model_max_length=77,
    )


def llama_tokenizer():
    """Byte pairs trained on the template, with LLaMA 3's special tokens."""
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += ["<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(5 * CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[3],
        pad_token=special[4],
        padding_side="right",
    )


def encoders(model, folder):
    """Save a model's encoders in `folder`: networks and tokenizers by their folders."""
    clip = clip_tokenizer()
    clip_network = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=12,
            intermediate_size=24,
            projection_dim=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
        )
    )
    t5 = {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    if model == "wan":
        tokenizer = t5_tokenizer()
        config = transformers.UMT5Config(vocab_size=len(tokenizer), d_model=16, **t5)
        parts = {"text_encoder": (transformers.UMT5EncoderModel(config), "tokenizer", tokenizer)}
    elif model == "open-sora":
        tokenizer = t5_tokenizer()
        config = transformers.T5Config(vocab_size=len(tokenizer), d_model=20, **t5)
        names = "google/t5-v1_1-xxl", "openai/clip-vit-large-patch14"
        parts = {
            names[0]: (transformers.T5EncoderModel(config), names[0], tokenizer),
            names[1]: (clip_network, names[1], clip),
        }
    else:
        tokenizer = llama_tokenizer()
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=20,
            intermediate_size=40,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        parts = {
            "text_encoder": (transformers.LlamaModel(config), "tokenizer", tokenizer),
            "text_encoder_2": (clip_network, "tokenizer_2", clip),
        }
    for name, (network, tokenizer_name, tokenizer) in parts.items():
        randomise(network).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / tokenizer_name)


def vae(model, folder):
    """Save a model's VAE in `folder`/vae: latents of 4 channels, 4 x 8 x 8 pixels each."""
    if model == "wan":
        network = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[-0.7, 0.1, 0.9, 0.4],
            latents_std=[2.8, 1.4, 2.3, 1.6],
        )
    else:
        network = AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        )
    randomise(network).save_pretrained(folder / "vae")


def randomise(network):
    """The same weights anywhere; more than at initialisation, where texts hardly matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1 and "norm" not in name:
                weight.normal_(0, 0.2, generator=generator)
    return network.eval()
