"""The shapes world: captions, clips, detectors, and the small Wan that was trained on them."""
