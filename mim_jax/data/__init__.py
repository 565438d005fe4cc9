"""Images from disk to the device: sources -> decode -> pipeline on the host, augment on the device."""
