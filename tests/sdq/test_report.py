import base64
import dataclasses
import html
import html.parser
import io
import re

import numpy as np
import PIL.Image
import pytest

from sdq import report as r
from sdq import video_files
from sdq.plots import COLOURS

VOID = {"meta", "img"}  # HTML elements that are never closed
TIMES = "\N{MULTIPLICATION SIGN}"
RECIPE = r.Recipe(weights="sdq32:16", activations="sdq32:32", reference="bfloat16")


class Page(html.parser.HTMLParser):
    """The tags, attributes and words of a page; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.words += data.split()

    @property
    def text(self):
        return " ".join(self.words)

    def every(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def verdicts(**right):
    """name="rq" where both are right, "r" or "q" where one is, "" where none is."""
    return {k: {"reference": "r" in v, "quantised": "q" in v} for k, v in right.items()}


def clip_of(seed=0, noise=0.1, prompt="a red circle moves left", **right):
    rng = np.random.RandomState(seed)
    reference = rng.uniform(0.3, 0.7, (3, 12, 12, 3)).astype(np.float32)
    quantised = reference + noise * rng.choice([-1, 1], reference.shape).astype(np.float32)
    return r.measure_clip(prompt, reference, quantised, verdicts(**right))


@pytest.fixture(scope="module")
def full():
    """A report with every section; the PSNR of a clip is that of its noise, exactly."""
    return r.Report(
        title="4-bit sampling",
        model="Shapes, 9 M",
        recipe=RECIPE,
        clips=[
            clip_of(0, 0.1, shape="rq", colour="rq", motion="r"),
            clip_of(1, 0.01, "a blue square", shape="q", colour="rq", motion=""),
        ],
        memory=[
            r.Memory(name="attention", reference_bytes=2048, quantised_bytes=576, elements=1024),
            r.Memory(name="norms", reference_bytes=1024, quantised_bytes=1024, elements=512),
        ],
        layer_sqnr_db={"ffn.up": [21.0, 22.5], "ffn.down": [17.25, 19.0]},
        step_sqnr_db=[25.0, 24.0, 18.5],
        noise_floor_db=45.0,
        environment={"command": "sdq report --seed 0", "date": "2026-11-21", "jax": "0.10.2"},
        notes=["Held-out prompts."],
    )


@pytest.fixture(scope="module")
def text(full):
    return r.to_html(full)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def tiles(page_text):
    found = re.findall(
        r'<dt>(.*?)</dt><dd class="value[^"]*">(.*?)</dd>((?:<dd class="below">.*?</dd>)*)',
        page_text,
    )
    return {label: (value, re.findall(r">([^<]+)</dd>", below)) for label, value, below in found}


def test_tiles_sum_the_report_up(text):
    shown = tiles(text)
    # Mean squared errors 0.01 and 0.0001 pool to 0.00505.
    assert shown["PSNR"] == ("23.0 dB", ["worst clip 20.0 dB", "rounding alone 45.0 dB"])
    assert shown["Attributes right"] == ("4 of 6", ["reference 4 of 6"])
    assert shown["Smaller weights"] == (f"1.92{TIMES}", ["from 3 KiB", "to 1.562 KiB"])
    assert shown["Bits per weight"] == ("8.33", ["reference 16"])
    assert set(shown) == {"PSNR", "SSIM", "Attributes right", "Smaller weights", "Bits per weight"}
    low = min(np.mean(clip_of(seed, noise).ssim) for seed, noise in ((0, 0.1), (1, 0.01)))
    assert shown["SSIM"][1] == [f"worst clip {low:.3f}"]


def test_sections_and_what_they_say(page):
    for words in (
        "weights sdq32:16 activations sdq32:32 reference bfloat16",
        f"attention 2 KiB 576 B 3.56{TIMES} 4.50 28.1 %",
        f"norms 1 KiB 1 KiB 1.00{TIMES} 16.00 100.0 %",
        f"Total 3 KiB 1.562 KiB 1.92{TIMES} 8.33 52.1 %",
        "Lowest: ffn.down at depth 0, 17.2 dB",
        "Lowest: step 3 of 3, 18.5 dB",
        "date 2026-11-21 jax 0.10.2",
        "command sdq report --seed 0",
        "Held-out prompts.",
    ):
        assert words in page.text
    linked = {attrs["href"][1:] for attrs in page.every("a")}
    assert linked == {"videos", "memory", "layers", "steps", "words", "environment"}
    assert linked <= {attrs.get("id") for attrs in page.every("section")}


def test_verdicts_are_told_in_words_and_signs(page):
    assert "motion lost ✓ right reference ✗ wrong quantised" in page.text
    assert "shape gained ✗ wrong reference ✓ right quantised" in page.text
    assert "motion ✗ wrong reference ✗ wrong quantised" in page.text
    assert "colour ✓ right reference ✓ right quantised" in page.text


def test_animations_hold_both_videos_and_their_difference(full, page):
    images = page.every("img")
    assert len(images) == 2 * len(full.clips) and all(image["alt"] for image in images)
    for clip, pair, difference in zip(full.clips, images[::2], images[1::2], strict=True):
        pair, difference = frames_of(pair["src"]), frames_of(difference["src"])
        assert (pair[:, :, :12] == video_files.to_uint8(clip.reference_video)).all()
        assert (pair[:, :, 13:] == video_files.to_uint8(clip.quantised_video)).all()
        error = np.abs(clip.quantised_video - clip.reference_video)
        assert np.abs(difference - 255 * r.AMPLIFY * error).max() <= 1


def frames_of(uri):
    data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"), validate=True)
    frames = []
    with PIL.Image.open(io.BytesIO(data)) as image:
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


def test_page_needs_nothing_but_itself(text, page):
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "video"}
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith(("data:image/webp;base64,", "#")), (tag, name)
    without_data = re.sub(r"base64,[\w+/=]+", "", text)
    assert "//" not in without_data and "@import" not in without_data
    urls = set(re.findall(r"url\((.)", without_data))
    assert urls <= {"#"}
    [policy] = [attrs for attrs in page.every("meta") if "http-equiv" in attrs]
    assert policy["content"].startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_ids_are_unique_and_references_resolve(text, page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    references = [a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")]
    references += re.findall(r"url\(#(\w+)\)", text)
    assert references and set(references) <= set(ids)


def test_plots_take_their_colours_from_the_page(page):
    plots = [attrs for attrs in page.every("svg")]
    assert [p["aria-label"].split(",")[0] for p in plots] == [
        *["PSNR in dB over frames", "SSIM over frames"] * 2,
        "SQNR of layers by depth",
        "SQNR in dB over steps",
    ]
    styles = " ".join(attrs.get("style", "") for _, attrs in page.tags)
    assert "currentColor" in styles and "var(--accent)" in styles
    assert not any(stand_in in styles for stand_in in COLOURS)
    assert "17.2" in page.words and "22.5" in page.words  # cells of the layer map


def test_page_is_the_same_every_time(full, text):
    assert r.to_html(full) == text


ATTACK = "<script>alert('x')</script><img src=x onerror=y> \"&quot;$\\frac$ 日"


def test_everything_from_the_caller_is_escaped():
    report = r.Report(
        title=ATTACK,
        model=ATTACK,
        recipe=r.Recipe(weights=ATTACK, activations=ATTACK, reference=ATTACK),
        clips=[
            dataclasses.replace(
                clip_of(), prompt=ATTACK, verdicts={ATTACK: {"reference": True, "quantised": True}}
            )
        ],
        memory=[r.Memory(name=ATTACK, reference_bytes=4, quantised_bytes=1)],
        layer_sqnr_db={ATTACK: [20.0]},
        environment={ATTACK: ATTACK, "command": ATTACK},
        notes=[ATTACK],
    )
    text = r.to_html(report)
    page = Page(text)
    assert not page.every("script") and len(page.every("img")) == 2
    # Every one of them is there in full, as words.
    assert page.text.count(ATTACK) >= 11
    assert html.unescape(re.search("<title>(.*)</title>", text)[1]) == ATTACK


def test_what_is_missing_is_left_out():
    page = Page(r.to_html(r.Report(title="t", model="m", recipe=RECIPE)))
    assert not page.every("svg") and not page.every("img") and not page.every("table")
    assert {attrs["id"] for attrs in page.every("section")} == {"words"}
    assert "PSNR" not in page.text and "Attributes" not in page.text


def test_elements_that_are_unknown_leave_bits_out():
    memory = [
        r.Memory(name="a", reference_bytes=4, quantised_bytes=1, elements=2),
        r.Memory(name="b", reference_bytes=4, quantised_bytes=1),
    ]
    shown = tiles(r.to_html(r.Report(title="t", model="m", recipe=RECIPE, memory=memory)))
    assert shown == {"Smaller weights": (f"4.00{TIMES}", ["from 8 B", "to 2 B"])}


def test_equal_videos_and_numbers_that_are_not_finite_are_said():
    clip = clip_of(noise=0)
    report = r.Report(
        title="t",
        model="m",
        recipe=RECIPE,
        clips=[clip],
        layer_sqnr_db={"up": np.array([20.0, np.nan, np.inf]), "out": [19.0]},
        step_sqnr_db=np.array([20.0, np.nan, 18.0]),
    )
    text = r.to_html(report)
    page = Page(text)
    assert tiles(text)["PSNR"] == ("∞ dB", ["worst clip ∞ dB"])
    assert "no difference" in page.text and "not a number" in page.text
    assert "Lowest: up at depth 1, NaN" in page.text and "Lowest: step 2 of 3, NaN" in page.text
    assert "NaN" in page.words  # the cell of the map; sentences put a full stop behind it

    broken = dataclasses.replace(clip, psnr_db=[20.0, np.nan, 21.0], ssim=[0.9, np.nan, 0.9])
    shown = tiles(r.to_html(dataclasses.replace(report, clips=[clip_of(), broken])))
    assert shown["PSNR"] == ("NaN", ["worst clip NaN"])
    assert shown["SSIM"] == ("NaN", ["worst clip NaN"])


def test_pooled_psnr_is_that_of_the_mean_squared_error():
    assert r.pooled_psnr_db([20, 20]) == pytest.approx(20)
    assert r.pooled_psnr_db([np.inf, 20]) == pytest.approx(20 + 10 * np.log10(2))
    assert r.pooled_psnr_db([np.inf, np.inf]) == np.inf
    assert np.isnan(r.pooled_psnr_db([np.nan, 20]))


def test_wide_videos_are_shrunk_and_it_is_said(rng):
    coarse = rng.uniform(0.2, 0.8, (2, 8, 100, 3)).astype(np.float32)
    wide = coarse.repeat(4, axis=1).repeat(4, axis=2)  # 400 pixels: by a factor of 2
    clip = r.Clip(
        prompt="p", reference_video=wide, quantised_video=wide, psnr_db=[np.inf] * 2, ssim=[1] * 2
    )
    page = Page(r.to_html(r.Report(title="t", model="m", recipe=RECIPE, clips=[clip])))
    assert "Shown at 1/2 of its size" in page.text
    pair = frames_of(page.every("img")[0]["src"])
    shrunk = video_files.to_uint8(coarse).repeat(2, axis=1).repeat(2, axis=2)
    assert np.abs(pair[:, :, :200].astype(int) - shrunk).max() <= 1


def test_write_report_is_atomic(full, tmp_path):
    path = r.write_report(full, tmp_path / "new" / "report.html")
    before = path.read_bytes()
    assert before.startswith(b"<!doctype html>")
    video = full.clips[1].quantised_video.copy()
    video[2, 0, 0, 0] = np.nan
    bad = dataclasses.replace(full.clips[1], quantised_video=video)
    with pytest.raises(ValueError, match=r"quantised video of 'a blue square'.*first in frame 2"):
        r.write_report(dataclasses.replace(full, clips=[full.clips[0], bad]), path)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantised_video": np.zeros((3, 12, 8, 3))}, r"videos are \[3, 12, 12, 3\] and \[3, 12,"),
        ({"psnr_db": [1.0]}, "1 values of psnr_db for 3 frames"),
        ({"ssim": [1.0] * 4}, "4 values of ssim for 3 frames"),
        ({"verdicts": {"size": {"reference": True}}}, r"'size' has the keys \['reference'\]"),
    ],
)
def test_clips_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=f"Clip 'a red circle moves left': .*{message}"):
        dataclasses.replace(clip_of(), **change)
