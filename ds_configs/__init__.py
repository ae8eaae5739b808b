"""DeepSpeed JSON files, each valid for DeepSpeed as it stands."""

if __name__ != "egnscale.ds_configs":
    raise ImportError(
        "`import ds_configs` finds a folder of egnscale's source tree; write `import egnscale.ds_configs`"
    )
