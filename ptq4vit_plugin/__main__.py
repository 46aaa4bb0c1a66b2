"""`python -m ptq4vit_plugin` is the command `ptq4vit`."""

from .cli import main

main()
