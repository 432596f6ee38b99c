"""Sessions: conversations with the engines that are recorded, so that they can be trained on."""
