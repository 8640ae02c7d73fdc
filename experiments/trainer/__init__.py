"""The training loop and its parts: data on the device, crafting, steps, watching, saving."""
