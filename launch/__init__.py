"""The top of the house: command line, run configuration, tasks, trainer, ASE calculator."""

if __name__ != "egnscale.launch":
    raise ImportError("`import launch` finds a folder of egnscale's source tree; write `import egnscale.launch`")
