import numpy as np

from models.common.scan_plot import heat_map


def test_layers_of_the_plan_are_marked(tmp_path, rng):
    sqnr_db = {"blocks/up": 30 + rng.rand(5, 3), "blocks/down": np.full((5, 3), np.inf)}
    plain = heat_map(sqnr_db, {}, "title", tmp_path / "plain.png").read_bytes()
    marked = heat_map(sqnr_db, {"blocks/down": (1,)}, "title", tmp_path / "marked.png").read_bytes()
    assert plain[:4] == b"\x89PNG" and plain != marked
