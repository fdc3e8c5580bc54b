"""Zero-shot semantic segmentation by optimal transport between pixels and prompts."""
__version__ = "0.2.0"
IGNORE = 255  # label of a pixel without a class


def __getattr__(name):
    """`otseg.load` and what it returns, imported when they are asked for: `import otseg` stays fast."""
    if name in ("load", "Segmenter", "Result"):
        from otseg import predict

        return getattr(predict, name)
    raise AttributeError(f"module 'otseg' has no attribute {name!r}")
