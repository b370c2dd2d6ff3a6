"""`spar demo`: a local page that segments images with any words, in several modes side by side."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
