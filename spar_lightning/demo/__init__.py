"""`spar demo`: a local page that segments images with any words, in several modes side by side."""

import os

# gradio reads these when it is imported, and when it asks its own server whether it has started.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "127.0.0.1", "localhost")))
