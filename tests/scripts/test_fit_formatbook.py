import numpy as np
import pytest

from scripts import fit_formatbook
from sdq.formatbook import SDQ32


def test_candidates_are_all_dialects_there_are():
    dialects = fit_formatbook.candidates()
    assert dialects.shape == (6434, 8) and len({tuple(d) for d in dialects.tolist()}) == 6434
    assert (np.diff(dialects, axis=1) > 0).all() and (dialects[:, 0] == 0).all()


@pytest.mark.slow
def test_the_frozen_book_is_reproduced_bit_for_bit():
    assert fit_formatbook.fitted_dialects(log=lambda *_: None) == SDQ32.dialects
