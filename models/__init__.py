"""What is computed: the graph record, its verbs, GemNet-T. Imports torch and nothing of ours."""

if __name__ != "egnscale.models":
    raise ImportError("`import models` finds a folder of egnscale's source tree; write `import egnscale.models`")
