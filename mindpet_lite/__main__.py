"""`python -m mindpet_lite` is `mindpet-lite`."""
import sys

from mindpet_lite.cli import main

if __name__ == "__main__":
    sys.exit(main())
