"""How it is spread: layout, partition, exchanges, engine, checkpoints. Knows no model and no data set."""

if __name__ != "egnscale.scaling":
    raise ImportError("`import scaling` finds a folder of egnscale's source tree; write `import egnscale.scaling`")
