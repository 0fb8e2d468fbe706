"""The demo page as a Space on the Hugging Face hub (docs/demo.md): a copy of this file beside README.md, as `app.py`.

The Space's variable MODEL names what draws: a repository in the hub's form, ORG/NAME.
"""

import os

from autoregressive.demo.main import main
from utils.program import UserError, run


def serve() -> None:
    model = os.environ.get("MODEL")
    if not model:
        raise UserError("no model is named; set the Space's variable MODEL to a repository of weights, ORG/NAME.")
    main(["--pretrained", model, "--host", "0.0.0.0", "--port", "7860"])


if __name__ == "__main__":
    run(serve)
