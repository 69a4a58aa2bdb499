import pytest

from sdq import cli

PROMPT = "a large red circle moves left over a blue checkerboard"


def sample(*options):
    return cli.main(["sample", "--prompt", PROMPT, "--steps", "1", *map(str, options)])


def test_sample_writes_videos_strips_and_a_report(tmp_path, capsys):
    assert sample("--compare", "bf16", "--out", tmp_path) == 0
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == [
        "1-large-red-circle-beside-bf16.webp",
        "1-large-red-circle.png",
        "1-large-red-circle.webp",
        "report.html",
    ]
    assert sorted(line.rpartition("/")[2] for line in capsys.readouterr().out.split()) == written
    page = (tmp_path / "report.html").read_text()
    assert PROMPT in page and "sdq32:16" in page


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", "a huge red circle moves left over a blue wall"], "unknown words"),
        (["--model", "wan3"], "unknown model 'wan3'; there is shapes"),
        (["--weights", "int3"], "int3"),
        (["--steps", "0"], "steps: expected a whole number"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, capsys, options, message):
    assert sample("--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("sdq sample: ") and message in error
    assert not (tmp_path / "out").exists()
