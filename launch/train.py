"""The script that launchers start: `deepspeed --hostfile H launch/train.py --config CONFIG.yaml [key=value ...]`."""

import sys

from egnscale.launch.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
