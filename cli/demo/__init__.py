"""The demo: a tiny chat model, and the questions it is fine-tuned and scored on."""
