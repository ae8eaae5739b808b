"""Systems in, graphs out: samples, stores, the EMT builder, neighbours, batches, samplers."""

if __name__ != "egnscale.data":
    raise ImportError("`import data` finds a folder of egnscale's source tree; write `import egnscale.data`")
