"""How it is spread: engine, checkpoints, averages of weights. Knows no model and no data set."""

if __name__ != "egnscale.scaling":
    raise ImportError("`import scaling` finds a folder of egnscale's source tree; write `import egnscale.scaling`")
