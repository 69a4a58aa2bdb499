"""The double- and single-stream video transformers of Open-Sora 2.0 and HunyuanVideo 1.0."""
