"""Zero-shot semantic segmentation by optimal transport between pixels and prompts."""
__version__ = "0.1.0"
