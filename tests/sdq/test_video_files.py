import base64
import errno
import io
import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import PIL.Image
import pytest

from sdq import video_files


@pytest.fixture
def video(rng):
    return rng.uniform(size=(5, 12, 16, 3)).astype(np.float32)


def frames_of(image):
    """uint8 `[F, H, W, 3]`."""
    frames = []
    for i in range(image.n_frames):
        image.seek(i)
        frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


def read(path):
    with PIL.Image.open(path) as image:
        return frames_of(image)


def enlarged(video, scale):
    """By the definition: pixel (i, j) of the file is pixel (i // scale, j // scale)."""
    _, high, wide, _ = video.shape
    rows, columns = np.arange(high * scale) // scale, np.arange(wide * scale) // scale
    return np.rint(255 * video[:, rows][:, :, columns].astype(float)).astype(np.uint8)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_webp_is_lossless_and_keeps_time(array, video, tmp_path):
    path = video_files.write_video(array(video), tmp_path / "new" / "clip.webp", fps=10, scale=3)
    assert (read(path) == enlarged(video, 3)).all()
    with PIL.Image.open(path) as image:
        image.seek(0)
        image.load()
        assert image.info["loop"] == 0 and image.info["duration"] == 100


def test_gif_is_close_and_does_not_flicker(rng, tmp_path):
    video = rng.uniform(size=(5, 24, 24, 3)).astype(np.float32)  # far more than 256 colours
    video[:, 12:] = video[0, 12:]  # still while the other half changes
    path = video_files.write_video(video, tmp_path / "clip.gif", fps=5, scale=2)
    got = read(path)
    # 256 colours in a cube of side 255 are about 255 / 256^(1/3) = 40 apart.
    assert np.abs(got.astype(int) - enlarged(video, 2)).mean() < 20
    # Palettes for each frame, or dithering, would make the still half twinkle.
    assert (got[:, 24:] == got[:1, 24:]).all()


def test_mp4_has_every_frame_and_even_sides(video, tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    smooth = np.broadcast_to(video[:, :1, :1], (5, 11, 15, 3))
    path = video_files.write_video(smooth, tmp_path / "clip.mp4", fps=7.5, scale=1)
    decode = [ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(decode, capture_output=True, check=True)
    for fact in (b"h264", b"yuv420p", b" 16x12", b" 7.50 fps"):
        assert fact in done.stderr
    frames = np.frombuffer(done.stdout, np.uint8).reshape(5, 12, 16, 3)
    # One colour a frame; the codec and its colour space round.
    error = np.abs(frames.astype(int) - np.rint(255 * smooth[:, :1, :1]))
    assert error.max() <= 8


def test_mp4_without_the_extra_names_it(video, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r'pip install "sdq\[video\]"'):
        video_files.write_video(video, tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_mp4_that_ffmpeg_cannot_write_is_an_error(video, tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    failed = subprocess.CompletedProcess([], 1, b"", b"Error closing file: No space left\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(OSError, match=r"ffmpeg failed in .*No space left"):
        video_files.write_video(video, tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_values_beyond_a_screen_are_clipped():
    video = np.array([-0.5, 0.0, 0.5, 1.0, 1.5], np.float32)[:, None, None, None] + np.zeros(3)
    levels = video_files.to_uint8(video.astype(np.float32))[:, 0, 0, 0]
    assert levels.tolist() == [0, 0, 128, 255, 255]
    narrow = video_files.to_uint8(video.astype(ml_dtypes.bfloat16))[:, 0, 0, 0]
    assert narrow.tolist() == levels.tolist()


def test_strip_takes_every_other_frame(video, tmp_path):
    path = video_files.write_strip(video, tmp_path / "strip.png", every=2, scale=2)
    strip = read(path)[0]
    gap, wide = 2 * video_files.GAP, 2 * 16
    assert strip.shape == (24, 3 * wide + 2 * gap, 3)
    for place, frame in enumerate((0, 2, 4)):
        start = place * (wide + gap)
        assert (strip[:, start : start + wide] == enlarged(video, 2)[frame]).all()
    assert (strip[:, wide : wide + gap] == 128).all()


def test_side_by_side_keeps_pixels_and_writes_captions(video):
    plain = video_files.side_by_side([video, 1 - video], scale=4)
    gap = 4 * video_files.GAP
    assert plain.shape == (5, 48, 2 * 64 + gap, 3) and plain.dtype == np.float32
    assert (np.rint(255 * plain[:, :, :64]) == enlarged(video, 4)).all()
    assert (np.rint(255 * plain[:, :, -64:]) == enlarged(1 - video, 4)).all()

    joined = video_files.side_by_side([video, 1 - video], ["reference", ""], scale=4)
    high = joined.shape[1] - 48
    assert (joined[:, high:] == plain).all()
    assert joined[:, :high, :64].min() < 0.4  # ink
    assert (joined[:, :high, 64:] == 1).all()  # none where the caption is empty
    assert (joined[:, :high] == joined[:1, :high]).all()


@pytest.mark.parametrize("label", ["many words that need several lines", "x" * 90])
def test_long_captions_wrap_inside_their_own_clip(label, video):
    short = video_files.side_by_side([video, video], ["a", ""])
    joined = video_files.side_by_side([video, video], [label, ""])
    high = joined.shape[1] - 48
    assert high > short.shape[1] - 48
    ink = joined[0, :high, :64].min(axis=(0, 2)) < 0.5
    assert ink.any() and not ink[[0, -1]].any()
    assert (joined[:, :high, 64:] == 1).all()


def test_data_uri_holds_the_clip(video):
    kind, data = video_files.data_uri(video).split(",")
    assert kind == "data:image/webp;base64"
    with PIL.Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        assert (frames_of(image) == enlarged(video, 1)).all()


BAD_VIDEOS = {
    "uint8": (np.zeros((2, 4, 4, 3), np.uint8), "is uint8, expected float"),
    "list": ([[[[0.0, 0.0, 0.0]]]], "is <class 'list'>, expected float"),
    "rank": (np.zeros((4, 4, 3), np.float32), r"is \[4, 4, 3\], expected \[F, H, W, 3\]"),
    "channels": (np.zeros((2, 4, 4, 1), np.float32), r"is \[2, 4, 4, 1\]"),
    "empty": (np.zeros((0, 4, 4, 3), np.float32), r"is \[0, 4, 4, 3\]"),
    "nan": (np.full((2, 4, 4, 3), np.nan, np.float32), "96 of 96 values .* not finite"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_bad_videos_are_refused_and_nothing_is_written(name, tmp_path):
    video, message = BAD_VIDEOS[name]
    for write, file in (
        (video_files.write_video, "a.webp"),
        (video_files.write_video, "a.mp4"),
        (video_files.write_strip, "a.png"),
    ):
        with pytest.raises(ValueError, match=f"{write.__name__}: .*{message}"):
            write(video, tmp_path / file)
    with pytest.raises(ValueError, match=message):
        video_files.data_uri(video)
    with pytest.raises(ValueError, match=f"side_by_side: .*{message}"):
        video_files.side_by_side([video])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value_is_found(bad, video):
    video[3, 2, 1, 0] = bad
    with pytest.raises(ValueError, match=r"1 of 2880 values .* not finite, the first in frame 3"):
        video_files.data_uri(video)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, p: video_files.write_video(v, p / "a.avi"), "cannot write '.avi', only .webp"),
        (lambda v, p: video_files.write_video(v, p / "a.webp", fps=0), "fps is 0"),
        (lambda v, p: video_files.write_video(v, p / "a.webp", fps=np.nan), "fps is nan"),
        (lambda v, p: video_files.write_video(v, p / "a.gif", scale=0), "scale is 0"),
        (lambda v, p: video_files.write_video(v, p / "a.mp4", scale=1.5), "scale is 1.5"),
        (lambda v, p: video_files.write_strip(v, p / "a.jpg"), "should end in .png"),
        (lambda v, p: video_files.write_strip(v, p / "a.png", every=0), "every is 0"),
        (lambda v, p: video_files.side_by_side([]), "no videos"),
        (lambda v, p: video_files.side_by_side([v], ["a", "b"]), "2 labels for 1 videos"),
        (lambda v, p: video_files.side_by_side([v, v[:2]]), r"different shapes, \[5, 12, 16, 3\]"),
    ],
)
def test_refusals_name_the_argument(call, message, video, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(video, tmp_path)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_said_and_the_old_file_stays(video, tmp_path, monkeypatch):
    path = tmp_path / "clip.webp"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cannot write .*clip\.webp: no space for .* bytes"
    ) as caught:
        video_files.write_video(video, path)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["clip.webp"] and path.read_bytes() == b"old"


def test_folder_that_is_a_file_is_one_clear_error(video, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"cannot write .*clip\.webp: "):
        video_files.write_video(video, tmp_path / "file" / "clip.webp")


def test_import_is_light():
    code = "import sys, sdq.video_files, sdq.video_metrics, sdq.report; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"PIL", "imageio_ffmpeg", "jinja2", "matplotlib"} & set(done.stdout.split())
